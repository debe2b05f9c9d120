// sigmoid, tanh and relu for a vector of any width.
//
// Error, float32: at most 4 units in the last place where the result is a normal number, 2⁻¹²⁶ absolute elsewhere;
// exact at ±inf; NaN stays NaN. `python -m benchmarks.activations` checks all 2³² values, the tests a sample.
//
// Both rest on q = expm1(r) for a reduced argument |r| ≤ ln 2 / 2, since eʸ = 2ⁿ (1 + q) and expm1(y) = 2ⁿ q + (2ⁿ −
// 1), the latter without cancellation near 0. The polynomials come from benchmarks/lab/fit_expm1.py.
#pragma once

#include <cstdint>

namespace pyrnnfast {
namespace {

template <class T>
struct Expm1Table;

template <>
struct Expm1Table<float> {
  // ln 2 in two parts; n·ln2_high is exact for every n that occurs.
  static constexpr float ln2_high = 0.693145751953125f, ln2_low = 1.42860677e-06f;
  // 1.5·2²³: adding it rounds to an integer, which is then found in the low bits.
  static constexpr float rounder = 12582912.0f;
  static constexpr int mantissa_bits = 23;
  static constexpr int32_t one_bits = 0x3F800000;
  // sigmoid: e^−x is inf (so that the result is 0) above the second bound, and no longer matters below the first.
  static constexpr float sigmoid_low = -87.0f, sigmoid_high = 89.0f;
  // tanh(x) = ±1 to rounding where 2|x| exceeds this.
  static constexpr float tanh_bound = 20.0f;
  static constexpr float q[] = {0.00139261836f, 0.00836317905f, 0.0416665546f, 0.16666577f, 0.5f};
};

template <>
struct Expm1Table<double> {
  static constexpr double ln2_high = 0.693147180369123816490, ln2_low = 1.90821492927058770002e-10;
  static constexpr double rounder = 6755399441055744.0;  // 1.5·2⁵²
  static constexpr int mantissa_bits = 52;
  static constexpr int64_t one_bits = 0x3FF0000000000000;
  static constexpr double sigmoid_low = -708.0, sigmoid_high = 709.9;
  static constexpr double tanh_bound = 40.0;
  static constexpr double q[] = {2.0914686968086877e-9,
                                 2.5105217004720745e-8,
                                 2.7557273643110295e-7,
                                 2.7557255400206424e-6,
                                 2.4801587325547741e-5,
                                 0.00019841269874820625,
                                 0.0013888888888883748,
                                 0.0083333333333261351,
                                 0.04166666666666667,
                                 0.16666666666666671,
                                 0.5};
};

// The arithmetic that cells.h asks for, over the vectors of S (cpu/simd.h).
template <class S>
struct VectorMath : S {
  using Value = typename S::Value;
  using Mask = typename S::Mask;
  using T = typename S::Scalar;
  using Table = Expm1Table<T>;

  static Value sigmoid(Value x) {
    const Value y = S::clamp(-x, S::splat(Table::sigmoid_low), S::splat(Table::sigmoid_high));
    const Expm1 e = expm1(y);
    const Value one = S::splat(1);
    // Not fma(scale, q, scale): scale may be inf while q < 0.
    return one / (one + e.scale * (one + e.q));
  }

  static Value tanh(Value x) {
    const Value y = S::clamp(x + x, S::splat(-Table::tanh_bound), S::splat(Table::tanh_bound));
    const Expm1 e = expm1(y);
    const Value expm1_2x = S::fma(e.scale, e.q, e.scale - S::splat(1));
    return expm1_2x / (expm1_2x + S::splat(2));
  }

  static Value relu(Value x) { return x < Value{} ? Value{} : x; }

  // x where `gate` > 0 or is NaN, else 0.
  static Value zero_where_not_positive(Value x, Value gate) { return gate <= Value{} ? Value{} : x; }

 private:
  // y = n ln 2 + r:  scale = 2ⁿ, q = expm1(r)
  struct Expm1 {
    Value scale, q;
  };

  static Expm1 expm1(Value y) {
    const Value rounder = S::splat(Table::rounder);
    const Value shifted = S::fma(y, S::splat(static_cast<T>(1.4426950408889634074)), rounder);
    const Value n = shifted - rounder;
    const Value r = S::fma(n, S::splat(-Table::ln2_low), S::fma(n, S::splat(-Table::ln2_high), y));
    Value poly = S::splat(Table::q[0]);
    constexpr int terms = sizeof(Table::q) / sizeof(T);
#pragma GCC unroll 16
    for (int i = 1; i < terms; ++i) poly = S::fma(poly, r, S::splat(Table::q[i]));
    // The low bits of `shifted` hold n; the shift drops the rest of it.
    const Mask exponent = reinterpret_cast<Mask>(shifted) << Table::mantissa_bits;
    return {reinterpret_cast<Value>(exponent + Table::one_bits), S::fma(r * r, poly, r)};
  }
};

}  // namespace
}  // namespace pyrnnfast
