// The shortest roads; see plain.h.
#include "plain.h"

#include <stdexcept>
#include <utility>

#include "run.h"
#include "tensor.h"

namespace py = pybind11;

namespace pyrnnfast {
namespace {

// like.new_empty(sizes): torch's own allocation, as for any other of its results.
py::object new_empty_of(py::handle like, const int64_t* sizes, int dimensions) {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  py::object arguments[3];
  PyObject* stack[4] = {like.ptr()};
  for (int i = 0; i < dimensions; ++i) {
    arguments[i] = py::int_(sizes[i]);
    stack[i + 1] = arguments[i].ptr();
  }
  PyObject* result = PyObject_VectorcallMethod(name, stack, static_cast<size_t>(1 + dimensions), nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

template <class... Sizes>
py::object new_empty(py::handle like, Sizes... sizes) {
  const int64_t all[] = {sizes...};
  return new_empty_of(like, all, static_cast<int>(sizeof...(sizes)));
}

bool requires_grad(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

// The columns [first, first + count) of a block of rows.
Operand columns(const Operand& block, int64_t first, int64_t count) {
  Operand part = block;
  const int64_t bytes = block.type == ElementType::float64 ? 8 : block.type == ElementType::float32 ? 4 : 2;
  part.data = static_cast<char*>(block.data) + first * bytes;
  part.shape[1] = count;
  return part;
}

// Gates, and cell states where there are any, in one block of `rows` rows.
std::vector<Operand> read_kept(const Operand& block, const Widths& w, int64_t hidden) {
  if (w.saved == 0) return {{}, {}};
  const int64_t gates = w.saved * hidden;
  return {columns(block, 0, gates), w.cell ? columns(block, gates, hidden) : Operand{}};
}
// The columns of that block in units of H; 0: there is none.
int64_t kept_width(const Widths& w) { return w.saved == 0 ? 0 : w.saved + (w.cell ? 1 : 0); }

const Widths* widths_or_null(const std::string& cell) {
  try {
    return &widths_of(check_cell(cell));
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}

// [B, T, ·] as [T, B, ·], whose rows lie in the same order where T or B is 1; whether it does.
bool exchange_time_and_batch(Operand& o) {
  if (o.dimensions != 3 || (o.shape[0] != 1 && o.shape[1] != 1)) return false;
  std::swap(o.shape[0], o.shape[1]);
  std::swap(o.stride[0], o.stride[1]);
  return true;
}

// Reads an operand that may be missing; whether it is plain, or nothing.
bool read_optional(py::handle given, const py::tuple& types, Operand& operand) {
  return given.is_none() || read_plain_tensor(given, types, operand);
}

}  // namespace

py::object forward_plain(const py::tuple& types, const std::string& cell, int64_t inputs, int64_t hidden,
                         int64_t dimensions, py::handle is_batch_first, py::handle x, py::handle hx,
                         const py::tuple& weights, bool grad, int threads) {
  const bool batch_first = is_batch_first.ptr() == Py_True;
  // Whatever else is true by Python's rules is torch's to judge.
  if (!batch_first && is_batch_first.ptr() != Py_False) return py::none();
  ForwardOperands o;
  if (!read_plain_tensor(x, types, o.x) || o.x.memory != Memory::cpu) return py::none();
  if (o.x.dimensions != dimensions || (dimensions != 2 && dimensions != 3)) return py::none();
  if (batch_first && !exchange_time_and_batch(o.x)) return py::none();
  const bool step = dimensions == 2;
  const int64_t T = step ? 1 : o.x.shape[0], B = o.x.shape[step ? 0 : 1];
  if (o.x.shape[dimensions - 1] != inputs || T < 1 || B < 1 || hidden < 1) return py::none();
  if (weights.size() != 2 && weights.size() != 4) return py::none();
  bool keep = grad && requires_grad(x);
  o.weights.resize(4);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (!read_plain_tensor(weights[i], types, o.weights[i]) || o.weights[i].dimensions != (i < 2 ? 2 : 1)) {
      return py::none();
    }
    keep = keep || (grad && requires_grad(weights[i]));
  }
  const bool lstm = cell == "lstm";
  if (!hx.is_none()) {
    const bool pair = PyTuple_Check(hx.ptr()) && PyTuple_GET_SIZE(hx.ptr()) == 2;
    if (lstm != pair) return py::none();
    Operand* const states[] = {&o.h0, &o.c0};
    for (int i = 0; i < (lstm ? 2 : 1); ++i) {
      const py::handle state = lstm ? py::handle(PyTuple_GET_ITEM(hx.ptr(), i)) : hx;
      if (!read_plain_tensor(state, types, *states[i]) || states[i]->dimensions != o.x.dimensions) return py::none();
      keep = keep || (grad && requires_grad(state));
    }
  }
  const Widths* const w = widths_or_null(cell);
  // Narrow data keep cell states that are wider.
  if (w == nullptr || (keep && w->cell && o.x.type == ElementType::bfloat16)) return py::none();
  const py::object y = step          ? new_empty(x, B, hidden)
                       : batch_first ? new_empty(x, B, T, hidden)
                                     : new_empty(x, T, B, hidden);
  const py::object h_n = step ? y : new_empty(x, int64_t{1}, B, hidden);
  const py::object c_n = !lstm ? py::none() : step ? new_empty(x, B, hidden) : new_empty(x, int64_t{1}, B, hidden);
  py::object block = py::none();
  o.y = read_tensor(y, "y");
  if (batch_first) exchange_time_and_batch(o.y);
  o.h_n = read_tensor(h_n, "h_n");
  o.c_n = read_tensor(c_n, "c_n");
  if (keep) {
    if (w->saved > 0) block = new_empty(x, T * B, kept_width(*w) * hidden);
    o.kept = read_kept(read_tensor(block, "kept"), *w, hidden);
  }
  try {
    run_without_gil(check_forward(cell, o, kCpuRules), threads);
  } catch (const std::invalid_argument&) {
    return py::none();
  }
  if (keep) {
    py::list results;
    if (!step) results.append(y);
    results.append(h_n);
    if (lstm) results.append(c_n);
    py::list blocks;
    if (w->saved > 0) blocks.append(block);
    return py::make_tuple(py::tuple(results), py::tuple(blocks));
  }
  const py::object state = lstm ? py::object(py::make_tuple(h_n, c_n)) : h_n;
  return py::make_tuple(step ? state : py::object(py::make_tuple(y, state)), py::none());
}

py::object backward_plain(const py::tuple& types, const std::string& cell, const PlainBackward& given, int threads) {
  const Widths* const w = widths_or_null(cell);
  if (w == nullptr || given.needs.size() != 7 || given.weights.size() != 4 ||
      given.kept.size() != (w->saved > 0 ? 1 : 0)) {
    return py::none();
  }
  py::tuple gradients(7);
  for (size_t i = 0; i < 7; ++i) gradients[i] = py::none();
  if (given.grad_y.is_none() && given.grad_h_n.is_none() && given.grad_c_n.is_none()) return gradients;
  BackwardOperands o;
  o.weights.resize(4);
  if (!read_plain_tensor(given.x, types, o.x) || o.x.dimensions > 3 || !read_optional(given.h0, types, o.h0) ||
      !read_optional(given.c0, types, o.c0) || !read_optional(given.y, types, o.y) ||
      !read_optional(given.grad_y, types, o.grad_y) || !read_optional(given.grad_h_n, types, o.grad_h_n) ||
      !read_optional(given.grad_c_n, types, o.grad_c_n)) {
    return py::none();
  }
  if (given.batch_first) {
    for (Operand* operand : {&o.x, &o.y, &o.grad_y}) {
      if (operand->present && !exchange_time_and_batch(*operand)) return py::none();
    }
  }
  for (size_t i = 0; i < 4; ++i) {
    if (!read_optional(given.weights[i], types, o.weights[i])) return py::none();
  }
  if (o.weights[1].dimensions != 2) return py::none();
  const int64_t hidden = o.weights[1].shape[1];
  Operand block;
  if (w->saved > 0) {
    if (!read_plain_tensor(given.kept[0], types, block) || block.dimensions != 2) return py::none();
    if (block.shape[1] != kept_width(*w) * hidden) return py::none();
    // For its size.
    if (!o.y.present) o.y = columns(block, 0, hidden);
  }
  o.kept = read_kept(block, *w, hidden);
  const py::handle tensors[] = {given.x,          given.h0,         given.c0,        given.weights[0],
                                given.weights[1], given.weights[2], given.weights[3]};
  const Operand* const operands[] = {&o.x, &o.h0, &o.c0, &o.weights[0], &o.weights[1], &o.weights[2], &o.weights[3]};
  o.dweights.resize(4);
  Operand* const wanted[] = {&o.dx, &o.dh0, &o.dc0, &o.dweights[0], &o.dweights[1], &o.dweights[2], &o.dweights[3]};
  for (size_t i = 0; i < 7; ++i) {
    if (py::handle(given.needs[i]).ptr() != Py_True || !operands[i]->present) continue;
    if (operands[i]->dimensions > 3) return py::none();
    const bool exchanged = given.batch_first && i == 0;
    Operand like = *operands[i];
    if (exchanged) exchange_time_and_batch(like);
    const py::object gradient = new_empty_of(tensors[i], like.shape, like.dimensions);
    *wanted[i] = read_tensor(gradient, "gradient");
    if (exchanged) exchange_time_and_batch(*wanted[i]);
    gradients[i] = gradient;
  }
  try {
    run_without_gil(check_backward(cell, o, kCpuRules), threads);
  } catch (const std::invalid_argument&) {
    return py::none();
  }
  return gradients;
}

}  // namespace pyrnnfast
