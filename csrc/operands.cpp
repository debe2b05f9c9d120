// The operands of both passes; see operands.h.
#include "operands.h"

#include "tensor.h"

namespace pyrnnfast {
namespace {

constexpr const char* kForward[kForwardOperands] = {"cell", "x",   "h0",  "c0",   "weights",
                                                    "y",    "h_n", "c_n", "kept", "batch_sizes"};
constexpr const char* kBackward[kBackwardOperands] = {"cell", "x",      "h0",       "c0",       "weights",    "y",
                                                      "kept", "grad_y", "grad_h_n", "grad_c_n", "grad_cells", "dx",
                                                      "dh0",  "dc0",    "dweights", "dgates",   "batch_sizes"};

// What both passes begin with, behind the cell's name.
void read_common(const Arguments& arguments, LayerOperands& o) {
  o.x = read_tensor(arguments[1], "x");
  o.h0 = read_tensor(arguments[2], "h0");
  o.c0 = read_tensor(arguments[3], "c0");
  o.weights = read_tensors(arguments[4], "weights");
  o.y = read_tensor(arguments[5], "y");
}

// Batch sizes, or (lengths, reset).
void read_steps(pybind11::handle given, LayerOperands& o) {
  if (!PyTuple_Check(given.ptr())) {
    o.batch_sizes = read_tensor(given, "batch_sizes");
    return;
  }
  const std::vector<Operand> mask = read_tensors(given, "batch_sizes");
  if (mask.size() != 2) throw pybind11::value_error("batch_sizes: (lengths, reset) is expected of a tuple");
  o.lengths = mask[0];
  o.reset = mask[1];
}

}  // namespace

std::vector<const char*> forward_names(std::initializer_list<const char*> others) {
  return names_with(kForward, others);
}

std::vector<const char*> backward_names(std::initializer_list<const char*> others) {
  return names_with(kBackward, others);
}

ForwardOperands read_forward(const Arguments& arguments) {
  const auto tensor = [&](size_t i) { return read_tensor(arguments[i], kForward[i]); };
  ForwardOperands o;
  read_common(arguments, o);
  o.h_n = tensor(6);
  o.c_n = tensor(7);
  o.kept = read_tensors(arguments[8], kForward[8]);
  read_steps(arguments[9], o);
  return o;
}

BackwardOperands read_backward(const Arguments& arguments) {
  const auto tensor = [&](size_t i) { return read_tensor(arguments[i], kBackward[i]); };
  BackwardOperands o;
  read_common(arguments, o);
  o.kept = read_tensors(arguments[6], kBackward[6]);
  o.grad_y = tensor(7);
  o.grad_h_n = tensor(8);
  o.grad_c_n = tensor(9);
  o.grad_cells = tensor(10);
  o.dx = tensor(11);
  o.dh0 = tensor(12);
  o.dc0 = tensor(13);
  o.dweights = read_tensors(arguments[14], kBackward[14]);
  o.dgates = tensor(15);
  read_steps(arguments[16], o);
  return o;
}

}  // namespace pyrnnfast
