// The module pyrnnfast._cpu: takes tensors as objects, passes them through the one door (check.cpp), lets go of the GIL
// and runs. The signatures stand in pyrnnfast/_cpu.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "arguments.h"
#include "check.h"
#include "cpu/dispatch.h"
#include "cpu/schedule.h"
#include "tensor.h"

namespace py = pybind11;
using namespace pyrnnfast;

namespace {

template <class Operands>
struct TensorArgument {
  const char* name;
  Operand Operands::* operand;
};

constexpr TensorArgument<ForwardOperands> kForwardTensors[] = {
    {"xgates", &ForwardOperands::xgates},
    {"x", &ForwardOperands::x},
    {"weight_ih", &ForwardOperands::weight_ih},
    {"bias", &ForwardOperands::bias},
    {"weight_hh", &ForwardOperands::weight_hh},
    {"bias_hn", &ForwardOperands::bias_hn},
    {"hgates", &ForwardOperands::hgates},
    {"h0", &ForwardOperands::h0},
    {"c0", &ForwardOperands::c0},
    {"y", &ForwardOperands::y},
    {"h_n", &ForwardOperands::h_n},
    {"c_n", &ForwardOperands::c_n},
    {"saved", &ForwardOperands::saved},
    {"cells", &ForwardOperands::cells},
    {"batch_sizes", &ForwardOperands::batch_sizes},
};

constexpr TensorArgument<BackwardOperands> kBackwardTensors[] = {
    {"y", &BackwardOperands::y},
    {"saved", &BackwardOperands::saved},
    {"cells", &BackwardOperands::cells},
    {"weight_hh", &BackwardOperands::weight_hh},
    {"h0", &BackwardOperands::h0},
    {"c0", &BackwardOperands::c0},
    {"grad_y", &BackwardOperands::grad_y},
    {"grad_h_n", &BackwardOperands::grad_h_n},
    {"grad_c_n", &BackwardOperands::grad_c_n},
    {"dgates", &BackwardOperands::dgates},
    {"carry", &BackwardOperands::carry},
    {"batch_sizes", &BackwardOperands::batch_sizes},
};

// `before`, the tensors of the table, then reverse and threads.
template <class Operands, size_t N>
std::vector<const char*> argument_names(std::vector<const char*> before, const TensorArgument<Operands> (&tensors)[N]) {
  for (const auto& tensor : tensors) before.push_back(tensor.name);
  before.push_back("reverse");
  before.push_back("threads");
  return before;
}

template <class Operands, size_t N>
Operands read_tensors(const Arguments& arguments, size_t first, const TensorArgument<Operands> (&tensors)[N]) {
  Operands operands;
  for (size_t i = 0; i < N; ++i) operands.*tensors[i].operand = read_tensor(arguments[first + i], tensors[i].name);
  return operands;
}

template <class P>
void run_without_gil(const Checked<P>& call, int threads) {
  const py::gil_scoped_release release;
  run(call.problem, threads);
}

void forward(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = argument_names({"cell"}, kForwardTensors);
  const Arguments arguments("forward", names, args, kwargs);
  const size_t last = names.size() - 1;
  const auto operands = read_tensors(arguments, 1, kForwardTensors);
  const int threads = check_threads(arguments.integer(last));
  run_without_gil(check_forward(arguments.text(0), operands, arguments.flag(last - 1)), threads);
}

void backward(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = argument_names({"cell", "batch"}, kBackwardTensors);
  const Arguments arguments("backward", names, args, kwargs);
  const size_t last = names.size() - 1;
  auto operands = read_tensors(arguments, 2, kBackwardTensors);
  operands.batch = arguments.integer(1);
  const int threads = check_threads(arguments.integer(last));
  run_without_gil(check_backward(arguments.text(0), operands, arguments.flag(last - 1)), threads);
}

void check_batch_sizes_of(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"batch_sizes", "rows"};
  const Arguments arguments("check_batch_sizes", names, args, kwargs);
  check_batch_sizes(read_tensor(arguments[0], names[0]), arguments.integer(1));
}

const std::vector<const char*> kNone;

std::vector<std::string> names_of_instruction_sets(const py::args& args, const py::kwargs& kwargs) {
  Arguments("instruction_sets", kNone, args, kwargs);
  std::vector<std::string> names;
  for (const InstructionSet* isa : instruction_sets()) names.emplace_back(isa->name);
  return names;
}

std::string name_of_instruction_set(const py::args& args, const py::kwargs& kwargs) {
  Arguments("instruction_set", kNone, args, kwargs);
  return instruction_set_in_use().name;
}

// For the tests of activations.h: out = sigmoid(x) or tanh(x), both 1-D, contiguous, of one dtype and size.
void activation(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"name", "x", "out"};
  const Arguments arguments("activation", names, args, kwargs);
  const std::string name = arguments.text(0);
  const Operand from = read_tensor(arguments[1], names[1]), to = read_tensor(arguments[2], names[2]);
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

void use_instruction_set(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"name"};
  select_instruction_set(Arguments("select_instruction_set", names, args, kwargs).text(0));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "The recurrence on the CPU; csrc/problem.h tells what each operand is.";
  instruction_set_in_use();  // a bad PYRNNFAST_ISA fails here, at import
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("check_batch_sizes", &check_batch_sizes_of,
        "Raises ValueError unless batch_sizes are those of packed data of so many rows.");
  m.def("instruction_sets", &names_of_instruction_sets, "Those that this machine can run, the best first.");
  m.def("instruction_set", &name_of_instruction_set, "The one in use.");
  m.def("select_instruction_set", &use_instruction_set);
  m.def("activation", &activation);
}
