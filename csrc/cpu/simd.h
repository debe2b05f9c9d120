// The vector of an instruction set: Bytes = 64 (AVX-512), 32 (AVX2) or 16 (whatever the baseline of the processor has).
// The compiler's own vector types carry + - * / and comparisons; here stands what they lack: loads of part of a vector,
// fused multiply-add, minimum and maximum. -ffp-contract=off (CMakeLists.txt) keeps the compiler from fusing on its
// own, which it might do differently in two instances of a template: then a row's bits would depend on its neighbours.
//
// Everything is in an anonymous namespace and nothing comes from the standard library, so that no function compiled for
// a newer processor can be shared by the linker with code that runs on an older one.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyrnnfast {
namespace {

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
};
template <>
struct Bits<double> {
  using Int = int64_t;
};

template <class T, int Bytes>
struct Simd {
  using Scalar = T;
  using Int = typename Bits<T>::Int;
  typedef T Value __attribute__((vector_size(Bytes)));
  typedef Int Mask __attribute__((vector_size(Bytes)));
  // The same vector at the alignment of its elements, through which memory is read and written.
  typedef T Unaligned __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));

  static constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
  static constexpr bool is_double = sizeof(T) == 8;
  // Vector registers: AVX-512 has 32, the others 16.
  static constexpr int registers = Bytes == 64 ? 32 : 16;

  // Minus zero: plus would have to turn −0 into +0, and costs an instruction.
  static Value splat(T x) { return x - Value{}; }
  static Value load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(T* p, Value v) { *reinterpret_cast<Unaligned*>(p) = v; }

  // The first n of the lanes, 0 < n < lanes; the others read as zero and are not touched in memory.
  static Value load_part(const T* p, int n) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64 && is_double) return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
    if constexpr (Bytes == 64 && !is_double) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32 && is_double) return _mm256_maskload_pd(p, reinterpret_cast<__m256i>(first(n)));
    if constexpr (Bytes == 32 && !is_double) return _mm256_maskload_ps(p, reinterpret_cast<__m256i>(first(n)));
#endif
    Value v{};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }

  static void store_part(T* p, Value v, int n) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64 && is_double) return _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
    if constexpr (Bytes == 64 && !is_double) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32 && is_double) return _mm256_maskstore_pd(p, reinterpret_cast<__m256i>(first(n)), v);
    if constexpr (Bytes == 32 && !is_double) return _mm256_maskstore_ps(p, reinterpret_cast<__m256i>(first(n)), v);
#endif
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }

  // a b + c, rounded once where the instruction set can.
  static Value fma(Value a, Value b, Value c) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64 && is_double) return _mm512_fmadd_pd(a, b, c);
    if constexpr (Bytes == 64 && !is_double) return _mm512_fmadd_ps(a, b, c);
#endif
#if defined(__FMA__)
    if constexpr (Bytes == 32 && is_double) return _mm256_fmadd_pd(a, b, c);
    if constexpr (Bytes == 32 && !is_double) return _mm256_fmadd_ps(a, b, c);
#endif
    return a * b + c;
  }

  // NaN in v stays NaN (the x86 instructions return their second operand then).
  static Value clamp(Value v, Value low, Value high) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64 && is_double) return _mm512_min_pd(high, _mm512_max_pd(low, v));
    if constexpr (Bytes == 64 && !is_double) return _mm512_min_ps(high, _mm512_max_ps(low, v));
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32 && is_double) return _mm256_min_pd(high, _mm256_max_pd(low, v));
    if constexpr (Bytes == 32 && !is_double) return _mm256_min_ps(high, _mm256_max_ps(low, v));
#endif
    v = low > v ? low : v;
    return high < v ? high : v;
  }

 private:
  static Mask first(int n) {
    Mask lane;
    for (int i = 0; i < lanes; ++i) lane[i] = i;
    return lane < Mask{} + n;
  }
};

}  // namespace
}  // namespace pyrnnfast
