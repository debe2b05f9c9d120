// The module pyrnnfast._cpu: takes tensors as objects, passes them through the one door (check.cpp), lets go of the GIL
// and runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/schedule.h"
#include "tensor.h"

namespace py = pybind11;
using namespace pyrnnfast;

namespace {

void forward(const std::string& cell, py::object xgates, py::object weight_hh, py::object bias_hn, py::object hgates,
             py::object h0, py::object c0, py::object y, py::object h_n, py::object c_n, py::object saved,
             py::object cells, py::object batch_sizes, bool reverse, int64_t threads) {
  ForwardOperands o;
  o.xgates = read_tensor(xgates, "xgates");
  o.weight_hh = read_tensor(weight_hh, "weight_hh");
  o.bias_hn = read_tensor(bias_hn, "bias_hn");
  o.hgates = read_tensor(hgates, "hgates");
  o.h0 = read_tensor(h0, "h0");
  o.c0 = read_tensor(c0, "c0");
  o.y = read_tensor(y, "y");
  o.h_n = read_tensor(h_n, "h_n");
  o.c_n = read_tensor(c_n, "c_n");
  o.saved = read_tensor(saved, "saved");
  o.cells = read_tensor(cells, "cells");
  o.batch_sizes = read_tensor(batch_sizes, "batch_sizes");
  const int team = check_threads(threads);
  const Checked<Forward> call = check_forward(cell, o, reverse);
  const py::gil_scoped_release release;
  run(call.problem, team);
}

void backward(const std::string& cell, int64_t batch, py::object y, py::object saved, py::object cells,
              py::object weight_hh, py::object h0, py::object c0, py::object grad_y, py::object grad_h_n,
              py::object grad_c_n, py::object dgates, py::object carry, py::object batch_sizes, bool reverse,
              int64_t threads) {
  BackwardOperands o;
  o.batch = batch;
  o.y = read_tensor(y, "y");
  o.saved = read_tensor(saved, "saved");
  o.cells = read_tensor(cells, "cells");
  o.weight_hh = read_tensor(weight_hh, "weight_hh");
  o.h0 = read_tensor(h0, "h0");
  o.c0 = read_tensor(c0, "c0");
  o.grad_y = read_tensor(grad_y, "grad_y");
  o.grad_h_n = read_tensor(grad_h_n, "grad_h_n");
  o.grad_c_n = read_tensor(grad_c_n, "grad_c_n");
  o.dgates = read_tensor(dgates, "dgates");
  o.carry = read_tensor(carry, "carry");
  o.batch_sizes = read_tensor(batch_sizes, "batch_sizes");
  const int team = check_threads(threads);
  const Checked<Backward> call = check_backward(cell, o, reverse);
  const py::gil_scoped_release release;
  run(call.problem, team);
}

std::vector<std::string> names_of_instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* isa : instruction_sets()) names.emplace_back(isa->name);
  return names;
}

// For the tests of activations.h: out = sigmoid(x) or tanh(x), both 1-D, contiguous, of one dtype and size.
void activation(const std::string& name, py::object x, py::object out) {
  const Operand from = read_tensor(x, "x"), to = read_tensor(out, "out");
  if (name != "sigmoid" && name != "tanh") throw py::value_error("activation must be 'sigmoid' or 'tanh'");
  for (const Operand* o : {&from, &to}) {
    if (!o->present || !o->on_cpu || o->dimensions != 1 || o->stride[0] != 1 || o->type != from.type ||
        o->shape[0] != from.shape[0] || o->data == nullptr ||
        (o->type != ElementType::float32 && o->type != ElementType::float64)) {
      throw py::value_error("x and out must be contiguous 1-D float32 or float64 CPU tensors of one size");
    }
  }
  const auto kind = static_cast<int>(name == "sigmoid" ? Activation::sigmoid : Activation::tanh);
  const auto dtype = static_cast<int>(from.type == ElementType::float64 ? Dtype::float64 : Dtype::float32);
  const py::gil_scoped_release release;
  instruction_set_in_use().activation[kind][dtype](from.data, to.data, from.shape[0]);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The recurrence on the CPU; csrc/problem.h tells what each operand is.";
  instruction_set_in_use();  // a bad PYRNNFAST_ISA fails here, at import
  m.def("forward", &forward, py::arg("cell"), py::arg("xgates"), py::arg("weight_hh"), py::arg("bias_hn"),
        py::arg("hgates"), py::arg("h0"), py::arg("c0"), py::arg("y"), py::arg("h_n"), py::arg("c_n"), py::arg("saved"),
        py::arg("cells"), py::arg("batch_sizes"), py::arg("reverse"), py::arg("threads"));
  m.def("backward", &backward, py::arg("cell"), py::arg("batch"), py::arg("y"), py::arg("saved"), py::arg("cells"),
        py::arg("weight_hh"), py::arg("h0"), py::arg("c0"), py::arg("grad_y"), py::arg("grad_h_n"), py::arg("grad_c_n"),
        py::arg("dgates"), py::arg("carry"), py::arg("batch_sizes"), py::arg("reverse"), py::arg("threads"));
  m.def(
      "check_batch_sizes",
      [](py::object batch_sizes, int64_t rows) { check_batch_sizes(read_tensor(batch_sizes, "batch_sizes"), rows); },
      py::arg("batch_sizes"), py::arg("rows"), "Raises ValueError unless batch_sizes are those of packed data.");
  m.def("instruction_sets", &names_of_instruction_sets, "Those that this machine can run, the best first.");
  m.def("instruction_set", [] { return std::string(instruction_set_in_use().name); }, "The one in use.");
  m.def("select_instruction_set", &select_instruction_set, py::arg("name"));
  m.def("activation", &activation, py::arg("name"), py::arg("x"), py::arg("out"));
}
