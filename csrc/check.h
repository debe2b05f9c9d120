// The only door to the kernels: every rule that a call must meet stands in check.cpp, with the text of its error.
// Behind it nothing is checked again. Knows neither Python nor torch.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace pyrnnfast {

enum class ElementType { float32, float64, int64, other };

// A tensor as it was handed over; `data` may be anything until it has been checked.
struct Operand {
  bool present = false;
  void* data = nullptr;
  int dimensions = 0;
  int64_t shape[2] = {0, 0}, stride[2] = {0, 0};  // of the first two dimensions
  ElementType type = ElementType::other;
  bool on_cpu = false;
};

// Named as in Forward and Backward (problem.h). `batch_sizes` absent: dense.
struct ForwardOperands {
  Operand xgates, x, weight_ih, bias, weight_hh, bias_hn, hgates, h0, c0, y, h_n, c_n, saved, cells, batch_sizes;
};
struct BackwardOperands {
  Operand y, saved, cells, weight_hh, h0, c0, grad_y, grad_h_n, grad_c_n, dgates, carry, batch_sizes;
  int64_t batch = 0;
};

// A problem and the memory that it points into.
template <class P>
struct Checked {
  std::vector<int64_t> offsets;
  P problem;
};

// All throw std::invalid_argument.
Checked<Forward> check_forward(const std::string& cell, const ForwardOperands& operands, bool reverse);
Checked<Backward> check_backward(const std::string& cell, const BackwardOperands& operands, bool reverse);
// The first row of each step and, last, the number of rows, which must be `rows`.
std::vector<int64_t> check_batch_sizes(const Operand& batch_sizes, int64_t rows);
int check_threads(int64_t threads);

}  // namespace pyrnnfast
