// What one call of the recurrence is: sizes, strides and addresses, already checked (check.cpp). Plain data without
// functions, because translation units compiled for different instruction sets share this header.
//
// Notation: T steps, B sequences, I inputs, H hidden units, G gates of a cell, N = sum of the batch sizes (T·B when
// dense) rows. Rows are time-major: those of step t are offsets[t] … offsets[t + 1] - 1, longest sequences first, as in
// torch's PackedSequence. Dense input is packed input with a constant batch size.
#pragma once

#include <cstdint>

namespace pyrnnfast {

// The last one is an LSTM with a projection (cells.h), on the CPU alone.
enum class CellKind { rnn_tanh, rnn_relu, gru, lstm, projected_lstm };
// Of the operands in memory. What is computed with, and the running cell state, is float32 where they are narrower.
enum class Dtype { float32, float64, bfloat16, float16 };
inline constexpr int kCellKinds = 5, kDtypes = 4;

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
  int64_t inputs = 0;                // I
  int64_t hidden = 0;                // H
  int64_t outputs = 0;               // P: of y, h0 and h_n, and of their gradients; H where nothing is projected
  const int64_t* offsets = nullptr;  // [T + 1]
  bool reverse = false;              // from the last step to the first
  // For CUDA alone, with a constant batch size, and in the device's memory: see Flow in cuda/elements.h.
  const int64_t* lengths = nullptr;                 // [B]
  const uint8_t* reset = nullptr;                   // [T, B]
  int64_t next_reset_step = 0, next_reset_row = 0;  // elements from one to the next
  Matrix x;                                         // [N, I]
  Matrix weight_ih;                                 // [G·H, I]
  Matrix weight_hh;                                 // [G·H, P]
  Matrix weight_hr;                                 // [P, H], of a projected LSTM
  Matrix bias_ih, bias_hh;                          // [1, G·H], absent: zeros
  Matrix h0, c0;                                    // [B, P] and [B, H], absent: zeros
  // Written by the forward pass and read by the backward pass; `saved` and `cells` are absent when there will be none.
  Matrix y;      // [N, P]: h_t
  Matrix saved;  // [N, S·H]: what backward needs of the gates
  Matrix cells;  // [N, H] (LSTM): c_t, float32 where the operands are narrower
};

// The forward pass. Every output is written whole.
struct Forward : Problem {
  Matrix h_n;  // [B, P], out: h after the last step of each sequence; may be y itself when T = 1
  Matrix c_n;  // [B, H], out (LSTM): the same for c
};

// Back through time. The outputs are the gradients of those operands that are present among them.
struct Backward : Problem {
  Matrix grad_y;                  // [N, P], absent: zeros
  Matrix grad_h_n, grad_c_n;      // [B, P] and [B, H], absent: zeros
  Matrix grad_cells;              // [N, H] (LSTM), absent: zeros; of the type of cells
  Matrix dx;                      // [N, I], out
  bool add_to_dx = false;         // to what is there already, of the other direction
  Matrix dweight_ih, dweight_hh;  // [G·H, I] and [G·H, P], out
  Matrix dweight_hr;              // [P, H], out
  Matrix dbias_ih, dbias_hh;      // [1, G·H], out
  Matrix dh0, dc0;                // [B, P] and [B, H], out
  Matrix dgates;                  // [N, dgates·H], out: the gate gradients of each row (cells.h)
  // dgates are there already, of rows that need not be steps of one another: h0 is [N, H], the state before each. Of
  // the outputs there are only those of weights and biases, and x is all that is read besides.
  bool dgates_given = false;
};

// The tile by itself: out [M, N] = a [M, K] b [K, N], or, for each of several samples, out [M, N] = aᵀ b with a [K, M].
struct Product {
  Dtype dtype = Dtype::float32;
  int64_t rows = 0, columns = 0, depth = 0;  // M, N, K
  Matrix a, b, out;
  bool transposed = false;
  int64_t samples = 1, next_a = 0, next_b = 0, next_out = 0;  // elements from a sample to the next
};

}  // namespace pyrnnfast
