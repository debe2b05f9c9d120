// What is done to every element of a step, and around the time loop: the functions that a CUDA thread runs, or, in the
// tests, a loop on the host. Each is given a row and a column.
#pragma once

#include <utility>

#include "../cells.h"
#include "numbers.h"

namespace pyrnnfast {
namespace {

// Rows of elements of one type, `stride` apart; absent: null.
template <class T>
struct View {
  T* data = nullptr;
  int64_t stride = 0;
  // Over time: from a row to that of the same sequence at the next step of the pass, if that is known.
  int64_t step = 0;

  PYRNNFAST_HD bool present() const { return data != nullptr; }
  PYRNNFAST_HD T& operator()(int64_t row, int64_t column) const { return data[row * stride + column]; }
  PYRNNFAST_HD T* row(int64_t index) const { return data + index * stride; }
  // Of a row of those that begin with `first`; absent: null.
  PYRNNFAST_HD T* at(int64_t first, int row, int column) const {
    return data == nullptr ? nullptr : data + (first + row) * stride + column;
  }
  // Without its first rows.
  PYRNNFAST_HD View from(int64_t row) const { return {data == nullptr ? nullptr : data + row * stride, stride, step}; }
};

template <class T>
View<T> view(const Matrix& m) {
  return {static_cast<T*>(m.data), m.stride};
}

// Where the state before a step comes from.
enum class Start { previous, initial, zeros };

// Which sequences have which steps of a direction. Sequences are rows of a step; those of packed data, the longest
// first, are at step t the first active(t). Padded data has all rows at all steps, but with `lengths` a sequence only
// takes part in its first ones; `reset` says where its state is cleared before a step. (Backward in time: between the
// same two.)
struct Flow {
  int steps = 0, batch = 0;
  bool reverse = false;
  bool plain = true;                 // all sequences have all steps, and nothing is cleared: the three below are null
  const int64_t* offsets = nullptr;  // [T + 1], null: the batch size does not change
  const int64_t* lengths = nullptr;  // [B], null: all sequences have all steps
  const uint8_t* reset = nullptr;    // [T, B], null: never
  int64_t reset_step = 0, reset_row = 0;

  PYRNNFAST_HD int64_t offset(int t) const { return offsets == nullptr ? int64_t{t} * batch : offsets[t]; }
  PYRNNFAST_HD bool is_step(int t) const { return t >= 0 && t < steps; }
  // At steps that are none: no row.
  PYRNNFAST_HD bool has_row(int t, int row) const {
    if (plain || offsets == nullptr) return is_step(t);
    return is_step(t) && row < offsets[t + 1] - offsets[t];
  }
  PYRNNFAST_HD bool here(int t, int row) const {
    if (plain) return is_step(t);
    return has_row(t, row) && (lengths == nullptr || t < lengths[row]);
  }
  PYRNNFAST_HD int before(int t) const { return reverse ? t + 1 : t - 1; }
  PYRNNFAST_HD int later(int t) const { return reverse ? t - 1 : t + 1; }

  PYRNNFAST_HD Start start(int t, int row) const {
    if (plain) return is_step(before(t)) ? Start::previous : Start::initial;
    const bool goes_on = here(before(t), row);
    if (reset != nullptr && (goes_on || !reverse)) {
      const int cleared = reverse ? t + 1 : t;
      if (reset[cleared * reset_step + row * reset_row] != 0) return Start::zeros;
    }
    return goes_on ? Start::previous : Start::initial;
  }
};

// The biases of a unit: of each gate, those of both products together, except for that of the GRU's h_n.
template <class Cell, class A>
struct Biases {
  A gate[Cell::gates] = {};
  A hn = 0;

  template <class E>
  PYRNNFAST_HD void read(const E* bias_ih, const E* bias_hh, int hidden, int unit) {
    for (int g = 0; g < Cell::gates; ++g) {
      const bool inner = Cell::has_bias_hn && g == Cell::gates - 1;
      const A ih = bias_ih == nullptr ? A(0) : widened(bias_ih[g * hidden + unit]);
      const A hh = bias_hh == nullptr ? A(0) : widened(bias_hh[g * hidden + unit]);
      gate[g] = inner ? ih : ih + hh;
      if (inner) hn = hh;
    }
  }
};

// The forward pass of a direction behind its products, one element of a step at a time, in three parts: what can be
// loaded before the product is known, what has to be computed before the next step can begin, and what is only stored.
template <class Cell, class E>
struct ForwardLayer {
  using A = Accumulator<E>;
  Flow flow;
  int hidden = 0;
  const E *bias_ih = nullptr, *bias_hh = nullptr;
  View<A> xgates;  // of the chunk, which begins at row `base`
  int64_t base = 0;
  View<E> y, saved;
  View<A> cells;

  // Where the numbers of an element lie at a step, of the first gate. To compute that anew would take a good part of
  // the time that a step has.
  struct Place {
    const A* x;
    E *y, *saved;
    A* cells;
  };

  struct Ahead {
    bool in_data = false;  // whether the sequence has a row at this step, padding or not
    bool here = false;     // and has this step
    bool cleared = false;
    A x[Cell::gates] = {};
  };

  PYRNNFAST_HD Place place(int t, int row, int unit) const {
    if (!flow.is_step(t)) return {};
    const int64_t first = flow.offset(t);
    return {xgates.at(first - base, row, unit), y.at(first, row, unit), saved.at(first, row, unit),
            cells.at(first, row, unit)};
  }
  // Some steps on, where the batch size does not change.
  template <int Steps>
  PYRNNFAST_HD void move(Place& p) const {
    p.x += Steps * xgates.step;
    p.y += Steps * y.step;
    p.saved += Steps * saved.step;
    p.cells += Steps * cells.step;
  }

  PYRNNFAST_HD Ahead ahead(const Place& p, int t, int row) const {
    Ahead a;
    a.in_data = a.here = true;
    if (!flow.plain) {
      a.in_data = flow.has_row(t, row);
      a.here = flow.here(t, row);
      if (!a.here) return a;
      a.cleared = flow.start(t, row) == Start::zeros;
    }
    for (int g = 0; g < Cell::gates; ++g) a.x[g] = p.x[g * hidden];
    return a;
  }

  // Of an element that is here. `h` and `c`: in and out, rounded as they are kept in memory.
  template <class Math>
  PYRNNFAST_HD static StepForward<A> step(const Ahead& a, const Biases<Cell, A>& bias, const A (&product)[Cell::gates],
                                          A& h, A& c) {
    StepForward<A> s{};
    for (int g = 0; g < Cell::gates; ++g) {
      s.x[g] = a.x[g] + bias.gate[g];
      s.a[g] = a.cleared ? A(0) : product[g];
    }
    s.bias_hn = bias.hn;
    s.h_prev = a.cleared ? A(0) : h;
    s.c_prev = a.cleared ? A(0) : c;
    Cell::template forward<Math>(s);
    h = widened(Rounded<E>::from(s.h));
    c = s.c;
    return s;
  }

  PYRNNFAST_HD void store(const Ahead& a, const Place& p, const StepForward<A>& s) const {
    if (!a.in_data) return;
    *p.y = Rounded<E>::from(a.here ? s.h : A(0));
    if (Cell::has_cell && cells.present()) *p.cells = a.here ? s.c : A(0);
    if constexpr (Cell::saved > 0) {
      if (!a.here || !saved.present()) return;
      for (int k = 0; k < Cell::saved; ++k) p.saved[k * hidden] = Rounded<E>::from(s.saved[k]);
    }
  }
};

// A step of it, its states in memory.
template <class Cell, class E>
struct ForwardElement {
  using A = Accumulator<E>;
  ForwardLayer<Cell, E> layer;
  int t;
  View<A> hgates;  // absent: zeros
  View<E> h;
  View<A> c;

  PYRNNFAST_HD void operator()(int64_t of_row, int64_t of_unit) const {
    const int row = static_cast<int>(of_row), unit = static_cast<int>(of_unit);
    const auto place = layer.place(t, row, unit);
    const auto a = layer.ahead(place, t, row);
    StepForward<A> s{};
    if (a.here) {
      Biases<Cell, A> bias;
      bias.read(layer.bias_ih, layer.bias_hh, layer.hidden, unit);
      A product[Cell::gates];
      for (int g = 0; g < Cell::gates; ++g) product[g] = hgates.present() ? hgates(row, g * layer.hidden + unit) : A(0);
      A own_h = widened(h(row, unit)), own_c = Cell::has_cell ? c(row, unit) : A(0);
      s = layer.template step<ScalarMath<A>>(a, bias, product, own_h, own_c);
      h(row, unit) = Rounded<E>::from(own_h);
      if (Cell::has_cell) c(row, unit) = own_c;
    }
    layer.store(a, place, s);
  }
};

// The way back through time of a direction behind its products, in the same three parts.
template <class Cell, class E>
struct BackwardLayer {
  using A = Accumulator<E>;
  Flow flow;
  int hidden = 0;
  View<E> grad_y, grad_h_n;
  View<A> grad_cells;
  View<E> y, saved, h0, c0;
  View<A> cells;
  View<E> dgates;       // out, of the chunk, which begins at row `base`: [rows, P·H]
  View<E> h_prev_rows;  // likewise [rows, H]: for the product that gives ∂L/∂W_hh; absent where nobody wants it
  int64_t base = 0;

  // As of the other pass.
  struct Place {
    const E *grad_y, *y, *saved;
    const A *cells, *grad_cells;
    E *dgates, *h_prev_rows;
  };

  // Numbers as they lie in memory, since a conversion would wait for them.
  struct Ahead {
    bool in_data = false, here = false;
    bool from_later = false;  // whether the sequence has the later step
    bool passed_on = false;   // which had its state from this one, or, if this is none, from before the sequence
    E grad_y = Rounded<E>::from(0), grad_h_n = Rounded<E>::from(0), h = Rounded<E>::from(0);
    E h_prev = Rounded<E>::from(0), c0 = Rounded<E>::from(0);
    E saved[Cell::saved > 0 ? Cell::saved : 1] = {};
    A c = 0, c_prev = 0, grad_cells = 0;
  };

  PYRNNFAST_HD Place place(int t, int row, int unit) const {
    if (!flow.is_step(t)) return {};
    const int64_t first = flow.offset(t);
    return {grad_y.at(first, row, unit),
            y.at(first, row, unit),
            saved.at(first, row, unit),
            cells.at(first, row, unit),
            grad_cells.at(first, row, unit),
            dgates.at(first - base, row, unit),
            h_prev_rows.at(first - base, row, unit)};
  }
  template <int Steps>
  PYRNNFAST_HD void move(Place& p) const {
    p.grad_y += Steps * grad_y.step;
    p.y += Steps * y.step;
    p.saved += Steps * saved.step;
    p.cells += Steps * cells.step;
    p.grad_cells += Steps * grad_cells.step;
    p.dgates += Steps * dgates.step;
    p.h_prev_rows += Steps * h_prev_rows.step;
  }

  PYRNNFAST_HD Ahead ahead(const Place& p, int t, int row, int unit) const {
    Ahead a;
    const int later = flow.later(t);
    a.from_later = flow.here(later, row);
    a.passed_on = a.from_later && (flow.plain || flow.start(later, row) != Start::zeros);
    a.here = flow.here(t, row);
    a.in_data = flow.plain ? a.here : flow.has_row(t, row);
    if (!a.here) return a;
    if (!a.from_later && grad_h_n.present()) a.grad_h_n = grad_h_n(row, unit);
    if (grad_y.present()) a.grad_y = *p.grad_y;
    if (Cell::backward_reads_h) a.h = *p.y;
    const Start start = flow.start(t, row);
    if (start == Start::previous) {
      if (flow.offsets == nullptr) {
        a.h_prev = p.y[y.step];
        if (Cell::has_cell) a.c_prev = p.cells[cells.step];
      } else {
        const int64_t first = flow.offset(flow.before(t));
        a.h_prev = *y.at(first, row, unit);
        if (Cell::has_cell) a.c_prev = *cells.at(first, row, unit);
      }
    } else if (start == Start::initial) {
      if (h0.present()) a.h_prev = h0(row, unit);
      if (Cell::has_cell && c0.present()) a.c0 = c0(row, unit);
    }
    if (Cell::has_cell) {
      a.c = *p.cells;
      if (grad_cells.present()) a.grad_cells = *p.grad_cells;
    }
    for (int k = 0; k < Cell::saved; ++k) a.saved[k] = p.saved[k * hidden];
    return a;
  }

  // `product`: what comes from the later step. `carry`: in and out.
  template <class Math>
  PYRNNFAST_HD static StepBackward<A> step(const Ahead& a, A product, A& carry) {
    StepBackward<A> s{};
    if (a.from_later && !a.passed_on) carry = 0;
    if (!a.here) return s;
    s.dh = (a.passed_on ? product : A(widened(a.grad_h_n))) + widened(a.grad_y);
    s.carry = carry + a.grad_cells;
    s.h = widened(a.h);
    s.h_prev = widened(a.h_prev);
    s.c = a.c;
    s.c_prev = a.c_prev + widened(a.c0);  // one of them is zero
    for (int k = 0; k < Cell::saved; ++k) s.saved[k] = widened(a.saved[k]);
    Cell::template backward<Math>(s);
    carry = s.carry;
    return s;
  }

  // Of padding the gate gradients are zeros.
  PYRNNFAST_HD void store(const Ahead& a, const Place& p, const StepBackward<A>& s) const {
    if (!a.in_data) return;
    for (int k = 0; k < Cell::dgates; ++k) p.dgates[k * hidden] = Rounded<E>::from(s.dgates[k]);
    if (h_prev_rows.present()) *p.h_prev_rows = a.h_prev;
  }
};

// A step of it, the carry in memory.
template <class Cell, class E>
struct BackwardElement {
  using A = Accumulator<E>;
  BackwardLayer<Cell, E> layer;
  int t;
  View<A> product, carry;
  View<A> dh;  // out, [B, H]: ∂L/∂h0, but for what the carry adds; absent where nobody wants it

  PYRNNFAST_HD void operator()(int64_t of_row, int64_t of_unit) const {
    const int row = static_cast<int>(of_row), unit = static_cast<int>(of_unit);
    const auto place = layer.place(t, row, unit);
    const auto a = layer.ahead(place, t, row, unit);
    const A own = a.from_later ? product(row, unit) : A(0);
    A carried = Cell::has_carry ? carry(row, unit) : A(0);
    const auto s = layer.template step<ScalarMath<A>>(a, own, carried);
    if (Cell::has_carry) carry(row, unit) = carried;
    if (!a.here && a.from_later && dh.present()) dh(row, unit) = a.passed_on ? own : A(0);
    layer.store(a, place, s);
  }
};

// Rows of padded data, zeros where it is padding.
template <class E>
struct WithoutPadding {
  View<E> to, from;
  Flow flow;
  int64_t first;  // the step that the rows begin with

  PYRNNFAST_HD void operator()(int64_t row, int64_t column) const {
    const bool real = flow.here(static_cast<int>(first + row / flow.batch), static_cast<int>(row % flow.batch));
    to(row, column) = real ? from(row, column) : Rounded<E>::from(0);
  }
};

// to = from + more; absent: zeros.
template <class To, class From>
struct Copy {
  View<To> to;
  View<From> from, more;

  PYRNNFAST_HD void operator()(int64_t row, int64_t column) const {
    using A = Accumulator<From>;
    A value = from.present() ? A(widened(from(row, column))) : A(0);
    if (more.present()) value = value + A(widened(more(row, column)));
    to(row, column) = Rounded<To>::from(value);
  }
};

// Which gate gradient goes with a gate of W_hh.
template <class Cell, int Gate>
struct RecurrentDgate {
  static constexpr int find() {
    int gate = Gate, k = 0;
    while (gate >= Cell::segment[k].length) gate -= Cell::segment[k++].length;
    return Cell::segment[k].begin + gate;
  }
  static constexpr int value = find();
};

// The gradients of both biases, from sums of gate gradients by group of sequences: [groups, dgates · H].
template <class Cell, class E>
struct BiasGradients {
  using A = Accumulator<E>;
  const A* sums;
  int64_t groups, hidden;
  E *ih, *hh;  // null: not wanted

  PYRNNFAST_HD A sum(int64_t column) const {
    A total = 0;
    for (int64_t group = 0; group < groups; ++group) total += sums[group * Cell::dgates * hidden + column];
    return total;
  }
  PYRNNFAST_HD void operator()(int64_t, int64_t column) const {
    if (ih != nullptr) ih[column] = Rounded<E>::from(sum(column));
    if (hh == nullptr) return;
    const int64_t dgate = recurrent(column / hidden, std::make_integer_sequence<int, Cell::gates>{});
    hh[column] = Rounded<E>::from(sum(dgate * hidden + column % hidden));
  }
  template <int... Gate>
  PYRNNFAST_HD static int64_t recurrent(int64_t gate, std::integer_sequence<int, Gate...>) {
    return ((gate == Gate ? RecurrentDgate<Cell, Gate>::value : 0) + ...);
  }
};

template <class To>
struct Ones {
  To* to;
  PYRNNFAST_HD void operator()(int64_t, int64_t column) const { to[column] = Rounded<To>::from(1); }
};

}  // namespace
}  // namespace pyrnnfast
