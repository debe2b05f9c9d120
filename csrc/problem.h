// What one call of the recurrence is: sizes, strides and addresses, already checked (check.cpp). Plain data without
// functions, because translation units compiled for different instruction sets share this header.
//
// Notation: T steps, B sequences, H hidden units, G gates of a cell, N = sum of the batch sizes (T·B when dense) rows.
// Rows are time-major: those of step t are offsets[t] … offsets[t + 1] - 1, longest sequences first, as in torch's
// PackedSequence. Dense input is packed input with a constant batch size.
#pragma once

#include <cstdint>

namespace pyrnnfast {

enum class CellKind { rnn_tanh, rnn_relu, gru, lstm };
enum class Dtype { float32, float64 };
inline constexpr int kCellKinds = 4;
inline constexpr int kDtypes = 2;

// Rows of contiguous elements, `stride` elements apart. A null address says that the operand is absent.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};

struct Problem {
  CellKind cell = CellKind::rnn_tanh;
  Dtype dtype = Dtype::float32;
  int64_t steps = 0;                 // T
  int64_t batch = 0;                 // B, at the first step
  int64_t hidden = 0;                // H
  const int64_t* offsets = nullptr;  // [T + 1]
  bool reverse = false;              // from the last step to the first
  Matrix weight_hh;                  // [G·H, H]; absent only when T = 1
  Matrix h0, c0;                     // [B, H], absent: zeros
};

// The forward pass. Every output is written whole; `saved` and `cells` are absent when no gradient is wanted.
//
// The input's half of the gates comes ready, as `xgates`, or the kernel makes it, from `x`, `weight_ih` and `bias`.
struct Forward : Problem {
  int64_t inputs = 0;  // I; 0: xgates is given
  Matrix x;            // [N, I]
  Matrix weight_ih;    // [G·H, I]
  Matrix bias;         // [1, G·H], absent: zeros

  Matrix xgates;   // [N, G·H], x W_ihᵀ + b
  Matrix bias_hn;  // [1, H], GRU: the bias inside r ⊙ (W_hn h + b_hn); absent: zeros
  Matrix hgates;   // [B, G·H], h0 W_hhᵀ; absent: zeros
  Matrix y;        // [N, H], out: h_t
  Matrix h_n;      // [B, H], out: h after the last step of each sequence
  Matrix c_n;      // [B, H], out (LSTM): the same for c, and the running c meanwhile
  Matrix saved;    // [N, S·H], out: what backward needs of the gates; may be xgates itself
  Matrix cells;    // [N, H], out (LSTM): c_t
};

// Back through time. `dgates` holds, for the LSTM and the vanilla RNN, ∂L/∂(gates before their non-linearity); for the
// GRU the columns are r, z, n with respect to the input's gates and then n with respect to the recurrent ones.
struct Backward : Problem {
  Matrix y;         // [N, H], of the forward pass
  Matrix saved;     // [N, S·H]
  Matrix cells;     // [N, H]
  Matrix grad_y;    // [N, H], absent: zeros
  Matrix grad_h_n;  // [B, H], absent: zeros
  Matrix grad_c_n;  // [B, H], absent: zeros
  Matrix dgates;    // [N, D·H], out
  Matrix carry;     // [B, H], out: ∂L/∂c0 (LSTM); the part of ∂L/∂h0 that passes by the gates (GRU)
};

}  // namespace pyrnnfast
