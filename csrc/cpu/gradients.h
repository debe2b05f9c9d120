// What a chunk of dgates gives once it is there: dx of its rows, and its part of dW_ih, dW_hh and the biases'
// gradients, while it is in the cache. dgates are never written to memory as a whole.
#pragma once

#include "through_weights.h"

namespace pyrnnfast {
namespace {

// E: the type of the operands in memory.
template <class Cell, class S, class E>
struct Gradients {
  using T = typename S::Scalar;
  using V = typename S::Value;
  using D = Dgates<Cell, S, E>;
  using W = ThroughWeights<Cell, S, E>;
  using Operand = typename D::Operand;
  static constexpr int gates = Cell::gates;
  static constexpr bool narrow_products = kNarrowProducts<S, E>;

  // Whether dW is rounded tile by tile: one product sums up all rows. Else float32 sums of it are kept until the end.
  static bool rounds_tiles(const Backward& p, const Plan& plan) {
    const int64_t rows = p.offsets[p.steps];
    return !kSame<T, E> && rows <= plan.chunk_rows && rows <= kDepth;
  }

  // h of the step before in time's order of the layer, null for zeros.
  static const E* previous_h(const Backward& p, int64_t t, int64_t row) {
    if (p.dgates_given) return at<const E>(p.h0, p.offsets[t] + row, 0);
    const int64_t t_prev = p.reverse ? t + 1 : t - 1;
    return row < active_rows(p, t_prev) ? at<const E>(p.y, p.offsets[t_prev] + row, 0) : row_or_null<E>(p.h0, row);
  }

  static void products(const Backward& p, const Plan& plan, const Chunk& chunk, const Share& share) {
    const int rank = share.rank, size = share.size;
    const int64_t rows = chunk_rows(p, chunk);
    const Operand* dgates = D::at_step(p, plan, chunk, chunk.first);
    if (p.dx.data != nullptr) {
      const typename W::Weight weight = W::input(p, plan);
      const Matrix dx{at<E>(p.dx, p.offsets[chunk.first], 0), p.dx.stride};
      W::template product<Operand>(p, plan, weight, dgates, rows, W::part_of(weight, rows, share), dx, p.add_to_dx,
                                   rank, [](int64_t, const Block&, T*) {});
    }
    if (p.dgates.data != nullptr && !p.dgates_given) {
      for (int64_t row = share_of(rows, rank, size); row < share_of(rows, rank + 1, size); ++row) {
        narrow_row<S>(dgates + row * D::stride(p), Cell::dgates * p.hidden,
                      at<E>(p.dgates, p.offsets[chunk.first] + row, 0), false);
      }
    }
    const bool again = chunk.index > 0;
    if constexpr (narrow_products) pair_rows(p, plan, dgates, rows, rank, size);
    if (p.dweight_ih.data != nullptr) {
      const auto source = [&](const Cursor& at_row) { return at<const E>(p.x, at_row.flat, 0); };
      weight_gradient(p, plan, chunk, dgates, source, p.inputs, Factor::input, p.dweight_ih,
                      Sums{sums(p.dweight_ih, plan, kSumsInput), sums_stride(p.dweight_ih, p.inputs), again}, rank,
                      size);
    }
    if (p.dweight_hh.data != nullptr) {
      const auto source = [&](const Cursor& at_row) { return previous_h(p, at_row.t, at_row.row); };
      weight_gradient(p, plan, chunk, dgates, source, p.outputs, Factor::hidden, p.dweight_hh,
                      Sums{sums(p.dweight_hh, plan, kSumsHidden), sums_stride(p.dweight_hh, p.outputs), again}, rank,
                      size);
    }
    if (Cell::projects && p.dweight_hr.data != nullptr) {
      const Operand* unprojected = dgates + D::unprojected(p);
      const int64_t base = p.offsets[chunk.first];
      const auto source = [&](const Cursor& at_row) { return unprojected + (at_row.flat - base) * D::stride(p); };
      weight_gradient(p, plan, chunk, dgates, source, p.hidden, Factor::projection, p.dweight_hr,
                      Sums{sums(p.dweight_hr, plan, kSumsProjection), sums_stride(p.dweight_hr, p.hidden), again}, rank,
                      size);
    }
    if constexpr (!kSame<T, E>) S::stream_end();
    if (p.dbias_ih.data != nullptr || p.dbias_hh.data != nullptr) {
      const int64_t columns = Cell::dgates * p.hidden;
      add_up(dgates, D::stride(p), rows, share_of(columns, rank, size), share_of(columns, rank + 1, size), again,
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

  // Pairs of rows of dgates side by side, as dW's sums over rows want them: the columns of a thread's rows of dW, and
  // not an element of another thread's.
  static void pair_rows(const Backward& p, const Plan& plan, const Operand* dgates, int64_t rows, int rank, int size) {
    const auto pair = [&](int64_t first, int64_t last, int64_t column) {
      const int64_t count = last - first, whole = count - count % S::lanes;
      for (int64_t row = 0; row < rows; row += 2) {
        const Operand* even = dgates + row * D::stride(p) + column;
        const Operand* odd = row + 1 < rows ? even + D::stride(p) : nullptr;
        Operand* to = region<Operand>(plan, kPairs) + row * D::stride(p) + 2 * column;
        pack_row_pair<S>(even, odd, Block{0, static_cast<int>(whole / S::lanes), static_cast<int>(whole)}, to);
        for (int64_t i = whole; i < count; ++i) {
          to[2 * i] = even[i];
          to[2 * i + 1] = odd == nullptr ? Operand{} : odd[i];
        }
      }
    };
    const auto of_factor = [&](Factor factor, const auto& fn) {
      const int64_t weight_rows = D::rows_of(p, factor);
      D::for_each_stretch(p, factor, share_of(weight_rows, rank, size), share_of(weight_rows, rank + 1, size), fn);
    };
    of_factor(Factor::input, pair);
    of_factor(Factor::hidden, [&](int64_t first, int64_t last, int64_t column) {
      if (column != first) pair(first, last, column);
    });
    if constexpr (Cell::projects) of_factor(Factor::projection, pair);
  }

  // Those columns as the left operand: element [column, row].
  static Left<Operand> transposed(const Backward& p, const Plan& plan, const Operand* dgates, int64_t row,
                                  int64_t column) {
    const int64_t at_row = row * D::stride(p);
    if constexpr (narrow_products) {
      return {region<Operand>(plan, kPairs) + at_row + 2 * column, 2, D::stride(p)};
    } else {
      return {dgates + at_row + column, 1, D::stride(p)};
    }
  }

  // The first of `count` rows that next() gives, if each lies behind the one before; else null.
  template <class Next>
  static auto together(const Next& next, int64_t count, int64_t width) {
    const auto first = next();
    for (int64_t i = 1; i < count && first != nullptr; ++i) {
      if (next() != first + i * width) return decltype(first){};
    }
    return first;
  }

  // Rows of dW that stay in the first cache: a few whole tiles.
  static constexpr int64_t kSliceRows = 8 * Products<S, Operand, Operand>::max_rows;

  // Some rows of one panel's columns of dW, of all rows of the data, rounded while they are in the first cache.
  static void rounded_product(const Left<Operand>& left, int64_t rows, int64_t whole, const Panel<Operand>& panel,
                              int columns, int64_t depth, E* out, int64_t out_stride) {
    constexpr int64_t width = W::widest;
    alignas(64) T tiles[kSliceRows * width];
    // Of other rows only some begin with a line, and those would leave their neighbours' lines half written.
    const bool by_lines = reinterpret_cast<uintptr_t>(out) % 64 == 0 && out_stride % kNarrowLine == 0;
    for (int64_t first = 0; first < rows; first += kSliceRows) {
      const int64_t count = rows - first < kSliceRows ? rows - first : kSliceRows;
      multiply<S>(Left<Operand>{left.data + first * left.row, left.row, left.depth}, count, whole, panel,
                  static_cast<int>(panel.stride), depth, tiles, width, false);
      for (int64_t i = 0; i < count; ++i) {
        E* const to = out + (first + i) * out_stride;
        if (by_lines) {
          stream_row<S>(tiles + i * width, columns, to);
        } else {
          narrow_row<S>(tiles + i * width, columns, to, false);
        }
      }
    }
  }

  // dW += dgatesᵀ rows, where source(cursor) is a row of `columns` elements, in memory or among dgates, or null for
  // zeros. Where whole panels can be dealt out evenly, each thread has some columns of dW; else some rows, and packs
  // all panels for itself. What is rounded goes by rows: each thread has paired columns of dgates for its own, and
  // rounds in the end what it has added up elsewhere than in dW itself (`out`).
  template <class Source>
  static void weight_gradient(const Backward& p, const Plan& plan, const Chunk& chunk, const Operand* dgates,
                              const Source& source, int64_t columns, Factor factor, const Matrix& gradient,
                              const Sums& out, int rank, int size) {
    const int64_t blocks = W::blocks(columns);
    const bool by_columns = kSame<T, E> && columns % (size * W::widest) == 0;
    const int64_t first_block = by_columns ? blocks / size * rank : 0;
    const int64_t last_block = by_columns ? first_block + blocks / size : blocks;
    const int64_t whole = D::rows_of(p, factor);
    const int64_t begin = by_columns ? 0 : share_of(whole, rank, size);
    const int64_t end = by_columns ? whole : share_of(whole, rank + 1, size);
    Operand* const packed = W::template own_panels<Operand>(plan, rank);
    const int64_t rows = chunk_rows(p, chunk);
    Cursor start{p.offsets[chunk.first], chunk.first, 0};
    for (int64_t k = 0; k < rows; k += kDepth) {
      const int64_t depth = rows - k < kDepth ? rows - k : kDepth;
      // Of few rows, as many panels at once as there is room for: dW is written along its rows then, some at a time,
      // and not down a panel, where narrow rows are one or two cache lines.
      const int64_t room = packed_depth(depth) * W::widest;
      const int64_t several = kSame<T, E> ? 1 : kDepth / packed_depth(depth);
      Cursor after = start;
      for (int64_t group = first_block; group < last_block; group += several) {
        const int64_t group_end = group + several < last_block ? group + several : last_block;
        const Operand* panels = packed;
        for (int64_t index = group; index < group_end; ++index) {
          const Block b = W::block(columns, index);
          const int width = b.vectors * S::lanes;
          const auto next = [&] {
            const auto from = source(after);
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
            const Operand* ready = width == columns ? together(next, depth, width) : nullptr;
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
            const Block b = W::block(columns, index);
            const Panel<Operand> panel{panels + (index - group) * room, b.vectors * S::lanes};
            D::for_each_stretch(p, factor, row, slice_end, [&](int64_t first, int64_t last, int64_t column) {
              const Left<Operand> left = transposed(p, plan, dgates, k, column);
              if constexpr (!kSame<T, E>) {
                if (rounds_tiles(p, plan)) {
                  return rounded_product(left, last - first, whole, panel, b.present, depth,
                                         at<E>(gradient, first, b.first), gradient.stride);
                }
              }
              multiply<S>(left, last - first, whole, panel, b.present, depth, out.data + first * out.stride + b.first,
                          out.stride, out.again || k > 0);
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
        const auto even = next();
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
