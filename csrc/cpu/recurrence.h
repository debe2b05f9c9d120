// The time loop, forward and back through time, once for every cell and instruction set.
//
// Both directions have one shape. At each step, for a tile of rows and a block of units: multiply rows of the step
// before (h, or dgates) by a panel of weights in registers, then finish these units (the cell's own equations) while
// the product is still in the first cache. Rows without a step before (the start of their sequence) take their product
// from the caller instead. What differs between forward and backward is a policy, `ForwardPass` or `BackwardPass`.
#pragma once

#include "../activations.h"
#include "../cells.h"
#include "kernel.h"
#include "tile.h"
#include "weights.h"

namespace pyrnnfast {
namespace {

template <class T>
T* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<T*>(m.data) + row * m.stride + column;
}

inline int64_t active_rows(const Problem& p, int64_t t) {
  return t < 0 || t >= p.steps ? 0 : p.offsets[t + 1] - p.offsets[t];
}

// `n` lanes of a vector starting at a column of a row; whole vectors are the common case.
template <class S, bool Whole>
struct Lanes {
  int n;
  using T = typename S::Scalar;
  typename S::Value load(const T* p) const {
    if constexpr (Whole) return S::load(p);
    return S::load_part(p, n);
  }
  void store(T* p, typename S::Value v) const {
    if constexpr (Whole) return S::store(p, v);
    S::store_part(p, v, n);
  }
  typename S::Value load_or_zero(const Matrix& m, int64_t row, int64_t column) const {
    return m.data == nullptr ? typename S::Value{} : load(at<const T>(m, row, column));
  }
};

inline void prefetch(const Matrix& m, int64_t row, int64_t column, int element_bytes) {
  if (m.data != nullptr)
    __builtin_prefetch(static_cast<const char*>(m.data) + (row * m.stride + column) * element_bytes);
}

// Where a tile stands: `rows` rows from `row` at time t. `continues` tells whether they have a step before in the order
// of this pass, and rows from `ending` on have none after.
struct Place {
  int64_t t, row;
  int rows;
  bool continues;
  int64_t ending;
};

// Of one row and one vector of units: the recurrent product and, where the kernel makes it, the input's. Gates stand
// `gate_stride` apart.
template <class T>
struct RowProducts {
  const T* recurrent;
  const T* input;
  int gate_stride;
};

template <class Cell, class S_>
struct ForwardPass {
  using S = S_;
  using T = typename S::Scalar;
  using V = typename S::Value;
  using Math = VectorMath<S>;
  using Params = Forward;
  static constexpr int gates = Cell::gates;
  static constexpr int segments = 1;
  static constexpr Segment segment[1] = {{0, 1}};
  static constexpr int64_t depth(int64_t hidden) { return hidden; }
  static constexpr bool has_input = true;
  static int64_t inputs(const Forward& p) { return p.inputs; }

  static void pack(const Forward& p, const Block& block, T* panel) {
    if (p.inputs > 0) pack_forward<S>(p.weight_ih, gates, p.hidden, p.inputs, block, panel);
    panel += p.inputs * gates * block.vectors * S::lanes;
    if (p.weight_hh.data != nullptr) pack_forward<S>(p.weight_hh, gates, p.hidden, p.hidden, block, panel);
  }

  static bool descending(const Forward& p) { return p.reverse; }
  static const Matrix& operand(const Forward& p) { return p.y; }
  static const Matrix& start(const Forward& p) { return p.hgates; }

  static void prefetch_row(const Forward& p, int64_t flat, int64_t row, int64_t unit) {
    for (int g = 0; g < gates; ++g) prefetch(p.xgates, flat, g * p.hidden + unit, sizeof(T));
    if constexpr (Cell::has_cell) prefetch(p.c_n, row, unit, sizeof(T));
  }

  // One row of one vector of units. `before` is where the row's previous h stands, or −1.
  template <bool Whole>
  static void finish(const Forward& p, const Lanes<S, Whole>& lanes, const RowProducts<T>& product, const Place& place,
                     int64_t row, int64_t unit, int64_t before) {
    const int64_t flat = p.offsets[place.t] + row;
    const int64_t H = p.hidden;
    StepForward<V> s;
#pragma GCC unroll 4
    for (int g = 0; g < gates; ++g) {
      s.x[g] = product.input == nullptr
                   ? lanes.load(at<const T>(p.xgates, flat, g * H + unit))
                   : S::load(product.input + g * product.gate_stride) + lanes.load_or_zero(p.bias, 0, g * H + unit);
      s.a[g] = S::load(product.recurrent + g * product.gate_stride);
    }
    if constexpr (Cell::has_bias_hn) s.bias_hn = lanes.load_or_zero(p.bias_hn, 0, unit);
    if constexpr (Cell::forward_reads_h_prev) {
      s.h_prev = before < 0 ? lanes.load_or_zero(p.h0, row, unit) : lanes.load(at<const T>(p.y, before, unit));
    }
    if constexpr (Cell::has_cell) {
      s.c_prev = place.continues ? lanes.load(at<const T>(p.c_n, row, unit)) : lanes.load_or_zero(p.c0, row, unit);
    }
    Cell::template forward<Math>(s);
    lanes.store(at<T>(p.y, flat, unit), s.h);
    if (row >= place.ending) lanes.store(at<T>(p.h_n, row, unit), s.h);
    if constexpr (Cell::has_cell) {
      lanes.store(at<T>(p.c_n, row, unit), s.c);
      if (p.cells.data != nullptr) lanes.store(at<T>(p.cells, flat, unit), s.c);
    }
    if (p.saved.data != nullptr) {
#pragma GCC unroll 4
      for (int g = 0; g < Cell::saved; ++g) lanes.store(at<T>(p.saved, flat, g * H + unit), s.saved[g]);
    }
  }
};

template <class Cell, class S_>
struct BackwardPass {
  using S = S_;
  using T = typename S::Scalar;
  using V = typename S::Value;
  using Math = VectorMath<S>;
  using Params = Backward;
  static constexpr int gates = 1;  // the product has one column a unit
  static constexpr int segments = Cell::segments;
  static constexpr auto& segment = Cell::segment;
  static constexpr int64_t depth(int64_t hidden) { return Cell::gates * hidden; }
  static constexpr bool has_input = false;
  static int64_t inputs(const Backward&) { return 0; }

  static void pack(const Backward& p, const Block& block, T* panel) {
    pack_backward<S>(p.weight_hh, Cell::gates, p.hidden, block, panel);
  }

  static bool descending(const Backward& p) { return !p.reverse; }
  static const Matrix& operand(const Backward& p) { return p.dgates; }
  static const Matrix& start(const Backward& p) { return p.grad_h_n; }

  static void prefetch_row(const Backward& p, int64_t flat, int64_t row, int64_t unit) {
    for (int g = 0; g < Cell::saved; ++g) prefetch(p.saved, flat, g * p.hidden + unit, sizeof(T));
    prefetch(p.grad_y, flat, unit, sizeof(T));
    if constexpr (Cell::has_cell) prefetch(p.cells, flat, unit, sizeof(T));
    if constexpr (Cell::backward_reads_h) prefetch(p.y, flat, unit, sizeof(T));
    if constexpr (Cell::has_carry) prefetch(p.carry, row, unit, sizeof(T));
  }

  // `before` is unused here: the state before the step is the one before it in the forward pass.
  template <bool Whole>
  static void finish(const Backward& p, const Lanes<S, Whole>& lanes, const RowProducts<T>& product, const Place& place,
                     int64_t row, int64_t unit, int64_t) {
    const int64_t t = place.t;
    const int64_t flat = p.offsets[t] + row;
    const int64_t H = p.hidden;
    const int64_t t_prev = p.reverse ? t + 1 : t - 1;
    const bool has_prev = row < active_rows(p, t_prev);
    StepBackward<V> s;
    s.dh = S::load(product.recurrent) + lanes.load_or_zero(p.grad_y, flat, unit);
#pragma GCC unroll 4
    for (int g = 0; g < Cell::saved; ++g) s.saved[g] = lanes.load(at<const T>(p.saved, flat, g * H + unit));
    if constexpr (Cell::backward_reads_h) s.h = lanes.load(at<const T>(p.y, flat, unit));
    if constexpr (Cell::backward_reads_h_prev) {
      s.h_prev =
          has_prev ? lanes.load(at<const T>(p.y, p.offsets[t_prev] + row, unit)) : lanes.load_or_zero(p.h0, row, unit);
    }
    if constexpr (Cell::has_cell) {
      s.c = lanes.load(at<const T>(p.cells, flat, unit));
      s.c_prev = has_prev ? lanes.load(at<const T>(p.cells, p.offsets[t_prev] + row, unit))
                          : lanes.load_or_zero(p.c0, row, unit);
    }
    if constexpr (Cell::has_carry) {
      // A fresh row carries ∂L/∂c_n (LSTM); the GRU's ∂L/∂h_n has come with the product.
      s.carry = place.continues  ? lanes.load(at<const T>(p.carry, row, unit))
                : Cell::has_cell ? lanes.load_or_zero(p.grad_c_n, row, unit)
                                 : V{};
    }
    Cell::template backward<Math>(s);
#pragma GCC unroll 4
    for (int g = 0; g < Cell::dgates; ++g) lanes.store(at<T>(p.dgates, flat, g * H + unit), s.dgates[g]);
    if constexpr (Cell::has_carry) lanes.store(at<T>(p.carry, row, unit), s.carry);
  }
};

template <class Pass>
struct Sweep {
  using S = typename Pass::S;
  using T = typename Pass::T;
  using V = typename Pass::V;
  using Params = typename Pass::Params;
  // A tile is at most four vectors wide: the gates of one vector of units, or four vectors of units.
  static constexpr int unit_vectors = Pass::gates == 1 ? kMaxVectors : 1;

  static int64_t blocks(const Params& p) { return ceil_div(p.hidden, unit_vectors * S::lanes); }

  static int64_t panel_elements(const Params& p) {
    return (Pass::inputs(p) + Pass::depth(p.hidden)) * Pass::gates * unit_vectors * S::lanes;
  }

  // The first step's recurrent product comes from the caller: without a second one no weights are needed for it.
  static int64_t packed_bytes(const Params& p) {
    if (p.steps == 1 && Pass::inputs(p) == 0) return 0;
    return blocks(p) * panel_elements(p) * static_cast<int64_t>(sizeof(T));
  }

  static void pack(const Params& p, void* packed, int64_t index) {
    const Block block = unit_block<S>(p.hidden, unit_vectors, index);
    Pass::pack(p, block, static_cast<T*>(packed) + index * panel_elements(p));
  }

  static void sweep(const Params& p, const void* packed, const Share& share) {
    const bool descending = Pass::descending(p);
    const int64_t stride = descending ? -1 : 1;
    const int tallest = Products<S>::rows(p.batch);
    int64_t t = descending ? p.steps - 1 : 0;
    for (int64_t step = 0; step < p.steps; ++step, t += stride) {
      const int64_t before = step == 0 ? 0 : active_rows(p, t - stride);
      const int64_t ending = step == p.steps - 1 ? 0 : active_rows(p, t + stride);
      const int64_t active = active_rows(p, t);
      const int64_t end = active < share.row_end ? active : share.row_end;
      const int64_t continuing = before < end ? before : end;
      for (int64_t index = share.block_begin; index < share.block_end; ++index) {
        const Block block = unit_block<S>(p.hidden, unit_vectors, index);
        const T* panel = static_cast<const T*>(packed) + index * panel_elements(p);
        Place place{t, share.row_begin, 0, true, ending};
        while (place.row < end) {
          place.continues = place.row < continuing;
          const int64_t left = (place.continues ? continuing : end) - place.row;
          place.rows = static_cast<int>(ceil_div(left, ceil_div(left, tallest)));
          one_tile(p, place, t - stride, block, panel);
          place.row += place.rows;
        }
      }
      if (share.barrier != nullptr) share.barrier->wait(share.parties);
    }
  }

 private:
  static void one_tile(const Params& p, const Place& place, int64_t t_before, const Block& block, const T* panel) {
    alignas(64) T tile[Products<S>::max_rows * kMaxVectors * S::lanes];
    alignas(64) T input_tile[Products<S>::max_rows * kMaxVectors * S::lanes];
    const int width = block.vectors * S::lanes;  // of one gate
    const int64_t flat = p.offsets[place.t] + place.row;
    for (int m = 0; m < place.rows; ++m) {
      for (int v = 0; v < block.vectors; ++v) {
        Pass::prefetch_row(p, flat + m, place.row + m, block.unit + v * S::lanes);
      }
    }
    const auto product = Products<S>::find(p.batch, Pass::gates * block.vectors, place.rows);
    const int64_t inputs = Pass::inputs(p);
    if constexpr (Pass::has_input) {
      if (inputs > 0) product(at<const T>(p.x, flat, 0), p.x.stride, panel, inputs, input_tile, false);
      panel += inputs * Pass::gates * width;
    }
    if (place.continues) {
      const Matrix& operand = Pass::operand(p);
      const T* rows = at<const T>(operand, p.offsets[t_before] + place.row, 0);
      for (int i = 0; i < Pass::segments; ++i) {
        const int64_t length = Pass::segments == 1 ? Pass::depth(p.hidden) : Pass::segment[i].length * p.hidden;
        product(rows + Pass::segment[i].begin * p.hidden, operand.stride, panel, length, tile, i > 0);
        panel += length * Pass::gates * width;
      }
    } else {
      take_start(p, place, block, tile);
    }
    for (int v = 0; v < block.vectors; ++v) {
      const int64_t unit = block.unit + v * S::lanes;
      const int64_t present = p.hidden - unit;
      const RowProducts<T> products{tile + v * S::lanes, inputs > 0 ? input_tile + v * S::lanes : nullptr, width};
      if (present >= S::lanes) {
        finish_rows(p, Lanes<S, true>{S::lanes}, place, t_before, products, unit);
      } else {
        finish_rows(p, Lanes<S, false>{static_cast<int>(present)}, place, t_before, products, unit);
      }
    }
  }

  template <class L>
  static void finish_rows(const Params& p, const L& lanes, const Place& place, int64_t t_before,
                          RowProducts<T> products, int64_t unit) {
    const int row_stride = Pass::gates * products.gate_stride;
    for (int m = 0; m < place.rows; ++m) {
      const int64_t row = place.row + m;
      const int64_t before = place.continues ? p.offsets[t_before] + row : -1;
      Pass::finish(p, lanes, products, place, row, unit, before);
      products.recurrent += row_stride;
      if (products.input != nullptr) products.input += row_stride;
    }
  }

  // The product of rows that start here: given by the caller, or zero.
  static void take_start(const Params& p, const Place& place, const Block& block, T* tile) {
    const Matrix& start = Pass::start(p);
    for (int m = 0; m < place.rows; ++m) {
      for (int g = 0; g < Pass::gates; ++g) {
        for (int v = 0; v < block.vectors; ++v, tile += S::lanes) {
          const int64_t unit = block.unit + v * S::lanes;
          const int64_t present = p.hidden - unit;
          const int64_t column = g * p.hidden + unit;
          S::store(tile, present >= S::lanes
                             ? Lanes<S, true>{S::lanes}.load_or_zero(start, place.row + m, column)
                             : Lanes<S, false>{static_cast<int>(present)}.load_or_zero(start, place.row + m, column));
        }
      }
    }
  }
};

template <class Pass>
constexpr Kernel<typename Pass::Params> kernel() {
  using W = Sweep<Pass>;
  return {W::blocks, W::packed_bytes, W::pack, W::sweep};
}

template <class S, Activation kind>
void activate(const void* x, void* out, int64_t count) {
  using T = typename S::Scalar;
  const auto* from = static_cast<const T*>(x);
  auto* to = static_cast<T*>(out);
  const auto apply = [](typename S::Value v) {
    return kind == Activation::sigmoid ? VectorMath<S>::sigmoid(v) : VectorMath<S>::tanh(v);
  };
  int64_t i = 0;
  for (; i + S::lanes <= count; i += S::lanes) S::store(to + i, apply(S::load(from + i)));
  const int left = static_cast<int>(count - i);
  if (left > 0) S::store_part(to + i, apply(S::load_part(from + i, left)), left);
}

// Every kernel for vectors of this many bytes.
template <int Bytes>
constexpr InstructionSet instruction_set(const char* name) {
  using F = Simd<float, Bytes>;
  using D = Simd<double, Bytes>;
  return {name,
          {{kernel<ForwardPass<Rnn<false>, F>>(), kernel<ForwardPass<Rnn<false>, D>>()},
           {kernel<ForwardPass<Rnn<true>, F>>(), kernel<ForwardPass<Rnn<true>, D>>()},
           {kernel<ForwardPass<Gru, F>>(), kernel<ForwardPass<Gru, D>>()},
           {kernel<ForwardPass<Lstm, F>>(), kernel<ForwardPass<Lstm, D>>()}},
          {{kernel<BackwardPass<Rnn<false>, F>>(), kernel<BackwardPass<Rnn<false>, D>>()},
           {kernel<BackwardPass<Rnn<true>, F>>(), kernel<BackwardPass<Rnn<true>, D>>()},
           {kernel<BackwardPass<Gru, F>>(), kernel<BackwardPass<Gru, D>>()},
           {kernel<BackwardPass<Lstm, F>>(), kernel<BackwardPass<Lstm, D>>()}},
          {{activate<F, Activation::sigmoid>, activate<D, Activation::sigmoid>},
           {activate<F, Activation::tanh>, activate<D, Activation::tanh>}}};
}

}  // namespace
}  // namespace pyrnnfast
