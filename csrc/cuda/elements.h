// What is done to every element of a step, and around the time loop: the functions that a CUDA thread runs, or, in the
// tests, a loop on the host. Each is given a row and a column.
#pragma once

#include "../cells.h"
#include "numbers.h"

namespace pyrnnfast {
namespace {

// Rows of elements of one type, `stride` apart; absent: null.
template <class T>
struct View {
  T* data = nullptr;
  int64_t stride = 0;

  PYRNNFAST_HD bool present() const { return data != nullptr; }
  PYRNNFAST_HD T& operator()(int64_t row, int64_t column) const { return data[row * stride + column]; }
  PYRNNFAST_HD T* row(int64_t index) const { return data + index * stride; }
  // Without its first rows.
  PYRNNFAST_HD View from(int64_t row) const { return {data == nullptr ? nullptr : data + row * stride, stride}; }
};

template <class T>
View<T> view(const Matrix& m) {
  return {static_cast<T*>(m.data), m.stride};
}

// The states before a step, of the rows that have gone through a step before; the others begin with `first`, or zeros.
template <class T, class First>
struct Previous {
  View<T> rows;
  int64_t count = 0;
  View<First> first;

  PYRNNFAST_HD auto operator()(int64_t row, int64_t column) const -> decltype(widened(T{})) {
    if (row < count) return widened(rows(row, column));
    return first.present() ? widened(first(row, column)) : decltype(widened(T{}))(0);
  }
};

// The biases of a unit: of each gate, those of both products together, except for that of the GRU's h_n.
template <class Cell, class A>
struct Biases {
  A gate[Cell::gates] = {};
  A hn = 0;

  template <class E>
  PYRNNFAST_HD void read(const E* bias_ih, const E* bias_hh, int64_t hidden, int64_t unit) {
    for (int g = 0; g < Cell::gates; ++g) {
      const bool inner = Cell::has_bias_hn && g == Cell::gates - 1;
      const A ih = bias_ih == nullptr ? A(0) : widened(bias_ih[g * hidden + unit]);
      const A hh = bias_hh == nullptr ? A(0) : widened(bias_hh[g * hidden + unit]);
      gate[g] = inner ? ih : ih + hh;
      if (inner) hn = hh;
    }
  }
};

// Where the results of a step forward go, row 0 being the step's first.
template <class E>
struct ForwardResults {
  View<E> y, saved;
  View<Accumulator<E>> cells;

  template <class Cell>
  PYRNNFAST_HD void write(const StepForward<Accumulator<E>>& s, int64_t hidden, int64_t row, int64_t unit) const {
    y(row, unit) = Rounded<E>::from(s.h);
    if (Cell::saved > 0 && saved.present()) {
      for (int k = 0; k < Cell::saved; ++k) saved(row, k * hidden + unit) = Rounded<E>::from(s.saved[k]);
    }
    if (Cell::has_cell && cells.present()) cells(row, unit) = s.c;
  }
};

// A step forward behind its products.
template <class Cell, class E>
struct ForwardElement {
  using A = Accumulator<E>;
  View<A> xgates, hgates;  // hgates absent: zeros
  const E *bias_ih, *bias_hh;
  View<E> h;  // the states, before and after
  View<A> c;
  ForwardResults<E> results;
  int64_t hidden;

  PYRNNFAST_HD void operator()(int64_t row, int64_t unit) const {
    Biases<Cell, A> bias;
    bias.read(bias_ih, bias_hh, hidden, unit);
    StepForward<A> s{};
    for (int g = 0; g < Cell::gates; ++g) {
      s.x[g] = xgates(row, g * hidden + unit) + bias.gate[g];
      if (hgates.present()) s.a[g] = hgates(row, g * hidden + unit);
    }
    s.bias_hn = bias.hn;
    if (Cell::forward_reads_h_prev) s.h_prev = widened(h(row, unit));
    if (Cell::has_cell) s.c_prev = c(row, unit);
    Cell::template forward<ScalarMath<A>>(s);
    h(row, unit) = Rounded<E>::from(s.h);
    if (Cell::has_cell) c(row, unit) = s.c;
    results.template write<Cell>(s, hidden, row, unit);
  }
};

// What a step back through time reads and writes besides the products, row 0 being the step's first.
template <class E>
struct BackwardOperandsOfStep {
  using A = Accumulator<E>;
  View<E> grad_y, grad_h_n;
  View<A> grad_cells;
  int64_t continuing = 0;  // the rows before this one have gone through a later step; the others begin with grad_h_n
  View<E> y, saved;
  View<A> cells;
  Previous<E, E> h_prev;
  Previous<A, E> c_prev;
  View<E> dgates;       // out, [rows, P·H]
  View<E> h_prev_rows;  // out, [rows, H]: for the product that gives ∂L/∂W_hh; absent where nobody wants it

  // `dh`: what comes from the later step, of rows that continue. `carry`: in and out.
  template <class Cell>
  PYRNNFAST_HD StepBackward<A> run(A dh, A& carry, int64_t hidden, int64_t row, int64_t unit) const {
    StepBackward<A> s{};
    if (row < continuing) {
      s.dh = dh;
    } else if (grad_h_n.present()) {
      s.dh = widened(grad_h_n(row, unit));
    }
    if (grad_y.present()) s.dh = s.dh + widened(grad_y(row, unit));
    s.carry = carry;
    if (Cell::backward_reads_h) s.h = widened(y(row, unit));
    const A before = h_prev(row, unit);
    s.h_prev = before;
    if (Cell::has_cell) {
      s.c = cells(row, unit);
      s.c_prev = c_prev(row, unit);
      if (grad_cells.present()) s.carry = s.carry + grad_cells(row, unit);
    }
    for (int k = 0; k < Cell::saved; ++k) s.saved[k] = widened(saved(row, k * hidden + unit));
    Cell::template backward<ScalarMath<A>>(s);
    for (int k = 0; k < Cell::dgates; ++k) dgates(row, k * hidden + unit) = Rounded<E>::from(s.dgates[k]);
    if (h_prev_rows.present()) h_prev_rows(row, unit) = Rounded<E>::from(before);
    carry = s.carry;
    return s;
  }
};

// A step back through time behind its product.
template <class Cell, class E>
struct BackwardElement {
  using A = Accumulator<E>;
  BackwardOperandsOfStep<E> operands;
  View<A> dh, carry;
  int64_t hidden;

  PYRNNFAST_HD void operator()(int64_t row, int64_t unit) const {
    A carried = Cell::has_carry ? carry(row, unit) : A(0);
    operands.template run<Cell>(row < operands.continuing ? dh(row, unit) : A(0), carried, hidden, row, unit);
    if (Cell::has_carry) carry(row, unit) = carried;
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

// The same values, as the tensor cores take them.
template <class E>
struct ForTensorCores {
  View<E> to, from;
  PYRNNFAST_HD void operator()(int64_t row, int64_t column) const {
    to(row, column) = for_tensor_cores<E>(widened(from(row, column)));
  }
};

template <class To>
struct Ones {
  To* to;
  PYRNNFAST_HD void operator()(int64_t, int64_t column) const { to[column] = Rounded<To>::from(1); }
};

}  // namespace
}  // namespace pyrnnfast
