// Every rule that a call must meet; see check.h.
#include "check.h"

#include <stdexcept>

namespace pyrnnfast {
namespace {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument((std::string() + ... + parts));
}

std::string size_text(int64_t rows, int64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

std::string shape_text(const Operand& o) {
  if (o.dimensions > 3) return "a tensor of " + std::to_string(o.dimensions) + " dimensions";
  std::string text;
  for (int i = 0; i < o.dimensions; ++i) text += (i == 0 ? "" : ", ") + std::to_string(o.shape[i]);
  return "[" + text + "]";
}

void require_in(const Operand& o, const char* name, Memory memory) {
  if (o.memory != memory) fail(name, memory == Memory::cpu ? " must be on the CPU" : " must be on a CUDA device");
}

void require_present(const Operand& o, const char* name) {
  if (!o.present) fail(name, " is missing");
}

enum class Need { always, optional, never };

Dtype dtype_of(const Operand& o, const char* name) {
  switch (o.type) {
    case ElementType::float32:
      return Dtype::float32;
    case ElementType::float64:
      return Dtype::float64;
    case ElementType::bfloat16:
      return Dtype::bfloat16;
    case ElementType::float16:
      return Dtype::float16;
    default:
      fail(name, " must be a float32, float64, bfloat16 or float16 tensor");
  }
}

// Checks those operands of a call that share a type, which have to be on the device of the first of them.
class Door {
 public:
  Door(ElementType type, const Operand& first, const Rules& rules)
      : type_(type), device_(first.device), memory_(rules.memory) {}

  // `rows` rows of `columns` elements, over one or more dimensions; a single row may have no dimension of its own.
  Matrix matrix(const Operand& o, const char* name, int64_t rows, int64_t columns, Need need) const {
    if (!enters(o, name, need)) return {};
    const int last = o.dimensions - 1;
    int64_t found = 1;
    for (int i = 0; i < last && i < 2; ++i)
      found = o.shape[i] == 0 || found <= rows / o.shape[i] ? found * o.shape[i] : -1;
    if (!(last >= 0 && last < 3 && o.shape[last] == columns && found == rows))
      fail(name, ": expected size " + size_text(rows, columns) + ", got " + shape_text(o));
    return contiguous_rows(o, name, rows, columns);
  }

  // Direction `d` of [directions, rows, columns].
  Matrix of_direction(const Operand& o, const char* name, int64_t d, int64_t directions, int64_t rows, int64_t columns,
                      Need need) const {
    if (!enters(o, name, need)) return {};
    const bool fits = o.dimensions == 3
                          ? o.shape[0] == directions && o.shape[1] == rows && o.shape[2] == columns
                          : o.dimensions == 2 && directions == 1 && o.shape[0] == rows && o.shape[1] == columns;
    if (!fits)
      fail(name, ": expected size [" + std::to_string(directions) + ", " + std::to_string(rows) + ", " +
                     std::to_string(columns) + "], got " + shape_text(o));
    if (o.dimensions == 2) return contiguous_rows(o, name, rows, columns);
    Operand part = o;
    part.dimensions = 2;
    for (int i = 0; i < 2; ++i) {
      part.shape[i] = o.shape[i + 1];
      part.stride[i] = o.stride[i + 1];
    }
    Matrix m = contiguous_rows(part, name, rows, columns);
    if (!(directions == 1 || o.stride[0] >= (rows - 1) * m.stride + columns))
      fail(name, ": directions must not overlap");
    m.data = static_cast<char*>(m.data) + d * o.stride[0] * bytes_of(type_);
    return m;
  }

  // The first of [samples, rows, columns].
  Matrix of_sample(const Operand& o, const char* name, int64_t samples, int64_t rows, int64_t columns) const {
    enters(o, name, Need::always);
    if (!(o.shape[0] == samples && o.shape[1] == rows && o.shape[2] == columns))
      fail(name, ": expected size [" + std::to_string(samples) + ", " + std::to_string(rows) + ", " +
                     std::to_string(columns) + "], got " + shape_text(o));
    Operand part = o;
    part.dimensions = 2;
    for (int i = 0; i < 2; ++i) {
      part.shape[i] = o.shape[i + 1];
      part.stride[i] = o.stride[i + 1];
    }
    return contiguous_rows(part, name, rows, columns);
  }

  // Columns [first, first + …) of a matrix.
  Matrix columns_from(const Matrix& m, int64_t first) const {
    return {m.data == nullptr ? nullptr : static_cast<char*>(m.data) + first * bytes_of(type_), m.stride};
  }

 private:
  bool enters(const Operand& o, const char* name, Need need) const {
    if (!o.present) {
      if (need == Need::always) fail(name, " is missing");
      return false;
    }
    if (need == Need::never) fail(name, " does not apply to this cell or call");
    require_in(o, name, memory_);
    if (o.device != device_) fail(name, " must be on the device of the other tensors");
    if (o.type != type_) fail(name, " must have the dtype of the other tensors");
    return true;
  }

  static Matrix contiguous_rows(const Operand& o, const char* name, int64_t rows, int64_t columns) {
    const int last = o.dimensions - 1;
    if (!(columns == 1 || o.stride[last] == 1)) fail(name, " must be contiguous in its last dimension");
    if (o.data == nullptr) fail(name, " has no memory");
    // Of the dimensions of rows, those of size 1 say nothing.
    int64_t stride = columns, below = 1;
    for (int i = last - 1; i >= 0; --i) {
      if (o.shape[i] == 1) continue;
      if (below == 1) stride = o.stride[i];
      if (!(o.stride[i] == below * stride)) fail(name, ": rows must be equally far apart");
      below *= o.shape[i];
    }
    if (!(rows == 1 || stride >= columns)) fail(name, ": rows must not overlap");
    return {o.data, stride};
  }

  ElementType type_;
  int device_;
  Memory memory_;
};

Need when(bool applies, Need need = Need::always) { return applies ? need : Need::never; }

// The first row of each step of a batch that does not change, and the number of rows.
std::vector<int64_t> dense_offsets(int64_t rows, int64_t batch) {
  if (batch <= 0) fail("batch size must be positive, got " + std::to_string(batch));
  if (rows <= 0) fail("Expected sequence length to be larger than 0 in RNN");
  std::vector<int64_t> offsets(static_cast<size_t>(rows / batch) + 1);
  for (size_t t = 0; t < offsets.size(); ++t) offsets[t] = static_cast<int64_t>(t) * batch;
  return offsets;
}

int64_t checked_product(int64_t a, int64_t b) {
  if (!(a >= 0 && b >= 0 && (b == 0 || a <= (int64_t{1} << 60) / b))) fail("the number of rows is out of range");
  return a * b;
}

// The cell state stays in float32 where the rest is narrower.
Door door_of_cells(const Operand& x, const Rules& rules) {
  const bool narrow = x.type == ElementType::bfloat16 || x.type == ElementType::float16;
  return Door(narrow ? ElementType::float32 : x.type, x, rules);
}

void require_rows(const Operand& o, const char* name) {
  require_present(o, name);
  if (!(o.dimensions == 2 || o.dimensions == 3)) fail(name, ": expected two or three dimensions, got " + shape_text(o));
}

// The upper bound keeps the sizes of all operands, and of the packed weights, within int64.
void require_size(int64_t size, const char* name) {
  if (!(size > 0 && size < int64_t{1} << 26))
    fail(name, " must be positive and below 2^26, got " + std::to_string(size));
}

// Lengths and resets: their values are the device's, which nobody waits for.
void add_mask(Problem& p, const LayerOperands& o, const Rules& rules) {
  const Operand* const operands[] = {&o.lengths, &o.reset};
  const char* const names[] = {"lengths", "reset"};
  for (int i = 0; i < 2; ++i) {
    const Operand& given = *operands[i];
    if (!given.present) continue;
    if (!(rules.masks && !o.batch_sizes.present && o.x.dimensions == 3)) fail(names[i], " does not apply to this call");
    require_in(given, names[i], rules.memory);
    if (given.device != o.x.device) fail(names[i], " must be on the device of the other tensors");
    if (given.data == nullptr) fail(names[i], " has no memory");
  }
  if (o.lengths.present) {
    if (o.lengths.type != ElementType::int64) fail("lengths must be an int64 tensor");
    if (!(o.lengths.dimensions == 1 && o.lengths.shape[0] == p.batch && (p.batch == 1 || o.lengths.stride[0] == 1)))
      fail("lengths: expected contiguous [" + std::to_string(p.batch) + "], got " + shape_text(o.lengths));
    p.lengths = static_cast<const int64_t*>(o.lengths.data);
  }
  if (o.reset.present) {
    if (o.reset.type != ElementType::boolean) fail("reset must be a bool tensor");
    if (!(o.reset.dimensions == 2 && o.reset.shape[0] == p.steps && o.reset.shape[1] == p.batch))
      fail("reset: expected size " + size_text(p.steps, p.batch) + ", got " + shape_text(o.reset));
    p.reset = static_cast<const uint8_t*>(o.reset.data);
    p.next_reset_step = o.reset.stride[0];
    p.next_reset_row = o.reset.stride[1];
  }
}

// Of one direction, four, or five where h is projected.
void add_weight_gradients(Backward& p, const Operand* dweights, const Door& door) {
  const int64_t rows = widths_of(p.cell).gates * p.hidden;
  p.dweight_ih = door.matrix(dweights[0], "dweight_ih", rows, p.inputs, Need::optional);
  p.dweight_hh = door.matrix(dweights[1], "dweight_hh", rows, p.outputs, Need::optional);
  p.dbias_ih = door.matrix(dweights[2], "dbias_ih", 1, rows, Need::optional);
  p.dbias_hh = door.matrix(dweights[3], "dbias_hh", 1, rows, Need::optional);
  if (p.cell == CellKind::projected_lstm)
    p.dweight_hr = door.matrix(dweights[4], "dweight_hr", p.outputs, p.hidden, Need::optional);
}

// How many weights a direction has: five with a projection, as these are all of one or of two directions.
size_t weights_each(const LayerOperands& o) { return !o.weights.empty() && o.weights.size() % 5 == 0 ? 5 : 4; }

// What the passes have in common. Calls fill(problem, d, door) for the rest of each direction.
template <class P, class Fill>
Checked<P> check_layer(const std::string& cell, const LayerOperands& o, const Rules& rules, bool backward,
                       const Fill& fill) {
  const size_t each = weights_each(o);
  const CellKind given = check_cell(cell), kind = each == 5 ? CellKind::projected_lstm : given;
  if (each == 5 && !(given == CellKind::lstm && rules.projections))
    fail("five weights for each direction are for an LSTM with a projection on the CPU");
  const Widths& w = widths_of(kind);
  require_rows(o.x, "x");
  require_rows(o.y, "y");
  const Dtype dtype = dtype_of(o.x, "x");
  const Door door(o.x.type, o.x, rules), cells_door = door_of_cells(o.x, rules);
  const auto D = static_cast<int64_t>(o.weights.size() / each);
  if (!(o.weights.size() % each == 0 && (D == 1 || D == 2)))
    fail("weights must be four, or five with a projection, for each of one or two directions, got " +
         std::to_string(o.weights.size()));
  if (!(o.kept.size() == static_cast<size_t>(2 * D) || (o.kept.empty() && !backward)))
    fail("kept must be two for each direction, got " + std::to_string(o.kept.size()));
  const int last = o.x.dimensions - 1;
  const int64_t N = last == 2 ? checked_product(o.x.shape[0], o.x.shape[1]) : o.x.shape[0];
  const int64_t I = o.x.shape[last], outputs = o.y.shape[o.y.dimensions - 1] / D;
  // The rows of W_hr are as long as the cell state; what is no matrix is refused below.
  const int64_t H = each == 5 ? o.weights[4].shape[1] : outputs;
  require_size(outputs, each == 5 ? "projected size" : "hidden size");
  require_size(H, "hidden size");
  require_size(I, "number of input features");
  // Before anything is allocated for so many rows: they exist.
  const Matrix x = door.matrix(o.x, "x", N, I, Need::always);
  const Matrix y = door.matrix(o.y, "y", N, D * outputs, Need::always);
  if (!(last == 1 || !o.batch_sizes.present)) fail("packed x must have two dimensions");
  Checked<P> call{o.batch_sizes.present ? check_batch_sizes(o.batch_sizes, N) : dense_offsets(N, o.x.shape[last - 1]),
                  {}};
  for (int64_t d = 0; d < D; ++d) {
    P p;
    p.cell = kind;
    p.dtype = dtype;
    p.steps = static_cast<int64_t>(call.offsets.size()) - 1;
    p.batch = call.offsets[1];
    p.inputs = I;
    p.hidden = H;
    p.outputs = outputs;
    p.offsets = call.offsets.data();
    p.reverse = d == 1;
    const auto weight = [&](int i) -> const Operand& {
      return o.weights[each * static_cast<size_t>(d) + static_cast<size_t>(i)];
    };
    p.x = x;
    p.y = door.columns_from(y, d * outputs);
    p.weight_ih = door.matrix(weight(0), "weight_ih", w.gates * H, I, Need::always);
    p.weight_hh = door.matrix(weight(1), "weight_hh", w.gates * H, outputs, Need::always);
    p.bias_ih = door.matrix(weight(2), "bias_ih", 1, w.gates * H, Need::optional);
    p.bias_hh = door.matrix(weight(3), "bias_hh", 1, w.gates * H, Need::optional);
    if (each == 5) p.weight_hr = door.matrix(weight(4), "weight_hr", outputs, H, Need::always);
    p.h0 = door.of_direction(o.h0, "h0", d, D, p.batch, outputs, Need::optional);
    p.c0 = door.of_direction(o.c0, "c0", d, D, p.batch, H, when(w.cell, Need::optional));
    if (!o.kept.empty()) {
      const Need need = backward ? Need::always : Need::optional;
      const auto at = static_cast<size_t>(2 * d);
      p.saved = door.matrix(o.kept[at], "saved", N, w.saved * H, when(w.saved > 0, need));
      p.cells = cells_door.matrix(o.kept[at + 1], "cells", N, H, when(w.cell, need));
    }
    add_mask(p, o, rules);
    fill(p, d, door);
    call.directions.push_back(p);
  }
  return call;
}

}  // namespace

int64_t bytes_of(ElementType type) { return type == ElementType::float64 ? 8 : type == ElementType::float32 ? 4 : 2; }

CellKind check_cell(const std::string& name) {
  if (name == "rnn_tanh") return CellKind::rnn_tanh;
  if (name == "rnn_relu") return CellKind::rnn_relu;
  if (name == "gru") return CellKind::gru;
  if (name == "lstm") return CellKind::lstm;
  fail("cell must be 'rnn_tanh', 'rnn_relu', 'gru' or 'lstm', got '" + name + "'");
}

std::vector<int64_t> check_batch_sizes(const Operand& o, int64_t rows) {
  require_present(o, "batch_sizes");
  require_in(o, "batch_sizes", Memory::cpu);
  if (o.type != ElementType::int64) fail("batch_sizes must be an int64 tensor");
  if (o.dimensions != 1) fail("batch_sizes must have one dimension, got " + shape_text(o));
  if (o.shape[0] <= 0) fail("Expected sequence length to be larger than 0 in RNN");
  if (o.data == nullptr) fail("batch_sizes has no memory");
  if (o.shape[0] > rows)
    fail("batch_sizes has " + std::to_string(o.shape[0]) + " steps, but the data have only " + std::to_string(rows) +
         " rows");
  std::vector<int64_t> offsets(static_cast<size_t>(o.shape[0]) + 1, 0);
  int64_t previous = rows;
  for (int64_t t = 0; t < o.shape[0]; ++t) {
    // Read once: another thread may be writing to it.
    const int64_t size = static_cast<const volatile int64_t*>(o.data)[t * o.stride[0]];
    const auto where = [t] { return "batch_sizes[" + std::to_string(t) + "]"; };
    if (size <= 0) fail(where(), " must be positive, got " + std::to_string(size));
    if (size > previous)
      fail(t == 0
               ? where() + " is " + std::to_string(size) + ", but the data have only " + std::to_string(rows) + " rows"
               : "batch_sizes must not increase, but " + where() + " is " + std::to_string(size) + " after " +
                     std::to_string(previous));
    previous = size;
    const auto at = static_cast<size_t>(t);
    if (!(size <= rows - offsets[at]))
      fail("batch_sizes sum to more than the " + std::to_string(rows) + " rows of the data");
    offsets[at + 1] = offsets[at] + size;
  }
  if (offsets.back() != rows)
    fail("batch_sizes sum to " + std::to_string(offsets.back()) + ", but the data have " + std::to_string(rows) +
         " rows");
  return offsets;
}

int check_threads(int64_t threads) {
  if (!(threads >= 1 && threads <= 4096)) fail("threads must be from 1 to 4096, got " + std::to_string(threads));
  return static_cast<int>(threads);
}

Checked<Forward> check_forward(const std::string& cell, const ForwardOperands& o, const Rules& rules) {
  return check_layer<Forward>(cell, o, rules, false, [&](Forward& p, int64_t d, const Door& door) {
    const auto D = static_cast<int64_t>(o.weights.size() / weights_each(o));
    p.h_n = door.of_direction(o.h_n, "h_n", d, D, p.batch, p.outputs, Need::always);
    p.c_n = door.of_direction(o.c_n, "c_n", d, D, p.batch, p.hidden, when(widths_of(p.cell).cell));
  });
}

Checked<Backward> check_backward(const std::string& cell, const BackwardOperands& o, const Rules& rules) {
  const size_t weights = o.weights.size();
  if (o.dweights.size() != weights) fail("dweights must be as many as weights");
  return check_layer<Backward>(cell, o, rules, true, [&](Backward& p, int64_t d, const Door& door) {
    const size_t each = weights_each(o);
    const auto D = static_cast<int64_t>(weights / each);
    const int64_t N = p.offsets[p.steps], B = p.batch, I = p.inputs, H = p.hidden, P = p.outputs;
    const Widths& w = widths_of(p.cell);
    p.grad_y = door.columns_from(door.matrix(o.grad_y, "grad_y", N, D * P, Need::optional), d * P);
    p.grad_h_n = door.of_direction(o.grad_h_n, "grad_h_n", d, D, B, P, Need::optional);
    p.grad_c_n = door.of_direction(o.grad_c_n, "grad_c_n", d, D, B, H, when(w.cell, Need::optional));
    const Door cells_door = door_of_cells(o.x, rules);
    const Need of_cells = when(w.cell, Need::optional);
    p.grad_cells = cells_door.columns_from(cells_door.matrix(o.grad_cells, "grad_cells", N, D * H, of_cells), d * H);
    p.dx = door.matrix(o.dx, "dx", N, I, Need::optional);
    p.add_to_dx = d > 0;
    add_weight_gradients(p, &o.dweights[each * static_cast<size_t>(d)], door);
    p.dgates =
        door.columns_from(door.matrix(o.dgates, "dgates", N, D * w.dgates * H, Need::optional), d * w.dgates * H);
    p.dh0 = door.of_direction(o.dh0, "dh0", d, D, B, P, Need::optional);
    p.dc0 = door.of_direction(o.dc0, "dc0", d, D, B, H, when(w.cell, Need::optional));
  });
}

Checked<Backward> check_weight_gradients(const std::string& cell, const Operand& x, const Operand& states,
                                         const Operand& dgates, const std::vector<Operand>& dweights) {
  const CellKind kind = check_cell(cell);
  const Widths& w = widths_of(kind);
  require_rows(x, "x");
  require_rows(states, "states");
  if (x.dimensions != 2) fail("x: expected two dimensions, got " + shape_text(x));
  if (dweights.size() != 4) fail("dweights must be four, got " + std::to_string(dweights.size()));
  Backward p;
  p.cell = kind;
  p.dtype = dtype_of(x, "x");
  p.dgates_given = true;
  const int64_t N = x.shape[0];
  if (N <= 0) fail("x has no rows");
  p.inputs = x.shape[1];
  p.hidden = p.outputs = states.shape[states.dimensions - 1];
  require_size(p.hidden, "hidden size");
  require_size(p.inputs, "number of input features");
  const Door door(x.type, x, kCpuRules);
  p.x = door.matrix(x, "x", N, p.inputs, Need::always);
  p.h0 = door.matrix(states, "states", N, p.hidden, Need::always);
  p.dgates = door.matrix(dgates, "dgates", N, w.dgates * p.hidden, Need::always);
  add_weight_gradients(p, dweights.data(), door);
  // Cut into steps, for a chunk is made of whole ones.
  constexpr int64_t rows_of_step = 64;
  Checked<Backward> call{{0}, {}};
  while (call.offsets.back() < N) {
    const int64_t left = N - call.offsets.back();
    call.offsets.push_back(call.offsets.back() + (left < rows_of_step ? left : rows_of_step));
  }
  p.steps = static_cast<int64_t>(call.offsets.size()) - 1;
  p.batch = call.offsets[1];
  p.offsets = call.offsets.data();
  call.directions.push_back(p);
  return call;
}

Product check_outer_products(const Operand& a, const Operand& b, const Operand& out) {
  const Operand* const operands[] = {&a, &b, &out};
  const char* const names[] = {"a", "b", "out"};
  for (int i = 0; i < 3; ++i) {
    require_present(*operands[i], names[i]);
    if (operands[i]->dimensions != 3) fail(names[i], ": expected three dimensions, got " + shape_text(*operands[i]));
  }
  Product p;
  p.dtype = dtype_of(a, "a");
  if (bytes_of(p.dtype) == 2) fail("a must be a float32 or float64 tensor");
  p.transposed = true;
  p.samples = a.shape[0];
  p.depth = a.shape[1];
  p.rows = a.shape[2];
  p.columns = b.shape[2];
  require_size(p.samples, "number of samples");
  require_size(p.depth, "number of rows of a");
  require_size(p.rows, "number of columns of a");
  require_size(p.columns, "number of columns of b");
  const Door door(a.type, a, kCpuRules);
  p.a = door.of_sample(a, "a", p.samples, p.depth, p.rows);
  p.b = door.of_sample(b, "b", p.samples, p.depth, p.columns);
  p.out = door.of_sample(out, "out", p.samples, p.rows, p.columns);
  p.next_a = a.stride[0];
  p.next_b = b.stride[0];
  p.next_out = out.stride[0];
  if (!(p.samples == 1 || p.next_out >= (p.rows - 1) * p.out.stride + p.columns)) fail("out: samples must not overlap");
  return p;
}

Product check_product(const Operand& a, const Operand& b, const Operand& out) {
  require_rows(a, "a");
  require_rows(b, "b");
  Product p;
  p.dtype = dtype_of(a, "a");
  if (bytes_of(p.dtype) == 2) fail("a must be a float32 or float64 tensor");
  p.rows = a.shape[0];
  p.depth = a.shape[1];
  p.columns = b.shape[1];
  require_size(p.depth, "number of columns of a");
  require_size(p.columns, "number of columns of b");
  const Door door(a.type, a, kCpuRules);
  p.a = door.matrix(a, "a", p.rows, p.depth, Need::always);
  p.b = door.matrix(b, "b", p.depth, p.columns, Need::always);
  p.out = door.matrix(out, "out", p.rows, p.columns, Need::always);
  return p;
}

}  // namespace pyrnnfast
