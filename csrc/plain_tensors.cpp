// The tensors of plain calls; see plain_tensors.h.
#include "plain_tensors.h"

#include <pybind11/gil_safe_call_once.h>

#include <stdexcept>
#include <utility>

#include "tensor.h"

namespace py = pybind11;

namespace pyrnnfast {
namespace {

bool is_contiguous(const Operand& o) {
  int64_t expected = 1;
  for (int i = o.dimensions - 1; i >= 0; --i) {
    if (o.shape[i] != 1 && o.stride[i] != expected) return false;
    expected *= o.shape[i];
  }
  return true;
}

// [T, I] as [T, 1, I].
void insert_batch(Operand& o) {
  o.shape[2] = o.shape[1];
  o.stride[2] = o.stride[1];
  o.shape[1] = 1;
  o.dimensions = 3;
}

// [B, T, I] as [T, B, I].
void exchange_time_and_batch(Operand& o) {
  std::swap(o.shape[0], o.shape[1]);
  std::swap(o.stride[0], o.stride[1]);
}

py::object call_method(PyObject* name, PyObject* const* stack, size_t arguments, PyObject* keywords = nullptr) {
  PyObject* result = PyObject_VectorcallMethod(name, stack, 1 + arguments, keywords);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

PyObject* new_empty_name() {
  static PyObject* const name = PyUnicode_InternFromString("new_empty");
  return name;
}

template <class... Sizes>
py::object new_empty_of(py::handle like, Sizes... sizes) {
  const int64_t all[] = {sizes...};
  return new_empty(like, all, static_cast<int>(sizeof...(sizes)));
}

}  // namespace

PlainCall::PlainCall(const Arguments& arguments)
    : types(arguments.tuple(0)),
      form(arguments.tuple(1)),
      x(arguments[kPlainX]),
      batch_sizes(arguments[3]),
      weights(arguments.tuple(kPlainWeights)) {}

bool read_form(const py::tuple& given, Form& form) {
  if (given.size() != 5 || !PyUnicode_Check(py::handle(given[0]).ptr())) return false;
  form.cell = given[0].cast<std::string>();
  int64_t* const numbers[] = {&form.layers, &form.directions};
  bool* const truths[] = {&form.single_step, &form.batch_first};
  for (size_t i = 0; i < 2; ++i) {
    const py::handle number = given[1 + i], truth = given[3 + i];
    if (!PyLong_Check(number.ptr()) || !PyBool_Check(truth.ptr())) return false;
    int overflow = 0;
    *numbers[i] = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
    *truths[i] = truth.ptr() == Py_True;
  }
  try {
    form.widths = &widths_of(check_cell(form.cell));
  } catch (const std::invalid_argument&) {
    return false;
  }
  // More layers than there are tuples for their weights would overflow their number.
  if (form.layers < 1 || form.layers > (1 << 20) || (form.directions != 1 && form.directions != 2)) return false;
  return !form.single_step || form.runs() == 1;
}

bool Reader::read(py::handle tensor, int dimensions, Operand& o, int64_t expanded) {
  return plain(tensor, o) && o.dimensions == dimensions && compact(tensor, o, expanded);
}

bool Reader::read_rows(py::handle tensor, Layout layout, Operand& o) {
  return plain(tensor, o) && place(tensor, layout, o);
}

bool Reader::read_x(const PlainCall& call, const Form& form, int64_t inputs, Layout& layout, Operand& o) {
  py::handle tensor = call.x;
  if (form.single_step && !call.batch_sizes.is_none()) return false;
  if (!plain(tensor, o) || o.dimensions < 1 || o.dimensions > 3 || o.shape[o.dimensions - 1] != inputs) return false;
  layout = form.single_step              ? Layout::step
           : !call.batch_sizes.is_none() ? Layout::packed
           : o.dimensions == 2           ? Layout::unbatched
           : form.batch_first            ? Layout::batch_first
                                         : Layout::time_major;
  return place(tensor, layout, o, INT64_MAX);  // with the right columns it fits, however long it is
}

bool Reader::read_states(py::handle tensor, Layout layout, Operand& o, int64_t expanded) {
  const bool flat = layout == Layout::step || layout == Layout::unbatched;
  if (!read(tensor, flat ? 2 : 3, o, expanded)) return false;
  if (layout == Layout::unbatched) insert_batch(o);
  return true;
}

bool Reader::read_weights(const py::tuple& given, const Form& form, std::vector<Operand>& weights) {
  const auto runs = static_cast<size_t>(form.runs());
  const size_t each = given.size() / runs;
  if (each * runs != given.size() || each < 2 || each > 5 || (form.single_step && each % 2 != 0)) return false;
  const size_t places = each % 2 == 0 ? 4 : 5;
  weights.resize(places * runs);
  for (size_t i = 0; i < given.size(); ++i) {
    const size_t place = Form::place_of(i, each), kind = place % places;
    if (!read(given[i], kind == 2 || kind == 3 ? 1 : 2, weights[place])) return false;
  }
  return true;
}

// The tensor becomes what has been read, where it had to be resolved.
bool Reader::plain(py::handle& tensor, Operand& o) {
  const bool is_plain = read_plain_tensor(tensor, types_, rules_, o);
  if (!is_plain && resolve_) {
    if (is_zero_tensor(tensor)) tensor = keep(tensor.attr("clone")());
    if (py::hasattr(tensor, "resolve_neg")) tensor = keep(tensor.attr("resolve_neg")());
    o = read_tensor(tensor, "what was saved, or a gradient,");
  }
  if ((is_plain || resolve_) && o.memory == rules_.memory && o.data != nullptr) return true;
  if (resolve_) {
    throw std::invalid_argument(std::string("backward: what was saved, or a gradient, has no memory on ") +
                                (rules_.memory == Memory::cpu ? "the CPU" : "a CUDA device"));
  }
  return false;
}

bool Reader::place(py::handle tensor, Layout layout, Operand& o, int64_t expanded) {
  const bool three = layout == Layout::time_major || layout == Layout::batch_first;
  if (o.dimensions != (three ? 3 : 2)) return false;
  if (layout == Layout::batch_first) {
    exchange_time_and_batch(o);
    return is_contiguous(o) || compact(keep(tensor.attr("transpose")(0, 1)), o, expanded);
  }
  if (!compact(tensor, o, expanded)) return false;
  if (layout == Layout::unbatched) insert_batch(o);
  return true;
}

// Makes o contiguous; false where it is expanded, to more than so many elements, and nobody asked to resolve it.
bool Reader::compact(py::handle tensor, Operand& o, int64_t expanded) {
  if (is_contiguous(o)) return true;
  bool is_expanded = false, is_small = true;
  int64_t left = expanded;
  for (int i = 0; i < o.dimensions; ++i) {
    is_expanded = is_expanded || (o.stride[i] == 0 && o.shape[i] > 1);
    is_small = is_small && o.shape[i] <= left;
    if (o.shape[i] > 0) left /= o.shape[i];
  }
  if (is_expanded && !is_small && !resolve_) return false;
  o = read_tensor(keep(tensor.attr("contiguous")()), "tensor");
  return true;
}

py::handle Reader::keep(py::object tensor) {
  kept_.push_back(std::move(tensor));
  return kept_.back();
}

py::object new_empty(py::handle like, const int64_t* sizes, int dimensions) {
  py::object arguments[3];
  PyObject* stack[4] = {like.ptr()};
  for (int i = 0; i < dimensions; ++i) {
    arguments[i] = py::int_(sizes[i]);
    stack[i + 1] = arguments[i].ptr();
  }
  return call_method(new_empty_name(), stack, static_cast<size_t>(dimensions));
}

py::object new_matrix(py::handle like, int64_t rows, int64_t columns, bool wide) {
  if (!wide) return new_empty_of(like, rows, columns);
  static PyObject* const keywords = py::make_tuple("dtype").release().ptr();
  // An import runs Python, and may let go of the GIL: no other thread may wait for it with the GIL in hand.
  static py::gil_safe_call_once_and_store<py::object> float32;
  float32.call_once_and_store_result([] { return py::object(py::module_::import("torch").attr("float32")); });
  const py::int_ sizes[] = {rows, columns};
  PyObject* const stack[] = {like.ptr(), sizes[0].ptr(), sizes[1].ptr(), float32.get_stored().ptr()};
  return call_method(new_empty_name(), stack, 2, keywords);
}

py::object new_rows(py::handle x, const Operand& rows, Layout layout, int64_t columns, Operand& o) {
  const int64_t T = rows.shape[0], B = rows.shape[1];
  py::object tensor;
  if (layout == Layout::batch_first && T > 1 && B > 1) {
    // In time-major order, as the kernels write it and as torch returns it.
    tensor = x.attr("new_empty_strided")(py::make_tuple(B, T, columns), py::make_tuple(columns, B * columns, 1));
  } else if (layout == Layout::batch_first) {
    tensor = new_empty_of(x, B, T, columns);
  } else {
    tensor = layout == Layout::time_major ? new_empty_of(x, T, B, columns) : new_empty_of(x, T, columns);
  }
  o = read_tensor(tensor, "rows");
  if (layout == Layout::unbatched) insert_batch(o);
  if (layout == Layout::batch_first) exchange_time_and_batch(o);
  return tensor;
}

py::object new_states(py::handle like, const Form& form, Layout layout, int64_t B, int64_t hidden, Operand& o) {
  const int64_t runs = form.runs();
  py::object tensor = layout == Layout::step        ? new_empty_of(like, B, hidden)
                      : layout == Layout::unbatched ? new_empty_of(like, runs, hidden)
                                                    : new_empty_of(like, runs, B, hidden);
  o = read_tensor(tensor, "states");
  if (layout == Layout::unbatched) insert_batch(o);
  return tensor;
}

bool requires_grad(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  const auto found = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), name));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

}  // namespace pyrnnfast
