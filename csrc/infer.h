// The shortest road there is, for calls whose kernel takes microseconds: a dense layer of one direction, or a single
// step, without gradients, from Python's objects to Python's objects.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace pyrnnfast {

// What torch.nn's module returns for x [T, B, I], or its cell for x [B, I]. None wherever anything is not as plain as
// it could be, so that the caller goes the long way, where it is put right or gets its error.
pybind11::object infer_plain(const pybind11::tuple& types, const std::string& cell, int64_t inputs, int64_t hidden,
                             pybind11::handle x, pybind11::handle hx, const pybind11::tuple& weights, int threads);

}  // namespace pyrnnfast
