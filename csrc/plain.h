// The shortest roads there are, for calls whose kernel takes microseconds: a dense layer of one direction, or a single
// step, from Python's objects to Python's objects. Each answers None wherever anything is not as plain as it could be,
// so that the caller goes the long way, where it is put right or gets its error.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace pyrnnfast {

// For x of so many dimensions, 3: [T, B, I], or [B, T, I] where `batch_first` is True and T or B is 1, or 2, a step:
// [B, I]: a pair. Where `grad` says that gradients are enabled and an operand asks for one: the results y, h_n, c_n, or
// h, c, in a tuple, and what backward needs in another. Else: what torch.nn's module, or its cell, returns, and None.
pybind11::object forward_plain(const pybind11::tuple& types, const std::string& cell, int64_t inputs, int64_t hidden,
                               int64_t dimensions, pybind11::handle batch_first, pybind11::handle x,
                               pybind11::handle hx, const pybind11::tuple& weights, bool grad, int threads);

// The operands of such a call back through time.
struct PlainBackward {
  pybind11::tuple needs;  // of x, h0, c0 and the four weights, whether its gradient is wanted
  bool batch_first;       // x, y and grad_y are
  pybind11::handle x, h0, c0;
  pybind11::tuple weights;  // four; a bias may be None
  pybind11::handle y;       // None of a step, where the values are of no use
  pybind11::tuple kept;     // of forward_plain
  pybind11::handle grad_y;  // of a step: none
  pybind11::handle grad_h_n, grad_c_n;
};

// A tuple of the gradients of x, h0, c0 and the four weights; None where none is wanted, or nothing comes from
// upstream.
pybind11::object backward_plain(const pybind11::tuple& types, const std::string& cell, const PlainBackward& operands,
                                int threads);

}  // namespace pyrnnfast
