// Every rule that a call must meet; see check.h.
#include "check.h"

#include <stdexcept>

#include "cells.h"

namespace pyrnnfast {
namespace {

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument(text); }

void require(bool condition, const std::string& text) {
  if (!condition) fail(text);
}

CellKind parse_cell(const std::string& name) {
  if (name == "rnn_tanh") return CellKind::rnn_tanh;
  if (name == "rnn_relu") return CellKind::rnn_relu;
  if (name == "gru") return CellKind::gru;
  if (name == "lstm") return CellKind::lstm;
  fail("cell must be 'rnn_tanh', 'rnn_relu', 'gru' or 'lstm', got '" + name + "'");
}

// Columns of each operand in units of H; 0 or false: the cell has no such operand.
struct Widths {
  int64_t gates, saved, dgates;
  bool cell, bias_hn, carry;
};

template <class Cell>
constexpr Widths widths{Cell::gates, Cell::saved, Cell::dgates, Cell::has_cell, Cell::has_bias_hn, Cell::has_carry};

const Widths& widths_of(CellKind cell) {
  switch (cell) {
    case CellKind::lstm:
      return widths<Lstm>;
    case CellKind::gru:
      return widths<Gru>;
    default:
      return widths<Rnn<false>>;
  }
}

std::string size_text(int64_t rows, int64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

std::string shape_text(const Operand& o) {
  if (o.dimensions == 1) return "[" + std::to_string(o.shape[0]) + "]";
  if (o.dimensions == 2) return size_text(o.shape[0], o.shape[1]);
  return "a tensor of " + std::to_string(o.dimensions) + " dimensions";
}

void require_on_cpu(const Operand& o, const std::string& name) { require(o.on_cpu, name + " must be on the CPU"); }

void require_present(const Operand& o, const std::string& name) { require(o.present, name + " is missing"); }

enum class Need { always, optional, never };

// What all operands of one call must agree on.
class Door {
 public:
  explicit Door(const std::string& cell, const Operand& typed, const std::string& typed_name)
      : kind(parse_cell(cell)), widths(widths_of(kind)) {
    require_present(typed, typed_name);
    require(typed.type == ElementType::float32 || typed.type == ElementType::float64,
            typed_name + " must be a float32 or float64 tensor");
    type_ = typed.type;
  }

  Dtype dtype() const { return type_ == ElementType::float64 ? Dtype::float64 : Dtype::float32; }

  Matrix matrix(const Operand& o, const std::string& name, int64_t rows, int64_t columns, Need need) const {
    if (!o.present) {
      require(need != Need::always, name + " is missing");
      return {};
    }
    require(need != Need::never, name + " does not apply to this cell or call");
    require_on_cpu(o, name);
    require(o.type == type_, name + " must have the dtype of the other tensors");
    const bool vector = o.dimensions == 1 && rows == 1;
    const bool fits = vector ? o.shape[0] == columns : o.dimensions == 2 && o.shape[0] == rows && o.shape[1] == columns;
    require(fits, name + ": expected size " + size_text(rows, columns) + ", got " + shape_text(o));
    const int64_t column_stride = vector ? o.stride[0] : o.stride[1];
    require(columns == 1 || column_stride == 1, name + " must be contiguous in its last dimension");
    const int64_t row_stride = vector || rows == 1 ? columns : o.stride[0];
    require(row_stride >= columns, name + ": rows must not overlap");
    require(o.data != nullptr, name + " has no memory");
    return {o.data, row_stride};
  }

  const CellKind kind;
  const Widths& widths;

 private:
  ElementType type_;
};

Need when(bool applies, Need need = Need::always) { return applies ? need : Need::never; }

// The sizes of a call, from its rows, its batch size and, where packed, its batch sizes.
std::vector<int64_t> offsets_of(const Operand& batch_sizes, int64_t rows, int64_t batch) {
  require(batch > 0, "batch size must be positive, got " + std::to_string(batch));
  require(rows > 0, "Expected sequence length to be larger than 0 in RNN");
  if (batch_sizes.present) {
    std::vector<int64_t> offsets = check_batch_sizes(batch_sizes, rows);
    require(offsets[1] == batch,
            "batch_sizes[0] must be the batch size " + std::to_string(batch) + ", got " + std::to_string(offsets[1]));
    return offsets;
  }
  require(rows % batch == 0,
          std::to_string(rows) + " rows are no whole number of steps of a batch of " + std::to_string(batch));
  std::vector<int64_t> offsets(static_cast<size_t>(rows / batch) + 1);
  for (size_t t = 0; t < offsets.size(); ++t) offsets[t] = static_cast<int64_t>(t) * batch;
  return offsets;
}

void require_rows(const Operand& o, const std::string& name) {
  require_present(o, name);
  require(o.dimensions == 2, name + ": expected two dimensions, got " + shape_text(o));
}

// The upper bound keeps the sizes of all operands within int64.
void require_hidden(int64_t hidden) {
  require(hidden > 0 && hidden < int64_t{1} << 40,
          "hidden size must be positive and below 2^40, got " + std::to_string(hidden));
}

template <class P>
void fill_sizes(Checked<P>& call, const Door& door, int64_t batch, int64_t hidden, bool reverse) {
  P& p = call.problem;
  p.cell = door.kind;
  p.dtype = door.dtype();
  p.steps = static_cast<int64_t>(call.offsets.size()) - 1;
  p.batch = batch;
  p.hidden = hidden;
  p.offsets = call.offsets.data();
  p.reverse = reverse;
}

}  // namespace

std::vector<int64_t> check_batch_sizes(const Operand& o, int64_t rows) {
  require_present(o, "batch_sizes");
  require_on_cpu(o, "batch_sizes");
  require(o.type == ElementType::int64, "batch_sizes must be an int64 tensor");
  require(o.dimensions == 1, "batch_sizes must have one dimension, got " + shape_text(o));
  require(o.shape[0] > 0, "Expected sequence length to be larger than 0 in RNN");
  require(o.data != nullptr, "batch_sizes has no memory");
  require(o.shape[0] <= rows, "batch_sizes has " + std::to_string(o.shape[0]) + " steps, but the data have only " +
                                  std::to_string(rows) + " rows");
  std::vector<int64_t> offsets(static_cast<size_t>(o.shape[0]) + 1, 0);
  int64_t previous = rows;
  for (int64_t t = 0; t < o.shape[0]; ++t) {
    // Read once: another thread may be writing to it.
    const int64_t size = static_cast<const volatile int64_t*>(o.data)[t * o.stride[0]];
    const std::string where = "batch_sizes[" + std::to_string(t) + "]";
    require(size > 0, where + " must be positive, got " + std::to_string(size));
    require(size <= previous, t == 0 ? where + " is " + std::to_string(size) + ", but the data have only " +
                                           std::to_string(rows) + " rows"
                                     : "batch_sizes must not increase, but " + where + " is " + std::to_string(size) +
                                           " after " + std::to_string(previous));
    previous = size;
    const auto at = static_cast<size_t>(t);
    require(size <= rows - offsets[at],
            "batch_sizes sum to more than the " + std::to_string(rows) + " rows of the data");
    offsets[at + 1] = offsets[at] + size;
  }
  require(offsets.back() == rows, "batch_sizes sum to " + std::to_string(offsets.back()) + ", but the data have " +
                                      std::to_string(rows) + " rows");
  return offsets;
}

int check_threads(int64_t threads) {
  require(threads >= 1 && threads <= 4096, "threads must be from 1 to 4096, got " + std::to_string(threads));
  return static_cast<int>(threads);
}

Checked<Forward> check_forward(const std::string& cell, const ForwardOperands& o, bool reverse) {
  require(o.xgates.present != o.x.present, "either xgates or x must be given");
  const Operand& input = o.xgates.present ? o.xgates : o.x;
  const std::string input_name = o.xgates.present ? "xgates" : "x";
  const Door door(cell, input, input_name);
  require_rows(input, input_name);
  require_rows(o.h_n, "h_n");
  const int64_t N = input.shape[0], B = o.h_n.shape[0], H = o.h_n.shape[1];
  require_hidden(H);
  const Widths& w = door.widths;
  // Before anything is allocated for so many rows: they exist.
  door.matrix(o.y, "y", N, H, Need::always);
  Checked<Forward> call{offsets_of(o.batch_sizes, N, B), {}};
  Forward& p = call.problem;
  fill_sizes(call, door, B, H, reverse);
  p.xgates = door.matrix(o.xgates, "xgates", N, w.gates * H, when(!o.x.present));
  if (o.x.present) {
    p.inputs = o.x.shape[1];
    require(p.inputs > 0, "x must have at least one feature");
  }
  p.x = door.matrix(o.x, "x", N, p.inputs, when(o.x.present));
  p.weight_ih = door.matrix(o.weight_ih, "weight_ih", w.gates * H, p.inputs, when(o.x.present));
  p.bias = door.matrix(o.bias, "bias", 1, w.gates * H, when(o.x.present, Need::optional));
  p.weight_hh = door.matrix(o.weight_hh, "weight_hh", w.gates * H, H, p.steps > 1 ? Need::always : Need::optional);
  p.bias_hn = door.matrix(o.bias_hn, "bias_hn", 1, H, when(w.bias_hn, Need::optional));
  p.hgates = door.matrix(o.hgates, "hgates", B, w.gates * H, Need::optional);
  p.h0 = door.matrix(o.h0, "h0", B, H, Need::optional);
  p.c0 = door.matrix(o.c0, "c0", B, H, when(w.cell, Need::optional));
  p.y = door.matrix(o.y, "y", N, H, Need::always);
  p.h_n = door.matrix(o.h_n, "h_n", B, H, Need::always);
  p.c_n = door.matrix(o.c_n, "c_n", B, H, when(w.cell));
  p.saved = door.matrix(o.saved, "saved", N, w.saved * H, when(w.saved > 0, Need::optional));
  p.cells = door.matrix(o.cells, "cells", N, H, when(w.cell, Need::optional));
  return call;
}

Checked<Backward> check_backward(const std::string& cell, const BackwardOperands& o, bool reverse) {
  const Door door(cell, o.y, "y");
  require_rows(o.y, "y");
  const int64_t N = o.y.shape[0], B = o.batch, H = o.y.shape[1];
  require_hidden(H);
  const Widths& w = door.widths;
  door.matrix(o.y, "y", N, H, Need::always);
  Checked<Backward> call{offsets_of(o.batch_sizes, N, B), {}};
  Backward& p = call.problem;
  fill_sizes(call, door, B, H, reverse);
  p.y = door.matrix(o.y, "y", N, H, Need::always);
  p.saved = door.matrix(o.saved, "saved", N, w.saved * H, when(w.saved > 0));
  p.cells = door.matrix(o.cells, "cells", N, H, when(w.cell));
  p.weight_hh = door.matrix(o.weight_hh, "weight_hh", w.gates * H, H, p.steps > 1 ? Need::always : Need::optional);
  p.h0 = door.matrix(o.h0, "h0", B, H, Need::optional);
  p.c0 = door.matrix(o.c0, "c0", B, H, when(w.cell, Need::optional));
  p.grad_y = door.matrix(o.grad_y, "grad_y", N, H, Need::optional);
  p.grad_h_n = door.matrix(o.grad_h_n, "grad_h_n", B, H, Need::optional);
  p.grad_c_n = door.matrix(o.grad_c_n, "grad_c_n", B, H, when(w.cell, Need::optional));
  p.dgates = door.matrix(o.dgates, "dgates", N, w.dgates * H, Need::always);
  p.carry = door.matrix(o.carry, "carry", B, H, when(w.carry));
  return call;
}

}  // namespace pyrnnfast
