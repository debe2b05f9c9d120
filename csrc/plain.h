// The shortest roads there are, for eager calls on plain tensors: a whole stack of layers, or a single step, from
// Python's objects to Python's objects, one call forward and one back. Calls whose kernels take microseconds would
// otherwise wait for what surrounds them, and the kernels of a device for the host.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

#include "arguments.h"
#include "check.h"

namespace pyrnnfast {

// What runs the layers of a call, one after the other. Called with the GIL.
class Backend {
 public:
  virtual const Rules& rules() const = 0;
  virtual void run(const std::vector<Checked<Forward>>& layers) const = 0;
  virtual void run(const std::vector<Checked<Backward>>& layers) const = 0;

 protected:
  ~Backend() = default;
};

// The names of the arguments: those of the operands, then `others`, which are the backend's.
std::vector<const char*> plain_forward_names(std::initializer_list<const char*> others);
std::vector<const char*> plain_backward_names(std::initializer_list<const char*> others);
// How many of the names are those of operands, and which are these.
inline constexpr size_t kPlainForwardOperands = 10, kPlainBackwardOperands = 12;
inline constexpr size_t kPlainX = 2, kPlainWeights = 4;

// Both have
//
// - types: of tensors that may be read
// - form: (cell, layers, directions, single_step, batch_first), where `directions` are 1 or 2
// - x: [T, B, I]; [B, T, I] with `batch_first`; [T, I] without a batch; [N, I] with batch_sizes; [B, I]: a step
// - batch_sizes: None, or [T]
// - weights: weight_ih, weight_hh and perhaps bias_ih, bias_hh of each layer and direction, and with projections
//   weight_hr behind them

// And inputs, hidden, outputs (columns of h: P of projections, else H), hx, grad. A pair. Where `grad` says that
// gradients are enabled and an operand asks for one: the results y, h_n, c_n, or h, c, in a tuple, and in another what
// backward needs. Else what torch.nn's module, or its cell, returns, and None.
//
// None when anything is unusual: the caller then takes the general way, which puts it right or raises. hx: None, h0, or
// for the LSTM (h0, c0).
pybind11::object forward_plain(const Arguments& arguments, const Backend& backend);

// And needs, h0, c0, y, kept, upstream, dgates. The gradients of x, h0, c0 and the weights, None where none is wanted
// or nothing comes from upstream. Throws where the operands do not fit; they are copied where their elements do not lie
// side by side, as hooks for saved tensors may have changed them.
//
// needs: of x, h0, c0 and each weight, whether its gradient is wanted. y: None of a step, where its values are of no
// use. kept: of forward_plain. upstream: the gradients of its results. dgates: whether, of a step, dgates [B, …·H] are
// wanted, too (cells.h); they stand behind the others then.
pybind11::tuple backward_plain(const Arguments& arguments, const Backend& backend);

}  // namespace pyrnnfast
