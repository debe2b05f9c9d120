// Weights packed into panels: for one block of units, everything that the register tile multiplies with, in the order
// in which it is read.
//
//   by unit     panel[k][gate][unit] = W[gate·H + unit, k]      x W_ihᵀ and h W_hhᵀ, of the forward pass
//   by column   panel[k][column]     = W[k, column]             dgates W_ih and dgates W_hh, of the backward pass
//
// The units and columns of the last block that do not exist are zeros. Narrow panels have the elements of an even k and
// of the next side by side, vector by vector, as load_pairs (simd.h) knows them.
#pragma once

#include "tile.h"

namespace pyrnnfast {
namespace {

// What a block of units, or of columns, has: `vectors` vectors of them, `present` of which exist.
struct Block {
  int64_t first;
  int vectors;
  int present;
};

template <class S>
Block block_at(int64_t count, int widest, int64_t index) {
  const int64_t first = index * widest * S::lanes;
  const int64_t present = count - first < widest * S::lanes ? count - first : widest * S::lanes;
  return {first, static_cast<int>(ceil_div(present, S::lanes)), static_cast<int>(present)};
}

template <class S, class P, class E>
void pack_by_unit(const E* weight, int64_t stride, int gates, int64_t hidden, int64_t depth, const Block& block,
                  P* panel) {
  using V = typename S::Value;
  // Pairs of narrow elements, which lie beside one another, are moved as one.
  constexpr bool pairs = sizeof(P) != sizeof(typename S::Scalar);
  constexpr int several = pairs ? 2 : 1;
  const int width = block.vectors * S::lanes;
  const int64_t row = int64_t{gates} * width;  // elements of one k
  // A square of units × k at a time: whole vectors are read and written, and few rows are open at once.
  for (int column = 0; column < row; column += S::lanes) {
    const int gate = column / width, unit = column % width;
    const int present = block.present - unit < S::lanes ? block.present - unit : S::lanes;
    const E* from = weight + (gate * hidden + block.first + unit) * stride;
    for (int64_t k = 0; k < depth; k += several * S::lanes) {
      const int left = depth - k < several * S::lanes ? static_cast<int>(depth - k) : several * S::lanes;
      V square[S::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < S::lanes; ++i) {
        const E* at = from + i * stride + k;
        if constexpr (pairs) {
          square[i] = i >= present ? V{} : S::load_neighbours(at, left);
        } else {
          square[i] = i >= present ? V{} : left == S::lanes ? S::load(at) : S::load_part(at, left);
        }
      }
      S::transpose(square);
      P* to = panel + k * row + several * column;
#pragma GCC unroll 16
      for (int i = 0; i < S::lanes; ++i) {
        if (several * i >= left) continue;
        if constexpr (pairs) {
          S::store_neighbours(to + several * i * row, square[i]);
        } else {
          S::store(to + i * row, square[i]);
        }
      }
    }
  }
}

// The vector at column i of a row that has `present` columns, or none: zeros where there is nothing.
template <class S, class E>
typename S::Value load_present(const E* from, int present, int i) {
  if (from == nullptr || i >= present) return typename S::Value{};
  return present - i >= S::lanes ? S::load(from + i) : S::load_part(from + i, present - i);
}

// One k of a panel by column, from the row of a matrix; all zeros where there is none.
template <class S, class E>
void pack_row(const E* from, const Block& block, typename S::Scalar* to) {
  for (int i = 0; i < block.vectors * S::lanes; i += S::lanes)
    S::store(to + i, load_present<S>(from, block.present, i));
}

// Two of them as pairs.
template <class S, class N>
void pack_row_pair(const N* even, const N* odd, const Block& block, N* to) {
  for (int i = 0; i < block.vectors * S::lanes; i += S::lanes) {
    S::store_pairs(to + 2 * i, load_present<S>(even, block.present, i), load_present<S>(odd, block.present, i));
  }
}

// The first `columns` columns of a matrix; beyond a whole panel the next ones begin `room` elements on.
template <class S, class P, class E>
void pack_by_column(const E* matrix, int64_t stride, int64_t depth, int64_t columns, P* panel, int64_t room = 0) {
  constexpr int64_t rows_ahead = 16;
  constexpr int64_t several = sizeof(P) == sizeof(typename S::Scalar) ? 1 : 2;
  // Rows are far apart: the processor does not know of the next ones by itself.
  const auto nearer = [&](int64_t k) {
    for (int64_t i = 0; i < columns; i += 64 / static_cast<int64_t>(sizeof(E)))
      __builtin_prefetch(matrix + k * stride + i);
  };
  for (int64_t k = 0; k < depth; k += several) {
    for (int64_t next = k + rows_ahead; next < k + rows_ahead + several && next < depth; ++next) nearer(next);
    P* to = panel;
    for (int64_t first = 0; first < columns; first += kMaxVectors * S::lanes, to += room) {
      const Block block = block_at<S>(columns - first, kMaxVectors, 0);
      const E* from = matrix + k * stride + first;
      P* const row = to + k * block.vectors * S::lanes;
      if constexpr (several == 1) {
        pack_row<S>(from, block, row);
      } else {
        pack_row_pair<S>(from, k + 1 < depth ? from + stride : nullptr, block, row);
      }
    }
  }
}

// The depth that a panel has room for: pairs are whole.
inline int64_t packed_depth(int64_t depth) { return depth + depth % 2; }

}  // namespace
}  // namespace pyrnnfast
