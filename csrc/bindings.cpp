// The module pyrnnfast._cpu: takes tensors as objects, passes them through the one door (check.cpp), lets go of the GIL
// and runs. The signatures stand in pyrnnfast/_cpu.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "check.h"
#include "cpu/company.h"
#include "cpu/dispatch.h"
#include "cpu/schedule.h"
#include "cpu/threads.h"
#include "operands.h"
#include "plain.h"
#include "prepacked.h"
#include "run.h"
#include "tensor.h"

namespace py = pybind11;
using namespace pyrnnfast;

namespace {

void forward(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = forward_names({"threads"});
  const Arguments arguments("forward", names, args, kwargs);
  const ForwardOperands o = read_forward(arguments);
  const int threads = check_threads(arguments.integer(kForwardOperands));
  run_without_gil(check_forward(arguments.text(0), o, kCpuRules), threads);
}

void backward(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = backward_names({"threads"});
  const Arguments arguments("backward", names, args, kwargs);
  const BackwardOperands o = read_backward(arguments);
  const int threads = check_threads(arguments.integer(kBackwardOperands));
  run_without_gil(check_backward(arguments.text(0), o, kCpuRules), threads);
}

template <Product (*check)(const Operand&, const Operand&, const Operand&)>
void product(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"a", "b", "out", "threads"};
  const Arguments arguments(check == check_product ? "matmul" : "outer_products", names, args, kwargs);
  const Product p = check(read_tensor(arguments[0], names[0]), read_tensor(arguments[1], names[1]),
                          read_tensor(arguments[2], names[2]));
  const int threads = check_threads(arguments.integer(3));
  const py::gil_scoped_release release;
  run(p, threads);
}

class OnThreads final : public Backend {
 public:
  explicit OnThreads(int threads) : threads_(threads) {}
  // With panels of the weights, which are these tensors.
  OnThreads(int threads, Prepacked& prepacked, const py::tuple& weights)
      : threads_(threads), prepacked_(&prepacked), weights_(weights) {}
  const Rules& rules() const override { return kCpuRules; }
  void run(const std::vector<Checked<Forward>>& layers) const override {
    const auto panels = prepacked_ == nullptr ? nullptr : prepacked_->panels_of(layers, weights_);
    const py::gil_scoped_release release;
    size_t next = 0;
    for (const Checked<Forward>& layer : layers) {
      for (const Forward& direction : layer.directions) {
        pyrnnfast::run(direction, threads_, panels == nullptr ? nullptr : &(*panels)[next++]);
      }
    }
  }
  void run(const std::vector<Checked<Backward>>& layers) const override { run_without_gil(layers, threads_); }

 private:
  int threads_;
  Prepacked* prepacked_ = nullptr;
  py::tuple weights_;
};

py::object forward_of_plain(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = plain_forward_names({"prepacked", "threads"});
  const Arguments arguments("forward_plain", names, args, kwargs);
  const py::handle prepacked = arguments[kPlainForwardOperands];
  const int threads = check_threads(arguments.integer(kPlainForwardOperands + 1));
  if (prepacked.is_none()) return forward_plain(arguments, OnThreads(threads));
  if (!py::isinstance<Prepacked>(prepacked)) throw py::type_error("prepacked must be a Prepacked or None");
  return forward_plain(arguments, OnThreads(threads, prepacked.cast<Prepacked&>(), arguments.tuple(kPlainWeights)));
}

py::tuple backward_of_plain(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = plain_backward_names({"threads"});
  const Arguments arguments("backward_plain", names, args, kwargs);
  return backward_plain(arguments, OnThreads(check_threads(arguments.integer(kPlainBackwardOperands))));
}

void weight_gradients(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"cell", "x", "states", "dgates", "dweights", "threads"};
  const Arguments arguments("weight_gradients", names, args, kwargs);
  const auto tensor = [&](size_t i) { return read_tensor(arguments[i], names[i]); };
  run_without_gil(
      check_weight_gradients(arguments.text(0), tensor(1), tensor(2), tensor(3), read_tensors(arguments[4], names[4])),
      check_threads(arguments.integer(5)));
}

void check_batch_sizes_of(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"batch_sizes", "rows"};
  const Arguments arguments("check_batch_sizes", names, args, kwargs);
  check_batch_sizes(read_tensor(arguments[0], names[0]), arguments.integer(1));
}

// Whether every tensor is one of the given types, not lazily negated, on one device, of one dtype that the kernels know
// there and of its shape: what Python would take longer to find out than a small kernel to run.
bool agree(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"types", "tensors", "shapes"};
  const Arguments arguments("agree", names, args, kwargs);
  const py::tuple types = arguments.tuple(0), tensors = arguments.tuple(1), shapes = arguments.tuple(2);
  if (tensors.size() != shapes.size()) return false;
  Operand first;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const py::handle shape = shapes[i];
    Operand o;
    if (!PyTuple_Check(shape.ptr()) || !read_plain_tensor(tensors[i], types, o)) return false;
    if (i == 0) first = o;
    if (o.type != first.type || o.memory != first.memory || o.device != first.device) return false;
    if (o.dimensions != PyTuple_GET_SIZE(shape.ptr()) || o.dimensions > 3) return false;
    for (int d = 0; d < o.dimensions; ++d) {
      if (o.shape[d] != PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d))) {
        PyErr_Clear();
        return false;
      }
    }
  }
  return true;
}

const std::vector<const char*> kNone;

void doubt_weights(const py::args& args, const py::kwargs& kwargs) {
  Arguments("doubt_weights", kNone, args, kwargs);
  Prepacked::doubt();
}

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
    if (!o->present || o->memory != Memory::cpu || o->dimensions != 1 || o->stride[0] != 1 || o->type != from.type ||
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

double seconds_to_meet_of(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"threads", "times"};
  const Arguments arguments("seconds_to_meet", names, args, kwargs);
  const int threads = check_threads(arguments.integer(0));
  const int64_t times = arguments.integer(1);
  if (times < 1 || times > 1'000'000) throw py::value_error("times must be from 1 to 1000000");
  const py::gil_scoped_release release;
  return seconds_to_meet(threads, static_cast<int>(times));
}

int processors_of(const py::args& args, const py::kwargs& kwargs) {
  Arguments("processors", kNone, args, kwargs);
  return processors();
}

void set_quota_of(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"processors"};
  const int64_t number = Arguments("set_quota", names, args, kwargs).integer(0);
  if (number < 1) throw py::value_error("processors must be at least 1, got " + std::to_string(number));
  set_quota(number);
}

// For the tests of company.h: how many threads the next call had better have, of the most that one had, after each
// call that it may hear of. Of a call: nanoseconds at its end, threads, operations, nanoseconds that it took, and those
// that its threads were without a core.
std::vector<int> limits_beside_company(const std::vector<std::array<int64_t, 5>>& calls) {
  Company company;
  std::vector<int> limits;
  int wanted = 1;
  for (const auto& [now, threads, operations, taken, without] : calls) {
    for (const int64_t number : {now, threads, operations, taken, without}) {
      if (number < 0 || number > int64_t{1} << 40) throw py::value_error("numbers must be from 0 to 2**40");
    }
    const Company::Time at{Company::Duration(now)}, begin = at - Company::Duration(taken);
    const int team = check_threads(threads);
    if (company.listens(begin)) {
      company.heard(at, {team, static_cast<double>(operations), Company::Duration(taken), Company::Duration(without)});
    }
    wanted = std::max(wanted, team);
    limits.push_back(company.limit(at, wanted));
  }
  return limits;
}

void set_threshold_of(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"name", "value"};
  const Arguments arguments("set_threshold", names, args, kwargs);
  set_threshold(arguments.text(0), arguments.integer(1));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Recurrent layers on the CPU; csrc/check.h tells what each operand is.";
  instruction_set_in_use();  // a bad PYRNNFAST_ISA fails here, at import
  py::class_<Prepacked>(m, "Prepacked", "What a module keeps of its weights from call to call; see csrc/prepacked.h.")
      .def(py::init<>())
      .def_property_readonly("bytes", &Prepacked::bytes, "Of memory.")
      // A copy, or what a file has, begins with nothing.
      .def("__reduce__", [](const Prepacked&) {
        return py::make_tuple(py::module_::import("pyrnnfast.prepack").attr("keeping"), py::tuple());
      });
  m.def("doubt_weights", &doubt_weights, "Some may have changed, without torch's counting it.");
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("forward_plain", &forward_of_plain, "A plain stack of layers, or step; None for whatever is not so plain.");
  m.def("backward_plain", &backward_of_plain, "Back through the same.");
  m.def("weight_gradients", &weight_gradients, "Those of rows whose dgates are there already.");
  m.def("check_batch_sizes", &check_batch_sizes_of,
        "Raises ValueError unless batch_sizes are those of packed data of so many rows.");
  m.def("agree", &agree, "Whether tensors are plain ones of these types and shapes, and of one dtype of the kernels'.");
  m.def("instruction_sets", &names_of_instruction_sets, "Those that this machine can run, the best first.");
  m.def("instruction_set", &name_of_instruction_set, "The one in use.");
  m.def("select_instruction_set", &use_instruction_set);
  m.def("activation", &activation);
  m.def("limits_beside_company", &limits_beside_company, "For tests; see csrc/cpu/company.h.");
  m.def("set_threshold", &set_threshold_of, "For tests; see csrc/cpu/schedule.h.");
  m.def("processors", &processors_of, "How many a call may use at most.");
  m.def("set_quota", &set_quota_of, "No more processors than this.");
  m.def("seconds_to_meet", &seconds_to_meet_of, "What a barrier of the threads takes: for benchmarks.");
  m.def("matmul", &product<check_product>, "out = a b, by the register tile: for benchmarks and tests.");
  m.def("outer_products", &product<check_outer_products>, "out[s] = Σ_k a[s, k] ⊗ b[s, k].");
}
