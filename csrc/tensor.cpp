// Reads a torch tensor; see tensor.h.
#include "tensor.h"

#include <string>

namespace py = pybind11;

namespace pyrnnfast {
namespace {

namespace dlpack {
struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType type;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeTable {
  Version version;
  ExchangeTable* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*borrow)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device, void** out);
};
constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4, kBool = 6;
}  // namespace dlpack

ElementType element_type(const dlpack::DataType& type) {
  if (type.lanes != 1) return ElementType::other;
  if (type.code == dlpack::kFloat && type.bits == 32) return ElementType::float32;
  if (type.code == dlpack::kFloat && type.bits == 64) return ElementType::float64;
  if (type.code == dlpack::kBfloat && type.bits == 16) return ElementType::bfloat16;
  if (type.code == dlpack::kFloat && type.bits == 16) return ElementType::float16;
  if (type.code == dlpack::kInt && type.bits == 64) return ElementType::int64;
  if (type.code == dlpack::kBool && type.bits == 8) return ElementType::boolean;
  return ElementType::other;
}

// The exchange table of an object's type. The two types of ordinary tensors are remembered, as looking one up takes
// longer than a small kernel; both live as long as torch does.
const dlpack::ExchangeTable& exchange_table(py::handle object, const char* name) {
  static PyTypeObject* known[2] = {};
  static const dlpack::ExchangeTable* tables[2] = {};
  PyTypeObject* type = Py_TYPE(object.ptr());
  for (int i = 0; i < 2; ++i) {
    if (known[i] == type) return *tables[i];
  }
  const py::object capsule = py::getattr(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_CheckExact(capsule.ptr())) {
    throw py::type_error(std::string(name) + " must be a torch.Tensor, got " + type->tp_name);
  }
  const auto* table =
      static_cast<const dlpack::ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table == nullptr) throw py::error_already_set();
  if (table->version.major != dlpack::kMajor || table->borrow == nullptr) {
    throw py::type_error("this torch speaks DLPack " + std::to_string(table->version.major) +
                         ", which this build of pyrnnfast does not read");
  }
  const std::string full_name = type->tp_name;
  const int slot = full_name == "Tensor" ? 0 : full_name == "Parameter" ? 1 : -1;
  if (slot >= 0 && known[slot] == nullptr) {
    Py_INCREF(type);  // so that no other type can come to stand at its address
    tables[slot] = table;
    known[slot] = type;
  }
  return *table;
}

}  // namespace

Operand read_tensor(py::handle object, const char* name) {
  if (object.is_none()) return {};
  const dlpack::ExchangeTable& table = exchange_table(object, name);
  dlpack::Tensor tensor{};
  if (table.borrow(object.ptr(), &tensor) != 0) {
    PyErr_Clear();  // torch tells of its dispatcher and adds a C++ stack
    throw py::value_error(std::string(name) + " must be a dense tensor with memory of its own");
  }
  Operand operand;
  operand.present = true;
  operand.data = tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  operand.dimensions = tensor.dimensions;
  for (int i = 0; i < tensor.dimensions && i < 3; ++i) {
    operand.shape[i] = tensor.shape[i];
    operand.stride[i] = tensor.strides[i];
  }
  operand.type = element_type(tensor.type);
  operand.memory = tensor.device.type == dlpack::kCpu    ? Memory::cpu
                   : tensor.device.type == dlpack::kCuda ? Memory::cuda
                                                         : Memory::other;
  operand.device = tensor.device.id;
  return operand;
}

std::vector<Operand> read_tensors(py::handle tuple, const char* name) {
  if (!PyTuple_Check(tuple.ptr())) {
    throw py::type_error(std::string(name) + " must be a tuple, got " + Py_TYPE(tuple.ptr())->tp_name);
  }
  std::vector<Operand> operands;
  operands.reserve(static_cast<size_t>(PyTuple_GET_SIZE(tuple.ptr())));
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple.ptr()); ++i) {
    operands.push_back(read_tensor(PyTuple_GET_ITEM(tuple.ptr(), i), name));
  }
  return operands;
}

bool is_zero_tensor(py::handle object) {
  return py::hasattr(object, "_is_zerotensor") && object.attr("_is_zerotensor")().ptr() == Py_True;
}

namespace {

// The rest of what makes a tensor plain, once its operand has been read.
bool obeys(const Rules& rules, const Operand& o) {
  return o.memory == rules.memory && (o.type == ElementType::float32 || o.type == ElementType::float64 ||
                                      o.type == ElementType::bfloat16 || o.type == ElementType::float16);
}

// Of one of these types, with elements of its own.
bool read_elements(py::handle object, const py::tuple& types, Operand& operand) {
  bool known = false;
  for (const py::handle type : types) known |= reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr();
  if (!known) return false;
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), is_neg));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() != Py_False) return false;
  try {
    operand = read_tensor(object, "tensor");
  } catch (const py::value_error&) {  // it has no memory
    return false;
  }
  return operand.data != nullptr || !is_zero_tensor(object);
}

}  // namespace

bool read_plain_tensor(py::handle object, const py::tuple& types, const Rules& rules, Operand& operand) {
  return read_elements(object, types, operand) && obeys(rules, operand);
}

bool read_plain_tensor(py::handle object, const py::tuple& types, Operand& operand) {
  return read_elements(object, types, operand) &&
         obeys(operand.memory == Memory::cuda ? kCudaRules : kCpuRules, operand);
}

void* current_stream(py::handle tensor, int device) {
  const dlpack::ExchangeTable& table = exchange_table(tensor, "tensor");
  void* stream = nullptr;
  if (table.current_stream == nullptr || table.current_stream(dlpack::kCuda, device, &stream) != 0) {
    PyErr_Clear();
    throw py::value_error("torch does not tell its current stream");
  }
  return stream;
}

}  // namespace pyrnnfast
