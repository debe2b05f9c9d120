// What a chunk of dgates gives once it is there: dx of its rows, and its part of dW_ih, dW_hh and the biases'
// gradients, while it is in the cache. dgates are never written to memory as a whole. And products with a weight,
// whatever of it is packed, as dx and dh0 are.
#pragma once

#include "../cells.h"
#include "rows.h"

namespace pyrnnfast {
namespace {

// E: the type of the operands in memory.
template <class Cell, class S, class E>
struct Gradients {
  using T = typename S::Scalar;
  using V = typename S::Value;
  static constexpr int gates = Cell::gates;
  static constexpr bool narrow_products = kNarrowProducts<S, E>;
  using Operand = OperandOf<S, E>;

  // A cache line more than a row needs: rows a power of two apart would fall upon one another in the caches.
  static int64_t dgates_stride(const Backward& p) {
    return padded<S>(Cell::dgates * p.hidden) + 64 / static_cast<int64_t>(sizeof(Operand));
  }

  static bool wants_packing(const Plan& plan, Region r) { return r == kPackedHidden ? plan.packed : plan.input_packed; }
  // Whether all panels are packed in memory before the pass. One that is used once is packed by the thread that uses
  // it, a stretch at a time, and stays in its second cache; but threads that cannot share panels evenly share rows, and
  // would all pack all panels.
  static bool packed(const Backward& p, const Plan& plan, Region r) {
    const bool once = r == kPackedHidden ? p.steps == 1 : p.offsets[p.steps] <= plan.chunk_rows;
    const int64_t blocks = ceil_div(r == kPackedHidden ? p.hidden : p.inputs, kMaxVectors * S::lanes);
    return wants_packing(plan, r) && !(once && deal_evenly(blocks, plan.threads));
  }
  // Whether, instead, each whole panel is packed where it is used.
  static bool packs_at_use(const Backward& p, const Plan& plan, Region r) {
    return wants_packing(plan, r) && !packed(p, plan, r);
  }
  // Whether a block of columns is read where it lies.
  static bool lies_ready(const Plan& plan, Region r, const Block& b) {
    return kSame<T, E> && !wants_packing(plan, r) && b.present == b.vectors * S::lanes;
  }
  template <class P>
  static P* packed_panel(const Backward& p, const Plan& plan, Region r, const Block& b) {
    return region<P>(plan, r) + (packed(p, plan, r) ? packed_depth(gates * p.hidden) * b.first : 0);
  }
  template <class P>
  static Panel<P> panel(const Backward& p, const Plan& plan, const Matrix& weight, Region r, const Block& b) {
    if constexpr (kSame<T, E>) {
      if (lies_ready(plan, r, b)) return {at<const P>(weight, 0, b.first), weight.stride};
    }
    return {packed_panel<P>(p, plan, r, b), b.vectors * S::lanes};
  }
  template <class P>
  static void pack(const Backward& p, const Matrix& weight, const Block& b, P* to) {
    pack_by_column<S>(static_cast<const E*>(weight.data), weight.stride, gates * p.hidden, b, to);
  }

  // Whether dW is rounded tile by tile: one product sums up all rows. Else float32 sums of it are kept until the end.
  static bool rounds_tiles(const Backward& p, const Plan& plan) {
    const int64_t rows = p.offsets[p.steps];
    return !kSame<T, E> && rows <= plan.chunk_rows && rows <= kDepth;
  }

  // A thread's own panel of one stretch.
  static Operand* own_panel(const Plan& plan, int rank) {
    return region<Operand>(plan, kPanels) + rank * kDepth * kMaxVectors * S::lanes;
  }

  // What a thread has of a product: rows × blocks of columns.
  struct Part {
    int64_t row_begin, row_end, block_begin, block_end;
    static Part of_rows(int64_t rows, int64_t blocks, const Share& s) {
      return {share_of(rows, s.rank, s.size), share_of(rows, s.rank + 1, s.size), 0, blocks};
    }
    static Part of_blocks(int64_t rows, int64_t blocks, const Share& s) {
      return {0, rows, share_of(blocks, s.rank, s.size), share_of(blocks, s.rank + 1, s.size)};
    }
  };

  // A thread's room for one block of columns of a strip of rows that such a product has.
  static constexpr int64_t kStripRows = kDepth;
  static int64_t own_rows_bytes(const Backward& p, const Plan& plan) {
    const int64_t rows = p.dx.data != nullptr && !kSame<T, E> ? plan.chunk_rows : p.dh0.data != nullptr ? p.batch : 0;
    return (rows < kStripRows ? rows : kStripRows) * kMaxVectors * S::lanes * static_cast<int64_t>(sizeof(T));
  }
  static T* own_rows(const Backward& p, const Plan& plan, int rank) {
    return region<T>(plan, kRows) + rank * own_rows_bytes(p, plan) / static_cast<int64_t>(sizeof(T));
  }

  // Rows of dgates times one block of columns of a weight, to `columns` columns of `out`. P: the type of packed
  // weights. `whole`: how many rows all threads have together (multiply).
  template <class P>
  static void through_weight(const Backward& p, const Plan& plan, const Operand* dgates, int64_t rows, int64_t whole,
                             Region r, const Block& b, int columns, int rank, T* out, int64_t out_stride, bool add) {
    const bool recurrent = r == kPackedHidden;
    const Matrix& weight = recurrent ? p.weight_hh : p.weight_ih;
    const bool ready = packed(p, plan, r) || lies_ready(plan, r, b) || (recurrent && p.steps > 1);
    P* const own = static_cast<P*>(static_cast<void*>(own_panel(plan, rank)));
    const Panel<P> there = ready ? panel<P>(p, plan, weight, r, b) : Panel<P>{own, b.vectors * S::lanes};
    for_each_stretch(p, recurrent, 0, gates * p.hidden, [&](int64_t first, int64_t last, int64_t column) {
      for (int64_t k = first; k < last; k += kDepth) {
        const int64_t depth = last - k < kDepth ? last - k : kDepth;
        Panel<P> stretch = there;
        if (ready) {
          stretch.data += k * there.stride;
          // The next stretch lies behind this one, where they are packed.
          if (packed(p, plan, r)) stretch.ahead = stretch.data + depth * there.stride;
        } else {
          pack_by_column<S>(at<const E>(weight, k, 0), weight.stride, depth, b, own);
        }
        multiply<S>(Left<Operand>{dgates + column + k - first, dgates_stride(p), 1}, rows, whole, stretch, columns,
                    depth, out, out_stride, add || k > 0);
      }
    });
  }

  static Operand* dgates_at(const Backward& p, const Plan& plan, const Chunk& chunk, int64_t t) {
    Operand* rows = region<Operand>(plan, chunk.index % 2 == 0 ? kGates0 : kGates1);
    return rows + (p.offsets[t] - p.offsets[chunk.first]) * dgates_stride(p);
  }

  // h of the step before in time's order of the layer, null for zeros.
  static const E* previous_h(const Backward& p, int64_t t, int64_t row) {
    const int64_t t_prev = p.reverse ? t + 1 : t - 1;
    return row < active_rows(p, t_prev) ? at<const E>(p.y, p.offsets[t_prev] + row, 0) : row_or_null<E>(p.h0, row);
  }

  static void products(const Backward& p, const Plan& plan, const Chunk& chunk, const Share& share) {
    const int rank = share.rank, size = share.size;
    const int64_t rows = chunk_rows(p, chunk);
    const Operand* dgates = dgates_at(p, plan, chunk, chunk.first);
    if (p.dx.data != nullptr) input_gradient(p, plan, chunk, dgates, share);
    if (p.dgates.data != nullptr) {
      for (int64_t row = share_of(rows, rank, size); row < share_of(rows, rank + 1, size); ++row) {
        narrow_row<S>(dgates + row * dgates_stride(p), Cell::dgates * p.hidden,
                      at<E>(p.dgates, p.offsets[chunk.first] + row, 0), false);
      }
    }
    const bool again = chunk.index > 0;
    if constexpr (narrow_products) pair_rows(p, plan, dgates, rows, rank, size);
    if (p.dweight_ih.data != nullptr) {
      const auto source = [&](const Cursor& at_row) { return at<const E>(p.x, at_row.flat, 0); };
      weight_gradient(p, plan, chunk, dgates, source, p.inputs, false, p.dweight_ih,
                      Sums{sums(p.dweight_ih, plan, kSumsInput), sums_stride(p.dweight_ih, p.inputs), again}, rank,
                      size);
    }
    if (p.dweight_hh.data != nullptr) {
      const auto source = [&](const Cursor& at_row) { return previous_h(p, at_row.t, at_row.row); };
      weight_gradient(p, plan, chunk, dgates, source, p.hidden, true, p.dweight_hh,
                      Sums{sums(p.dweight_hh, plan, kSumsHidden), sums_stride(p.dweight_hh, p.hidden), again}, rank,
                      size);
    }
    if (p.dbias_ih.data != nullptr || p.dbias_hh.data != nullptr) {
      const int64_t columns = Cell::dgates * p.hidden;
      add_up(dgates, dgates_stride(p), rows, share_of(columns, rank, size), share_of(columns, rank + 1, size), again,
             region<T>(plan, kBias));
    }
  }

  // The sums of the columns [begin, end) as far as they lie in [low, high), to `out` from column `to` on.
  static void copy_bias(const Plan& plan, int64_t begin, int64_t end, int64_t low, int64_t high, const Matrix& out,
                        int64_t to) {
    if (begin < low) begin = low;
    if (end > high) end = high;
    if (begin < end) {
      narrow_row<S>(region<T>(plan, kBias) + begin, end - begin, at<E>(out, 0, to + begin - low), false);
    }
  }

 private:
  // dx = dgates W_ih of the chunk: where threads pack panels as they use them, each has some columns of it, else some
  // rows.
  static void input_gradient(const Backward& p, const Plan& plan, const Chunk& chunk, const Operand* dgates,
                             const Share& share) {
    const int64_t rows = chunk_rows(p, chunk), blocks = ceil_div(p.inputs, kMaxVectors * S::lanes);
    const Part part =
        packs_at_use(p, plan, kPackedInput) ? Part::of_blocks(rows, blocks, share) : Part::of_rows(rows, blocks, share);
    if (part.row_begin == part.row_end) return;
    const int64_t flat = p.offsets[chunk.first] + part.row_begin, count = part.row_end - part.row_begin;
    const Operand* left = dgates + part.row_begin * dgates_stride(p);
    for (int64_t index = part.block_begin; index < part.block_end; ++index) {
      const Block b = block_at<S>(p.inputs, kMaxVectors, index);
      if constexpr (kSame<T, E>) {
        through_weight<T>(p, plan, left, count, rows, kPackedInput, b, b.present, share.rank,
                          at<T>(p.dx, flat, b.first), p.dx.stride, p.add_to_dx);
      } else {
        T* sums = own_rows(p, plan, share.rank);
        const int width = b.vectors * S::lanes;
        for (int64_t first = 0; first < count; first += kStripRows) {
          const int64_t strip = count - first < kStripRows ? count - first : kStripRows;
          through_weight<Operand>(p, plan, left + first * dgates_stride(p), strip, rows, kPackedInput, b, width,
                                  share.rank, sums, width, false);
          for (int64_t i = 0; i < strip; ++i) {
            narrow_row<S>(sums + i * width, b.present, at<E>(p.dx, flat + first + i, b.first), p.add_to_dx);
          }
        }
      }
    }
  }

  // A row of the data: row `row` of step t.
  struct Cursor {
    int64_t flat, t, row;
  };
  // A sum in the making: the first time it is written, then added to.
  struct Sums {
    T* data;
    int64_t stride;
    bool again;
  };

  static T* sums(const Matrix& gradient, const Plan& plan, Region r) {
    return kSame<T, E> ? static_cast<T*>(gradient.data) : region<T>(plan, r);
  }
  static int64_t sums_stride(const Matrix& gradient, int64_t columns) {
    return kSame<T, E> ? gradient.stride : columns;
  }

  // Rows begin … end − 1 of dW, with the columns of dgates that are theirs: fn(first row, last row + 1, first column).
  template <class Fn>
  static void for_each_stretch(const Backward& p, bool recurrent, int64_t begin, int64_t end, const Fn& fn) {
    int64_t row = 0;
    for (int i = 0; i < (recurrent ? Cell::segments : 1); ++i) {
      const int64_t column = recurrent ? Cell::segment[i].begin * p.hidden : 0;
      const int64_t length = (recurrent ? Cell::segment[i].length : gates) * p.hidden;
      const int64_t first = begin > row ? begin : row, last = end < row + length ? end : row + length;
      if (first < last) fn(first, last, column + first - row);
      row += length;
    }
  }

  // Pairs of rows of dgates side by side, as dW's sums over rows want them: the columns of a thread's rows of dW, and
  // not an element of another thread's.
  static void pair_rows(const Backward& p, const Plan& plan, const Operand* dgates, int64_t rows, int rank, int size) {
    const int64_t begin = share_of(gates * p.hidden, rank, size), end = share_of(gates * p.hidden, rank + 1, size);
    const auto pair = [&](int64_t first, int64_t last, int64_t column) {
      const int64_t count = last - first, whole = count - count % S::lanes;
      for (int64_t row = 0; row < rows; row += 2) {
        const Operand* even = dgates + row * dgates_stride(p) + column;
        const Operand* odd = row + 1 < rows ? even + dgates_stride(p) : nullptr;
        Operand* to = region<Operand>(plan, kPairs) + row * dgates_stride(p) + 2 * column;
        pack_row_pair<S>(even, odd, Block{0, static_cast<int>(whole / S::lanes), static_cast<int>(whole)}, to);
        for (int64_t i = whole; i < count; ++i) {
          to[2 * i] = even[i];
          to[2 * i + 1] = odd == nullptr ? Operand{} : odd[i];
        }
      }
    };
    pair(begin, end, begin);
    for_each_stretch(p, true, begin, end, [&](int64_t first, int64_t last, int64_t column) {
      if (column != first) pair(first, last, column);
    });
  }

  // Those columns as the left operand: element [column, row].
  static Left<Operand> transposed(const Backward& p, const Plan& plan, const Operand* dgates, int64_t row,
                                  int64_t column) {
    const int64_t at_row = row * dgates_stride(p);
    if constexpr (narrow_products) {
      return {region<Operand>(plan, kPairs) + at_row + 2 * column, 2, dgates_stride(p)};
    } else {
      return {dgates + at_row + column, 1, dgates_stride(p)};
    }
  }

  // The first of `count` rows that next() gives, if each lies behind the one before; else null.
  template <class Next>
  static const E* together(const Next& next, int64_t count, int64_t width) {
    const E* const first = next();
    for (int64_t i = 1; i < count && first != nullptr; ++i) {
      if (next() != first + i * width) return nullptr;
    }
    return first;
  }

  // Rows of dW that stay in the first cache: a few whole tiles.
  static constexpr int64_t kSliceRows = 8 * Products<S, Operand, Operand>::max_rows;

  // Some rows of one panel's columns of dW, of all rows of the data, rounded while they are in the first cache.
  static void rounded_product(const Backward& p, const Left<Operand>& left, int64_t rows, const Panel<Operand>& panel,
                              int columns, int64_t depth, E* out, int64_t out_stride) {
    constexpr int64_t width = kMaxVectors * S::lanes;
    alignas(64) T tiles[kSliceRows * width];
    for (int64_t first = 0; first < rows; first += kSliceRows) {
      const int64_t count = rows - first < kSliceRows ? rows - first : kSliceRows;
      multiply<S>(Left<Operand>{left.data + first * left.row, left.row, left.depth}, count, gates * p.hidden, panel,
                  static_cast<int>(panel.stride), depth, tiles, width, false);
      for (int64_t i = 0; i < count; ++i) {
        narrow_row<S>(tiles + i * width, columns, out + (first + i) * out_stride, false);
      }
    }
  }

  // dW += dgatesᵀ rows, where source(cursor) is a row of `columns` elements, or null for zeros. Where whole panels
  // can be dealt out evenly, each thread has some columns of dW; else some rows, and packs all panels for itself. What
  // is rounded goes by rows: each thread has paired columns of dgates for its own, and rounds in the end what it has
  // added up elsewhere than in dW itself (`out`).
  template <class Source>
  static void weight_gradient(const Backward& p, const Plan& plan, const Chunk& chunk, const Operand* dgates,
                              const Source& source, int64_t columns, bool recurrent, const Matrix& gradient,
                              const Sums& out, int rank, int size) {
    const int64_t blocks = ceil_div(columns, kMaxVectors * S::lanes);
    const bool by_columns = kSame<T, E> && columns % (size * kMaxVectors * S::lanes) == 0;
    const int64_t first_block = by_columns ? blocks / size * rank : 0;
    const int64_t last_block = by_columns ? first_block + blocks / size : blocks;
    const int64_t begin = by_columns ? 0 : share_of(gates * p.hidden, rank, size);
    const int64_t end = by_columns ? gates * p.hidden : share_of(gates * p.hidden, rank + 1, size);
    Operand* const packed = own_panel(plan, rank);
    const int64_t rows = chunk_rows(p, chunk);
    Cursor start{p.offsets[chunk.first], chunk.first, 0};
    for (int64_t k = 0; k < rows; k += kDepth) {
      const int64_t depth = rows - k < kDepth ? rows - k : kDepth;
      // Of few rows, as many panels at once as there is room for: dW is written along its rows then, some at a time,
      // and not down a panel, where narrow rows are one or two cache lines.
      const int64_t room = packed_depth(depth) * kMaxVectors * S::lanes;
      const int64_t several = kSame<T, E> ? 1 : kDepth / packed_depth(depth);
      Cursor after = start;
      for (int64_t group = first_block; group < last_block; group += several) {
        const int64_t group_end = group + several < last_block ? group + several : last_block;
        const Operand* panels = packed;
        for (int64_t index = group; index < group_end; ++index) {
          const Block b = block_at<S>(columns, kMaxVectors, index);
          const int width = b.vectors * S::lanes;
          const auto next = [&] {
            const E* from = source(after);
            ++after.flat;
            if (++after.row == active_rows(p, after.t)) {
              ++after.t;
              after.row = 0;
            }
            return from == nullptr ? nullptr : from + b.first;
          };
          after = start;
          if constexpr (kSame<T, E>) {
            // Rows of the only panel's width that lie beside one another are as it wants them.
            const E* ready = width == columns ? together(next, depth, width) : nullptr;
            if (ready != nullptr) {
              panels = ready;
              continue;
            }
            after = start;
          }
          pack_rows(next, b, depth, packed + (index - group) * room);
        }
        const int64_t slice = group_end - group > 1 ? kSliceRows : end - begin;
        for (int64_t row = begin; row < end; row += slice) {
          const int64_t slice_end = row + slice < end ? row + slice : end;
          for (int64_t index = group; index < group_end; ++index) {
            const Block b = block_at<S>(columns, kMaxVectors, index);
            const Panel<Operand> panel{panels + (index - group) * room, b.vectors * S::lanes};
            for_each_stretch(p, recurrent, row, slice_end, [&](int64_t first, int64_t last, int64_t column) {
              const Left<Operand> left = transposed(p, plan, dgates, k, column);
              if constexpr (!kSame<T, E>) {
                if (rounds_tiles(p, plan)) {
                  return rounded_product(p, left, last - first, panel, b.present, depth,
                                         at<E>(gradient, first, b.first), gradient.stride);
                }
              }
              multiply<S>(left, last - first, gates * p.hidden, panel, b.present, depth,
                          out.data + first * out.stride + b.first, out.stride, out.again || k > 0);
            });
          }
        }
      }
      start = after;
    }
  }

  // A panel of the rows that next() gives, or of pairs of them.
  template <class Next>
  static void pack_rows(const Next& next, const Block& b, int64_t depth, Operand* panel) {
    const int width = b.vectors * S::lanes;
    for (int64_t i = 0; i < depth; ++i) {
      if constexpr (narrow_products) {
        const E* even = next();
        pack_row_pair<S>(even, i + 1 < depth ? next() : nullptr, b, panel + i * width);
        ++i;
      } else {
        pack_row<S>(next(), b, panel + i * width);
      }
    }
  }

  // sums[column] (+)= Σ over rows, for columns begin … end − 1.
  static void add_up(const Operand* rows, int64_t stride, int64_t count, int64_t begin, int64_t end, bool again,
                     T* sums) {
    for (int64_t column = begin; column < end; column += S::lanes) {
      with_lanes<S>(end - column, [&](const auto& lanes) {
        V total{};
        for (int64_t i = 0; i < count; ++i) total = total + lanes.load(rows + i * stride + column);
        lanes.store(sums + column, again ? lanes.load(sums + column) + total : total);
      });
    }
  }
};

}  // namespace
}  // namespace pyrnnfast
