// The arguments of a Python call; see arguments.h.
#include "arguments.h"

namespace py = pybind11;

namespace pyrnnfast {

Arguments::Arguments(const std::string& function, const std::vector<const char*>& names, const py::args& args,
                     const py::kwargs& kwargs)
    : names_(names), values_(names.size()) {
  if (args.size() > names.size()) {
    throw py::type_error(function + "() takes " + std::to_string(names.size()) + " arguments, got " +
                         std::to_string(args.size()));
  }
  for (size_t i = 0; i < args.size(); ++i) values_[i] = args[i];
  size_t found = args.size();
  for (size_t i = 0; i < names.size(); ++i) {
    const py::handle named = kwargs.size() == 0 ? py::handle() : PyDict_GetItemString(kwargs.ptr(), names[i]);
    if (named) {
      if (values_[i]) throw py::type_error(function + "() got '" + names[i] + "' twice");
      values_[i] = named;
      ++found;
    }
    if (!values_[i]) throw py::type_error(function + "() misses the argument '" + names[i] + "'");
  }
  if (found != args.size() + kwargs.size()) throw py::type_error(function + "() got an argument of unknown name");
}

void Arguments::wrong_type(size_t index, const char* expected) const {
  throw py::type_error(std::string(names_[index]) + " must be " + expected + ", got " +
                       Py_TYPE(values_[index].ptr())->tp_name);
}

std::string Arguments::text(size_t index) const {
  if (!PyUnicode_Check(values_[index].ptr())) wrong_type(index, "a str");
  return values_[index].cast<std::string>();
}

py::tuple Arguments::tuple(size_t index) const {
  if (!PyTuple_Check(values_[index].ptr())) wrong_type(index, "a tuple");
  return py::reinterpret_borrow<py::tuple>(values_[index]);
}

bool Arguments::truth(size_t index) const {
  if (!PyBool_Check(values_[index].ptr())) wrong_type(index, "a bool");
  return values_[index].ptr() == Py_True;
}

int64_t Arguments::integer(size_t index) const {
  // NumPy's integers, too, and tensors of one integer.
  if (!PyIndex_Check(values_[index].ptr())) wrong_type(index, "an int");
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(values_[index].ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) throw py::value_error(std::string(names_[index]) + " is out of range");
  return value;
}

}  // namespace pyrnnfast
