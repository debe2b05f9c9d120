// dgates of a chunk: where they stand in the call's memory, and which of their columns belong to which rows of a
// weight. Where h is projected, each row has ∂L/∂h and what was projected behind them.
#pragma once

#include "../cells.h"
#include "rows.h"

namespace pyrnnfast {
namespace {

// Of the weights.
enum class Factor { input, hidden, projection };

// E: the type of the operands in memory.
template <class Cell, class S, class E>
struct Dgates {
  static constexpr int gates = Cell::gates;
  using Operand = OperandOf<S, E>;

  // A cache line more than a row needs: rows a power of two apart would fall upon one another in the caches.
  static int64_t stride(const Backward& p) {
    return (Cell::projects ? unprojected(p) + padded<S>(p.hidden) : of_output(p)) +
           64 / static_cast<int64_t>(sizeof(Operand));
  }
  // The columns of ∂L/∂h, P of them, and of h before its projection, H.
  static int64_t of_output(const Backward& p) { return padded<S>(Cell::dgates * p.hidden); }
  static int64_t unprojected(const Backward& p) { return of_output(p) + padded<S>(p.outputs); }
  // How many rows the weight has.
  static int64_t rows_of(const Backward& p, Factor factor) {
    return factor == Factor::projection ? p.outputs : gates * p.hidden;
  }

  // Those of row 0 of a step.
  static Operand* at_step(const Backward& p, const Plan& plan, const Chunk& chunk, int64_t t) {
    Operand* rows = region<Operand>(plan, chunk.index % 2 == 0 ? kGates0 : kGates1);
    return rows + (p.offsets[t] - p.offsets[chunk.first]) * stride(p);
  }

  // Rows begin … end − 1 of a weight, with the columns that are theirs: fn(first row, last row + 1, first column).
  template <class Fn>
  static void for_each_stretch(const Backward& p, Factor factor, int64_t begin, int64_t end, const Fn& fn) {
    if (factor == Factor::projection) {
      if (begin < end) fn(begin, end, of_output(p) + begin);
      return;
    }
    const bool recurrent = factor == Factor::hidden;
    int64_t row = 0;
    for (int i = 0; i < (recurrent ? Cell::segments : 1); ++i) {
      const int64_t column = recurrent ? Cell::segment[i].begin * p.hidden : 0;
      const int64_t length = (recurrent ? Cell::segment[i].length : gates) * p.hidden;
      const int64_t first = begin > row ? begin : row, last = end < row + length ? end : row + length;
      if (first < last) fn(first, last, column + first - row);
      row += length;
    }
  }
};

}  // namespace
}  // namespace pyrnnfast
