// The only door to the kernels: every rule that a call must meet stands in check.cpp, with the text of its error.
// Behind it nothing is checked again. Knows neither Python nor torch.
#pragma once

#include <string>
#include <vector>

#include "problem.h"
#include "widths.h"

namespace pyrnnfast {

enum class ElementType { float32, float64, bfloat16, float16, int64, boolean, other };

enum class Memory { cpu, cuda, other };

// Which operands the kernels behind this door take.
struct Rules {
  Memory memory;
  bool masks;  // lengths and resets
  bool projections;
};
inline constexpr Rules kCpuRules{Memory::cpu, false, true}, kCudaRules{Memory::cuda, true, false};

// Of the types that the kernels know.
int64_t bytes_of(ElementType type);

// A tensor as it was handed over; `data` may be anything until it has been checked.
struct Operand {
  bool present = false;
  void* data = nullptr;
  int dimensions = 0;
  int64_t shape[3] = {0, 0, 0}, stride[3] = {0, 0, 0};  // of the first three dimensions
  ElementType type = ElementType::other;
  Memory memory = Memory::other;
  int device = 0;  // its number among those with such memory
};

// The operands of a layer in D = 1 or 2 directions, the second of which runs backward in time. Named as in Forward and
// Backward (problem.h), which hold one direction of it.
struct LayerOperands {
  Operand x;                     // [T, B, I]; [N, I] with batch_sizes; [B, I]: one step
  Operand h0, c0;                // [D, B, H], or [B, H] where D = 1; of a projected LSTM h0 has P columns
  std::vector<Operand> weights;  // weight_ih, weight_hh, bias_ih, bias_hh[, weight_hr] of each direction
  Operand y;                     // as x, with D·H columns, or D·P
  std::vector<Operand> kept;     // saved, cells of each direction; empty: nothing is kept for backward
  Operand batch_sizes;           // [T], absent: dense
  Operand lengths;               // [B], of padded data: how many steps of each sequence are real; beyond 0 … T as near
  Operand reset;                 // [T, B], of padded data: whether a state is cleared before a step
};
struct ForwardOperands : LayerOperands {
  Operand h_n, c_n;  // as h0
};
struct BackwardOperands : LayerOperands {
  Operand grad_y, grad_h_n, grad_c_n;  // as y, h0
  Operand grad_cells;                  // as y
  Operand dx, dh0, dc0;                // as x, h0
  std::vector<Operand> dweights;       // as weights
  Operand dgates;                      // as y, with D·dgates·H columns (cells.h)
};

// The problem of each direction, and the memory that they point into: a copy would point into the original's.
template <class P>
struct Checked {
  Checked() = default;
  Checked(Checked&&) = default;
  Checked& operator=(Checked&&) = default;

  std::vector<int64_t> offsets;
  std::vector<P> directions;
};

// All throw std::invalid_argument.
Checked<Forward> check_forward(const std::string& cell, const ForwardOperands& operands, const Rules& rules);
Checked<Backward> check_backward(const std::string& cell, const BackwardOperands& operands, const Rules& rules);
// The gradients of weights and biases, four, alone: of rows x [N, I], the states before them [N, H], and dgates
// of each.
Checked<Backward> check_weight_gradients(const std::string& cell, const Operand& x, const Operand& states,
                                         const Operand& dgates, const std::vector<Operand>& dweights);
CellKind check_cell(const std::string& name);
// The first row of each step and, last, the number of rows, which must be `rows`.
std::vector<int64_t> check_batch_sizes(const Operand& batch_sizes, int64_t rows);
int check_threads(int64_t threads);
// out [M, N] = a [M, K] b [K, N], for benchmarks and tests of the tile.
Product check_product(const Operand& a, const Operand& b, const Operand& out);
// out[s] [M, N] = Σ_k a[s, k] ⊗ b[s, k] for a [S, K, M] and b [S, K, N]: the weight gradients of samples by themselves.
Product check_outer_products(const Operand& a, const Operand& b, const Operand& out);

}  // namespace pyrnnfast
