// The vector of an instruction set: Bytes = 64 (AVX-512), 32 (AVX2) or 16 (NEON, or whatever the baseline of another
// processor has).
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
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace pyrnnfast {
namespace {

// Narrow types as they lie in memory. bfloat16: the upper half of a float32.
struct Bf16 {
  uint16_t bits;
};
// float16 of IEEE 754: 5 bits of exponent, 10 of fraction.
struct Fp16 {
  uint16_t bits;
};

// Half, as GCC takes a vector of a size that depends on a parameter for one only if its elements do, too.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Int = int32_t;
  using Half = uint16_t;
};
template <>
struct Bits<double> {
  using Int = int64_t;
  using Half = uint16_t;
};

template <class N>
inline constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<Bf16> = true;

template <class T, int Bytes>
struct Simd {
  using Scalar = T;
  using Int = typename Bits<T>::Int;
  using Half = typename Bits<T>::Half;
  typedef T Value __attribute__((vector_size(Bytes)));
  typedef Int Mask __attribute__((vector_size(Bytes)));
  // The same vector at the alignment of its elements, through which memory is read and written.
  typedef T Unaligned __attribute__((vector_size(Bytes), aligned(alignof(T)), may_alias));

  static constexpr int lanes = Bytes / static_cast<int>(sizeof(T));
  static constexpr bool is_double = sizeof(T) == 8;
  // Vector registers: AVX-512 and NEON have 32, the others 16.
#if defined(__aarch64__)
  static constexpr int registers = 32;
#else
  static constexpr int registers = Bytes == 64 ? 32 : 16;
#endif

  // Whether instructions widen and round float16.
#if defined(__AVX512F__) || defined(__F16C__) || defined(__aarch64__)
  static constexpr bool converts_fp16 = true;
#else
  static constexpr bool converts_fp16 = false;
#endif

  // Whether pair_product is there: products of bfloat16 by the processor itself, at twice the speed of float32.
#if defined(__AVX512BF16__)
  static constexpr bool has_pair_product = Bytes == 64 && !is_double;
  // sum + a[0] w₀ + a[1] w₁, in float32, for pairs of weights as load_pairs knows them; `count` = 1: without a[1].
  static Value pair_product(const Bf16* a, int count, const Bf16* weights, Value sum) {
    const uint32_t pair = a[0].bits | (count == 1 ? 0u : uint32_t{a[1].bits} << 16);
    const __m512i x = _mm512_set1_epi32(static_cast<int>(pair)), w = _mm512_loadu_si512(weights);
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
  // sum + the products of 2 · lanes elements and as many others, neighbours added up.
  static Value add_products(const Bf16* a, const Bf16* b, Value sum) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
#else
  static constexpr bool has_pair_product = false;
#endif

  // Minus zero: plus would have to turn −0 into +0, and costs an instruction.
  static Value splat(T x) { return x - Value{}; }
  static Value load(const T* p) { return *reinterpret_cast<const Unaligned*>(p); }
  static void store(T* p, Value v) { *reinterpret_cast<Unaligned*>(p) = v; }

  // Narrow types N: widened where they are read; rounded to the nearest, ties to even, where they are written.
  template <class N>
  static Value load(const N* p) {
    return widened<N>(*reinterpret_cast<const UnalignedHalves*>(p));
  }
  template <class N>
  static void store(N* p, Value v) {
    *reinterpret_cast<UnalignedHalves*>(p) = narrowed<N>(v);
  }
  // The same past the caches, where the instruction set can; `p` is aligned to what is written. Other threads may read
  // it after stream_end().
  template <class N>
  static void stream(N* p, Value v) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64) {
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(narrowed<N>(v)));
    }
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32) {
      return _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(narrowed<N>(v)));
    }
#endif
    store(p, v);
  }
  static void stream_end() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
  }
  // Two vectors beside one another, in the order in which they are widened soonest. bfloat16 lane by lane, (a₀ b₀)
  // (a₁ b₁) …, which takes an operation each, not two; float16 one behind the other.
  static void load_pairs(const Bf16* p, Value& a, Value& b) {
    const Mask pairs = *reinterpret_cast<const UnalignedMask*>(p);
    a = reinterpret_cast<Value>(pairs << 16);
    b = reinterpret_cast<Value>(pairs & ~0xFFFF);
  }
  static void load_pairs(const Fp16* p, Value& a, Value& b) {
    a = load(p);
    b = load(p + lanes);
  }
  // Of values that the narrow type has exactly.
  static void store_pairs(Bf16* p, Value a, Value b) {
    *reinterpret_cast<UnalignedMask*>(p) = ((reinterpret_cast<Mask>(a) >> 16) & 0xFFFF) | reinterpret_cast<Mask>(b);
  }
  static void store_pairs(Fp16* p, Value a, Value b) {
    store(p, a);
    store(p + lanes, b);
  }
  // Neighbours in memory as one element, to be moved and not computed with: the first n of 2 · lanes, else zeros.
  typedef T UnalignedPairs __attribute__((vector_size(Bytes), aligned(2), may_alias));
  template <class N>
  static Value load_neighbours(const N* p, int n) {
    if (n >= 2 * lanes) return *reinterpret_cast<const UnalignedPairs*>(p);
    Mask pairs{};
    if constexpr (Bytes == 64 || Bytes == 32) {
      pairs = reinterpret_cast<Mask>(load_part(static_cast<const T*>(static_cast<const void*>(p)), n / 2));
    } else {
      for (int i = 0; i < n / 2; ++i) pairs[i] = p[2 * i].bits | p[2 * i + 1].bits << 16;
    }
    if (n % 2 != 0) pairs = numbers() == n / 2 ? Mask{} + p[n - 1].bits : pairs;
    return reinterpret_cast<Value>(pairs);
  }
  // To where load_pairs finds the first and the second ones of them.
  static void store_neighbours(Bf16* p, Value v) { *reinterpret_cast<UnalignedPairs*>(p) = v; }
  static void store_neighbours(Fp16* p, Value v) {
    const Mask pairs = reinterpret_cast<Mask>(v);
    *reinterpret_cast<UnalignedHalves*>(p) = lower_halves(pairs & 0xFFFF);
    *reinterpret_cast<UnalignedHalves*>(p + lanes) = lower_halves((pairs >> 16) & 0xFFFF);
  }
  // Of parts, pairs go by masks of 32 bits, as there are none of 16 without more of AVX-512; the last one by itself.
  template <class N>
  static Value load_part(const N* p, int n) {
    Halves halves{};
#if defined(__AVX512F__)
    if constexpr (Bytes == 64) {
      halves = reinterpret_cast<Halves>(_mm256_maskload_epi32(reinterpret_cast<const int*>(p), first_of_8(n / 2)));
      return widened<N>(half_numbers() == static_cast<Half>(n - 1) ? Halves{} + p[n - 1].bits : halves);
    }
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32) {
      halves = reinterpret_cast<Halves>(
          _mm_maskload_epi32(reinterpret_cast<const int*>(p), _mm256_castsi256_si128(first_of_8(n / 2))));
      return widened<N>(half_numbers() == static_cast<Half>(n - 1) ? Halves{} + p[n - 1].bits : halves);
    }
#endif
    for (int i = 0; i < n; ++i) halves[i] = p[i].bits;
    return widened<N>(halves);
  }
  template <class N>
  static void store_part(N* p, Value v, int n) {
    const Halves halves = narrowed<N>(v);
#if defined(__AVX512F__)
    if constexpr (Bytes == 64) {
      _mm256_maskstore_epi32(reinterpret_cast<int*>(p), first_of_8(n / 2), reinterpret_cast<__m256i>(halves));
      p[n - 1].bits = halves[n - 1];
      return;
    }
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32) {
      _mm_maskstore_epi32(reinterpret_cast<int*>(p), _mm256_castsi256_si128(first_of_8(n / 2)),
                          reinterpret_cast<__m128i>(halves));
      p[n - 1].bits = halves[n - 1];
      return;
    }
#endif
#pragma GCC unroll 4
    for (int i = 0; i < lanes - 1; ++i) {
      if (i < n) p[i].bits = halves[i];
    }
  }

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
    // Not up to n: the compiler would call memcpy.
#pragma GCC unroll 4
    for (int i = 0; i < lanes - 1; ++i) {
      if (i < n) v[i] = p[i];
    }
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
#pragma GCC unroll 4
    for (int i = 0; i < lanes - 1; ++i) {
      if (i < n) p[i] = v[i];
    }
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
#if defined(__aarch64__)
    if constexpr (is_double) return vfmaq_f64(c, a, b);
    if constexpr (!is_double) return vfmaq_f32(c, a, b);
#endif
    return a * b + c;
  }

  // Loaded once and then used several times; the compiler would load it for each of the uses, where an instruction that
  // computes can load as well, and loads are what a product of few rows waits for.
  static Value in_register(Value v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
    return v;
  }

  // Lane i of the result is the sum of the lanes of v[i]. Uses up `v`.
  static Value sum_each(Value (&v)[lanes]) {
    fold<lanes / 2>(v);
    return v[0];
  }

  // Lane i of v[j] becomes lane j of v[i].
  static void transpose(Value (&v)[lanes]) { exchange<lanes / 2>(v); }

  // NaN in v stays NaN (the x86 instructions return their second operand then, those of NEON a NaN).
  static Value clamp(Value v, Value low, Value high) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64 && is_double) return _mm512_min_pd(high, _mm512_max_pd(low, v));
    if constexpr (Bytes == 64 && !is_double) return _mm512_min_ps(high, _mm512_max_ps(low, v));
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32 && is_double) return _mm256_min_pd(high, _mm256_max_pd(low, v));
    if constexpr (Bytes == 32 && !is_double) return _mm256_min_ps(high, _mm256_max_ps(low, v));
#endif
#if defined(__aarch64__)
    if constexpr (is_double) return vminq_f64(high, vmaxq_f64(low, v));
    if constexpr (!is_double) return vminq_f32(high, vmaxq_f32(low, v));
#endif
    v = low > v ? low : v;
    return high < v ? high : v;
  }

 private:
  typedef Half Halves __attribute__((vector_size(2 * lanes)));
  typedef Half UnalignedHalves __attribute__((vector_size(2 * lanes), aligned(2), may_alias));
  typedef Int UnalignedMask __attribute__((vector_size(Bytes), aligned(2), may_alias));

  template <class N>
  static Value widened(Halves halves) {
    if constexpr (is_bf16<N>) {
      return reinterpret_cast<Value>(wide(halves) << 16);
    } else {
      return from_fp16(halves);
    }
  }
  // Rounded; NaN stays NaN.
  template <class N>
  static Halves narrowed(Value v) {
    if constexpr (!is_bf16<N>) return to_fp16(v);
    const Mask bits = reinterpret_cast<Mask>(v);
    const Mask rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16) & 0xFFFF;
    return lower_halves(v != v ? Mask{} + 0x7FC0 : rounded);
  }

  static Value from_fp16(Halves halves) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64) return _mm512_cvtph_ps(reinterpret_cast<__m256i>(halves));
#endif
#if defined(__F16C__)
    if constexpr (Bytes == 32) return _mm256_cvtph_ps(reinterpret_cast<__m128i>(halves));
#endif
#if defined(__aarch64__)
    return vcvt_f32_f16(reinterpret_cast<float16x4_t>(halves));
#endif
    // Exponents differ by 112; those of infinity and NaN once more. What is below the normal numbers gets an exponent,
    // and its leading bit, which that implies, is taken off by a subtraction.
    const Mask bits = wide(halves), size = (bits & 0x7FFF) << 13, exponent = size & (0x1F << 23);
    const Mask moved = size + (exponent == 0x1F << 23 ? Mask{} + (224 << 23) : Mask{} + (112 << 23));
    const Mask lifted = size + (113 << 23), leading = Mask{} + (113 << 23);
    const Mask small = reinterpret_cast<Mask>(reinterpret_cast<Value>(lifted) - reinterpret_cast<Value>(leading));
    return reinterpret_cast<Value>((exponent == 0 ? small : moved) | (bits & 0x8000) << 16);
  }
  static Halves to_fp16(Value v) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64) return reinterpret_cast<Halves>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
    if constexpr (Bytes == 32) return reinterpret_cast<Halves>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__aarch64__)
    return reinterpret_cast<Halves>(vcvt_f16_f32(v));
#endif
    // The same the other way round; for what falls below the normal numbers, an addition rounds.
    const Mask bits = reinterpret_cast<Mask>(v), size = bits & 0x7FFFFFFF;
    const Mask normal = (size + (((size >> 13) & 1) + 0xFFF) - (112 << 23)) >> 13;
    const Value half = reinterpret_cast<Value>(Mask{} + (126 << 23));
    const Mask small = reinterpret_cast<Mask>(reinterpret_cast<Value>(size) + half) - (126 << 23);
    const Mask finite = size < 113 << 23 ? small : normal;
    // From half a step beyond the largest number on: infinity.
    const Mask large = v != v ? Mask{} + 0x7E00 : Mask{} + 0x7C00;
    return lower_halves((size > 0x477FEFFF ? large : finite) | ((bits >> 16) & 0x8000));
  }

  static Mask wide(Halves halves) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64) return reinterpret_cast<Mask>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32) return reinterpret_cast<Mask>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#endif
    return __builtin_convertvector(halves, Mask);
  }
  // Of lanes whose upper halves are zeros.
  static Halves lower_halves(Mask lanes_of_32) {
#if defined(__AVX512F__)
    if constexpr (Bytes == 64) {
      return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(lanes_of_32)));
    }
#endif
#if defined(__AVX2__)
    if constexpr (Bytes == 32) {
      const __m256i all = reinterpret_cast<__m256i>(lanes_of_32);
      return reinterpret_cast<Halves>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
    }
#endif
    return __builtin_convertvector(lanes_of_32, Halves);
  }
  static Halves half_numbers() {
    Halves lane;
    for (int i = 0; i < lanes; ++i) lane[i] = static_cast<Half>(i);
    return lane;
  }

#if defined(__AVX2__)
  static __m256i first_of_8(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
#endif

  template <int... I>
  struct Indices {};
  template <int N, int... I>
  struct Count : Count<N - 1, N - 1, I...> {};
  template <int... I>
  struct Count<0, I...> {
    using Type = Indices<I...>;
  };

  // Of each group of 2·Width lanes the lower (Part = 0) or upper (1) half, from a and b side by side.
  template <int Width, int Part, int... L>
  static Value halves(Value a, Value b, Indices<L...>) {
    return __builtin_shufflevector(
        a, b, (L / (2 * Width) * (2 * Width) + L % Width + Part * Width + (L % (2 * Width) < Width ? 0 : lanes))...);
  }
  // Adds up pairs of lanes `Width` apart, and so on down to neighbours; half of the vectors are left after each step.
  template <int Width>
  static void fold(Value (&v)[lanes]) {
    using All = typename Count<lanes>::Type;
    for (int i = 0; i < Width; ++i) {
      v[i] = halves<Width, 0>(v[i], v[i + Width], All{}) + halves<Width, 1>(v[i], v[i + Width], All{});
    }
    if constexpr (Width > 1) fold<Width / 2>(v);
  }

  // Exchanges the off-diagonal quarters of squares of 2·Width, then within the quarters.
  template <int Width>
  static void exchange(Value (&v)[lanes]) {
    using All = typename Count<lanes>::Type;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if ((i & Width) != 0) continue;
      const Value a = v[i], b = v[i + Width];
      v[i] = halves<Width, 0>(a, b, All{});
      v[i + Width] = halves<Width, 1>(a, b, All{});
    }
    if constexpr (Width > 1) exchange<Width / 2>(v);
  }

  static Mask numbers() {
    Mask lane;
    for (int i = 0; i < lanes; ++i) lane[i] = i;
    return lane;
  }
  static Mask first(int n) { return numbers() < Mask{} + n; }
};

}  // namespace
}  // namespace pyrnnfast
