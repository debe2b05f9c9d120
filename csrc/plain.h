// The shortest roads there are, for eager calls on plain CPU tensors: a whole stack of layers, or a single step, from
// Python's objects to Python's objects, one call forward and one back. Calls whose kernels take microseconds would
// otherwise wait for what surrounds them.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace pyrnnfast {

// The operands of a call. `form` is (cell, layers, directions, single_step, batch_first), where `directions` are 1
// or 2.
struct PlainCall {
  pybind11::tuple types;  // of tensors that may be read
  pybind11::tuple form;
  // [T, B, I]; [B, T, I] with `batch_first`; [T, I] without a batch; [N, I] with batch_sizes; [B, I]: a step
  pybind11::handle x;
  pybind11::handle batch_sizes;  // None, or [T]
  pybind11::tuple weights;       // weight_ih, weight_hh and perhaps bias_ih, bias_hh of each layer and direction
};

// A pair. Where `grad` says that gradients are enabled and an operand asks for one: the results y, h_n, c_n, or h, c,
// in a tuple, and in another what backward needs. Else what torch.nn's module, or its cell, returns, and None.
//
// None when anything is unusual: the caller then takes the general way, which puts it right or raises. hx: None, h0, or
// for the LSTM (h0, c0).
pybind11::object forward_plain(const PlainCall& call, int64_t inputs, int64_t hidden, pybind11::handle hx, bool grad,
                               int threads);

// The gradients of x, h0, c0 and the weights, None where none is wanted or nothing comes from upstream. Throws where
// the operands do not fit; they are copied where their elements do not lie side by side, as hooks for saved tensors may
// have changed them.
//
// needs: of x, h0, c0 and each weight, whether its gradient is wanted. y: None of a step, where its values are of no
// use. kept: of forward_plain. upstream: the gradients of its results. dgates: whether, of a step, dgates [B, P·H] are
// wanted, too (cells.h); they stand behind the others then.
pybind11::tuple backward_plain(const PlainCall& call, const pybind11::tuple& needs, pybind11::handle h0,
                               pybind11::handle c0, pybind11::handle y, const pybind11::tuple& kept,
                               const pybind11::tuple& upstream, bool dgates, int threads);

}  // namespace pyrnnfast
