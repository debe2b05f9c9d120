// What follows from the kind of a cell and from a dtype.
#pragma once

#include "cells.h"
#include "problem.h"

namespace pyrnnfast {

// Columns of each operand in units of H; 0 or false: the cell has no such operand.
struct Widths {
  int64_t gates, saved, dgates;
  bool cell;

  template <class Cell>
  static constexpr Widths of() {
    return {Cell::gates, Cell::saved, Cell::dgates, Cell::has_cell};
  }
};

namespace {  // as the cells are

inline const Widths& widths_of(CellKind cell) {
  // In the order of CellKind.
  static constexpr Widths widths[kCellKinds] = {Widths::of<Rnn<false>>(), Widths::of<Rnn<true>>(), Widths::of<Gru>(),
                                                Widths::of<Lstm>(), Widths::of<ProjectedLstm>()};
  return widths[static_cast<int>(cell)];
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

}  // namespace
}  // namespace pyrnnfast
