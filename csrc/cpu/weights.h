// Recurrent weights packed into panels: for one block of units, everything that the register tile multiplies with, in
// the order in which it is read.
//
//   forward   panel[k][gate][unit] = W_hh[gate·H + unit, k]      k = 0 … H − 1, after W_ih likewise where the
//                                                                kernel applies the input product too
//   backward  panel[k][unit]       = W_hh[k, unit]               k = 0 … G·H − 1
//
// The units of the last block that do not exist are zeros.
#pragma once

#include "../problem.h"

namespace pyrnnfast {
namespace {

// A block of units as the tile sees it: `vectors` vectors of units for each gate.
struct Block {
  int64_t unit;  // its first unit
  int vectors;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class S>
Block unit_block(int64_t hidden, int widest, int64_t index) {
  const int64_t unit = index * widest * S::lanes;
  const int64_t vectors = ceil_div(hidden - unit, S::lanes);
  return {unit, vectors < widest ? static_cast<int>(vectors) : widest};
}

template <class S>
void pack_forward(const Matrix& weight, int gates, int64_t hidden, int64_t depth, const Block& block,
                  typename S::Scalar* panel) {
  using T = typename S::Scalar;
  const int width = block.vectors * S::lanes;
  const int64_t row = int64_t{gates} * width;  // elements of one k
  // In stretches of k short enough for the lines written to stay in the first cache while all rows pass.
  constexpr int64_t stretch = 16;
  for (int64_t k0 = 0; k0 < depth; k0 += stretch) {
    const int64_t k1 = k0 + stretch < depth ? k0 + stretch : depth;
    for (int gate = 0; gate < gates; ++gate) {
      for (int lane = 0; lane < width; ++lane) {
        T* to = panel + gate * width + lane;
        const int64_t unit = block.unit + lane;
        if (unit < hidden) {
          const T* from = static_cast<const T*>(weight.data) + (gate * hidden + unit) * weight.stride;
          // So many rows are open at once that the processor's own prefetching gives up.
          __builtin_prefetch(from + k1);
          for (int64_t k = k0; k < k1; ++k) to[k * row] = from[k];
        } else {
          for (int64_t k = k0; k < k1; ++k) to[k * row] = T(0);
        }
      }
    }
  }
}

template <class S>
void pack_backward(const Matrix& weight, int gates, int64_t hidden, const Block& block, typename S::Scalar* panel) {
  using T = typename S::Scalar;
  const int width = block.vectors * S::lanes;
  const int64_t present = hidden - block.unit < width ? hidden - block.unit : width;
  for (int64_t k = 0; k < gates * hidden; ++k) {
    const T* from = static_cast<const T*>(weight.data) + k * weight.stride + block.unit;
    T* to = panel + k * width;
    for (int64_t i = 0; i < present; ++i) to[i] = from[i];
    for (int64_t i = present; i < width; ++i) to[i] = T(0);
  }
}

}  // namespace
}  // namespace pyrnnfast
