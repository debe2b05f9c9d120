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
  return (bits & 0x7f800000u) == 0x7f800000u ? value : same_bits<float>((bits + 0x1000u) & ~0x1fffu);
}

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

}  // namespace
}  // namespace pyrnnfast
