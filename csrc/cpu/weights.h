// Weights packed into panels: for one block of units, everything that the register tile multiplies with, in the order
// in which it is read.
//
//   by unit     panel[k][gate][unit] = W[gate·H + unit, k]      x W_ihᵀ and h W_hhᵀ, of the forward pass
//   by column   panel[k][column]     = W[k, column]             dgates W_ih and dgates W_hh, of the backward pass
//
// The units and columns of the last block that do not exist are zeros. Panels of bfloat16 have the elements of an even
// k and of the next side by side: panel[k / 2][…][k % 2].
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

template <class T, class E>
T convert(E x) {
  return static_cast<T>(x);
}
template <>
inline float convert<float, Bf16>(Bf16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <class S, class P, class E>
void pack_by_unit(const E* weight, int64_t stride, int gates, int64_t hidden, int64_t depth, const Block& block,
                  P* panel) {
  using V = typename S::Value;
  const int width = block.vectors * S::lanes;
  const int64_t row = int64_t{gates} * width;  // elements of one k
  // A square of units × k at a time: whole vectors are read and written, and few rows are open at once.
  for (int column = 0; column < row; column += S::lanes) {
    const int gate = column / width, unit = column % width;
    const int present = block.present - unit < S::lanes ? block.present - unit : S::lanes;
    const E* from = weight + (gate * hidden + block.first + unit) * stride;
    for (int64_t k = 0; k < depth; k += S::lanes) {
      const int left = depth - k < S::lanes ? static_cast<int>(depth - k) : S::lanes;
      V square[S::lanes];
#pragma GCC unroll 16
      for (int i = 0; i < S::lanes; ++i) {
        const E* at = from + i * stride + k;
        square[i] = i >= present ? V{} : left == S::lanes ? S::load(at) : S::load_part(at, left);
      }
      S::transpose(square);
      if constexpr (sizeof(P) == sizeof(typename S::Scalar)) {
        P* to = panel + k * row + column;
#pragma GCC unroll 16
        for (int i = 0; i < S::lanes; ++i) {
          if (i < left) S::store(to + i * row, square[i]);
        }
      } else {
        P* to = panel + k * row + 2 * column;
        for (int i = 0; i < left; i += 2) S::store_pairs(to + i * row, square[i], square[i + 1]);
      }
    }
  }
}

// One k of a panel by column, from the row of a matrix; all zeros where there is none.
template <class S, class E>
void pack_row(const E* from, const Block& block, typename S::Scalar* to) {
  const int width = block.vectors * S::lanes;
  const int present = from == nullptr ? 0 : block.present;
  int i = 0;
  for (; i + S::lanes <= present; i += S::lanes) S::store(to + i, S::load(from + i));
  if (i < present) {
    S::store(to + i, S::load_part(from + i, present - i));
    i += S::lanes;
  }
  for (; i < width; i += S::lanes) S::store(to + i, typename S::Value{});
}

template <class S, class P, class E>
void pack_by_column(const E* weight, int64_t stride, int64_t depth, const Block& block, P* panel) {
  const int width = block.vectors * S::lanes;
  for (int64_t k = 0; k < depth; ++k) {
    const E* from = weight + k * stride + block.first;
    if constexpr (sizeof(P) == sizeof(typename S::Scalar)) {
      pack_row<S>(from, block, panel + k * width);
    } else {
      P* to = panel + (k - k % 2) * width + k % 2;
      for (int i = 0; i < width; ++i) to[2 * i] = i < block.present ? from[i] : P{};
    }
  }
}

// The depth that a panel has room for: pairs are whole.
inline int64_t packed_depth(int64_t depth) { return depth + depth % 2; }

}  // namespace
}  // namespace pyrnnfast
