// From a checked call to the template that serves it.
#pragma once

#include "backend.h"
#include "pass.h"

namespace pyrnnfast {
namespace {

template <class P>
struct PassOf;
template <>
struct PassOf<Forward> {
  template <class Cell, class E>
  using Type = ForwardPass<Cell, E>;
};
template <>
struct PassOf<Backward> {
  template <class Cell, class E>
  using Type = BackwardPass<Cell, E>;
};

// body(cell), an object of its class.
template <class Body>
auto with_cell(CellKind kind, const Body& body) {
  switch (kind) {
    case CellKind::rnn_tanh:
      return body(Rnn<false>{});
    case CellKind::rnn_relu:
      return body(Rnn<true>{});
    case CellKind::gru:
      return body(Gru{});
    default:  // there are no projections: kCudaRules
      return body(Lstm{});
  }
}

// body(number), an object of the type of the operands.
template <class Body>
auto with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::float32:
      return body(float{});
    case Dtype::float64:
      return body(double{});
    case Dtype::bfloat16:
      return body(Bfloat16{});
    default:
      return body(Float16{});
  }
}

template <class E, class P>
int64_t scratch_bytes_of(const Checked<P>& call, const Plan& plan, bool tf32) {
  return with_cell(call.directions[0].cell, [&](auto cell) {
    using Cell = decltype(cell);
    return scratch_of_layer<PassOf<P>::template Type, P, Cell, E>(call.directions, plan, tf32);
  });
}

template <class E, class P, class M>
void run_with(const Checked<P>& call, const Plan& plan, const Context& context, M* const (&machines)[2]) {
  with_cell(call.directions[0].cell, [&](auto cell) {
    using Cell = decltype(cell);
    run_layer<PassOf<P>::template Type, P, Cell, E>(call.directions, plan, context.tf32, context.scratch, machines);
  });
}

}  // namespace
}  // namespace pyrnnfast
