// The arguments of a Python call, taken apart by hand: positional or by name, as declared.
//
// pybind11 would do it, but the text of its TypeError prints every argument, and torch crashes printing a tensor whose
// storage has been freed. Here no argument is ever printed; errors name its type.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>
#include <vector>

namespace pyrnnfast {

class Arguments {
 public:
  // Throws py::type_error unless every name is given exactly once and nothing else is.
  Arguments(const std::string& function, const std::vector<const char*>& names, const pybind11::args& args,
            const pybind11::kwargs& kwargs);
  // The names must outlive this.
  Arguments(const std::string& function, std::vector<const char*>&& names, const pybind11::args& args,
            const pybind11::kwargs& kwargs) = delete;

  pybind11::handle operator[](size_t index) const { return values_[index]; }

  // These throw py::type_error for another type, and integer() py::value_error beyond 64 bits.
  std::string text(size_t index) const;
  pybind11::tuple tuple(size_t index) const;
  bool truth(size_t index) const;
  int64_t integer(size_t index) const;

 private:
  [[noreturn]] void wrong_type(size_t index, const char* expected) const;

  const std::vector<const char*>& names_;
  std::vector<pybind11::handle> values_;
};

// `first`, then `others`.
template <size_t Count>
std::vector<const char*> names_with(const char* const (&first)[Count], std::initializer_list<const char*> others) {
  std::vector<const char*> names(first, first + Count);
  names.insert(names.end(), others);
  return names;
}

}  // namespace pyrnnfast
