// The persistent form: the recurrence of a chunk of steps in one launch, the recurrent weights kept on the chip.
//
// A block owns kUnits hidden units of a group of sequences, and for a step computes
//   product [weight rows, sequences] = its rows of the weights · exchange of the step before
// by tensor cores, the depth shared among its warps; then a tail (the cell's equations) for each of its elements, which
// writes its part of the next exchange. Forward, the exchange holds h; backward, the gate gradients, so that every
// block computes ∂L/∂h of its own units. There are two exchanges, used by turns, and one flag for each block: the
// number of steps that it has written. A warp waits for the blocks whose part it is about to read, and no others.
// Nobody writes an exchange that is still being read: who writes step s + 1 has seen all of step s, whose writers had
// read the exchange of step s − 1 before.
//
// A Block gives the code its threads: on the device those of CUDA (device.cuh); in the tests loops, and a std::thread
// for each block (host.h). `Each…` are what a lane, warp or thread keeps to itself. All loops over fragments that are
// held in registers are unrolled.
//
// The order of the product's depth inside a fragment does not matter as long as weights and exchange agree, so lane q
// of 4 takes 16 bytes that lie together; tensor cores see them as two products, of two words each.
#pragma once

#include <utility>

#include "elements.h"
#include "plan.h"

namespace pyrnnfast {
namespace {

// 16 bytes.
struct Words {
  uint32_t word[4];
};

// A lane's part of a product [16, 8]: rows lane / 4 and lane / 4 + 8, columns lane % 4 · 2 and the next.
struct Sums4 {
  float value[4];
};

// Of 16 rows of weights: those of rows `lane / 4` and `lane / 4 + 8`.
struct WeightWords {
  Words low, high;
};

// What is the same in both passes: see pass.h, which fills it in.
template <class E>
struct SweepRun {
  int64_t first, last;  // steps, in the order of the pass
  int64_t steps;        // T
  bool descending;      // whether time goes down
  int64_t batch, hidden;
  const int64_t* offsets;  // null: the batch size does not change
  int64_t base;            // the first row of the chunk
  int64_t unit_blocks, depth, exchange_rows, spare_fragments;
  int32_t* flags;  // [row groups, unit blocks]
  E* exchange;     // [2, exchange_rows, depth]
  View<E> weights;

  PYRNNFAST_HD int64_t time(int64_t step) const { return descending ? steps - 1 - step : step; }
  PYRNNFAST_HD int64_t offset(int64_t t) const { return offsets == nullptr ? t * batch : offsets[t]; }
  // At steps that are none: no row.
  PYRNNFAST_HD int64_t active(int64_t t) const {
    if (t < 0 || t >= steps) return 0;
    return offsets == nullptr ? batch : offsets[t + 1] - offsets[t];
  }
  PYRNNFAST_HD E* exchange_row(int64_t step, int64_t row) const {
    return exchange + ((step % 2) * exchange_rows + row) * depth;
  }
};

template <class Cell, class E>
struct ForwardTail {
  using A = Accumulator<E>;
  using Number = E;
  static constexpr bool served = sizeof(A) == sizeof(float);
  static constexpr int weight_tiles = Cell::gates;
  static constexpr int gates_of_exchange = 1;

  struct Run : SweepRun<E> {
    const E *bias_ih, *bias_hh;
    View<A> xgates;  // of the chunk
    View<E> h;       // [B, H]: the states before and after the chunk
    View<A> c;
    ForwardResults<E> results;

    PYRNNFAST_HD int64_t last_sweep_step() const { return this->last; }
  };

  // What a thread keeps of one element from step to step.
  struct Element {
    Biases<Cell, A> bias;
    A x[Cell::gates];
    A h, c;
  };

  // An element of the weights: row `row` of the tile, at `depth` of the exchange.
  PYRNNFAST_HD static E weight(const Run& run, int64_t block, int tile, int row, int64_t depth) {
    const int64_t unit = block * kUnits + row;
    return unit < run.hidden && depth < run.hidden ? run.weights(tile * run.hidden + unit, depth) : Rounded<E>::from(0);
  }

  PYRNNFAST_HD static void begin(const Run& run, Element& e, int64_t row, int64_t unit) {
    e.bias.read(run.bias_ih, run.bias_hh, run.hidden, unit);
    e.h = widened(run.h(row, unit));
    e.c = Cell::has_cell ? run.c(row, unit) : A(0);
  }

  // Loads what the step wants from far away, before it waits.
  PYRNNFAST_HD static void fetch(const Run& run, int64_t step, Element& e, int64_t row, int64_t unit) {
    const int64_t t = run.time(step);
    if (row >= run.active(t)) return;
    for (int g = 0; g < Cell::gates; ++g) {
      e.x[g] = run.xgates(run.offset(t) - run.base + row, g * run.hidden + unit);
    }
  }

  PYRNNFAST_HD static void finish(const Run& run, int64_t step, Element& e, int64_t row, int64_t unit,
                                  const A (&product)[weight_tiles]) {
    const int64_t t = run.time(step);
    if (row >= run.active(t)) return;
    StepForward<A> s{};
    for (int g = 0; g < Cell::gates; ++g) {
      s.x[g] = e.x[g] + e.bias.gate[g];
      s.a[g] = product[g];
    }
    s.bias_hn = e.bias.hn;
    s.h_prev = e.h;
    s.c_prev = e.c;
    Cell::template forward<ScalarMath<A>>(s);
    run.exchange_row(step + 1, row)[unit] = for_tensor_cores<E>(s.h);
    run.results.template write<Cell>(s, run.hidden, run.offset(t) + row, unit);
    // As the step form and the backward pass have it.
    e.h = widened(Rounded<E>::from(s.h));
    if (Cell::has_cell) e.c = s.c;
  }

  PYRNNFAST_HD static void end(const Run& run, const Element& e, int64_t row, int64_t unit) {
    run.h(row, unit) = Rounded<E>::from(e.h);
    if (Cell::has_cell) run.c(row, unit) = e.c;
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

template <class Cell, class E>
struct BackwardTail {
  using A = Accumulator<E>;
  using Number = E;
  static constexpr bool served = sizeof(A) == sizeof(float);
  static constexpr int weight_tiles = 1;
  static constexpr int gates_of_exchange = Cell::gates;

  struct Run : SweepRun<E> {
    View<E> grad_y, grad_h_n;
    View<A> grad_cells;
    View<E> y, saved;
    View<A> cells;
    View<E> h0, c0;
    View<E> dgates, h_prev_rows;  // of the chunk
    View<A> dh, carry;            // [B, H]: dh, out, of sequences that have had their first step
    bool leaves;                  // whether anybody wants dh or the last carry

    // One more product than there are steps gives ∂L/∂h0.
    PYRNNFAST_HD int64_t last_sweep_step() const {
      return leaves && this->last == this->steps ? this->last + 1 : this->last;
    }
  };

  struct Element {
    A carry;
  };

  // At `depth` of the exchange: for each block, for each gate, its units.
  PYRNNFAST_HD static E weight(const Run& run, int64_t block, int, int row, int64_t depth) {
    const int64_t unit = block * kUnits + row, gate = depth / kUnits % Cell::gates;
    const int64_t source = depth / (kUnits * Cell::gates) * kUnits + depth % kUnits;
    return unit < run.hidden && source < run.hidden ? run.weights(gate * run.hidden + source, unit)
                                                    : Rounded<E>::from(0);
  }

  PYRNNFAST_HD static void begin(const Run& run, Element& e, int64_t row, int64_t unit) {
    e.carry = Cell::has_carry ? run.carry(row, unit) : A(0);
  }

  PYRNNFAST_HD static void fetch(const Run&, int64_t, Element&, int64_t, int64_t) {}

  PYRNNFAST_HD static void finish(const Run& run, int64_t step, Element& e, int64_t row, int64_t unit,
                                  const A (&product)[weight_tiles]) {
    const int64_t t = run.time(step);
    // In the order of the layer, not of the pass: the step before this one, and the one after.
    const int64_t before = run.descending ? t - 1 : t + 1, later = run.descending ? t + 1 : t - 1;
    const int64_t active = run.active(t), continuing = run.active(later);
    if (row >= active) {
      if (row < continuing && run.leaves) run.dh(row, unit) = product[0];
      return;
    }
    const int64_t first_row = run.offset(t);
    BackwardOperandsOfStep<E> o;
    o.grad_y = run.grad_y.from(first_row);
    o.grad_h_n = run.grad_h_n;
    o.grad_cells = run.grad_cells.from(first_row);
    o.continuing = continuing;
    o.y = run.y.from(first_row);
    o.saved = run.saved.from(first_row);
    o.cells = run.cells.from(first_row);
    o.h_prev.first = run.h0;
    o.c_prev.first = run.c0;
    if (run.active(before) > 0) {
      o.h_prev.rows = run.y.from(run.offset(before));
      o.c_prev.rows = run.cells.from(run.offset(before));
      o.h_prev.count = o.c_prev.count = run.active(before);
    }
    o.dgates = run.dgates.from(first_row - run.base);
    o.h_prev_rows = run.h_prev_rows.from(first_row - run.base);
    const StepBackward<A> s = o.template run<Cell>(product[0], e.carry, run.hidden, row, unit);
    E* to = run.exchange_row(step + 1, row) + unit / kUnits * (kUnits * Cell::gates) + unit % kUnits;
    exchange_gates(to, s, std::make_integer_sequence<int, Cell::gates>{});
  }

  template <int... Gate>
  PYRNNFAST_HD static void exchange_gates(E* to, const StepBackward<A>& s, std::integer_sequence<int, Gate...>) {
    ((to[Gate * kUnits] = for_tensor_cores<E>(s.dgates[RecurrentDgate<Cell, Gate>::value])), ...);
  }

  PYRNNFAST_HD static void end(const Run& run, const Element& e, int64_t row, int64_t unit) {
    if (Cell::has_carry) run.carry(row, unit) = e.carry;
  }
};

// `block`: the number of its units; `group`: of its sequences.
template <class Tail, int RowTiles, class Block>
PYRNNFAST_DEVICE void sweep(const typename Tail::Run& run, Block& block, int64_t unit_block, int64_t group) {
  using E = typename Tail::Number;
  constexpr int weight_tiles = Tail::weight_tiles, rows = RowTiles * kTileRows;
  constexpr int held = held_fragments(weight_tiles, RowTiles);
  constexpr int fragment = depth_of_fragment(sizeof(E)), lane_elements = 16 / sizeof(E);
  constexpr int sum_stride = weight_tiles * kUnits + 4;  // against bank conflicts
  constexpr int elements = (rows * kUnits + kThreads - 1) / kThreads;

  struct Fragments {
    typename Block::template EachLane<WeightWords> tile[held][weight_tiles];
  };
  struct Elements {
    typename Tail::Element element[elements];
  };
  typename Block::template EachWarp<Fragments> weights;
  typename Block::template EachThread<Elements> threads;
  WeightWords* const spare = block.template shared<WeightWords>();
  float* const sums = reinterpret_cast<float*>(spare + kWarps * run.spare_fragments * weight_tiles *
                                                           kLanes);  // [warp, row, sum_stride]

  const int64_t fragments = run.depth / fragment, row_begin = group * rows;
  const auto begin_of = [&](int warp) { return fragments * warp / kWarps; };
  int32_t* const flags = run.flags + group * run.unit_blocks;

  // The elements of a thread: (row of the batch, unit), where there is such.
  const auto each_element = [&](const auto& body) {
    block.each_thread([&](int thread) {
#pragma unroll
      for (int i = 0; i < elements; ++i) {
        const int place = i * kThreads + thread, row = place / kUnits;
        const int64_t unit = unit_block * kUnits + place % kUnits;
        if (row < rows && row_begin + row < run.batch && unit < run.hidden) {
          body(threads[thread].element[i], row, place % kUnits, row_begin + row, unit);
        }
      }
    });
  };

  block.each_warp([&](int warp) {
    const auto words = [&](int tile, int row, int64_t index, int lane) {
      E values[lane_elements];
#pragma unroll
      for (int j = 0; j < lane_elements; ++j) {
        const E weight = Tail::weight(run, unit_block, tile, row, index * fragment + lane % 4 * lane_elements + j);
        if constexpr (sizeof(E) == sizeof(float)) {
          values[j] = for_tensor_cores<E>(weight);
        } else {
          values[j] = weight;
        }
      }
      return same_bits<Words>(values);
    };
    const int64_t first = begin_of(warp), count = begin_of(warp + 1) - first;
    block.each_lane([&](int lane) {
    // The reading is not unrolled, as it would be most of the kernel then; the choice of the registers is.
#pragma unroll 1
      for (int64_t i = 0; i < count; ++i) {
#pragma unroll 1
        for (int tile = 0; tile < weight_tiles; ++tile) {
          const WeightWords both{words(tile, lane / 4, first + i, lane), words(tile, lane / 4 + 8, first + i, lane)};
          if (i >= held) {
            spare[((warp * run.spare_fragments + i - held) * weight_tiles + tile) * kLanes + lane] = both;
            continue;
          }
#pragma unroll
          for (int own = 0; own < held * weight_tiles; ++own) {
            if (own == i * weight_tiles + tile) weights[warp].tile[own / weight_tiles][own % weight_tiles][lane] = both;
          }
        }
      }
    });
  });
  each_element([&](auto& e, int, int, int64_t row, int64_t unit) { Tail::begin(run, e, row, unit); });

  const int64_t last = run.last_sweep_step();
  for (int64_t step = run.first; step < last; ++step) {
    each_element([&](auto& e, int, int, int64_t row, int64_t unit) { Tail::fetch(run, step, e, row, unit); });
    block.each_warp([&](int warp) {
      const int64_t first = begin_of(warp), count = begin_of(warp + 1) - first;
      typename Block::template EachLane<Sums4> sum[weight_tiles][RowTiles];
      block.each_lane([&](int lane) {
#pragma unroll
        for (int tile = 0; tile < weight_tiles; ++tile) {
#pragma unroll
          for (int n = 0; n < RowTiles; ++n) sum[tile][n][lane] = Sums4{};
        }
      });
      if (count > 0 && step > 0) {
        // The blocks that write what this warp reads.
        constexpr int written = kUnits * Tail::gates_of_exchange;
        const int64_t writer = first * fragment / written, after = ((first + count) * fragment - 1) / written + 1;
        block.wait(flags + writer, (after < run.unit_blocks ? after : run.unit_blocks) - writer, step);
      }
      const auto load = [&](int64_t index, typename Block::template EachLane<Words>(&from)[RowTiles]) {
        block.each_lane([&](int lane) {
#pragma unroll
          for (int n = 0; n < RowTiles; ++n) {
            from[n][lane] = block.load(run.exchange_row(step, row_begin + n * kTileRows + lane / 4) +
                                       (first + index) * fragment + lane % 4 * lane_elements);
          }
        });
      };
#pragma unroll
      for (int i = 0; i < held; ++i) {
        if (i < count) {
          typename Block::template EachLane<Words> from[RowTiles];
          load(i, from);
#pragma unroll
          for (int tile = 0; tile < weight_tiles; ++tile) {
#pragma unroll
            for (int n = 0; n < RowTiles; ++n) {
              block.template multiply<E>(weights[warp].tile[i][tile], from[n], sum[tile][n]);
            }
          }
        }
      }
      for (int64_t i = held; i < count; ++i) {
        typename Block::template EachLane<Words> from[RowTiles];
        load(i, from);
#pragma unroll
        for (int tile = 0; tile < weight_tiles; ++tile) {
          typename Block::template EachLane<WeightWords> weight;
          block.each_lane([&](int lane) {
            weight[lane] = spare[((warp * run.spare_fragments + i - held) * weight_tiles + tile) * kLanes + lane];
          });
#pragma unroll
          for (int n = 0; n < RowTiles; ++n) block.template multiply<E>(weight, from[n], sum[tile][n]);
        }
      }
      // Lane: rows lane / 4 and lane / 4 + 8 of the weights, sequences lane % 4 · 2 and the next.
      block.each_lane([&](int lane) {
#pragma unroll
        for (int tile = 0; tile < weight_tiles; ++tile) {
#pragma unroll
          for (int n = 0; n < RowTiles; ++n) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const int row = n * kTileRows + lane % 4 * 2 + k % 2, column = tile * kUnits + lane / 4 + k / 2 * 8;
              sums[(warp * rows + row) * sum_stride + column] = sum[tile][n][lane].value[k];
            }
          }
        }
      });
    });
    block.meet();
    each_element([&](auto& e, int own_row, int own_unit, int64_t row, int64_t unit) {
      float product[weight_tiles];
#pragma unroll
      for (int tile = 0; tile < weight_tiles; ++tile) {
        product[tile] = 0;
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) {
          product[tile] += sums[(warp * rows + own_row) * sum_stride + tile * kUnits + own_unit];
        }
      }
      Tail::finish(run, step, e, row, unit, product);
    });
    block.publish(flags + unit_block, static_cast<int32_t>(step + 1));
  }
  each_element([&](auto& e, int, int, int64_t row, int64_t unit) { Tail::end(run, e, row, unit); });
}

}  // namespace
}  // namespace pyrnnfast
