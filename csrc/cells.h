// The cells: one step forward and one step back, for every lane of a vector or for one CUDA thread. Their equations
// stand here and in pyrnnfast/reference.py, and nowhere else. Gate orders, names and conventions are torch's.
//
// A cell says how many gates its products have (`gates`), how many values per unit it saves for backward (`saved`), how
// many gate gradients it gives (`dgates`) and which states it reads; the time loop (cpu/forward.h, cpu/backward.h,
// cuda/pass.h) does the rest. `Math` supplies the arithmetic: a value type with + - * and the functions splat, fma,
// sigmoid, tanh, relu.
#pragma once

#include "host_device.h"
#include "problem.h"

namespace pyrnnfast {
namespace {

// Forward, in: the two halves of the gates, x W_ihᵀ + b and h W_hhᵀ, and the states before the step.
//          out: the states after it, and what backward will want.
template <class V>
struct StepForward {
  V x[4], a[4];
  V h_prev, c_prev, bias_hn;
  V h, c;
  V saved[4];
};

// Backward, in: ∂L/∂h of this step, complete; the carried gradient; states and saved values of the forward step.
//          out: gate gradients and the gradient to carry to the step before; of an LSTM h again.
template <class V>
struct StepBackward {
  V dh, carry;
  V h, h_prev, c, c_prev;
  V saved[4];
  V dgates[4];
};

// A stretch of columns of dgates that takes part in the recurrent product, in units of H.
struct Segment {
  int begin, length;
};

// Elman 1990: h = φ(x + a). Backward needs only h itself.
template <bool Relu>
struct Rnn {
  static constexpr int gates = 1, saved = 0, dgates = 1, segments = 1;
  static constexpr Segment segment[segments] = {{0, 1}};
  static constexpr bool has_cell = false, has_carry = false, has_bias_hn = false, projects = false;
  static constexpr bool forward_reads_h_prev = false;
  static constexpr bool backward_reads_h = true, backward_reads_h_prev = false;

  template <class Math>
  PYRNNFAST_HD static void forward(StepForward<typename Math::Value>& s) {
    const auto gate = s.x[0] + s.a[0];
    if constexpr (Relu) {
      s.h = Math::relu(gate);
    } else {
      s.h = Math::tanh(gate);
    }
  }

  template <class Math>
  PYRNNFAST_HD static void backward(StepBackward<typename Math::Value>& s) {
    if constexpr (Relu) {
      s.dgates[0] = Math::zero_where_not_positive(s.dh, s.h);
    } else {
      s.dgates[0] = s.dh * (Math::splat(1) - s.h * s.h);
    }
  }
};

// Cho et al. 2014, in the form of cuDNN and torch: the reset gate acts after the recurrent product.
//   r = σ(x_r + a_r)   z = σ(x_z + a_z)   n = tanh(x_n + r ⊙ (a_n + b_hn))   h = n + z ⊙ (h_prev − n)
struct Gru {
  static constexpr int gates = 3, saved = 4, dgates = 4, segments = 2;
  static constexpr Segment segment[segments] = {{0, 2}, {3, 1}};
  static constexpr bool has_cell = false, has_carry = true, has_bias_hn = true, projects = false;
  static constexpr bool forward_reads_h_prev = true;
  static constexpr bool backward_reads_h = false, backward_reads_h_prev = true;

  template <class Math>
  PYRNNFAST_HD static void forward(StepForward<typename Math::Value>& s) {
    const auto r = Math::sigmoid(s.x[0] + s.a[0]);
    const auto z = Math::sigmoid(s.x[1] + s.a[1]);
    const auto recurrent_n = s.a[2] + s.bias_hn;
    const auto n = Math::tanh(Math::fma(r, recurrent_n, s.x[2]));
    s.h = Math::fma(z, s.h_prev - n, n);
    s.saved[0] = r;
    s.saved[1] = z;
    s.saved[2] = n;
    s.saved[3] = recurrent_n;
  }

  template <class Math>
  PYRNNFAST_HD static void backward(StepBackward<typename Math::Value>& s) {
    const auto one = Math::splat(1);
    const auto r = s.saved[0], z = s.saved[1], n = s.saved[2], recurrent_n = s.saved[3];
    const auto dh = s.dh + s.carry;
    const auto dn = dh * (one - z) * (one - n * n);
    s.dgates[0] = dn * recurrent_n * (r * (one - r));
    s.dgates[1] = dh * (s.h_prev - n) * (z * (one - z));
    s.dgates[2] = dn;
    s.dgates[3] = dn * r;
    s.carry = dh * z;
  }
};

// Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000:
//   i, f, o = σ(·)   g = tanh(·)   c = f ⊙ c_prev + i ⊙ g   h = o ⊙ tanh(c)
struct Lstm {
  static constexpr int gates = 4, saved = 4, dgates = 4, segments = 1;
  static constexpr Segment segment[segments] = {{0, 4}};
  static constexpr bool has_cell = true, has_carry = true, has_bias_hn = false, projects = false;
  static constexpr bool forward_reads_h_prev = false;
  static constexpr bool backward_reads_h = false, backward_reads_h_prev = false;

  template <class Math>
  PYRNNFAST_HD static void forward(StepForward<typename Math::Value>& s) {
    const auto i = Math::sigmoid(s.x[0] + s.a[0]);
    const auto f = Math::sigmoid(s.x[1] + s.a[1]);
    const auto g = Math::tanh(s.x[2] + s.a[2]);
    const auto o = Math::sigmoid(s.x[3] + s.a[3]);
    s.c = Math::fma(f, s.c_prev, i * g);
    s.h = o * Math::tanh(s.c);
    s.saved[0] = i;
    s.saved[1] = f;
    s.saved[2] = g;
    s.saved[3] = o;
  }

  template <class Math>
  PYRNNFAST_HD static void backward(StepBackward<typename Math::Value>& s) {
    const auto one = Math::splat(1);
    const auto i = s.saved[0], f = s.saved[1], g = s.saved[2], o = s.saved[3];
    const auto tanh_c = Math::tanh(s.c);
    const auto dc = Math::fma(s.dh * o, one - tanh_c * tanh_c, s.carry);
    s.dgates[0] = dc * g * (i * (one - i));
    s.dgates[1] = dc * s.c_prev * (f * (one - f));
    s.dgates[2] = dc * i * (one - g * g);
    s.dgates[3] = s.dh * tanh_c * (o * (one - o));
    s.carry = dc * f;
    s.h = o * tanh_c;
  }
};

// Sak, Senior & Beaufays 2014: the state is W_hr h, of fewer units, and the h here goes no further. The passes do the
// projection; backward, `h` is an output, for the gradient of W_hr.
struct ProjectedLstm : Lstm {
  static constexpr bool projects = true;
};

}  // namespace
}  // namespace pyrnnfast
