// The register tile: a few rows of the previous step times one panel of recurrent weights.
//
//   tile[m][v·lanes + lane] = Σ_k a[m][k] · panel[k][v·lanes + lane]      m < Rows, v < Vectors
//
// Each element is one chain of multiply-adds over k (two, of even and odd k, in the small-batch family), whatever the
// number of rows beside it: a row's bits do not depend on how rows are shared among tiles and threads.
#pragma once

#include "simd.h"

namespace pyrnnfast {
namespace {

inline constexpr int kMaxVectors = 4;

template <class S>
using ProductFn = void (*)(const typename S::Scalar* a, int64_t a_stride, const typename S::Scalar* panel,
                           int64_t depth, typename S::Scalar* tile, bool add);

template <class S, int Vectors, int Rows, int Chains>
void product(const typename S::Scalar* a, int64_t a_stride, const typename S::Scalar* panel, int64_t depth,
             typename S::Scalar* tile, bool add) {
  using V = typename S::Value;
  constexpr int width = Vectors * S::lanes;
  V sum[Chains][Rows][Vectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      sum[0][m][v] = add ? S::load(tile + m * width + v * S::lanes) : V{};
      if constexpr (Chains == 2) sum[1][m][v] = V{};
    }
  }
  const auto step = [&](int64_t k, auto& chain) {
    V weight[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      weight[v] = S::load(panel + k * width + v * S::lanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const V x = S::splat(a[m * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) chain[m][v] = S::fma(x, weight[v], chain[m][v]);
    }
  };
  int64_t k = 0;
  for (; k + 1 < depth; k += 2) {
    step(k, sum[0]);
    step(k + 1, sum[Chains - 1]);
  }
  if (k < depth) step(k, sum[0]);
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      V total = sum[0][m][v];
      if constexpr (Chains == 2) total = total + sum[1][m][v];
      S::store(tile + m * width + v * S::lanes, total);
    }
  }
}

// Which products exist: up to six rows where there are 32 registers, three where there are 16. A batch that fits half a
// tile would leave the multipliers waiting for one another's results, so it gets two chains instead.
template <class S>
struct Products {
  static constexpr int max_rows = S::registers == 32 ? 6 : 3;
  static constexpr int small_batch = max_rows / 2;

  static int rows(int64_t batch) { return batch <= small_batch ? small_batch : max_rows; }

  static ProductFn<S> find(int64_t batch, int vectors, int rows) {
    return batch <= small_batch ? small[vectors - 1][rows - 1] : large[vectors - 1][rows - 1];
  }

 private:
  template <int Vectors, int Chains, int... Row>
  struct Table {
    static constexpr ProductFn<S> row[sizeof...(Row)] = {product<S, Vectors, Row, Chains>...};
  };
  template <int Vectors>
  static constexpr const ProductFn<S>* large_row() {
    if constexpr (max_rows == 6) {
      return Table<Vectors, 1, 1, 2, 3, 4, 5, 6>::row;
    } else {
      return Table<Vectors, 1, 1, 2, 3>::row;
    }
  }
  template <int Vectors>
  static constexpr const ProductFn<S>* small_row() {
    if constexpr (small_batch == 3) {
      return Table<Vectors, 2, 1, 2, 3>::row;
    } else {
      return Table<Vectors, 2, 1>::row;
    }
  }
  static constexpr const ProductFn<S>* large[kMaxVectors] = {large_row<1>(), large_row<2>(), large_row<3>(),
                                                             large_row<4>()};
  static constexpr const ProductFn<S>* small[kMaxVectors] = {small_row<1>(), small_row<2>(), small_row<3>(),
                                                             small_row<4>()};
};

}  // namespace
}  // namespace pyrnnfast
