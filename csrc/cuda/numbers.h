// Numbers of the CUDA path: how each type is stored, what it is computed with, and the arithmetic that cells.h asks
// for. All of it runs on the host too, where the tests are.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../host_device.h"
#include "../problem.h"

namespace pyrnnfast {
namespace {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
PYRNNFAST_HD To same_bits(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// What numbers of type E are computed with, and the running cell state is kept in.
template <class E>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class E>
using Accumulator = typename AccumulatorOf<E>::Type;

template <class E>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::float32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::float64;
};
template <>
struct DtypeOf<Bfloat16> {
  static constexpr Dtype value = Dtype::bfloat16;
};
template <>
struct DtypeOf<Float16> {
  static constexpr Dtype value = Dtype::float16;
};

PYRNNFAST_HD inline float widened(float value) { return value; }
PYRNNFAST_HD inline double widened(double value) { return value; }
PYRNNFAST_HD inline float widened(Bfloat16 value) { return same_bits<float>(static_cast<uint32_t>(value.bits) << 16); }
PYRNNFAST_HD inline float widened(Float16 value) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(value.bits));
#else
  return static_cast<float>(same_bits<_Float16>(value.bits));
#endif
}

// To the nearest number of type E, ties to even.
template <class E>
struct Rounded {
  PYRNNFAST_HD static E from(E value) { return value; }
};
template <>
struct Rounded<Bfloat16> {
  PYRNNFAST_HD static Bfloat16 from(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
    const auto bits = same_bits<uint32_t>(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};  // NaN
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
  }
};
template <>
struct Rounded<Float16> {
  PYRNNFAST_HD static Float16 from(float value) {
#if defined(__CUDACC__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    return {same_bits<uint16_t>(static_cast<_Float16>(value))};
#endif
  }
};

// As the tensor cores take a number of type E: float has only 10 bits of mantissa there (TF32), and is rounded to the
// nearest such, as they would cut the others off.
template <class E>
PYRNNFAST_HD E for_tensor_cores(Accumulator<E> value) {
  return Rounded<E>::from(value);
}
template <>
PYRNNFAST_HD inline float for_tensor_cores<float>(float value) {
  const auto bits = same_bits<uint32_t>(value);
  if ((bits & 0x7f800000u) != 0x7f800000u) return same_bits<float>((bits + 0x1000u) & ~0x1fffu);
  // NaN must not lose what makes it one.
  return (bits & 0x7fffffu) == 0 ? value : same_bits<float>(bits | 0x400000u);
}

// A number as it is handed from block to block: 32 bits, written at once, of which the tensor cores take the high ones.
// The low ones are a tag, which tells the step from the one before the last one, that the exchange had been used for,
// and from an exchange of zeros.
template <class E>
struct Tagged {
  static constexpr uint32_t kTag = sizeof(E) == sizeof(float) ? 0x1fffu : 0xffffu;

  PYRNNFAST_HD static uint32_t tag(int step) { return static_cast<uint32_t>(step + 1) & 0x1fffu; }
  PYRNNFAST_HD static uint32_t tag_of(uint32_t word) { return word & kTag; }
  PYRNNFAST_HD static uint32_t bits(uint32_t word) { return word & ~kTag; }
  PYRNNFAST_HD static uint32_t from(Accumulator<E> value, int step) {
    const E number = for_tensor_cores<E>(value);
    if constexpr (sizeof(E) == sizeof(float)) {
      return bits(same_bits<uint32_t>(number)) | tag(step);
    } else {
      return static_cast<uint32_t>(same_bits<uint16_t>(number)) << 16 | tag(step);
    }
  }
};

// A part of a sum, handed over in the same way: in float32, but for the two lowest bits, which are the tag. Zeros have
// that of step 3, but whoever waits for step 3 in a word has before waited for step 1 in the same word.
struct Part {
  static constexpr uint32_t kTag = 3;

  PYRNNFAST_HD static uint32_t tag(int step) { return static_cast<uint32_t>(step + 1) & kTag; }
  PYRNNFAST_HD static uint32_t tag_of(uint32_t word) { return word & kTag; }
  PYRNNFAST_HD static float value(uint32_t word) { return same_bits<float>(word & ~kTag); }
  PYRNNFAST_HD static uint32_t from(float value, uint32_t tag) { return (same_bits<uint32_t>(value) & ~kTag) | tag; }
};

// The arithmetic of cells.h, one number at a time. exp and tanh are those of CUDA's library, not the approximate ones:
// at most 2 units in the last place.
template <class T>
struct ScalarMath {
  using Value = T;
  static constexpr bool is_float = sizeof(T) == sizeof(float);
  PYRNNFAST_HD static T splat(T value) { return value; }
  PYRNNFAST_HD static T fma(T a, T b, T c) {
    if constexpr (is_float) return fmaf(a, b, c);
    return ::fma(a, b, c);
  }
  PYRNNFAST_HD static T exp(T x) {
    if constexpr (is_float) return expf(x);
    return ::exp(x);
  }
  PYRNNFAST_HD static T tanh(T x) {
    if constexpr (is_float) return tanhf(x);
    return ::tanh(x);
  }
  PYRNNFAST_HD static T sigmoid(T x) { return T(1) / (T(1) + exp(-x)); }
  PYRNNFAST_HD static T relu(T x) { return x < T(0) ? T(0) : x; }
  PYRNNFAST_HD static T zero_where_not_positive(T x, T gate) { return gate <= T(0) ? T(0) : x; }
};

// The same, as fast as a recurrence wants that waits for nothing else: by the processor's own 2^x and reciprocal.
// Errors of some 1e-7, relative to the result from 2^-4 on and below; what is stored in 16 bits, or was multiplied as
// TF32, has a thousand times that.
template <class T>
struct FastMath : ScalarMath<T> {
  // Without what CUDA's own do for denormal numbers, which are nothing beside the 1 that is added.
  PYRNNFAST_HD static T exp(T x) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
    return result;
#else
    return std::exp(x);
#endif
  }
  PYRNNFAST_HD static T quotient(T a, T b) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(b));
    return a * result;
#else
    return a / b;
#endif
  }
  PYRNNFAST_HD static T sigmoid(T x) { return quotient(T(1), T(1) + exp(-x)); }
  PYRNNFAST_HD static T tanh(T x) {
    const T square = x * x;
    // Near zero the other form loses all its digits.
    const T near_zero = x * ScalarMath<T>::fma(square, ScalarMath<T>::fma(square, T(2.0 / 15), T(-1.0 / 3)), T(1));
    const T elsewhere = T(1) - quotient(T(2), T(1) + exp(x + x));
    return square < T(1.0 / 256) ? near_zero : elsewhere;
  }
};

}  // namespace
}  // namespace pyrnnfast
