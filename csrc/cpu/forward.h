// The forward pass: x W_ihᵀ and h W_hhᵀ, a tile at a time, and the cell's equations while the tile is in the first
// cache.
//
// The input's product comes first, for all rows of a chunk of steps. Weights are packed before, or, where each panel is
// used once (W_hh of a single step, W_ih of a single chunk), a panel at a time as it is used; where there are only a
// few rows in all, both are dot products with weights read where they lie. Or they are packed since an earlier call.
#pragma once

#include "../activations.h"
#include "../cells.h"
#include "rows.h"

namespace pyrnnfast {
namespace {

// E: the type of the operands in memory.
template <class Cell, class S, class E>
struct ForwardPass {
  using T = typename S::Scalar;
  using V = typename S::Value;
  using Math = VectorMath<S>;
  static constexpr int gates = Cell::gates;
  static constexpr bool narrow_products = kNarrowProducts<S, E>;
  using Operand = OperandOf<S, E>;
  // h is rounded between steps then, as y is: a cell that adds to h itself keeps it whole beside.
  static constexpr bool keeps_h = narrow_products && Cell::forward_reads_h_prev;
  // A tile is at most four vectors wide: the gates of one vector of units, or four vectors of units.
  static constexpr int unit_vectors = gates == 1 ? kMaxVectors : 1;

  // Columns of a whole panel.
  static constexpr int widest = gates * unit_vectors * S::lanes;

  static int64_t blocks(int64_t columns) { return ceil_div(columns, unit_vectors * S::lanes); }
  static Block block(const Forward& p, int64_t index) { return block_at<S>(p.hidden, unit_vectors, index); }

  // Of the columns of a projected h.
  static int64_t output_blocks(const Forward& p, const Plan& plan) {
    return ceil_div(p.outputs, plan.output_vectors * S::lanes);
  }
  static Block output_block(const Forward& p, const Plan& plan, int64_t index) {
    return block_at<S>(p.outputs, plan.output_vectors, index);
  }

  static bool packed(const Plan& plan) { return plan.hidden != Packing::in_place; }
  static bool at_use(const Plan& plan) { return plan.hidden == Packing::at_use; }
  static bool input_at_use(const Plan& plan) { return plan.input == Packing::at_use; }

  // Gates of one row in the order of the tiles: [block][gate][unit].
  static int64_t gates_stride(const Forward& p) { return gates * padded<S>(p.hidden); }
  static int64_t gates_offset(const Block& b) { return gates * b.first; }

  static bool has_recurrent_product(const Forward& p) { return p.steps > 1 || p.h0.data != nullptr; }
  // Small batches wait for the weights to arrive from memory: half as many bytes arrive in half the time.
  static bool narrow(const Forward& p) { return narrow_products || (!kSame<T, E> && p.batch < 8); }

  static void layout(const Forward& p, const Plan& plan, int64_t* bytes) {
    constexpr auto size = static_cast<int64_t>(sizeof(T)), narrow_size = static_cast<int64_t>(sizeof(Operand));
    const int64_t units = padded<S>(p.hidden), outputs = padded<S>(p.outputs);
    const int64_t hidden_size = narrow(p) ? static_cast<int64_t>(sizeof(E)) : size;
    if (packed(plan)) {
      const auto columns = [&](bool used_once) { return used_once ? plan.threads * widest : gates_stride(p); };
      if (has_recurrent_product(p)) {
        bytes[kPackedHidden] = hidden_size * packed_depth(p.outputs) * columns(at_use(plan));
      }
      if (Cell::projects) bytes[kPackedProjection] = hidden_size * packed_depth(p.hidden) * outputs;
      bytes[kPackedInput] = narrow_size * packed_depth(p.inputs) * columns(input_at_use(plan));
      bytes[kGates0] = size * plan.chunk_rows * gates_stride(p);
      if (!kSame<Operand, E>) bytes[kRows] = size * plan.chunk_rows * padded<S>(p.inputs);
    }
    bytes[kBias] = size * (gates_stride(p) + units);
    bytes[kState0] = bytes[kState1] = narrow_size * p.batch * outputs;
    if (Cell::projects) bytes[kUnprojected] = narrow_size * p.batch * units;
    if (Cell::has_cell || keeps_h) bytes[kCell] = size * p.batch * units;
  }

  static void begin(const Forward& p, const Plan& plan, const Share& share) {
    const Blocks own = blocks_to_pack(blocks(p.hidden), share);
    for (int64_t index = own.begin; index < own.end; ++index) {
      const Block b = block(p, index);
      if (plan.hidden == Packing::before && has_recurrent_product(p)) pack_hidden(p, plan, b, share.rank);
      if (plan.input == Packing::before) pack_input(p, plan, b, share.rank);
      add_biases(p, plan, b);
    }
    if constexpr (Cell::projects) pack_projection(p, plan, share);
    const int64_t units = padded<S>(p.hidden), outputs = padded<S>(p.outputs);
    const int64_t row_end = share_of(p.batch, share.rank + 1, share.size);
    for (int64_t row = share_of(p.batch, share.rank, share.size); row < row_end; ++row) {
      copy_row<S>(row_or_null<E>(p.h0, row), p.outputs, region<Operand>(plan, kState0) + row * outputs);
      // Sequences that start later than others find their first state there.
      copy_row<S>(row_or_null<E>(p.h0, row), p.outputs, region<Operand>(plan, kState1) + row * outputs);
      if constexpr (Cell::has_cell) {
        copy_row<S>(row_or_null<E>(p.c0, row), p.hidden, region<T>(plan, kCell) + row * units);
      }
      if constexpr (keeps_h) {
        copy_row<S>(row_or_null<E>(p.h0, row), p.hidden, region<T>(plan, kCell) + row * units);
      }
    }
  }

  // The input's product for the share's rows of a chunk, in the order of the tiles. Threads that share rows have each
  // its own units here, too, where these can be dealt out evenly: what one writes no other will read, and each reads
  // its part of the weights only. Else they share the rows.
  static void products(const Forward& p, const Plan& plan, const Chunk& chunk, const Share& share) {
    if (!packed(plan)) return;
    const int64_t base = p.offsets[chunk.first];
    Rows parts[kSteps];
    int count = 0;
    if (share.row_begin == 0 && share.row_end >= active_rows(p, chunk.first)) {
      // All rows of all steps lie together.
      parts[0] = {0, chunk_rows(p, chunk)};
      input_products(p, plan, chunk, parts, 1, share);
    } else {
      for (int64_t t = chunk.first; t < chunk.last; ++t) {
        const int64_t active = active_rows(p, t), end = active < share.row_end ? active : share.row_end;
        if (share.row_begin < end) parts[count++] = {p.offsets[t] - base + share.row_begin, end - share.row_begin};
        if (count == kSteps || (t + 1 == chunk.last && count > 0)) {
          input_products(p, plan, chunk, parts, count, share);
          count = 0;
        }
      }
    }
    if (!by_units(p, plan, share)) meet(share);
  }

  static void sweep(const Forward& p, const Plan& plan, const Chunk& chunk, const Chunk&, const Share& share) {
    const int tallest = Products<S, T, T>::rows(p.batch);
    const int64_t count = chunk.last - chunk.first;
    const int64_t own_blocks = share.block_end - share.block_begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = p.reverse ? chunk.last - 1 - i : chunk.first + i;
      const int64_t step = p.reverse ? p.steps - 1 - t : t;
      const int64_t active = active_rows(p, t);
      const int64_t end = active < share.row_end ? active : share.row_end;
      const int64_t going_on = active_rows(p, p.reverse ? t - 1 : t + 1);
      const Heights heights(end - share.row_begin, tallest);
      for (int64_t j = 0; j < own_blocks; ++j) {
        // To and fro, so that each step begins with the weights that the last one has left in the cache.
        const bool ascending = step % 2 == 0;
        const Block b = block(p, ascending ? share.block_begin + j : share.block_end - 1 - j);
        const int turn = j + 1 == own_blocks || at_use(plan) ? 0 : ascending ? 1 : -1;
        if (at_use(plan) && has_recurrent_product(p)) pack_hidden(p, plan, b, share.rank);
        int index = 0;
        for (int64_t row = share.row_begin; row < end; ++index) {
          const int rows = heights[index];
          one_tile(p, plan, Place{t, step, row, rows, p.offsets[chunk.first], going_on, index, turn, share.rank}, b);
          row += rows;
        }
      }
      if constexpr (Cell::projects) {
        meet(share);
        project(p, plan, Place{t, step, 0, 0, 0, going_on, 0, 0, share.rank}, heights, end, share);
      }
      meet(share);
    }
  }

  static void end(const Forward&, const Plan&, const Chunk&, const Share&) {}

 private:
  // Rows of a chunk that lie together.
  struct Rows {
    int64_t first, count;
  };
  static constexpr int kSteps = 64;

  // Rows of one step. `base` is the first row of the chunk; from `going_on` on, this is the last step of a sequence.
  // This is tile number `index` of those that use its panel, after which comes the panel `turn` places on, in thread
  // `rank`.
  struct Place {
    int64_t t, step, row;
    int rows;
    int64_t base, going_on;
    int index, turn, rank;
  };

  // The products of a column, gates `gate_stride` apart.
  struct RowProducts {
    const T* recurrent;
    int64_t recurrent_stride;
    const T* input;
    int64_t input_stride;
    int gate_stride;
  };

  // One vector of units of the place's rows: where its operands stand in the first of them. All of it fits registers,
  // where the operands themselves would have to be read again after each store, which might have changed them.
  struct Column {
    V bias[gates], bias_hn;
    const T* before;
    Operand* after;
    T* cell;
    int64_t state_stride;
    E* y;
    int64_t y_stride;
    E* saved;
    int64_t saved_stride, gate_stride;
    T* cells;
    int64_t cells_stride;
    // From row `ending` on, the last states are written as well.
    int64_t ending;
    E *h_n, *c_n;
    int64_t h_n_stride, c_n_stride;
  };

  // Where a panel of so many elements for each column begins: a thread has room for one if it packs them as it uses
  // them.
  static int64_t panel_offset(bool used_once, const Block& b, int64_t depth, int rank) {
    return packed_depth(depth) * (used_once ? rank * widest : gates_offset(b));
  }
  template <class P>
  static P* hidden_panel(const Forward& p, const Plan& plan, const Block& b, int rank) {
    return region<P>(plan, kPackedHidden) + panel_offset(at_use(plan), b, p.outputs, rank);
  }
  static Operand* input_panel(const Forward& p, const Plan& plan, const Block& b, int rank) {
    return region<Operand>(plan, kPackedInput) + panel_offset(input_at_use(plan), b, p.inputs, rank);
  }
  static void pack_hidden(const Forward& p, const Plan& plan, const Block& b, int rank) {
    const auto pack = [&](auto* panel) {
      pack_by_unit<S>(static_cast<const E*>(p.weight_hh.data), p.weight_hh.stride, gates, p.hidden, p.outputs, b,
                      panel);
    };
    if (narrow(p)) {
      pack(hidden_panel<E>(p, plan, b, rank));
    } else {
      pack(hidden_panel<T>(p, plan, b, rank));
    }
  }
  static void pack_input(const Forward& p, const Plan& plan, const Block& b, int rank) {
    pack_by_unit<S>(static_cast<const E*>(p.weight_ih.data), p.weight_ih.stride, gates, p.hidden, p.inputs, b,
                    input_panel(p, plan, b, rank));
  }

  static void add_biases(const Forward& p, const Plan& plan, const Block& b) {
    const int width = b.vectors * S::lanes;
    T* sum = region<T>(plan, kBias) + gates_offset(b);
    T* inner = region<T>(plan, kBias) + gates_stride(p) + b.first;
    for (int g = 0; g < gates; ++g) {
      const bool is_inner = Cell::has_bias_hn && g == gates - 1;
      const auto bias_of = [&](const Matrix& bias, int i) {
        const E* from = bias.data == nullptr ? nullptr : at<const E>(bias, 0, g * p.hidden + b.first);
        return load_present<S>(from, b.present, i);
      };
      for (int i = 0; i < width; i += S::lanes) {
        const V ih = bias_of(p.bias_ih, i), hh = bias_of(p.bias_hh, i);
        S::store(sum + g * width + i, is_inner ? ih : ih + hh);
        if (is_inner) S::store(inner + i, hh);
      }
    }
  }

  static void one_tile(const Forward& p, const Plan& plan, const Place& place, const Block& b) {
    alignas(64) T tile[Products<S, T, T>::max_rows * kMaxVectors * S::lanes];
    alignas(64) T input_tile[Products<S, T, T>::max_rows * kMaxVectors * S::lanes];
    const int width = gates * b.vectors * S::lanes;
    const int64_t flat = p.offsets[place.t] + place.row;
    const int64_t outputs = padded<S>(p.outputs);
    const Operand* before = region<Operand>(plan, place.step % 2 == 0 ? kState0 : kState1) + place.row * outputs;
    const Left<Operand> h{before, outputs, 1};

    const T* input = input_tile;
    int64_t input_stride = width;
    if (packed(plan)) {
      input = region<T>(plan, kGates0) + (flat - place.base) * gates_stride(p) + gates_offset(b);
      input_stride = gates_stride(p);
      for (int m = 0; m < place.rows; ++m) {
        for (int v = 0; v < gates * b.vectors; ++v) __builtin_prefetch(input + m * input_stride + v * S::lanes);
        if constexpr (Cell::projects) continue;
        for (int v = 0; v < b.vectors; ++v) __builtin_prefetch(at<E>(p.y, flat + m, b.first + v * S::lanes), 1);
      }
    } else {
      dot_tile(p, p.weight_ih, at<const E>(p.x, flat, 0), p.x.stride, p.inputs, place.rows, b, input_tile);
    }
    if (place.step == 0 && p.h0.data == nullptr) {
      for (int i = 0; i < place.rows * width; i += S::lanes) S::store(tile + i, V{});
    } else if (!packed(plan)) {
      dot_tile(p, p.weight_hh, h.data, outputs, p.outputs, place.rows, b, tile);
    } else if (narrow(p)) {
      recurrent_product<E>(p, plan, place, b, h, tile);
    } else if constexpr (!narrow_products) {
      recurrent_product<T>(p, plan, place, b, h, tile);
    }
    for (int v = 0; v < b.vectors; ++v) {
      const RowProducts products{tile + v * S::lanes, width, input + v * S::lanes, input_stride, b.vectors * S::lanes};
      const Column column = column_of(p, plan, place, b, v);
      with_lanes<S>(b.present - v * S::lanes, [&](const auto& lanes) { finish(lanes, column, products, place.rows); });
    }
  }

  template <class P>
  static void recurrent_product(const Forward& p, const Plan& plan, const Place& place, const Block& b,
                                const Left<Operand>& h, T* tile) {
    const int width = gates * b.vectors * S::lanes;
    const P* data = hidden_panel<P>(p, plan, b, place.rank);
    const Panel<P> panel{data, width, place.turn == 0 ? nullptr : data + place.turn * packed_depth(p.outputs) * width};
    Products<S, Operand, P>::find(p.batch, gates * b.vectors, place.rows)(h, panel.for_tile(place.index, p.outputs),
                                                                          p.outputs, tile, width, false);
  }

  // W_hr is used at every step by all rows, so it is packed before wherever W_hh is packed at all.
  template <class P>
  static P* projection_panel(const Forward& p, const Plan& plan, const Block& b) {
    return region<P>(plan, kPackedProjection) + packed_depth(p.hidden) * b.first;
  }
  static void pack_projection(const Forward& p, const Plan& plan, const Share& share) {
    if (!packed(plan) || plan.hidden == Packing::kept) return;
    const Blocks own = blocks_to_pack(output_blocks(p, plan), share);
    for (int64_t index = own.begin; index < own.end; ++index) {
      const Block b = output_block(p, plan, index);
      const auto pack = [&](auto* panel) {
        pack_by_unit<S>(static_cast<const E*>(p.weight_hr.data), p.weight_hr.stride, 1, p.outputs, p.hidden, b, panel);
      };
      if (narrow(p)) {
        pack(projection_panel<E>(p, plan, b));
      } else {
        pack(projection_panel<T>(p, plan, b));
      }
    }
  }

  // The projection of the share's rows of a step, up to row `end`; of its columns each member has some.
  static void project(const Forward& p, const Plan& plan, Place place, const Heights& heights, int64_t end,
                      const Share& share) {
    const int64_t blocks = output_blocks(p, plan), last = share_of(blocks, share.member + 1, share.members);
    for (int64_t index = share_of(blocks, share.member, share.members); index < last; ++index) {
      const Block b = output_block(p, plan, index);
      place.index = 0;
      for (place.row = share.row_begin; place.row < end; place.row += place.rows) {
        place.rows = heights[place.index++];
        project_tile(p, plan, place, b);
      }
    }
  }
  static void project_tile(const Forward& p, const Plan& plan, const Place& place, const Block& b) {
    alignas(64) T tile[Products<S, T, T>::max_rows * kMaxVectors * S::lanes];
    const int width = b.vectors * S::lanes;
    const int64_t units = padded<S>(p.hidden), outputs = padded<S>(p.outputs);
    const Left<Operand> h{region<Operand>(plan, kUnprojected) + place.row * units, units, 1};
    if (!packed(plan)) {
      dot_columns(p.weight_hr, b.first, h.data, units, p.hidden, place.rows, b, tile, width);
    } else if (narrow(p)) {
      const Panel<E> panel{projection_panel<E>(p, plan, b), width};
      Products<S, Operand, E>::find(p.batch, b.vectors, place.rows)(h, panel, p.hidden, tile, width, false);
    } else if constexpr (!narrow_products) {
      const Panel<T> panel{projection_panel<T>(p, plan, b), width};
      Products<S, Operand, T>::find(p.batch, b.vectors, place.rows)(h, panel, p.hidden, tile, width, false);
    }
    Operand* const after = region<Operand>(plan, place.step % 2 == 0 ? kState1 : kState0) + place.row * outputs;
    for (int m = 0; m < place.rows; ++m) {
      for (int v = 0; v < b.vectors; ++v) {
        const int64_t unit = b.first + v * S::lanes;
        const V value = S::load(tile + m * width + v * S::lanes);
        S::store(after + m * outputs + unit, value);
        with_lanes<S>(p.outputs - unit, [&](const auto& lanes) {
          lanes.store(at<E>(p.y, p.offsets[place.t] + place.row + m, unit), value);
          if (place.row + m >= place.going_on) lanes.store(at<E>(p.h_n, place.row + m, unit), value);
        });
      }
    }
  }

  static bool by_units(const Forward& p, const Plan& plan, const Share& share) {
    return input_at_use(plan) || padded<S>(p.hidden) % (share.members * unit_vectors * S::lanes) == 0;
  }

  static void input_products(const Forward& p, const Plan& plan, const Chunk& chunk, const Rows* parts, int count,
                             const Share& share) {
    const int64_t base = p.offsets[chunk.first], whole = chunk_rows(p, chunk);
    const Matrix rows = x_of(p, plan, base, parts, count, share);
    const bool all_rows = by_units(p, plan, share);
    const int64_t last_block = all_rows ? share.block_end : blocks(p.hidden);
    for (int64_t index = all_rows ? share.block_begin : 0; index < last_block; ++index) {
      const Block b = block(p, index);
      const int width = gates * b.vectors * S::lanes;
      if (input_at_use(plan)) pack_input(p, plan, b, share.rank);
      for (int64_t k = 0; k < p.inputs; k += kDepth) {
        const int64_t depth = p.inputs - k < kDepth ? p.inputs - k : kDepth;
        // The next panel lies behind this one.
        const Operand* data = input_panel(p, plan, b, share.rank) + k * width;
        const bool is_last = (index + 1 == last_block || input_at_use(plan)) && k + depth == p.inputs;
        const Panel<Operand> panel{data, width, is_last ? nullptr : data + depth * width};
        for (int i = 0; i < count; ++i) {
          const Rows part = all_rows ? parts[i] : own_part(parts[i], i, count, share);
          const Left<Operand> x{at<const Operand>(rows, part.first, k), rows.stride, 1};
          T* out = region<T>(plan, kGates0) + part.first * gates_stride(p) + gates_offset(b);
          multiply<S>(x, part.count, whole, panel, width, depth, out, gates_stride(p), k > 0);
        }
      }
    }
  }

  // Of several parts, which are low, members take turns.
  static Rows own_part(const Rows& part, int index, int count, const Share& share) {
    if (count > 1) return {part.first, index % share.members == share.member ? part.count : 0};
    const int64_t begin = share_of(part.count, share.member, share.members);
    return {part.first + begin, share_of(part.count, share.member + 1, share.members) - begin};
  }

  // Rows of x as the products want them: where they lie, or widened, to which all who share them contribute. Row 0 is
  // the first of the chunk.
  static Matrix x_of(const Forward& p, const Plan& plan, int64_t base, const Rows* parts, int count,
                     const Share& share) {
    if constexpr (kSame<Operand, E>) {
      return {at<E>(p.x, base, 0), p.x.stride};
    } else {
      const Matrix wide{region<T>(plan, kRows), padded<S>(p.inputs)};
      for (int i = 0; i < count; ++i) {
        const int64_t end = share_of(parts[i].count, share.member + 1, share.members);
        for (int64_t m = share_of(parts[i].count, share.member, share.members); m < end; ++m) {
          const int64_t row = parts[i].first + m;
          copy_row<S>(at<const E>(p.x, base + row, 0), p.inputs, at<T>(wide, row, 0));
        }
      }
      meet(share);
      return wide;
    }
  }

  // The tile of rows a[m] with weights read where they lie.
  template <class A>
  static void dot_tile(const Forward& p, const Matrix& weight, const A* a, int64_t a_stride, int64_t depth, int rows,
                       const Block& b, T* tile) {
    const int width = gates * b.vectors * S::lanes;
    for (int g = 0; g < gates; ++g) {
      dot_columns(weight, g * p.hidden + b.first, a, a_stride, depth, rows, b, tile + g * b.vectors * S::lanes, width);
    }
  }
  // A block's columns of one, from row `first` of the weight on.
  template <class A>
  static void dot_columns(const Matrix& weight, int64_t first, const A* a, int64_t a_stride, int64_t depth, int rows,
                          const Block& b, T* tile, int tile_stride) {
    const auto of_rows = dots_of<S, A, E>(rows);
    for (int v = 0; v < b.vectors; ++v) {
      const int left = b.present - v * S::lanes, present = left < S::lanes ? left : S::lanes;
      of_rows(a, a_stride, at<const E>(weight, first + v * S::lanes, 0), weight.stride, present, depth,
              tile + v * S::lanes, tile_stride);
    }
  }

  static Column column_of(const Forward& p, const Plan& plan, const Place& place, const Block& b, int v) {
    const int64_t flat = p.offsets[place.t] + place.row;
    const int64_t unit = b.first + v * S::lanes, units = padded<S>(p.hidden), state = place.row * units + unit;
    const bool even = place.step % 2 == 0;
    Column c{};
    const T* bias = region<T>(plan, kBias) + gates_offset(b) + v * S::lanes;
    for (int g = 0; g < gates; ++g) c.bias[g] = S::load(bias + g * b.vectors * S::lanes);
    if constexpr (Cell::has_bias_hn) c.bias_hn = S::load(region<T>(plan, kBias) + gates_stride(p) + unit);
    c.before = region<T>(plan, keeps_h ? kCell : even ? kState0 : kState1) + state;
    c.after = region<Operand>(plan, Cell::projects ? kUnprojected : even ? kState1 : kState0) + state;
    c.state_stride = units;
    if constexpr (!Cell::projects) {
      c.y = at<E>(p.y, flat, unit);
      c.h_n = at<E>(p.h_n, place.row, unit);
    }
    c.y_stride = p.y.stride;
    if (p.saved.data != nullptr) c.saved = at<E>(p.saved, flat, unit);
    c.saved_stride = p.saved.stride;
    c.gate_stride = p.hidden;
    c.ending = place.going_on - place.row;
    c.h_n_stride = p.h_n.stride;
    if constexpr (Cell::has_cell || keeps_h) c.cell = region<T>(plan, kCell) + state;
    if constexpr (Cell::has_cell) {
      if (p.cells.data != nullptr) c.cells = at<T>(p.cells, flat, unit);
      c.cells_stride = p.cells.stride;
      c.c_n = at<E>(p.c_n, place.row, unit);
      c.c_n_stride = p.c_n.stride;
    }
    return c;
  }

  template <class L>
  static void finish(const L lanes, const Column c, const RowProducts product, int rows) {
    for (int m = 0; m < rows; ++m) {
      const T* input = product.input + m * product.input_stride;
      const T* recurrent = product.recurrent + m * product.recurrent_stride;
      StepForward<V> s;
#pragma GCC unroll 4
      for (int g = 0; g < gates; ++g) {
        s.x[g] = S::load(input + g * product.gate_stride) + c.bias[g];
        s.a[g] = S::load(recurrent + g * product.gate_stride);
      }
      s.bias_hn = c.bias_hn;
      if constexpr (Cell::forward_reads_h_prev) s.h_prev = S::load(c.before + m * c.state_stride);
      if constexpr (Cell::has_cell) s.c_prev = S::load(c.cell + m * c.state_stride);
      Cell::template forward<Math>(s);
      S::store(c.after + m * c.state_stride, s.h);
      if constexpr (keeps_h) S::store(c.cell + m * c.state_stride, s.h);
      if constexpr (!Cell::projects) {
        lanes.store(c.y + m * c.y_stride, s.h);
        if (m >= c.ending) lanes.store(c.h_n + m * c.h_n_stride, s.h);
      }
      if constexpr (Cell::has_cell) {
        S::store(c.cell + m * c.state_stride, s.c);
        if (m >= c.ending) lanes.store(c.c_n + m * c.c_n_stride, s.c);
        if (c.cells != nullptr) lanes.store(c.cells + m * c.cells_stride, s.c);
      }
      if (c.saved != nullptr) {
#pragma GCC unroll 4
        for (int g = 0; g < Cell::saved; ++g) lanes.store(c.saved + m * c.saved_stride + g * c.gate_stride, s.saved[g]);
      }
    }
  }
};

}  // namespace
}  // namespace pyrnnfast
