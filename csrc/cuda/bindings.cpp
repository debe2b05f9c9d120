// The module pyrnnfast._cuda, and _emulation, the same on the host: takes tensors as objects, passes them through the
// one door (check.cpp), plans, lets go of the GIL and runs. The signatures stand in pyrnnfast/_cuda.pyi.
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "../arguments.h"
#include "../operands.h"
#include "../plain.h"
#include "../tensor.h"
#include "backend.h"

namespace py = pybind11;
using namespace pyrnnfast;

namespace {

const std::vector<const char*> kNone;

std::atomic<int64_t>& chunk_bytes() {
  static std::atomic<int64_t> bytes{kChunkBytes};
  return bytes;
}

// Of a device, that a plan may count on; for tests.
std::atomic<int>& multiprocessors() {
  static std::atomic<int> count{std::numeric_limits<int>::max()};
  return count;
}

template <class P>
constexpr bool is_backward = false;
template <>
constexpr bool is_backward<Backward> = true;

template <class P>
Shape shape_of(const Checked<P>& call, bool tf32) {
  const P& p = call.directions[0];
  Shape shape;
  shape.cell = p.cell;
  shape.dtype = p.dtype;
  shape.backward = is_backward<P>;
  shape.tf32 = tf32;
  shape.steps = p.steps;
  shape.batch = p.batch;
  shape.inputs = p.inputs;
  shape.hidden = p.hidden;
  shape.directions = static_cast<int64_t>(call.directions.size());
  return shape;
}

Plan plan_for(const std::string& form, int device, const Shape& shape) {
  if (form == "step") return step_plan(shape, chunk_bytes(), "asked for");
  if (form != "persistent") throw py::value_error("form must be 'step' or 'persistent', got '" + form + "'");
  DeviceProperties properties = devices().at(static_cast<size_t>(device));
  properties.multiprocessors = std::min<int>(properties.multiprocessors, multiprocessors());
  Plan plan = make_plan(properties, shape, chunk_bytes());
  if (!plan.persistent) throw py::value_error("there is no persistent form of this: " + plan.reason);
  return plan;
}

template <class P>
void plan_and_run(const Checked<P>& call, py::handle x, int device, const std::string& form, bool tf32) {
  const P& problem = call.directions[0];
  if (std::max(problem.steps, problem.batch) > std::numeric_limits<int>::max()) {
    throw py::value_error("the kernels count steps and sequences in 32 bits");
  }
  Context context;
  context.device = device;
  context.tf32 = tf32;
  const Plan plan = plan_for(form, device, shape_of(call, tf32));
  // torch allocates, so that its allocator and CUDA graphs know of it.
  const int64_t element = call.directions[0].dtype == Dtype::float64   ? 8
                          : call.directions[0].dtype == Dtype::float32 ? 4
                                                                       : 2;
  const int64_t count = scratch_bytes(call, plan, tf32) / element + 1;
  const py::object scratch = x.attr("new_empty")(count);
  context.scratch = read_tensor(scratch, "scratch").data;
  if (kBackendRules.memory == Memory::cuda) {
    context.stream = current_stream(x, device);
    // To import what is there already takes a while, too.
    static py::gil_safe_call_once_and_store<py::object> torch_cuda;
    torch_cuda.call_once_and_store_result([] { return py::object(py::module_::import("torch.cuda")); });
    const py::object& cuda = torch_cuda.get_stored();
    // Whose handle it is.
    if (cuda.attr("current_device")().cast<int>() != device) {
      throw py::value_error("the device of the tensors must be the current one");
    }
    const py::object handle = cuda.attr("current_blas_handle")();
    context.blas = reinterpret_cast<void*>(handle.cast<uintptr_t>());
  }
  const py::gil_scoped_release release;
  run(call, plan, context);
}

void forward(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = forward_names({"form", "tf32"});
  const Arguments arguments("forward", names, args, kwargs);
  const ForwardOperands o = read_forward(arguments);
  plan_and_run(check_forward(arguments.text(0), o, kBackendRules), arguments[1], o.x.device,
               arguments.text(kForwardOperands), arguments.truth(kForwardOperands + 1));
}

void backward(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = backward_names({"form", "tf32"});
  const Arguments arguments("backward", names, args, kwargs);
  const BackwardOperands o = read_backward(arguments);
  plan_and_run(check_backward(arguments.text(0), o, kBackendRules), arguments[1], o.x.device,
               arguments.text(kBackwardOperands), arguments.truth(kBackwardOperands + 1));
}

// A plain call's layers, each in its form.
class OnDevice final : public Backend {
 public:
  // The last two of the arguments, from `first` on, are its own: forms, in the order in which the layers run, and tf32.
  OnDevice(const Arguments& arguments, size_t first) : x_(arguments[kPlainX]), tf32_(arguments.truth(first + 1)) {
    for (const py::handle form : arguments.tuple(first)) {
      if (!PyUnicode_Check(form.ptr())) throw py::type_error("forms must be a tuple of str");
      forms_.push_back(form.cast<std::string>());
    }
  }
  const Rules& rules() const override { return kBackendRules; }
  void run(const std::vector<Checked<Forward>>& layers) const override { run_each(layers); }
  void run(const std::vector<Checked<Backward>>& layers) const override { run_each(layers); }

 private:
  template <class P>
  void run_each(const std::vector<Checked<P>>& layers) const {
    if (forms_.size() < layers.size()) throw py::value_error("forms must be as many as there are layers");
    const int device = read_tensor(x_, "x").device;
    for (size_t i = 0; i < layers.size(); ++i) plan_and_run(layers[i], x_, device, forms_[i], tf32_);
  }

  py::handle x_;
  std::vector<std::string> forms_;
  bool tf32_;
};

py::object forward_of_plain(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = plain_forward_names({"forms", "tf32"});
  const Arguments arguments("forward_plain", names, args, kwargs);
  return forward_plain(arguments, OnDevice(arguments, kPlainForwardOperands));
}

py::tuple backward_of_plain(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = plain_backward_names({"forms", "tf32"});
  const Arguments arguments("backward_plain", names, args, kwargs);
  return backward_plain(arguments, OnDevice(arguments, kPlainBackwardOperands));
}

py::dict as_dict(const DeviceProperties& d) {
  py::dict found;
  found["name"] = d.name;
  found["major"] = d.major;
  found["minor"] = d.minor;
  found["multiprocessors"] = d.multiprocessors;
  found["shared_bytes"] = d.shared_bytes;
  found["cooperative"] = d.cooperative;
  return found;
}

py::tuple devices_as_dicts(const py::args& args, const py::kwargs& kwargs) {
  Arguments("devices", kNone, args, kwargs);
  const std::vector<DeviceProperties> found = devices();
  py::tuple result(found.size());
  for (size_t i = 0; i < found.size(); ++i) result[i] = as_dict(found[i]);
  return result;
}

Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "bfloat16") return Dtype::bfloat16;
  if (name == "float16") return Dtype::float16;
  throw py::value_error("dtype must be 'float32', 'float64', 'bfloat16' or 'float16', got '" + name + "'");
}

py::dict plan_as_dict(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"device", "backward", "cell",   "dtype",      "steps",
                                                 "batch",  "inputs",   "hidden", "directions", "tf32"};
  const Arguments arguments("plan", names, args, kwargs);
  if (!PyDict_Check(arguments[0].ptr())) throw py::type_error("device must be a dict, as from devices()");
  const auto given = arguments[0].cast<py::dict>();
  DeviceProperties device;
  device.major = given["major"].cast<int>();
  device.minor = given["minor"].cast<int>();
  device.multiprocessors = given["multiprocessors"].cast<int>();
  device.shared_bytes = given["shared_bytes"].cast<int64_t>();
  device.cooperative = given["cooperative"].cast<bool>();
  Shape shape;
  shape.backward = arguments.truth(1);
  shape.cell = check_cell(arguments.text(2));
  shape.dtype = dtype_named(arguments.text(3));
  int64_t* const sizes[] = {&shape.steps, &shape.batch, &shape.inputs, &shape.hidden, &shape.directions};
  for (size_t i = 0; i < 5; ++i) {
    *sizes[i] = arguments.integer(4 + i);
    // Products of sizes stay within 64 bits.
    if (*sizes[i] < 1 || *sizes[i] >= int64_t{1} << 26) {
      throw py::value_error(std::string(names[4 + i]) + " must be positive and below 2^26");
    }
  }
  if (shape.directions > 2) throw py::value_error("directions must be 1 or 2");
  shape.tf32 = arguments.truth(9);
  const Plan plan = make_plan(device, shape, chunk_bytes());
  py::dict found;
  found["form"] = plan.persistent ? "persistent" : "step";
  found["reason"] = plan.reason;
  found["chunk_steps"] = plan.chunk_steps;
  if (plan.persistent) {
    found["row_tiles"] = plan.row_tiles;
    found["row_groups"] = plan.row_groups;
    found["unit_blocks"] = plan.unit_blocks;
    found["depth"] = plan.depth;
    found["together"] = plan.together;
    found["blocks"] = plan.blocks;
    found["shared_bytes"] = plan.shared_bytes;
    found["spare"] = plan.spare;
    found["exchange_words"] = plan.exchange_words;
  }
  return found;
}

void set_threshold_of(const py::args& args, const py::kwargs& kwargs) {
  static const std::vector<const char*> names = {"name", "value"};
  const Arguments arguments("set_threshold", names, args, kwargs);
  const std::string name = arguments.text(0);
  const int64_t value = arguments.integer(1);
  if (value < 0) throw py::value_error("a threshold must not be negative");
  if (name == "chunk_bytes") {
    chunk_bytes() = value;
  } else if (name == "multiprocessors") {
    multiprocessors() = static_cast<int>(std::min<int64_t>(value, std::numeric_limits<int>::max()));
  } else if (name == "delays") {
    set_delays(static_cast<unsigned>(value));
  } else if (name == "poison") {
    set_poison(value != 0);
  } else {
    throw py::value_error("there is no threshold '" + name + "'");
  }
}

}  // namespace

PYBIND11_MODULE(PYRNNFAST_MODULE, m) {
  m.doc() = "Recurrent layers on CUDA devices; csrc/check.h tells what each operand is.";
  m.def("forward", &forward);
  m.def("backward", &backward);
  m.def("forward_plain", &forward_of_plain, "A plain stack of layers; None for whatever is not so plain.");
  m.def("backward_plain", &backward_of_plain, "Back through the same.");
  m.def("devices", &devices_as_dicts, "What each device is; RuntimeError with the driver's words where there is none.");
  m.def("plan", &plan_as_dict, "How a recurrence would be run on a device; csrc/cuda/plan.h.");
  m.def("architectures", [] { return kArchitectures; }, "What this was compiled for.");
  m.def("toolkit", [] { return kToolkit; }, "The version of CUDA that this was compiled with.");
  m.def("set_threshold", &set_threshold_of, "For tests; csrc/cuda/plan.h.");
  m.attr("CHUNK_BYTES") = kChunkBytes;
}
