// The shortest roads; see plain.h.
#include "plain.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "plain_tensors.h"
#include "tensor.h"

namespace py = pybind11;

namespace pyrnnfast {
namespace {

std::vector<Operand> weights_of_layer(const std::vector<Operand>& all, const Form& form, int64_t layer) {
  const auto each = static_cast<int64_t>(all.size()) / form.runs();
  const auto begin = all.begin() + each * layer * form.directions;
  return {begin, begin + each * form.directions};
}

// [D, B, H] of a layer out of [layers·D, B, H].
Operand states_of_layer(Operand o, const Form& form, int64_t layer) {
  if (!o.present || o.dimensions != 3) return o;
  o.data = static_cast<char*>(o.data) + layer * form.directions * o.stride[0] * bytes_of(o.type);
  o.shape[0] = form.directions;
  return o;
}

// `rows` rows from row `first` on of a contiguous block, and of their columns those from `column` on.
Operand part_of(const Operand& block, int64_t first, int64_t rows, int64_t column, int64_t columns) {
  Operand part = block;
  part.data = static_cast<char*>(block.data) + (first * block.stride[0] + column) * bytes_of(block.type);
  part.shape[0] = rows;
  part.shape[1] = columns;
  return part;
}

// Rows from row `first` on of a block, in the shape of `like`.
Operand rows_like(const Operand& like, const Operand& block, int64_t first) {
  Operand o = like;
  o.data = part_of(block, first, 0, 0, 0).data;
  for (int i = o.dimensions - 1, k = i; i >= 0; --i) o.stride[i] = i == k ? 1 : o.stride[i + 1] * o.shape[i + 1];
  return o;
}

int64_t rows_of(const Operand& x) { return x.dimensions == 3 ? x.shape[0] * x.shape[1] : x.shape[0]; }

constexpr const char* kForward[kPlainForwardOperands] = {"types",  "form",   "x",       "batch_sizes", "weights",
                                                         "inputs", "hidden", "outputs", "hx",          "grad"};
constexpr const char* kBackward[kPlainBackwardOperands] = {"types", "form", "x", "batch_sizes", "weights",  "needs",
                                                           "h0",    "c0",   "y", "kept",        "upstream", "dgates"};

// What both passes of a call have in common: its operands, of all layers.
struct Stack {
  Form form;
  Layout layout = Layout::step;
  Operand x, h0, c0, batch_sizes, y;
  std::vector<Operand> weights;
  // What is kept for backward, with the rows of all layers and directions beneath one another: gates
  // [layers·D·N, saved·H], with the cell states behind them, [layers·D·N, (saved + 1)·H], or, of narrow data, in a
  // tensor of their own, whose elements are wider.
  Operand gates, cells;
  // Of the lower layers, [slots·N, width]: all of them where they are kept, else each layer reads one and writes
  // another.
  Operand outputs;
  int64_t slots = 0;

  int64_t rows() const { return rows_of(x); }
  // Of h, P of an LSTM with projections and else H, and of all else that a unit has.
  int64_t columns_of_h() const { return weights[1].shape[1]; }
  int64_t hidden() const { return form.projects(weights) ? weights[4].shape[1] : columns_of_h(); }
  int64_t width() const { return form.directions * columns_of_h(); }
  bool has_cell() const { return form.widths->cell; }
  bool cells_apart() const { return has_cell() && (x.type == ElementType::bfloat16 || x.type == ElementType::float16); }
  // Of `gates`, in units of H.
  int64_t kept_columns() const { return form.widths->saved + (has_cell() && !cells_apart() ? 1 : 0); }

  Operand output_of(int64_t layer) const {
    return layer + 1 == form.layers ? y : rows_like(y, outputs, layer % slots * rows());
  }

  std::vector<Operand> kept_of(int64_t layer) const {
    std::vector<Operand> found;
    const int64_t columns = form.widths->saved * hidden();
    for (int64_t d = 0; d < form.directions; ++d) {
      const int64_t first = (layer * form.directions + d) * rows();
      found.push_back(gates.present ? part_of(gates, first, rows(), 0, columns) : Operand{});
      found.push_back(!has_cell()     ? Operand{}
                      : cells_apart() ? part_of(cells, first, rows(), 0, hidden())
                                      : part_of(gates, first, rows(), columns, hidden()));
    }
    return found;
  }

  template <class Operands>
  Operands operands_of(int64_t layer, bool kept) const {
    Operands o;
    o.x = layer == 0 ? x : output_of(layer - 1);
    o.h0 = states_of_layer(h0, form, layer);
    o.c0 = states_of_layer(c0, form, layer);
    o.weights = weights_of_layer(weights, form, layer);
    o.y = output_of(layer);
    if (kept) o.kept = kept_of(layer);
    o.batch_sizes = batch_sizes;
    return o;
  }
};

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(std::string("backward: ") + what + " does not fit this call");
}

}  // namespace

std::vector<const char*> plain_forward_names(std::initializer_list<const char*> others) {
  return names_with(kForward, others);
}

std::vector<const char*> plain_backward_names(std::initializer_list<const char*> others) {
  return names_with(kBackward, others);
}

py::object forward_plain(const Arguments& arguments, const Backend& backend) {
  const PlainCall call(arguments);
  const int64_t inputs = arguments.integer(5), hidden = arguments.integer(6), outputs = arguments.integer(7);
  const py::handle hx = arguments[8];
  const bool grad = arguments[9].ptr() == Py_True;
  Stack s;
  if (!read_form(call.form, s.form)) return py::none();
  Reader reader(call.types, backend.rules(), false);
  if (!reader.read_x(call, s.form, inputs, s.layout, s.x) || s.rows() < 1) return py::none();
  if (!reader.read_weights(call.weights, s.form, s.weights)) return py::none();
  if (s.hidden() != hidden || s.columns_of_h() != outputs) return py::none();
  bool keep = grad && requires_grad(call.x);
  for (size_t i = 0; i < call.weights.size(); ++i) keep = keep || (grad && requires_grad(call.weights[i]));
  const bool lstm = s.has_cell();
  if (!hx.is_none()) {
    const bool pair = PyTuple_Check(hx.ptr()) && PyTuple_GET_SIZE(hx.ptr()) == 2;
    if (lstm != pair) return py::none();
    Operand* const states[] = {&s.h0, &s.c0};
    for (int i = 0; i < (lstm ? 2 : 1); ++i) {
      const py::handle state = lstm ? py::handle(PyTuple_GET_ITEM(hx.ptr(), i)) : hx;
      // At most as many as there are rows; what does not fit is found out later.
      const int64_t columns = i == 0 ? outputs : hidden;
      if (!reader.read_states(state, s.layout, *states[i], s.form.runs() * s.rows() * columns)) return py::none();
      if (states[i]->dimensions == 3 && states[i]->shape[0] != s.form.runs()) return py::none();
      keep = keep || (grad && requires_grad(state));
    }
  }
  try {
    const bool step = s.layout == Layout::step;
    int64_t B = s.x.shape[step ? 0 : 1];
    if (s.layout == Layout::packed) {
      s.batch_sizes = read_tensor(call.batch_sizes, "batch_sizes");
      B = check_batch_sizes(s.batch_sizes, s.rows())[1];
    }
    Operand h_n, c_n;
    const py::object y_tensor = new_rows(call.x, s.x, s.layout, s.width(), s.y);
    const py::object h_tensor = step ? y_tensor : new_states(call.x, s.form, s.layout, B, outputs, h_n);
    if (step) h_n = s.y;
    const py::object c_tensor = lstm ? new_states(call.x, s.form, s.layout, B, hidden, c_n) : py::none();
    py::list blocks;
    const auto block = [&](int64_t rows, int64_t columns, bool wide = false) {
      const py::object tensor = new_matrix(call.x, rows, columns, wide);
      blocks.append(tensor);
      return read_tensor(tensor, "kept");
    };
    if (keep && s.form.widths->saved > 0) {
      s.gates = block(s.form.runs() * s.rows(), s.kept_columns() * hidden);
      if (s.cells_apart()) s.cells = block(s.form.runs() * s.rows(), hidden, true);
    }
    s.slots = keep ? s.form.layers - 1 : std::min<int64_t>(s.form.layers - 1, 2);
    if (s.slots > 0) s.outputs = block(s.slots * s.rows(), s.width());
    std::vector<Checked<Forward>> calls;
    for (int64_t layer = 0; layer < s.form.layers; ++layer) {
      auto o = s.operands_of<ForwardOperands>(layer, keep);
      o.h_n = states_of_layer(h_n, s.form, layer);
      o.c_n = states_of_layer(c_n, s.form, layer);
      calls.push_back(check_forward(s.form.cell, o, backend.rules()));
    }
    backend.run(calls);
    if (keep) {
      py::list results;
      if (!step) results.append(y_tensor);
      results.append(h_tensor);
      if (lstm) results.append(c_tensor);
      return py::make_tuple(py::tuple(results), py::tuple(blocks));
    }
    const py::object state = lstm ? py::object(py::make_tuple(h_tensor, c_tensor)) : h_tensor;
    return py::make_tuple(step ? state : py::object(py::make_tuple(y_tensor, state)), py::none());
  } catch (const std::invalid_argument&) {
    return py::none();
  }
}

py::tuple backward_plain(const Arguments& arguments, const Backend& backend) {
  const PlainCall call(arguments);
  const py::tuple needs = arguments.tuple(5), kept = arguments.tuple(9), upstream = arguments.tuple(10);
  const py::handle h0 = arguments[6], c0 = arguments[7], y = arguments[8];
  const bool dgates = arguments[11].ptr() == Py_True;
  Stack s;
  require(read_form(call.form, s.form), "the form");
  require(!dgates || s.form.single_step, "dgates");
  const size_t of_y = s.form.single_step ? 0 : 1;
  require(needs.size() == 3 + call.weights.size(), "needs");
  require(upstream.size() == of_y + (s.has_cell() ? 2 : 1), "upstream");
  py::tuple gradients(needs.size() + (dgates ? 1 : 0));
  for (size_t i = 0; i < gradients.size(); ++i) gradients[i] = py::none();
  if (std::all_of(upstream.begin(), upstream.end(), [](py::handle g) { return g.is_none(); })) return gradients;

  Reader reader(call.types, backend.rules(), true);
  require(reader.read_weights(call.weights, s.form, s.weights), "weights");
  require(reader.read_x(call, s.form, s.weights[0].shape[1], s.layout, s.x), "x");
  if (s.layout == Layout::packed) s.batch_sizes = read_tensor(call.batch_sizes, "batch_sizes");
  const int64_t N = s.rows(), H = s.hidden(), width = s.width();
  const auto read_states = [&](py::handle tensor, const char* name) {
    Operand o;
    if (tensor.is_none()) return o;
    require(reader.read_states(tensor, s.layout, o), name);
    require(o.dimensions != 3 || o.shape[0] == s.form.runs(), name);
    return o;
  };
  const auto read_rows = [&](py::handle tensor, const char* name) {
    Operand o;
    if (tensor.is_none()) return o;
    require(reader.read_rows(tensor, s.layout, o), name);
    require(o.dimensions == s.x.dimensions && rows_of(o) == N && o.shape[o.dimensions - 1] == width, name);
    return o;
  };
  size_t next = 0;
  const auto read_kept = [&](int64_t rows, int64_t columns, ElementType type) {
    Operand o;
    require(next < kept.size() && reader.read(kept[next++], 2, o), "kept");
    // Of its parts the door sees no more than their addresses.
    require(o.shape[0] == rows && o.shape[1] == columns && o.type == type, "kept");
    return o;
  };
  s.h0 = read_states(h0, "h0");
  s.c0 = read_states(c0, "c0");
  if (s.form.widths->saved > 0) s.gates = read_kept(s.form.runs() * N, s.kept_columns() * H, s.x.type);
  if (s.cells_apart()) s.cells = read_kept(s.form.runs() * N, H, ElementType::float32);
  s.slots = s.form.layers - 1;
  if (s.slots > 0) s.outputs = read_kept(s.slots * N, width, s.x.type);
  require(next == kept.size(), "kept");
  s.y = read_rows(y, "y");
  if (!s.y.present && s.form.single_step && s.gates.present) s.y = part_of(s.gates, 0, N, 0, H);  // for its size
  const Operand grad_y = of_y == 0 ? Operand{} : read_rows(upstream[0], "grad_y");
  const Operand grad_h_n = read_states(upstream[of_y], "grad_h_n");
  const Operand grad_c_n = s.has_cell() ? read_states(upstream[of_y + 1], "grad_c_n") : Operand{};

  Operand dx, dh0, dc0;
  std::vector<Operand> dweights(s.weights.size());
  int64_t lowest = s.form.layers;  // of the layers that have anything to do
  const auto wanted = [&](size_t i, int64_t layer) {
    if (py::handle(needs[i]).ptr() != Py_True) return false;
    lowest = std::min(lowest, layer);
    return true;
  };
  if (wanted(0, 0)) gradients[0] = new_rows(call.x, s.x, s.layout, s.x.shape[s.x.dimensions - 1], dx);
  const auto add_states = [&](size_t i, py::handle like, const Operand& o, Operand& gradient) {
    if (!o.present || !wanted(i, 0)) return;
    const int last = o.dimensions - 1;
    gradients[i] = new_states(like, s.form, s.layout, o.shape[last - 1], o.shape[last], gradient);
  };
  add_states(1, h0, s.h0, dh0);
  add_states(2, c0, s.c0, dc0);
  const size_t each = call.weights.size() / static_cast<size_t>(s.form.runs());
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const size_t run = i / each, at = s.form.place_of(i, each);
    if (!wanted(3 + i, static_cast<int64_t>(run) / s.form.directions)) continue;
    const py::object gradient = new_empty(call.weights[i], s.weights[at].shape, s.weights[at].dimensions);
    dweights[at] = read_tensor(gradient, "gradient");
    gradients[3 + i] = gradient;
  }
  Operand of_gates;
  if (dgates) {
    const py::object block = new_matrix(call.x, N, s.form.widths->dgates * H);
    of_gates = read_tensor(block, "dgates");
    gradients[needs.size()] = block;
    lowest = 0;
  }
  // The gradients of outputs between layers: each layer reads one slot and writes another.
  const int64_t slots = std::min<int64_t>(s.form.layers - 1 - lowest, 2);
  const py::object between = slots > 0 ? new_matrix(call.x, slots * N, width) : py::none();
  const Operand doutputs = read_tensor(between, "gradient");
  std::vector<Checked<Backward>> calls;
  Operand upper = grad_y;
  for (int64_t layer = s.form.layers - 1; layer >= lowest; --layer) {
    auto o = s.operands_of<BackwardOperands>(layer, true);
    o.grad_y = upper;
    o.grad_h_n = states_of_layer(grad_h_n, s.form, layer);
    o.grad_c_n = states_of_layer(grad_c_n, s.form, layer);
    o.dx = layer == 0 ? dx : layer == lowest ? Operand{} : rows_like(s.y, doutputs, layer % slots * N);
    o.dh0 = states_of_layer(dh0, s.form, layer);
    o.dc0 = states_of_layer(dc0, s.form, layer);
    o.dweights = weights_of_layer(dweights, s.form, layer);
    o.dgates = of_gates;
    calls.push_back(check_backward(s.form.cell, o, backend.rules()));
    upper = o.dx;
  }
  backend.run(calls);
  return gradients;
}

}  // namespace pyrnnfast
