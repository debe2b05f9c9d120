// The register tile, of which every product is made: a few rows times one panel.
//
//   out[m][v·lanes + lane] (+)= Σ_k a[m, k] · panel[k][v·lanes + lane]      m < Rows, v < Vectors
//
// Each element is one chain of multiply-adds over k (two, of every other k or pair of k, in the small-batch family),
// whatever the number of rows beside it: a row's bits do not depend on how rows are shared among tiles and threads.
#pragma once

#include "simd.h"

namespace pyrnnfast {
namespace {

inline constexpr int kMaxVectors = 4;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the elements of a matrix stand: a[m, k] at data[m · row + k · depth]. The strides are apart, so that no
// compiler copies them as one: see TileFn.
template <class T>
struct Left {
  Left(const T* first, int64_t row_stride, int64_t depth_stride) : row(row_stride), data(first), depth(depth_stride) {}
  int64_t row;
  const T* data;
  int64_t depth;
};

// `width` elements for each k, `stride` apart; they may be narrower in memory (P) than what is computed with. `ahead`
// is where the next panel begins, which a product brings nearer meanwhile, a line at each k: the processor does not
// know of it. Null: there is none.
template <class P>
struct Panel {
  const P* data;
  int64_t stride;
  const P* ahead = nullptr;

  static constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(P));
  // For tile number `index` of those that use this panel: the first ones bring the next panel, each its part.
  Panel for_tile(int64_t index, int64_t depth) const {
    const bool brings = ahead != nullptr && index * line < stride;
    return {data, stride, brings ? ahead + index * depth * line : nullptr};
  }
};

// A: the type of the left operand in memory. Only pair products (simd.h) take narrow ones, with a depth of 1 between
// them.
//
// The operands are references, not values: a structure on its way to the stack is copied in larger pieces than it was
// just written in, and such a load has to wait until all stores before it have reached the cache, those of the last
// tile's results among them. Then no product could begin while a tail is still at work.
template <class S, class A, class P>
using TileFn = void (*)(const Left<A>& a, const Panel<P>& panel, int64_t depth, typename S::Scalar* out,
                        int64_t out_stride, bool add);

template <class S, class A, class P, int Vectors, int Rows, int Chains>
void product(const Left<A>& a, const Panel<P>& panel, int64_t depth, typename S::Scalar* out, int64_t out_stride,
             bool add) {
  using T = typename S::Scalar;
  using V = typename S::Value;
  V sum[Chains][Rows][Vectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      for (int chain = 0; chain < Chains; ++chain) sum[chain][m][v] = V{};
    }
  }
  const A* row[Rows];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) row[m] = a.data + m * a.row;
  const P* weights = panel.data;
  const P* ahead = panel.ahead == nullptr ? panel.data : panel.ahead;
  int64_t at = 0;
  // Goes on by `count` values of k.
  const auto advance = [&](int count) {
    weights += count * panel.stride;
    at += count * a.depth;
    if constexpr (Chains == 1) {
      for (int i = 0; i < count; ++i, ahead += Panel<P>::line) __builtin_prefetch(ahead, 0, 2);
    }
  };
  int64_t k = 0;
  if constexpr (sizeof(P) == sizeof(T)) {
    const auto one = [&](auto& chain) {
      V weight[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) weight[v] = S::load(weights + v * S::lanes);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        const V x = S::splat(row[m][at]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) chain[m][v] = S::fma(x, weight[v], chain[m][v]);
      }
      advance(1);
    };
    for (; k + 1 < depth; k += 2) {
      one(sum[0]);
      one(sum[Chains - 1]);
    }
    if (k < depth) one(sum[0]);
  } else if constexpr (sizeof(A) == sizeof(T)) {
    // An even k and the next one, or the even one alone.
    const auto two = [&](int count) {
      V even[Vectors], odd[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) S::load_pairs(weights + 2 * v * S::lanes, even[v], odd[v]);
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
        const V x = S::splat(row[m][at]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[0][m][v] = S::fma(x, even[v], sum[0][m][v]);
        if (count == 1) continue;
        const V next = S::splat(row[m][at + a.depth]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sum[Chains - 1][m][v] = S::fma(next, odd[v], sum[Chains - 1][m][v]);
      }
      advance(2);
    };
    for (; k + 1 < depth; k += 2) two(2);
    if (k < depth) two(1);
  } else {
    const auto pair = [&](auto& chain, int count) {
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
          chain[m][v] = S::pair_product(row[m] + at, count, weights + 2 * v * S::lanes, chain[m][v]);
        }
      }
      advance(2);
    };
    for (; k + 3 < depth; k += 4) {
      pair(sum[0], 2);
      pair(sum[Chains - 1], 2);
    }
    for (; k + 1 < depth; k += 2) pair(sum[0], 2);
    if (k < depth) pair(sum[0], 1);
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      V total = sum[0][m][v];
      if constexpr (Chains == 2) total = total + sum[1][m][v];
      T* to = out + m * out_stride + v * S::lanes;
      // Added as a whole: a sum over very many k, in parts, is more exact so than as one chain.
      if (add) total = S::load(to) + total;
      S::store(to, total);
    }
  }
}

// Which products exist: up to six rows where there are 32 registers, three where there are 16. A batch that fits half a
// tile would leave the multipliers waiting for one another's results, so it gets two chains instead.
template <class S, class A, class P>
struct Products {
  static constexpr int max_rows = S::registers == 32 ? 6 : 3;
  static constexpr int small_batch = max_rows / 2;

  static int rows(int64_t batch) { return batch <= small_batch ? small_batch : max_rows; }

  static TileFn<S, A, P> find(int64_t batch, int vectors, int rows) {
    return batch <= small_batch ? small[vectors - 1][rows - 1] : large[vectors - 1][rows - 1];
  }

 private:
  template <int Vectors, int Chains, int... Row>
  struct Table {
    static constexpr TileFn<S, A, P> row[sizeof...(Row)] = {product<S, A, P, Vectors, Row, Chains>...};
  };
  template <int Vectors>
  static constexpr const TileFn<S, A, P>* large_row() {
    if constexpr (max_rows == 6) {
      return Table<Vectors, 1, 1, 2, 3, 4, 5, 6>::row;
    } else {
      return Table<Vectors, 1, 1, 2, 3>::row;
    }
  }
  template <int Vectors>
  static constexpr const TileFn<S, A, P>* small_row() {
    if constexpr (small_batch == 3) {
      return Table<Vectors, 2, 1, 2, 3>::row;
    } else {
      return Table<Vectors, 2, 1>::row;
    }
  }
  static constexpr const TileFn<S, A, P>* large[kMaxVectors] = {large_row<1>(), large_row<2>(), large_row<3>(),
                                                                large_row<4>()};
  static constexpr const TileFn<S, A, P>* small[kMaxVectors] = {small_row<1>(), small_row<2>(), small_row<3>(),
                                                                small_row<4>()};
};

// Rows cut into as few tiles as can be, of heights as equal as can be, the taller ones first. Divided once: a tile may
// be done before a division is.
class Heights {
 public:
  Heights(int64_t rows, int tallest) {
    const int64_t tiles = ceil_div(rows, tallest);
    low_ = tiles > 0 ? rows / tiles : 0;
    tall_ = rows - low_ * tiles;
  }
  int operator[](int64_t index) const { return static_cast<int>(low_ + (index < tall_ ? 1 : 0)); }

 private:
  int64_t low_, tall_;
};

// Any number of rows times one panel of `columns` ≤ vectors · lanes columns; the panel has all of them, `out` only
// those. `whole` is how many rows all threads have together: it decides the family, so that no bits depend on the
// share.
template <class S, class A, class P>
void multiply(const Left<A>& a, int64_t rows, int64_t whole, const Panel<P>& panel, int columns, int64_t depth,
              typename S::Scalar* out, int64_t out_stride, bool add) {
  using T = typename S::Scalar;
  const int vectors = static_cast<int>(ceil_div(columns, S::lanes));
  const int width = vectors * S::lanes;
  const Heights heights(rows, Products<S, A, P>::rows(whole));
  for (int64_t first = 0, index = 0; first < rows; ++index) {
    const int height = heights[index];
    const auto tile_product = Products<S, A, P>::find(whole, vectors, height);
    const Left<A> part{a.data + first * a.row, a.row, a.depth};
    T* to = out + first * out_stride;
    for (int64_t m = height; m < 2 * height && m < rows - first; ++m) {
      for (int i = 0; i < columns; i += static_cast<int>(64 / sizeof(T)))
        __builtin_prefetch(to + m * out_stride + i, 1);
    }
    const Panel<P> own = panel.for_tile(index, depth);
    if (columns == width) {
      tile_product(part, own, depth, to, out_stride, add);
    } else {
      alignas(64) T tile[Products<S, A, P>::max_rows * kMaxVectors * S::lanes];
      tile_product(part, own, depth, tile, width, false);
      for (int m = 0; m < height; ++m) {
        for (int i = 0; i < columns; ++i) {
          to[m * out_stride + i] = add ? to[m * out_stride + i] + tile[m * width + i] : tile[m * width + i];
        }
      }
    }
    first += height;
  }
}

// Calls with too few rows for packing to pay: out[m][i] = Σ_k a[m][k] · weights[i][k] for the `present` ≤ lanes rows of
// a matrix read where it lies. Of each m a whole vector is written, and its bits do not depend on the other rows.
template <class S, class A, class P>
using DotsFn = void (*)(const A* a, int64_t a_stride, const P* weights, int64_t weight_stride, int present,
                        int64_t depth, typename S::Scalar* out, int64_t out_stride);

template <class S, class A, class P, int Rows>
void dots(const A* a, int64_t a_stride, const P* weights, int64_t weight_stride, int present, int64_t depth,
          typename S::Scalar* out, int64_t out_stride) {
  using V = typename S::Value;
  // So many rows of the weights at once that the multipliers need not wait for one another's results.
  constexpr int several = 8 * Rows <= S::registers / 2 ? 8 : 4;
  constexpr int group = S::lanes < several ? S::lanes : several;
  V sums[Rows][S::lanes];
  for (int first = 0; first < S::lanes; first += group) {
    const P* row[group];
    V sum[Rows][group];
#pragma GCC unroll 8
    for (int i = 0; i < group; ++i) {
      // Rows that do not exist repeat the last.
      row[i] = weights + (first + i < present ? first + i : present - 1) * weight_stride;
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) sum[m][i] = V{};
    }
    int64_t k = 0;
    if constexpr (S::has_pair_product && is_bf16<A> && is_bf16<P>) {
      for (; k + 2 * S::lanes <= depth; k += 2 * S::lanes) {
#pragma GCC unroll 8
        for (int i = 0; i < group; ++i) {
#pragma GCC unroll 8
          for (int m = 0; m < Rows; ++m) sum[m][i] = S::add_products(a + m * a_stride + k, row[i] + k, sum[m][i]);
        }
      }
    }
    const auto add = [&](const auto& load) {
      V x[Rows];
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) x[m] = load(a + m * a_stride + k);
#pragma GCC unroll 8
      for (int i = 0; i < group; ++i) {
        V weight = load(row[i] + k);
        if constexpr (Rows > 1) weight = S::in_register(weight);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; ++m) sum[m][i] = S::fma(x[m], weight, sum[m][i]);
      }
    };
    for (; k + S::lanes <= depth; k += S::lanes) add([](const auto* p) { return S::load(p); });
    const int left = static_cast<int>(depth - k);
    if (left > 0) add([left](const auto* p) { return S::load_part(p, left); });
#pragma GCC unroll 8
    for (int i = 0; i < group; ++i) {
#pragma GCC unroll 8
      for (int m = 0; m < Rows; ++m) sums[m][first + i] = sum[m][i];
    }
  }
  for (int m = 0; m < Rows; ++m) S::store(out + m * out_stride, S::sum_each(sums[m]));
}

// For as many rows as a tile has.
template <class S, class A, class P>
DotsFn<S, A, P> dots_of(int rows) {
  if constexpr (Products<S, A, P>::max_rows == 6) {
    static constexpr DotsFn<S, A, P> of[] = {dots<S, A, P, 1>, dots<S, A, P, 2>, dots<S, A, P, 3>,
                                             dots<S, A, P, 4>, dots<S, A, P, 5>, dots<S, A, P, 6>};
    return of[rows - 1];
  } else {
    static constexpr DotsFn<S, A, P> of[] = {dots<S, A, P, 1>, dots<S, A, P, 2>, dots<S, A, P, 3>};
    return of[rows - 1];
  }
}

}  // namespace
}  // namespace pyrnnfast
