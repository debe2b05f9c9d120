// Back through time, a chunk of steps at a time; each is followed by its products (gradients.h).
//
// A step: dgates of the step that came before (the later one, in a layer that runs forward) times W_hh, a tile at a
// time, and the cell's derivatives while the tile is in the first cache. Rows whose sequence starts here take ∂L/∂h_n
// instead of the product. Of a projected h, the product gives ∂L/∂h; that times W_hr comes in its place.
#pragma once

#include "../activations.h"
#include "../cells.h"
#include "gradients.h"

namespace pyrnnfast {
namespace {

// E: the type of the operands in memory.
template <class Cell, class S, class E>
struct BackwardPass {
  using T = typename S::Scalar;
  using V = typename S::Value;
  using Math = VectorMath<S>;
  using D = Dgates<Cell, S, E>;
  using W = ThroughWeights<Cell, S, E>;
  using G = Gradients<Cell, S, E>;
  using Operand = typename D::Operand;
  static constexpr bool narrow_products = kNarrowProducts<S, E>;
  static constexpr int gates = Cell::gates;

  static int64_t blocks(int64_t columns) { return W::blocks(columns); }
  static Block block(const Backward& p, int64_t index) { return W::block(p.hidden, index); }

  static void layout(const Backward& p, const Plan& plan, int64_t* bytes) {
    constexpr auto size = static_cast<int64_t>(sizeof(T)), narrow_size = static_cast<int64_t>(sizeof(Operand));
    const int64_t hidden_size = W::narrow(p) ? static_cast<int64_t>(sizeof(E)) : size;
    bytes[kPackedHidden] = hidden_size * W::packed_elements(W::hidden(p, plan));
    bytes[kPackedInput] = narrow_size * W::packed_elements(W::input(p, plan));
    if (Cell::projects) bytes[kPackedProjection] = hidden_size * W::packed_elements(W::projection(p, plan));
    bytes[kRows] = size * plan.threads * W::own_rows(p, plan);
    bytes[kBias] = size * Cell::dgates * p.hidden;
    if (Cell::has_carry && !p.dgates_given) bytes[kCell] = size * p.batch * padded<S>(p.hidden);
    bytes[kGates0] = bytes[kGates1] = narrow_size * plan.chunk_rows * D::stride(p);
    if (narrow_products) bytes[kPairs] = narrow_size * packed_depth(plan.chunk_rows) * D::stride(p);
    bytes[kPanels] = narrow_size * plan.threads * W::kOwnPanels;
    if (!kSame<T, E> && !G::rounds_tiles(p, plan)) {
      if (p.dweight_ih.data != nullptr) bytes[kSumsInput] = size * gates * p.hidden * p.inputs;
      if (p.dweight_hh.data != nullptr) bytes[kSumsHidden] = size * gates * p.hidden * p.outputs;
      if (p.dweight_hr.data != nullptr) bytes[kSumsProjection] = size * p.outputs * p.hidden;
    }
  }

  static void begin(const Backward& p, const Plan& plan, const Share& share) {
    W::with_hidden_type(p, [&](auto type) {
      W::template pack_before<decltype(type)>(plan, W::hidden(p, plan), share);
      if constexpr (Cell::projects) W::template pack_before<decltype(type)>(plan, W::projection(p, plan), share);
    });
    W::template pack_before<Operand>(plan, W::input(p, plan), share);
    if (p.dgates_given) return;
    if constexpr (Cell::has_carry) {
      // The LSTM carries ∂L/∂c, and starts with that of c_n. The GRU's ∂L/∂h_n comes in place of the product.
      const int64_t units = padded<S>(p.hidden);
      const int64_t row_end = share_of(p.batch, share.rank + 1, share.size);
      for (int64_t row = share_of(p.batch, share.rank, share.size); row < row_end; ++row) {
        const E* first = Cell::has_cell ? row_or_null<E>(p.grad_c_n, row) : nullptr;
        copy_row<S>(first, p.hidden, region<T>(plan, kCell) + row * units);
      }
    }
  }

  static void sweep(const Backward& p, const Plan& plan, const Chunk& chunk, const Chunk& before, const Share& share) {
    if (p.dgates_given) return take_given(p, plan, chunk, share);
    const int tallest = Products<S, T, T>::rows(p.batch);
    const int64_t count = chunk.last - chunk.first;
    const int64_t own_blocks = share.block_end - share.block_begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = p.reverse ? chunk.first + i : chunk.last - 1 - i;
      const int64_t t_before = p.reverse ? t - 1 : t + 1;
      const int64_t active = active_rows(p, t), active_before = active_rows(p, t_before);
      const int64_t end = active < share.row_end ? active : share.row_end;
      const int64_t continuing = active_before < end ? active_before : end;
      const int64_t leaving = active_before < share.row_end ? active_before : share.row_end;
      const int64_t starting = continuing > share.row_begin ? continuing : share.row_begin;
      const Heights heights(continuing - share.row_begin, tallest), starting_heights(end - starting, tallest);
      // The dgates of the step before, of row 0.
      const Operand* dgates = active_before == 0 ? nullptr : D::at_step(p, plan, i == 0 ? before : chunk, t_before);
      // Sequences that had their first step just before, in a layer that runs backward.
      const int64_t first_to_leave = end > share.row_begin ? end : share.row_begin;
      if constexpr (Cell::projects) {
        const typename W::Weight hidden = W::hidden(p, plan);
        const int64_t blocks = W::blocks(hidden), last = share_of(blocks, share.member + 1, share.members);
        for (int64_t number = share_of(blocks, share.member, share.members); number < last; ++number) {
          const auto stretch = [&](int64_t row, int64_t row_end, const Heights& own, const Operand* before_them) {
            for (int64_t tile = 0; row < row_end; ++tile) {
              const int rows = own[tile];
              output_tile(p, plan, chunk, Place{t, row, rows, 0, 0, {}}, W::block(hidden, number), before_them);
              row += rows;
            }
          };
          stretch(share.row_begin, continuing, heights, dgates);
          stretch(starting, end, starting_heights, nullptr);
          if (p.dh0.data != nullptr) {
            leave(p, plan, {first_to_leave, leaving, number, number + 1}, dgates, share.rank);
          }
        }
        meet(share);
      }
      for (int64_t j = 0; j < own_blocks; ++j) {
        // To and fro, so that each step begins with the weights that the last one has left in the cache.
        const bool ascending = t % 2 == 0;
        const int64_t number = ascending ? share.block_begin + j : share.block_end - 1 - j;
        const Block b = block(p, number);
        const int turn = j + 1 == own_blocks || plan.hidden != Packing::before ? 0 : ascending ? 1 : -1;
        const Nearer next = j + 1 == own_blocks ? nearer(p, p.reverse ? t + 1 : t - 1, share) : Nearer{};
        int index = 0;
        const auto stretch = [&](int64_t row, int64_t last, const Heights& own, const Operand* before_them) {
          for (int64_t tile = 0; row < last; ++tile, ++index) {
            const int rows = own[tile];
            one_tile(p, plan, chunk, Place{t, row, rows, index, turn, next}, b, before_them);
            row += rows;
          }
        };
        stretch(share.row_begin, continuing, heights, dgates);
        stretch(starting, end, starting_heights, nullptr);
        if (!Cell::projects && p.dh0.data != nullptr) {
          leave(p, plan, {first_to_leave, leaving, number, number + 1}, dgates, share.rank);
        }
      }
      meet(share);
    }
  }

  static void products(const Backward& p, const Plan& plan, const Chunk& chunk, const Share& share) {
    G::products(p, plan, chunk, share);
  }

  static void end(const Backward& p, const Plan& plan, const Chunk& last, const Share& share) {
    const int rank = share.rank, size = share.size;
    const int64_t t = p.reverse ? p.steps - 1 : 0;
    const int64_t units = padded<S>(p.hidden);
    const int64_t row_begin = share_of(p.batch, rank, size), row_end = share_of(p.batch, rank + 1, size);
    if (p.dh0.data != nullptr) {
      const typename W::Part part = W::part_of(W::hidden(p, plan), active_rows(p, t), share);
      leave(p, plan, part, D::at_step(p, plan, last, t), rank);
    }
    if constexpr (Cell::has_cell) {
      for (int64_t row = row_begin; p.dc0.data != nullptr && row < row_end; ++row) {
        narrow_row<S>(region<T>(plan, kCell) + row * units, p.hidden, at<E>(p.dc0, row, 0), false);
      }
    }
    // Each thread rounds what it has added up itself, where it was not rounded tile by tile.
    if constexpr (!kSame<T, E>) {
      const int64_t gate_rows = G::rounds_tiles(p, plan) ? 0 : gates * p.hidden;
      for (int64_t row = share_of(gate_rows, rank, size); row < share_of(gate_rows, rank + 1, size); ++row) {
        if (p.dweight_ih.data != nullptr)
          narrow_row<S>(region<T>(plan, kSumsInput) + row * p.inputs, p.inputs, at<E>(p.dweight_ih, row, 0), false);
        if (p.dweight_hh.data != nullptr)
          narrow_row<S>(region<T>(plan, kSumsHidden) + row * p.outputs, p.outputs, at<E>(p.dweight_hh, row, 0), false);
      }
      const int64_t outputs = p.dweight_hr.data == nullptr || G::rounds_tiles(p, plan) ? 0 : p.outputs;
      for (int64_t row = share_of(outputs, rank, size); row < share_of(outputs, rank + 1, size); ++row) {
        narrow_row<S>(region<T>(plan, kSumsProjection) + row * p.hidden, p.hidden, at<E>(p.dweight_hr, row, 0), false);
      }
    }
    const int64_t columns = Cell::dgates * p.hidden;
    const int64_t first = share_of(columns, rank, size), end = share_of(columns, rank + 1, size);
    if (p.dbias_ih.data != nullptr) G::copy_bias(plan, first, end, 0, gates * p.hidden, p.dbias_ih, 0);
    if (p.dbias_hh.data != nullptr) {
      int64_t to = 0;
      for (const Segment& s : Cell::segment) {
        G::copy_bias(plan, first, end, s.begin * p.hidden, (s.begin + s.length) * p.hidden, p.dbias_hh, to);
        to += s.length * p.hidden;
      }
    }
  }

 private:
  // In place of a sweep.
  static void take_given(const Backward& p, const Plan& plan, const Chunk& chunk, const Share& share) {
    if (share.member > 0) return;
    for (int64_t t = chunk.first; t < chunk.last; ++t) {
      Operand* const to = D::at_step(p, plan, chunk, t);
      const int64_t active = active_rows(p, t), end = active < share.row_end ? active : share.row_end;
      for (int64_t row = share.row_begin; row < end; ++row) {
        copy_row<S>(at<const E>(p.dgates, p.offsets[t] + row, 0), Cell::dgates * p.hidden, to + row * D::stride(p));
      }
    }
  }

  // What a step will read of memory that nobody has touched for long.
  struct Stretch {
    const char* data = nullptr;
    int64_t lines = 0;
  };
  struct Nearer {
    Stretch saved, grad_y;
    // Where the lines begin that a product brings nearer, one at each k, while it has `depth` of them before it: of
    // one stretch or the other. Null: nothing is left.
    const char* for_tile(int64_t index, int64_t depth) const {
      const int64_t line = index * depth, after_saved = line - ceil_div(saved.lines, depth) * depth;
      if (line < saved.lines) return saved.data + line * 64;
      return after_saved < grad_y.lines ? grad_y.data + after_saved * 64 : nullptr;
    }
  };
  // Tile number `index` of those that use its panel, after which comes the panel `turn` places on, or `next`.
  struct Place {
    int64_t t, row;
    int rows;
    int index, turn;
    Nearer next;
  };
  // One vector of units of the place's rows: where its operands stand in the first of them. All of it fits registers,
  // where the operands themselves would have to be read again after each store, which might have changed them.
  struct Column {
    const E* grad_y;
    int64_t grad_y_stride;
    const E* saved;
    int64_t saved_stride, gate_stride;
    const E* y;
    int64_t y_stride;
    const T *cells, *grad_cells;
    int64_t cells_stride, grad_cells_stride;
    // The state before the step: of the step before in time, for so many rows, and else the layer's first.
    int64_t with_prev;
    const E* y_prev;
    const T* cells_prev;
    const E* first;
    int64_t first_stride;
    T* carry;
    int64_t carry_stride;
    Operand *dgates, *unprojected;
    int64_t dgates_stride;
  };
  // Of the share's rows of a step, if it is not too much to wait in the second cache.
  static Nearer nearer(const Backward& p, int64_t t, const Share& share) {
    constexpr int64_t most = 4096;
    const int64_t active = active_rows(p, t), end = active < share.row_end ? active : share.row_end;
    const auto stretch = [&](const Matrix& m) -> Stretch {
      const int64_t lines = (end - share.row_begin) * m.stride * static_cast<int64_t>(sizeof(E)) / 64;
      if (m.data == nullptr || lines <= 0 || lines > most) return {};
      return {reinterpret_cast<const char*>(at<const E>(m, p.offsets[t] + share.row_begin, 0)), lines};
    };
    return {stretch(p.saved), Cell::projects ? Stretch{} : stretch(p.grad_y)};
  }

  // tile = dgates W for a block of the weight's columns.
  static void recurrent_product(const Backward& p, const Plan& plan, const typename W::Weight& weight, const Block& b,
                                const Operand* dgates, const Place& place, T* tile) {
    W::with_hidden_type(p, [&](auto type) { product_with<decltype(type)>(p, plan, weight, b, dgates, place, tile); });
  }
  // P: the type of the packed weights.
  template <class P>
  static void product_with(const Backward& p, const Plan& plan, const typename W::Weight& weight, const Block& b,
                           const Operand* dgates, const Place& place, T* tile) {
    auto panel = W::template panel<P>(plan, weight, b);
    if (place.turn != 0) panel.ahead = panel.data + place.turn * packed_depth(weight.depth) * W::widest;
    const auto tile_product = Products<S, Operand, P>::find(p.batch, b.vectors, place.rows);
    const char* lines = place.next.for_tile(place.index, weight.depth);
    D::for_each_stretch(p, weight.factor, 0, weight.depth, [&](int64_t first, int64_t last, int64_t column) {
      const Left<Operand> left{dgates + column, D::stride(p), 1};
      const int64_t depth = last - first;
      auto own = panel.for_tile(place.index, depth);
      if (lines != nullptr) own.ahead = reinterpret_cast<const P*>(lines);
      tile_product(left, own, depth, tile, b.vectors * S::lanes, first > 0);
      if (lines != nullptr) lines += depth * 64;
      panel.data += depth * panel.stride;
      if (panel.ahead != nullptr) panel.ahead += depth * panel.stride;
    });
  }

  // Of the step before, or ∂L/∂h_n where there is none (null).
  static void product_or_last(const Backward& p, const Plan& plan, const Block& b, const Operand* dgates,
                              const Place& place, T* tile) {
    if (dgates != nullptr) {
      return recurrent_product(p, plan, W::hidden(p, plan), b, dgates + place.row * D::stride(p), place, tile);
    }
    for (int m = 0; m < place.rows; ++m) {
      const E* from = p.grad_h_n.data == nullptr ? nullptr : at<const E>(p.grad_h_n, place.row + m, b.first);
      pack_row<S>(from, b, tile + m * b.vectors * S::lanes);
    }
  }

  // ∂L/∂h of a projected h, to where its columns are.
  static void output_tile(const Backward& p, const Plan& plan, const Chunk& chunk, const Place& place, const Block& b,
                          const Operand* dgates) {
    alignas(64) T tile[Products<S, T, T>::max_rows * kMaxVectors * S::lanes];
    for (int m = 0; m < place.rows; ++m) {
      for (int v = 0; v < b.vectors; ++v)
        prefetch(p.grad_y, p.offsets[place.t] + place.row + m, b.first + v * S::lanes, sizeof(E));
    }
    product_or_last(p, plan, b, dgates, place, tile);
    Operand* to = D::at_step(p, plan, chunk, place.t) + place.row * D::stride(p) + D::of_output(p) + b.first;
    for (int m = 0; m < place.rows; ++m, to += D::stride(p)) {
      const E* grad_y = row_or_null<E>(p.grad_y, p.offsets[place.t] + place.row + m);
      for (int v = 0; v < b.vectors; ++v) {
        const int i = v * S::lanes;
        V dh = S::load(tile + m * b.vectors * S::lanes + i);
        if (grad_y != nullptr) dh = dh + load_present<S>(grad_y + b.first, b.present, i);
        with_lanes<S>(b.present - i, [&](const auto& lanes) { lanes.store(to + i, dh); });
      }
    }
  }

  // `dgates`: of the step before, row 0; null: there is none, and ∂L/∂h_n takes the place of the product. Where h is
  // projected, output_tile has seen to that.
  static void one_tile(const Backward& p, const Plan& plan, const Chunk& chunk, const Place& place, const Block& b,
                       const Operand* dgates) {
    alignas(64) T tile[Products<S, T, T>::max_rows * kMaxVectors * S::lanes];
    const int width = b.vectors * S::lanes;
    for (int m = 0; m < place.rows; ++m) {
      for (int v = 0; v < b.vectors; ++v) prefetch_row(p, place.t, place.row + m, b.first + v * S::lanes);
    }
    Operand* out = D::at_step(p, plan, chunk, place.t) + place.row * D::stride(p);
    if constexpr (Cell::projects) {
      recurrent_product(p, plan, W::projection(p, plan), b, out, place, tile);
    } else {
      product_or_last(p, plan, b, dgates, place, tile);
    }
    for (int v = 0; v < b.vectors; ++v) {
      const int64_t unit = b.first + v * S::lanes;
      const Column column = column_of(p, plan, place, unit, out + unit);
      const T* product = tile + v * S::lanes;
      with_lanes<S>(p.hidden - unit, [&](const auto& lanes) { finish(lanes, column, product, width, place.rows); });
    }
  }

  static void prefetch_row(const Backward& p, int64_t t, int64_t row, int64_t unit) {
    const int64_t flat = p.offsets[t] + row;
    for (int g = 0; g < Cell::saved; ++g) prefetch(p.saved, flat, g * p.hidden + unit, sizeof(E));
    if constexpr (!Cell::projects) prefetch(p.grad_y, flat, unit, sizeof(E));
    if constexpr (Cell::has_cell) prefetch(p.cells, flat, unit, sizeof(T));
    if constexpr (Cell::backward_reads_h) prefetch(p.y, flat, unit, sizeof(E));
  }

  static Column column_of(const Backward& p, const Plan& plan, const Place& place, int64_t unit, Operand* dgates) {
    const int64_t flat = p.offsets[place.t] + place.row, units = padded<S>(p.hidden);
    const int64_t t_prev = p.reverse ? place.t + 1 : place.t - 1;
    Column c{};
    if (!Cell::projects && p.grad_y.data != nullptr) c.grad_y = at<const E>(p.grad_y, flat, unit);
    c.grad_y_stride = p.grad_y.stride;
    if constexpr (Cell::saved > 0) {
      c.saved = at<const E>(p.saved, flat, unit);
      c.saved_stride = p.saved.stride;
    }
    c.gate_stride = p.hidden;
    if constexpr (Cell::backward_reads_h) c.y = at<const E>(p.y, flat, unit);
    c.y_stride = p.y.stride;
    if constexpr (Cell::has_cell) {
      c.cells = at<const T>(p.cells, flat, unit);
      c.cells_stride = p.cells.stride;
      if (p.grad_cells.data != nullptr) c.grad_cells = at<const T>(p.grad_cells, flat, unit);
      c.grad_cells_stride = p.grad_cells.stride;
    }
    c.with_prev = active_rows(p, t_prev) - place.row;
    if (c.with_prev > 0) {
      const int64_t flat_prev = p.offsets[t_prev] + place.row;
      if constexpr (Cell::backward_reads_h_prev) c.y_prev = at<const E>(p.y, flat_prev, unit);
      if constexpr (Cell::has_cell) c.cells_prev = at<const T>(p.cells, flat_prev, unit);
    }
    const Matrix& first = Cell::has_cell ? p.c0 : p.h0;
    if (first.data != nullptr) c.first = at<const E>(first, place.row, unit);
    c.first_stride = first.stride;
    if constexpr (Cell::has_carry) c.carry = region<T>(plan, kCell) + place.row * units + unit;
    c.carry_stride = units;
    c.dgates = dgates;
    if constexpr (Cell::projects) c.unprojected = dgates + D::unprojected(p);
    c.dgates_stride = D::stride(p);
    return c;
  }

  // `product`: the gradient that comes from the step before.
  template <class L>
  static void finish(const L lanes, const Column c, const T* product, int64_t product_stride, int rows) {
    for (int m = 0; m < rows; ++m) {
      StepBackward<V> s;
      s.dh = S::load(product + m * product_stride);
      if (c.grad_y != nullptr) s.dh = s.dh + lanes.load(c.grad_y + m * c.grad_y_stride);
#pragma GCC unroll 4
      for (int g = 0; g < Cell::saved; ++g) s.saved[g] = lanes.load(c.saved + m * c.saved_stride + g * c.gate_stride);
      if constexpr (Cell::backward_reads_h) s.h = lanes.load(c.y + m * c.y_stride);
      const V first = m < c.with_prev || c.first == nullptr ? V{} : lanes.load(c.first + m * c.first_stride);
      if constexpr (Cell::backward_reads_h_prev) {
        s.h_prev = m < c.with_prev ? lanes.load(c.y_prev + m * c.y_stride) : first;
      }
      if constexpr (Cell::has_cell) {
        s.c = lanes.load(c.cells + m * c.cells_stride);
        s.c_prev = m < c.with_prev ? lanes.load(c.cells_prev + m * c.cells_stride) : first;
      }
      if constexpr (Cell::has_carry) s.carry = S::load(c.carry + m * c.carry_stride);
      if constexpr (Cell::has_cell) {
        if (c.grad_cells != nullptr) s.carry = s.carry + lanes.load(c.grad_cells + m * c.grad_cells_stride);
      }
      Cell::template backward<Math>(s);
#pragma GCC unroll 4
      for (int g = 0; g < Cell::dgates; ++g) {
        lanes.store(c.dgates + m * c.dgates_stride + g * c.gate_stride, s.dgates[g]);
      }
      if constexpr (Cell::projects) lanes.store(c.unprojected + m * c.dgates_stride, s.h);
      if constexpr (Cell::has_carry) S::store(c.carry + m * c.carry_stride, s.carry);
    }
  }

  // ∂L/∂h0 of rows whose first step was the one that `dgates` (row 0) belong to.
  static void leave(const Backward& p, const Plan& plan, const typename W::Part& part, const Operand* dgates,
                    int rank) {
    const auto add_carry = [&](int64_t row, const Block& b, T* sums) {
      if constexpr (Cell::has_carry && !Cell::has_cell) {
        const T* carry = region<T>(plan, kCell) + row * padded<S>(p.hidden) + b.first;
        for (int i = 0; i < b.present; i += S::lanes) {
          with_lanes<S>(b.present - i, [&](const auto& lanes) {
            lanes.store(sums + i, lanes.load(sums + i) + lanes.load(carry + i));
          });
        }
      }
    };
    W::with_hidden_type(p, [&](auto type) {
      W::template product<decltype(type)>(p, plan, W::hidden(p, plan), dgates, p.batch, part, p.dh0, false, rank,
                                          add_carry);
    });
  }
};

}  // namespace
}  // namespace pyrnnfast
