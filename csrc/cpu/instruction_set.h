// Every kernel for vectors of one width.
#pragma once

#include "backward.h"
#include "forward.h"

namespace pyrnnfast {
namespace {

template <template <class, class, class> class Pass, class P, class Cell, class S, class E>
constexpr Kernel<P> kernel() {
  using W = Pass<Cell, S, E>;
  return {W::blocks, output_vectors<S, P>, W::layout, W::begin, W::sweep, W::products, W::end};
}

template <class S, Activation kind>
void activate(const void* x, void* out, int64_t count) {
  using T = typename S::Scalar;
  const auto* from = static_cast<const T*>(x);
  auto* to = static_cast<T*>(out);
  for (int64_t i = 0; i < count; i += S::lanes) {
    with_lanes<S>(count - i, [&](const auto& lanes) {
      const auto v = lanes.load(from + i);
      lanes.store(to + i, kind == Activation::sigmoid ? VectorMath<S>::sigmoid(v) : VectorMath<S>::tanh(v));
    });
  }
}

template <class S>
void multiply_share(const Product& p, void* panel, int rank, int size) {
  using T = typename S::Scalar;
  const int64_t begin = share_of(p.rows, rank, size), count = share_of(p.rows, rank + 1, size) - begin;
  const int64_t blocks = ceil_div(p.columns, kMaxVectors * S::lanes);
  auto* packed = static_cast<T*>(panel) + rank * kDepth * kMaxVectors * S::lanes;
  for (int64_t index = 0; index < p.samples * blocks && count > 0; ++index) {
    const int64_t sample = index / blocks;
    const Block b = block_at<S>(p.columns, kMaxVectors, index % blocks);
    for (int64_t k = 0; k < p.depth; k += kDepth) {
      const int64_t depth = p.depth - k < kDepth ? p.depth - k : kDepth;
      pack_by_column<S>(at<const T>(p.b, k, b.first) + sample * p.next_b, p.b.stride, depth, b.present, packed);
      Left<T> left{at<const T>(p.a, begin, k), p.a.stride, 1};
      if (p.transposed) left = {at<const T>(p.a, k, begin) + sample * p.next_a, 1, p.a.stride};
      multiply<S>(left, count, p.rows, Panel<T>{packed, b.vectors * S::lanes}, b.present, depth,
                  at<T>(p.out, begin, b.first) + sample * p.next_out, p.out.stride, k > 0);
    }
  }
}

template <int Bytes>
constexpr InstructionSet instruction_set(const char* name) {
  using F = Simd<float, Bytes>;
  using D = Simd<double, Bytes>;
  InstructionSet set{};
  set.name = name;
  const auto add = [&](CellKind kind, auto cell) {
    using Cell = decltype(cell);
    const auto add_type = [&](Dtype dtype, auto vector, auto element) {
      using S = decltype(vector);
      using E = decltype(element);
      set.forward[static_cast<int>(kind)][static_cast<int>(dtype)] = kernel<ForwardPass, Forward, Cell, S, E>();
      set.backward[static_cast<int>(kind)][static_cast<int>(dtype)] = kernel<BackwardPass, Backward, Cell, S, E>();
    };
    add_type(Dtype::float32, F{}, float{});
    add_type(Dtype::float64, D{}, double{});
    add_type(Dtype::bfloat16, F{}, Bf16{});
    add_type(Dtype::float16, F{}, Fp16{});
  };
  add(CellKind::rnn_tanh, Rnn<false>{});
  add(CellKind::rnn_relu, Rnn<true>{});
  add(CellKind::gru, Gru{});
  add(CellKind::lstm, Lstm{});
  add(CellKind::projected_lstm, ProjectedLstm{});
  set.activation[static_cast<int>(Activation::sigmoid)][0] = activate<F, Activation::sigmoid>;
  set.activation[static_cast<int>(Activation::sigmoid)][1] = activate<D, Activation::sigmoid>;
  set.activation[static_cast<int>(Activation::tanh)][0] = activate<F, Activation::tanh>;
  set.activation[static_cast<int>(Activation::tanh)][1] = activate<D, Activation::tanh>;
  // Measured, see docs/performance.md.
  set.depth_per_row[static_cast<int>(Dtype::float32)] = Bytes == 64 ? 17 : Bytes == 32 ? 10 : 3;
  set.depth_per_row[static_cast<int>(Dtype::float64)] = Bytes == 64 ? 10 : Bytes == 32 ? 6 : 3;
  set.depth_per_row[static_cast<int>(Dtype::bfloat16)] = Bytes == 16 ? 64 : 18;
  set.depth_per_row[static_cast<int>(Dtype::float16)] = Bytes == 64 ? 18 : Bytes == 32 ? 13 : 64;
  for (int64_t& rows : set.most_unpacked_rows) rows = Bytes == 16 ? 96 : 24;
  if (F::has_pair_product) set.most_unpacked_rows[static_cast<int>(Dtype::bfloat16)] = 40;
  if (Bytes == 32) set.most_unpacked_rows[static_cast<int>(Dtype::float16)] = 40;
  // Packing saves most of what it takes to widen it.
  if (!F::converts_fp16) set.most_unpacked_rows[static_cast<int>(Dtype::float16)] = 2;
  set.product[0] = multiply_share<F>;
  set.product[1] = multiply_share<D>;
  set.product_panel_bytes = kDepth * kMaxVectors * Bytes;
  return set;
}

}  // namespace
}  // namespace pyrnnfast
