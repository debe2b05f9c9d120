// Rows and vectors of operands as the passes see them: masked loads and stores, regions of the call's memory, steps.
#pragma once

#include "../problem.h"
#include "kernel.h"
#include "weights.h"

namespace pyrnnfast {
namespace {

// All threads of a share of rows wait for one another.
inline void meet(const Share& share) {
  if (share.barrier != nullptr) share.barrier->wait(share.members);
}

template <class E>
E* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<E*>(m.data) + row * m.stride + column;
}

template <class E>
const E* row_or_null(const Matrix& m, int64_t row) {
  return m.data == nullptr ? nullptr : at<const E>(m, row, 0);
}

inline void prefetch(const Matrix& m, int64_t row, int64_t column, int element_bytes) {
  if (m.data != nullptr)
    __builtin_prefetch(static_cast<const char*>(m.data) + (row * m.stride + column) * element_bytes);
}

template <class T>
T* region(const Plan& plan, Region r) {
  return static_cast<T*>(plan.region[r]);
}

inline int64_t active_rows(const Problem& p, int64_t t) {
  return t < 0 || t >= p.steps ? 0 : p.offsets[t + 1] - p.offsets[t];
}

// The rows of a chunk: from offsets[first] on.
inline int64_t chunk_rows(const Problem& p, const Chunk& chunk) {
  return p.offsets[chunk.last] - p.offsets[chunk.first];
}

// What thread `rank` of `size` has of so many: [share_of(rank), share_of(rank + 1)).
inline int64_t share_of(int64_t count, int rank, int size) { return count * rank / size; }

// The blocks whose weights a thread packs. Where all threads share the units it is they that will read them: what
// another has just written is far away.
struct Blocks {
  int64_t begin, end;
};
inline Blocks blocks_to_pack(int64_t blocks, const Share& share) {
  const int packers = share.size < blocks ? share.size : static_cast<int>(blocks);
  if (share.rank >= packers) return {0, 0};
  return {share_of(blocks, share.rank, packers), share_of(blocks, share.rank + 1, packers)};
}

// The longest stretch of a sum that one tile takes at once: its part of the panel then stays in the second cache while
// all rows pass by.
inline constexpr int64_t kDepth = 512;

template <class A, class B>
inline constexpr bool kSame = false;
template <class A>
inline constexpr bool kSame<A, A> = true;

template <bool First, class A, class B>
struct Either {
  using Type = A;
};
template <class A, class B>
struct Either<false, A, B> {
  using Type = B;
};

// Where the processor multiplies bfloat16 itself, the operands of all products are as narrow as they are in memory:
// weights and x as they come, states and dgates rounded.
template <class S, class E>
inline constexpr bool kNarrowProducts = is_bf16<E> && S::has_pair_product;
template <class S, class E>
using OperandOf = typename Either<kNarrowProducts<S, E>, E, typename S::Scalar>::Type;

template <class S>
int64_t padded(int64_t count) {
  return ceil_div(count, S::lanes) * S::lanes;
}

// How many vectors wide the blocks of a projected h's columns are: as wide as can be, but where several threads share
// them at each step, each is to have one. No bits depend on it.
template <class S, class P>
int output_vectors(const P& p, int members) {
  const bool shared = p.weight_hr.data != nullptr && p.steps > 1;
  int vectors = kMaxVectors;
  while (shared && vectors > 1 && ceil_div(p.outputs, vectors * S::lanes) < members) vectors /= 2;
  return vectors;
}

// `n` lanes of a vector starting at a column of a row; whole vectors are the common case.
template <class S, bool Whole>
struct Lanes {
  int n;
  using V = typename S::Value;
  template <class E>
  V load(const E* p) const {
    if constexpr (Whole) return S::load(p);
    return S::load_part(p, n);
  }
  template <class E>
  void store(E* p, V v) const {
    if constexpr (Whole) return S::store(p, v);
    S::store_part(p, v, n);
  }
};

// Calls fn(lanes) for what there is of a vector of `present` units.
template <class S, class Fn>
void with_lanes(int64_t present, const Fn& fn) {
  if (present >= S::lanes) {
    fn(Lanes<S, true>{S::lanes});
  } else {
    fn(Lanes<S, false>{static_cast<int>(present)});
  }
}

// Copies a row from memory to what is computed with, zeros if there is none, and zeros after its end.
template <class S, class E>
void copy_row(const E* from, int64_t count, typename S::Scalar* to) {
  pack_row<S>(from, Block{0, static_cast<int>(ceil_div(count, S::lanes)), static_cast<int>(count)}, to);
}

// The same, as narrow as it was.
template <class S>
void copy_row(const Bf16* from, int64_t count, Bf16* to) {
  const int64_t there = from == nullptr ? 0 : count;
  if (there > 0) __builtin_memcpy(to, from, there * sizeof(Bf16));
  for (int64_t i = there; i < padded<S>(count); ++i) to[i] = Bf16{};
}

// And back, perhaps added to what is there.
template <class S, class A, class E>
void narrow_row(const A* from, int64_t count, E* to, bool add) {
  for (int64_t i = 0; i < count; i += S::lanes) {
    with_lanes<S>(count - i, [&](const auto& lanes) {
      const auto v = lanes.load(from + i);
      lanes.store(to + i, add ? lanes.load(to + i) + v : v);
    });
  }
}

inline constexpr int64_t kNarrowLine = 32;  // elements

// Rounds a row that is not read again soon and begins with a cache line: whole lines go past the caches, which need not
// read them first then.
template <class S, class N>
void stream_row(const typename S::Scalar* from, int64_t count, N* to) {
  const int64_t whole = count - count % kNarrowLine;
  for (int64_t i = 0; i < whole; i += S::lanes) S::stream(to + i, S::load(from + i));
  narrow_row<S>(from + whole, count - whole, to + whole, false);
}

}  // namespace
}  // namespace pyrnnfast
