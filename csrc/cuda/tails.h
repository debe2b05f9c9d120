// The tails of the persistent form: the cell's equations for one element at a time, and what its block needs of it to
// hand on: forward h, back through time the gate gradients.
#pragma once

#include <utility>

#include "elements.h"
#include "plan.h"

namespace pyrnnfast {
namespace {

// What is the same in both passes: see pass.h, which fills it in.
template <class E>
struct SweepRun {
  // All in 32 bits, as 64 take longer.
  int first, last;               // steps, in the order of the pass
  bool descending;               // whether time goes down
  int unit_blocks, half, spare;  // half: words of one exchange; spare: see Plan
  uint32_t* exchange;            // two, zeros before the first step
  View<E> weights;

  // Of an element of a layer, at a step; it is asked for every step, or every second one.
  template <int Every, class Layer>
  PYRNNFAST_HD void find(typename Layer::Place& place, const Layer& layer, int step, int row, int unit) const {
    if (step < first + Every || layer.flow.offsets != nullptr) {
      place = layer.place(time(layer.flow, step), row, unit);
    } else {
      layer.template move<Every>(place);
    }
  }
  PYRNNFAST_HD int time(const Flow& flow, int step) const { return descending ? flow.steps - 1 - step : step; }
  // Of a step.
  PYRNNFAST_HD uint32_t* exchange_of(int step) const { return exchange + offset_of(step); }
  PYRNNFAST_HD int offset_of(int step) const { return (step & 1) * half; }
};

// What an element carries from step to step, where that goes from thread to thread.
struct CarriedPair {
  float one, other;
};
static_assert(sizeof(CarriedPair) == kCarriedBytes);

// To where other blocks read it.
PYRNNFAST_HD inline void hand_over(uint32_t* to, uint32_t word) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
#else
  __atomic_store_n(to, word, __ATOMIC_RELAXED);
#endif
}

template <class Cell, class E>
struct ForwardTail {
  using A = Accumulator<E>;
  using Number = E;
  static constexpr bool served = sizeof(A) == sizeof(float);
  static constexpr bool back = false;
  static constexpr int weight_tiles = Cell::gates;

  struct Run : SweepRun<E> {
    int depth;               // of the exchange: [rows, depth]
    bool starts_with_zeros;  // the exchange of step 0 is not to be read
    ForwardLayer<Cell, E> layer;
    View<E> h0, c0;    // [B, H]: before the first step; absent: zeros
    View<E> h_n, c_n;  // after the last one; h_n between chunks too
    View<A> c;         // between chunks

    PYRNNFAST_HD uint32_t* exchange_row(int step, int row) const { return this->exchange_of(step) + row * depth; }
  };

  // What a thread keeps from step to step, all of whose elements are of one unit.
  using OfUnit = Biases<Cell, A>;

  // Of one element, from step to step and from one part of a step to the next.
  struct Element {
    A h, c;
    uint32_t* to;  // where it is handed over for even steps
    typename ForwardLayer<Cell, E>::Place place;
    typename ForwardLayer<Cell, E>::Ahead ahead;
    StepForward<A> step;
  };

  using Carried = CarriedPair;
  PYRNNFAST_HD static Carried give(const Element& e) { return {static_cast<float>(e.h), static_cast<float>(e.c)}; }
  PYRNNFAST_HD static void take(Element& e, const Carried& carried) {
    e.h = carried.one;
    e.c = carried.other;
  }

  // An element of the weights: row `row` of the tile, at `depth` of the exchange.
  PYRNNFAST_HD static E weight(const Run& run, int block, int tile, int row, int depth) {
    const int unit = block * kUnits + row, hidden = run.layer.hidden;
    return unit < hidden && depth < hidden ? run.weights(tile * hidden + unit, depth) : Rounded<E>::from(0);
  }

  PYRNNFAST_HD static void begin(const Run& run, OfUnit& bias, Element& e, int row, int unit) {
    bias.read(run.layer.bias_ih, run.layer.bias_hh, run.layer.hidden, unit);
    e.to = run.exchange_row(0, row) + unit;
    if (run.first > 0) {
      e.h = widened(run.h_n(row, unit));
      e.c = Cell::has_cell ? run.c(row, unit) : A(0);
      return;
    }
    e.h = run.h0.present() ? A(widened(run.h0(row, unit))) : A(0);
    e.c = Cell::has_cell && run.c0.present() ? A(widened(run.c0(row, unit))) : A(0);
    if (!run.starts_with_zeros) hand_over(e.to, Tagged<E>::from(e.h, 0));
  }

  // What the step wants from far away, before it waits for the others.
  template <int Every>
  PYRNNFAST_HD static void fetch(const Run& run, int step, Element& e, int row, int unit) {
    run.template find<Every>(e.place, run.layer, step, row, unit);
    e.ahead = run.layer.ahead(e.place, run.time(run.layer.flow, step), row);
  }

  // What the others wait for.
  PYRNNFAST_HD static void finish(const Run& run, int step, const OfUnit& bias, Element& e,
                                  const A (&product)[weight_tiles]) {
    uint32_t* const to = e.to + run.offset_of(step + 1);
    if (e.ahead.here) e.step = run.layer.template step<FastMath<A>>(e.ahead, bias, product, e.h, e.c);
    hand_over(to, Tagged<E>::from(e.h, step + 1));
  }

  // Of the same unit of the block behind the last one, and of units that are none.
  PYRNNFAST_HD static void fill(const Run& run, int step, const Element& e) {
    hand_over(e.to + run.offset_of(step) + kUnits, Tagged<E>::from(A(0), step));
  }
  PYRNNFAST_HD static void blank(const Run& run, int step, int row, int unit) {
    hand_over(run.exchange_row(step, row) + unit, Tagged<E>::from(A(0), step));
  }

  // What nobody waits for.
  PYRNNFAST_HD static void store(const Run& run, Element& e) { run.layer.store(e.ahead, e.place, e.step); }

  PYRNNFAST_HD static void end(const Run& run, const Element& e, int row, int unit) {
    run.h_n(row, unit) = Rounded<E>::from(e.h);
    if (!Cell::has_cell) return;
    if (run.last < run.layer.flow.steps) {
      run.c(row, unit) = e.c;
    } else {
      run.c_n(row, unit) = Rounded<E>::from(e.c);
    }
  }
};

template <class Cell, class E>
struct BackwardTail {
  using A = Accumulator<E>;
  using Number = E;
  static constexpr bool served = sizeof(A) == sizeof(float);
  static constexpr bool back = true;
  static constexpr int gates = Cell::gates;
  static constexpr int summed = Cell::dgates;  // over time and sequences: the gradients of the biases

  struct Run : SweepRun<E> {
    BackwardLayer<Cell, E> layer;
    View<E> grad_h_n, grad_c_n;  // [B, H]; absent: zeros
    View<E> dh0, dc0;            // out; absent where nobody wants them
    View<A> dh, carry;           // between chunks
    bool states;                 // whether anybody wants the gradients of the initial states
    A* sums;                     // [row groups, dgates · H] of gate gradients; null where nobody wants them

    // One more product than there are steps gives ∂L/∂h0.
    PYRNNFAST_HD int end() const { return states ? layer.flow.steps + 1 : layer.flow.steps; }
    PYRNNFAST_HD int last_sweep_step() const { return this->last == layer.flow.steps ? end() : this->last; }
  };

  struct OfUnit {};

  struct Element {
    A carry;
    A dh;  // ∂L/∂h0, but for what the carry adds
    A sum[summed];
    typename BackwardLayer<Cell, E>::Place place;
    typename BackwardLayer<Cell, E>::Ahead ahead;
    StepBackward<A> step;
  };

  using Carried = CarriedPair;
  PYRNNFAST_HD static Carried give(const Element& e) { return {static_cast<float>(e.carry), static_cast<float>(e.dh)}; }
  PYRNNFAST_HD static void take(Element& e, const Carried& carried) {
    e.carry = carried.one;
    e.dh = carried.other;
  }

  // Of what the units of `block` add to those of `other`: what goes from `depth` of the former, for each gate its
  // units, to `row` of the latter.
  PYRNNFAST_HD static E weight(const Run& run, int block, int other, int row, int depth) {
    const int from = block * kUnits + depth % kUnits, to = other * kUnits + row, hidden = run.layer.hidden;
    return from < hidden && to < hidden ? run.weights(depth / kUnits * hidden + from, to) : Rounded<E>::from(0);
  }

  PYRNNFAST_HD static void begin(const Run& run, OfUnit&, Element& e, int row, int unit) {
    if (run.first > 0) {
      e.carry = Cell::has_carry ? run.carry(row, unit) : A(0);
      e.dh = run.states ? run.dh(row, unit) : A(0);
      return;
    }
    // The GRU's ∂L/∂h_n comes in the place of the product.
    e.carry = Cell::has_cell && run.grad_c_n.present() ? A(widened(run.grad_c_n(row, unit))) : A(0);
    // Sequences without a step keep it.
    e.dh = run.grad_h_n.present() ? A(widened(run.grad_h_n(row, unit))) : A(0);
  }

  template <int Every>
  PYRNNFAST_HD static void fetch(const Run& run, int step, Element& e, int row, int unit) {
    run.template find<Every>(e.place, run.layer, step, row, unit);
    e.ahead = run.layer.ahead(e.place, run.time(run.layer.flow, step), row, unit);
  }

  // `operand`: of the sequence, for each gate the block's units.
  PYRNNFAST_HD static void finish(const Run& run, Element& e, A product, E* operand, int own_unit) {
    e.step = run.layer.template step<FastMath<A>>(e.ahead, product, e.carry);
    if (!e.ahead.here && e.ahead.from_later) e.dh = e.ahead.passed_on ? product : A(0);
    put(operand + own_unit, e.step, std::make_integer_sequence<int, Cell::gates>{});
  }

  template <int... Gate>
  PYRNNFAST_HD static void put(E* operand, const StepBackward<A>& s, std::integer_sequence<int, Gate...>) {
    ((operand[Gate * kUnits] = for_tensor_cores<E>(s.dgates[RecurrentDgate<Cell, Gate>::value])), ...);
  }

  PYRNNFAST_HD static void store(const Run& run, Element& e) {
    for (int k = 0; k < summed; ++k) e.sum[k] += e.step.dgates[k];
    run.layer.store(e.ahead, e.place, e.step);
  }

  PYRNNFAST_HD static void end(const Run& run, const Element& e, int row, int unit) {
    if (run.last < run.layer.flow.steps) {
      if (Cell::has_carry) run.carry(row, unit) = e.carry;
      if (run.states) run.dh(row, unit) = e.dh;
      return;
    }
    if (run.dh0.present()) run.dh0(row, unit) = Rounded<E>::from(Cell::has_cell ? e.dh : e.dh + e.carry);
    if (Cell::has_cell && run.dc0.present()) run.dc0(row, unit) = Rounded<E>::from(e.carry);
  }
};

}  // namespace
}  // namespace pyrnnfast
