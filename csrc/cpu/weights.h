// Weights packed into panels: for one block of units, everything that the register tile multiplies with, in the order
// in which it is read.
//
//   by unit     panel[k][gate][unit] = W[gate·H + unit, k]      x W_ihᵀ and h W_hhᵀ, of the forward pass
//   by column   panel[k][column]     = W[k, column]             dgates W_ih and dgates W_hh, of the backward pass
//
// The units and columns of the last block that do not exist are zeros.
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
  const int width = block.vectors * S::lanes;
  const int64_t row = int64_t{gates} * width;  // elements of one k
  // In stretches of k short enough for the lines written to stay in the first cache while all rows pass.
  constexpr int64_t stretch = 16;
  for (int64_t k0 = 0; k0 < depth; k0 += stretch) {
    const int64_t k1 = k0 + stretch < depth ? k0 + stretch : depth;
    for (int gate = 0; gate < gates; ++gate) {
      for (int lane = 0; lane < width; ++lane) {
        P* to = panel + gate * width + lane;
        if (lane < block.present) {
          const E* from = weight + (gate * hidden + block.first + lane) * stride;
          // So many rows are open at once that the processor's own prefetching gives up.
          __builtin_prefetch(from + k1);
          for (int64_t k = k0; k < k1; ++k) to[k * row] = convert<P>(from[k]);
        } else {
          for (int64_t k = k0; k < k1; ++k) to[k * row] = P{};
        }
      }
    }
  }
}

// One k of a panel by column, from the row of a matrix; all zeros where there is none.
template <class S, class P, class E>
void pack_row(const E* from, const Block& block, P* to) {
  const int width = block.vectors * S::lanes;
  const int present = from == nullptr ? 0 : block.present;
  if constexpr (sizeof(P) == sizeof(typename S::Scalar)) {
    int i = 0;
    for (; i + S::lanes <= present; i += S::lanes) S::store(to + i, S::load(from + i));
    if (i < present) {
      S::store(to + i, S::load_part(from + i, present - i));
      i += S::lanes;
    }
    for (; i < width; i += S::lanes) S::store(to + i, typename S::Value{});
  } else {
    for (int i = 0; i < width; ++i) to[i] = i < present ? convert<P>(from[i]) : P{};
  }
}

template <class S, class P, class E>
void pack_by_column(const E* weight, int64_t stride, int64_t depth, const Block& block, P* panel) {
  const int width = block.vectors * S::lanes;
  for (int64_t k = 0; k < depth; ++k) pack_row<S>(weight + k * stride + block.first, block, panel + k * width);
}

}  // namespace
}  // namespace pyrnnfast
