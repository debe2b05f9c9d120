// dgates of a chunk: where they stand in the call's memory, and which of their columns belong to which rows of a
// weight.
#pragma once

#include "../cells.h"
#include "rows.h"

namespace pyrnnfast {
namespace {

// E: the type of the operands in memory.
template <class Cell, class S, class E>
struct Dgates {
  static constexpr int gates = Cell::gates;
  using Operand = OperandOf<S, E>;

  // A cache line more than a row needs: rows a power of two apart would fall upon one another in the caches.
  static int64_t stride(const Backward& p) {
    return padded<S>(Cell::dgates * p.hidden) + 64 / static_cast<int64_t>(sizeof(Operand));
  }
  // Those of row 0 of a step.
  static Operand* at_step(const Backward& p, const Plan& plan, const Chunk& chunk, int64_t t) {
    Operand* rows = region<Operand>(plan, chunk.index % 2 == 0 ? kGates0 : kGates1);
    return rows + (p.offsets[t] - p.offsets[chunk.first]) * stride(p);
  }

  // Rows begin … end − 1 of a weight, with the columns of dgates that are theirs: fn(first row, last row + 1, first
  // column). `recurrent`: of W_hh, else of W_ih.
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
};

}  // namespace
}  // namespace pyrnnfast
