// The shortest road; see infer.h.
#include "infer.h"

#include <stdexcept>

#include "run.h"
#include "tensor.h"

namespace py = pybind11;

namespace pyrnnfast {
namespace {

// x.new_empty(sizes): torch's own allocation, as for any other of its results.
template <class... Sizes>
py::object new_empty(py::handle x, Sizes... sizes) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  const py::object arguments[] = {py::int_(sizes)...};
  PyObject* stack[1 + sizeof...(sizes)] = {x.ptr()};
  for (size_t i = 0; i < sizeof...(sizes); ++i) stack[i + 1] = arguments[i].ptr();
  PyObject* result = PyObject_VectorcallMethod(name, stack, 1 + sizeof...(sizes), nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

}  // namespace

py::object infer_plain(const py::tuple& types, const std::string& cell, int64_t inputs, int64_t hidden, py::handle x,
                       py::handle hx, const py::tuple& weights, int threads) {
  ForwardOperands o;
  if (!read_plain_tensor(x, types, o.x) || o.x.memory != Memory::cpu) return py::none();
  const bool step = o.x.dimensions == 2;
  const int64_t T = o.x.shape[0], B = step ? T : o.x.shape[1];
  if ((!step && o.x.dimensions != 3) || o.x.shape[o.x.dimensions - 1] != inputs || T < 1 || B < 1 || hidden < 1) {
    return py::none();
  }
  if (weights.size() != 2 && weights.size() != 4) return py::none();
  o.weights.resize(4);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!read_plain_tensor(weights[i], types, o.weights[i]) || o.weights[i].dimensions != (i < 2 ? 2 : 1)) {
      return py::none();
    }
  }
  const bool lstm = cell == "lstm";
  if (!hx.is_none()) {
    const bool pair = PyTuple_Check(hx.ptr()) && PyTuple_GET_SIZE(hx.ptr()) == 2;
    if (lstm != pair) return py::none();
    Operand* const states[] = {&o.h0, &o.c0};
    for (int i = 0; i < (lstm ? 2 : 1); ++i) {
      const py::handle state = lstm ? py::handle(PyTuple_GET_ITEM(hx.ptr(), i)) : hx;
      if (!read_plain_tensor(state, types, *states[i]) || states[i]->dimensions != o.x.dimensions) return py::none();
    }
  }
  const py::object y = step ? new_empty(x, B, hidden) : new_empty(x, T, B, hidden);
  const py::object h_n = step ? y : new_empty(x, 1, B, hidden);
  const py::object c_n = !lstm ? py::none() : step ? new_empty(x, B, hidden) : new_empty(x, 1, B, hidden);
  o.y = read_tensor(y, "y");
  o.h_n = read_tensor(h_n, "h_n");
  o.c_n = read_tensor(c_n, "c_n");
  try {
    run_without_gil(check_forward(cell, o, kCpuRules), threads);
  } catch (const std::invalid_argument&) {
    return py::none();
  }
  if (step) return lstm ? py::object(py::make_tuple(h_n, c_n)) : h_n;
  return py::make_tuple(y, lstm ? py::object(py::make_tuple(h_n, c_n)) : h_n);
}

}  // namespace pyrnnfast
