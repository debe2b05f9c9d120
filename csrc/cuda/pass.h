// Both passes as the operations that a device is given in their order: the products over all rows of a chunk of steps,
// and between them the recurrence, by steps or in one launch (persistent.h).
//
// A machine M does the operations: the CUDA device (device.cuh), or, in the tests, loops on the host (host.h).
//   m.each(rows, columns, element)    element(row, column) for all
//   m.gemm<E, Out>(product)           below
//   m.zero(address, bytes)
//   m.put(address, values, count)     int64 numbers from the host, which must not be asked for later
//   m.sweep<Tail>(plan, runs, count)  persistent.h, of one direction or two
//   m.wait_for_other()                until what the other direction was given before this is done
#pragma once

#include <vector>

#include "elements.h"
#include "persistent.h"
#include "plan.h"
#include "scatter.h"

namespace pyrnnfast {
namespace {

// out = a b, or is added to; [rows, depth] [depth, columns], each perhaps stored transposed.
struct Multiplication {
  int64_t rows, columns, depth;
  const void* a;
  int64_t a_stride;
  bool a_transposed;
  const void* b;
  int64_t b_stride;
  bool b_transposed;
  void* out;
  int64_t out_stride;
  bool add;
  bool tf32;  // float32 may be rounded to TF32
};

// Hands out scratch memory; without a base it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* result = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return result;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Steps in the order of a pass, from `first` to before `last`.
struct Steps {
  int64_t first, last;
};

// What the passes have in common: one direction, its steps in the order of the pass, and what the persistent form
// wants.
template <class P, bool Backward>
struct Direction {
  const P p;
  const Plan& plan;
  const bool tf32;
  // Whether the steps of the pass go from the last to the first.
  bool descending() const { return p.reverse != Backward; }
  int64_t time(int64_t step) const { return descending() ? p.steps - 1 - step : step; }
  int64_t active(int64_t t) const { return t < 0 || t >= p.steps ? 0 : p.offsets[t + 1] - p.offsets[t]; }
  bool dense() const { return active(0) == active(p.steps - 1); }

  // The rows of a chunk lie together.
  int64_t base(const Steps& s) const { return p.offsets[descending() ? time(s.last - 1) : s.first]; }
  int64_t rows(const Steps& s) const {
    const int64_t after = (descending() ? time(s.first) : s.last - 1) + 1;
    return p.offsets[after] - base(s);
  }

  int64_t* device_offsets = nullptr;  // [T + 1], where the batch size changes
  uint32_t* exchange = nullptr;       // two

  void take_common(Arena& arena) {
    if (!dense()) device_offsets = arena.take<int64_t>(p.steps + 1);
    if (plan.persistent) exchange = arena.take<uint32_t>(2 * plan.exchange_words);
  }

  template <class M>
  void begin_common(M& m) const {
    if (device_offsets != nullptr) m.put(device_offsets, p.offsets, p.steps + 1);
    if (plan.persistent) m.zero(exchange, 2 * plan.exchange_words * static_cast<int64_t>(sizeof(uint32_t)));
  }

  Flow flow() const {
    Flow f;
    f.steps = static_cast<int>(p.steps);
    f.batch = static_cast<int>(p.batch);
    f.reverse = p.reverse;
    f.offsets = device_offsets;
    f.lengths = p.lengths;
    f.reset = p.reset;
    f.reset_step = p.next_reset_step;
    f.reset_row = p.next_reset_row;
    f.plain = f.offsets == nullptr && f.lengths == nullptr && f.reset == nullptr;
    return f;
  }

  // Rows of steps, as the sweep goes through them.
  template <class T>
  View<T> over_time(View<T> v) const {
    if (v.present()) v.step = (descending() ? -1 : 1) * p.batch * v.stride;
    return v;
  }

  template <class Run>
  void fill_common(Run& run, const Steps& s) const {
    run.first = static_cast<int>(s.first);
    run.last = static_cast<int>(s.last);
    run.descending = descending();
    run.unit_blocks = static_cast<int>(plan.unit_blocks);
    run.half = static_cast<int>(plan.exchange_words);
    run.exchange = exchange;
    run.spare = static_cast<int>(plan.spare);
  }
};

template <class Cell, class E>
struct ForwardPass : Direction<Forward, false> {
  using A = Accumulator<E>;
  using Tail = ForwardTail<Cell, E>;
  static constexpr bool wide = sizeof(A) == sizeof(E);

  View<A> xgates, hgates, c;

  ForwardPass(const Forward& forward, const Plan& plan, bool tf32, Arena& arena)
      : Direction<Forward, false>{forward, plan, tf32} {
    const int64_t columns = Cell::gates * p.hidden;
    xgates = {arena.take<A>(plan.chunk_steps * p.batch * columns), columns};
    if (!plan.persistent) hgates = {arena.take<A>(p.batch * columns), columns};
    if (Cell::has_cell) c = wide ? view<A>(p.c_n) : View<A>{arena.take<A>(p.batch * p.hidden), p.hidden};
    take_common(arena);
  }

  // By steps: h and c before the first step, in the place of those after the last one.
  template <class M>
  void begin(M& m) const {
    begin_common(m);
    if (plan.persistent) return;
    m.each(p.batch, p.hidden, Copy<E, E>{view<E>(p.h_n), view<E>(p.h0), {}});
    if (Cell::has_cell) m.each(p.batch, p.hidden, Copy<A, E>{c, view<E>(p.c0), {}});
  }

  template <class M>
  void before_sweep(M& m, const Steps& s) const {
    m.template gemm<E, A>({rows(s), Cell::gates * p.hidden, p.inputs, view<E>(p.x).row(base(s)), p.x.stride, false,
                           p.weight_ih.data, p.weight_ih.stride, true, xgates.data, xgates.stride, false, tf32});
  }

  ForwardLayer<Cell, E> layer(const Steps& s) const {
    ForwardLayer<Cell, E> l;
    l.flow = flow();
    l.hidden = static_cast<int>(p.hidden);
    l.bias_ih = static_cast<const E*>(p.bias_ih.data);
    l.bias_hh = static_cast<const E*>(p.bias_hh.data);
    l.xgates = over_time(xgates);
    l.base = base(s);
    l.y = over_time(view<E>(p.y));
    l.saved = over_time(view<E>(p.saved));
    l.cells = over_time(view<A>(p.cells));
    return l;
  }

  // A part of a chunk.
  template <class M>
  void sweep_by_steps(M& m, const Steps& chunk, const Steps& part) const {
    const auto h = view<E>(p.h_n);
    const auto l = layer(chunk);
    for (int64_t step = part.first; step < part.last; ++step) {
      const int64_t t = time(step), active = this->active(t);
      const bool product = step > 0 || p.h0.data != nullptr;
      if (product) {
        m.template gemm<E, A>({active, Cell::gates * p.hidden, p.hidden, h.data, h.stride, false, p.weight_hh.data,
                               p.weight_hh.stride, true, hgates.data, hgates.stride, false, tf32});
      }
      m.each(active, p.hidden, ForwardElement<Cell, E>{l, static_cast<int>(t), product ? hgates : View<A>{}, h, c});
    }
  }

  typename Tail::Run run(const Steps& s) const {
    typename Tail::Run run;
    fill_common(run, s);
    run.weights = view<E>(p.weight_hh);
    run.layer = layer(s);
    run.h0 = view<E>(p.h0);
    run.c0 = view<E>(p.c0);
    run.h_n = view<E>(p.h_n);
    run.c_n = view<E>(p.c_n);
    run.c = c;
    run.depth = static_cast<int>(plan.depth);
    run.starts_with_zeros = p.h0.data == nullptr;
    return run;
  }

  template <class M>
  void after_sweep(M&, const Steps&) const {}

  template <class M>
  void end(M& m) const {
    if (Cell::has_cell && !wide && !plan.persistent) m.each(p.batch, p.hidden, Copy<E, A>{view<E>(p.c_n), c, {}});
  }
};

template <class Cell, class E>
struct BackwardPass : Direction<Backward, true> {
  using A = Accumulator<E>;
  using Tail = BackwardTail<Cell, E>;
  static constexpr bool wide = sizeof(A) == sizeof(E);

  View<A> product;    // of a step's gate gradients and W_hh
  View<A> dh, carry;  // of the sequences that have had their first step; the LSTM's ∂L/∂c, or what adds to the GRU's dh
  View<E> dgates, h_prev_rows;
  View<E> x_rows;               // x without what stands in padding, which may be NaN
  E* ones = nullptr;            // by steps, and
  A* sums_of_dgates = nullptr;  // persistent: for the biases' gradients
  // The gradients of weights, where they cannot be summed up in the place of the results.
  View<A> sum_weight_ih, sum_weight_hh, sum_bias_ih, sum_bias_hh;

  BackwardPass(const Backward& backward, const Plan& plan, bool tf32, Arena& arena)
      : Direction<Backward, true>{backward, plan, tf32} {
    const int64_t rows = plan.chunk_steps * p.batch, H = p.hidden, GH = Cell::gates * H;
    if (!plan.persistent) product = {arena.take<A>(p.batch * H), H};
    if (wants_states()) dh = {arena.take<A>(p.batch * H), H};
    if (Cell::has_carry) carry = {arena.take<A>(p.batch * H), H};
    if (p.dgates.data == nullptr) dgates = {arena.take<E>(rows * Cell::dgates * H), Cell::dgates * H};
    if (p.dweight_hh.data != nullptr) h_prev_rows = {arena.take<E>(rows * H), H};
    if (p.dweight_ih.data != nullptr && p.lengths != nullptr) x_rows = {arena.take<E>(rows * p.inputs), p.inputs};
    const bool biases = p.dbias_ih.data != nullptr || p.dbias_hh.data != nullptr;
    if (biases && plan.persistent) sums_of_dgates = arena.take<A>(plan.row_groups * Cell::dgates * H);
    if (biases && !plan.persistent) ones = arena.take<E>(rows);
    if (!sums_in_place()) {
      if (p.dweight_ih.data != nullptr) sum_weight_ih = {arena.take<A>(GH * p.inputs), p.inputs};
      if (p.dweight_hh.data != nullptr) sum_weight_hh = {arena.take<A>(GH * H), H};
      if (!plan.persistent && p.dbias_ih.data != nullptr) sum_bias_ih = {arena.take<A>(GH), GH};
      if (!plan.persistent && p.dbias_hh.data != nullptr) sum_bias_hh = {arena.take<A>(GH), GH};
    }
    take_common(arena);
  }

  // A single chunk is rounded once, from the product's own accumulator.
  bool sums_in_place() const { return wide || plan.chunk_steps >= p.steps; }
  bool wants_states() const { return p.dh0.data != nullptr || p.dc0.data != nullptr; }

  template <class M>
  void begin(M& m) const {
    if (!plan.persistent) {
      // The GRU's ∂L/∂h_n comes in the place of the product.
      if (Cell::has_carry) {
        m.each(p.batch, p.hidden, Copy<A, E>{carry, Cell::has_cell ? view<E>(p.grad_c_n) : View<E>{}, {}});
      }
      // Sequences without a step keep it.
      if (wants_states()) m.each(p.batch, p.hidden, Copy<A, E>{dh, view<E>(p.grad_h_n), {}});
    }
    if (ones != nullptr) m.each(1, plan.chunk_steps * p.batch, Ones<E>{ones});
    begin_common(m);
    if (adds_chunks_to_dx() && !p.add_to_dx && p.dx.data != nullptr) {
      m.each(p.offsets[p.steps], p.inputs, Copy<E, E>{view<E>(p.dx), {}, {}});
    }
  }

  // The directions go through the chunks from opposite ends, so that either may be the first to come to a row.
  bool adds_chunks_to_dx() const { return plan.directions == 2 && plan.chunk_steps < p.steps; }

  template <class M>
  void before_sweep(M&, const Steps&) const {}

  // Of the chunk's first row on.
  View<E> dgates_of(const Steps& s) const {
    return p.dgates.data == nullptr ? dgates : view<E>(p.dgates).from(base(s));
  }

  BackwardLayer<Cell, E> layer(const Steps& s) const {
    BackwardLayer<Cell, E> l;
    l.flow = flow();
    l.hidden = static_cast<int>(p.hidden);
    l.grad_y = over_time(view<E>(p.grad_y));
    l.grad_h_n = view<E>(p.grad_h_n);
    l.grad_cells = over_time(view<A>(p.grad_cells));
    l.y = over_time(view<E>(p.y));
    l.saved = over_time(view<E>(p.saved));
    l.h0 = view<E>(p.h0);
    l.c0 = view<E>(p.c0);
    l.cells = over_time(view<A>(p.cells));
    l.dgates = over_time(dgates_of(s));
    l.h_prev_rows = over_time(h_prev_rows);
    l.base = base(s);
    return l;
  }

  template <class M>
  void sweep_by_steps(M& m, const Steps& chunk, const Steps& part) const {
    const auto l = layer(chunk);
    const bool beyond = wants_states() && part.last == p.steps;  // to ∂L/∂h0
    for (int64_t step = part.first; step < part.last + (beyond ? 1 : 0); ++step) {
      const int64_t t = time(step), next = time(step + 1), active = this->active(t),
                    last = this->active(time(step - 1));
      // Sequences that had their first step before this one leave here.
      m.each(wants_states() ? std::max(active, last) : active, p.hidden,
             BackwardElement<Cell, E>{l, static_cast<int>(t), product, carry, dh});
      const int64_t wanted = wants_states() ? active : std::min(active, this->active(next));
      if (wanted == 0) continue;
      const E* left = l.dgates.row(p.offsets[t] - base(chunk));
      int64_t weight_row = 0;
      for (const Segment& segment : Cell::segment) {
        m.template gemm<E, A>({wanted, p.hidden, segment.length * p.hidden, left + segment.begin * p.hidden,
                               l.dgates.stride, false, view<E>(p.weight_hh).row(weight_row), p.weight_hh.stride, false,
                               product.data, product.stride, weight_row > 0, tf32});
        weight_row += segment.length * p.hidden;
      }
    }
  }

  typename Tail::Run run(const Steps& s) const {
    typename Tail::Run run;
    fill_common(run, s);
    run.weights = view<E>(p.weight_hh);
    run.layer = layer(s);
    run.grad_h_n = view<E>(p.grad_h_n);
    run.grad_c_n = view<E>(p.grad_c_n);
    run.dh0 = view<E>(p.dh0);
    run.dc0 = view<E>(p.dc0);
    run.dh = dh;
    run.carry = carry;
    run.states = wants_states();
    run.sums = sums_of_dgates;
    return run;
  }

  // The products of a chunk's gate gradients.
  template <class M>
  void after_sweep(M& m, const Steps& s) const {
    const View<E> left = dgates_of(s);
    const int64_t count = rows(s), H = p.hidden, GH = Cell::gates * H;
    const bool add = s.first > 0;
    if (p.dx.data != nullptr) {
      const bool add_to_dx = p.add_to_dx || adds_chunks_to_dx();
      if (add_to_dx) m.wait_for_other();
      m.template gemm<E, E>({count, p.inputs, GH, left.data, left.stride, false, p.weight_ih.data, p.weight_ih.stride,
                             false, view<E>(p.dx).row(base(s)), p.dx.stride, add_to_dx, tf32});
    }
    const Segment all[] = {{0, Cell::gates}};
    View<E> x = view<E>(p.x).from(base(s));
    if (x_rows.present()) {
      m.each(count, p.inputs, WithoutPadding<E>{x_rows, x, flow(), base(s) / p.batch});
      x = x_rows;
    }
    sum(m, count, left, all, x.data, x.stride, p.inputs, p.dweight_ih, sum_weight_ih, add, tf32);
    sum(m, count, left, Cell::segment, h_prev_rows.data, h_prev_rows.stride, H, p.dweight_hh, sum_weight_hh, add, tf32);
    if (ones == nullptr) return;
    // The sums of columns, not rounded to TF32.
    sum_columns(m, count, left, all, p.dbias_ih, sum_bias_ih, add);
    sum_columns(m, count, left, Cell::segment, p.dbias_hh, sum_bias_hh, add);
  }

  template <class M>
  void end(M& m) const {
    if (!plan.persistent) {
      if (p.dh0.data != nullptr) {
        m.each(p.batch, p.hidden, Copy<E, A>{view<E>(p.dh0), dh, Cell::has_cell ? View<A>{} : carry});
      }
      if (p.dc0.data != nullptr) m.each(p.batch, p.hidden, Copy<E, A>{view<E>(p.dc0), carry, {}});
    }
    const int64_t GH = Cell::gates * p.hidden;
    if (sums_of_dgates != nullptr) {
      m.each(1, GH,
             BiasGradients<Cell, E>{sums_of_dgates, plan.row_groups, p.hidden, static_cast<E*>(p.dbias_ih.data),
                                    static_cast<E*>(p.dbias_hh.data)});
    }
    if (sums_in_place()) return;
    round_sums(m, GH, p.inputs, p.dweight_ih, sum_weight_ih);
    round_sums(m, GH, p.hidden, p.dweight_hh, sum_weight_hh);
    if (ones == nullptr) return;
    round_sums(m, 1, GH, p.dbias_ih, sum_bias_ih);
    round_sums(m, 1, GH, p.dbias_hh, sum_bias_hh);
  }

 private:
  template <class M>
  void multiply(M& m, Multiplication product, const Matrix& result, const View<A>& sums, int64_t row,
                int64_t column) const {
    if (sums_in_place()) {
      product.out = view<E>(result).row(row) + column;
      product.out_stride = result.stride;
      m.template gemm<E, E>(product);
    } else {
      product.out = sums.row(row) + column;
      product.out_stride = sums.stride;
      m.template gemm<E, A>(product);
    }
  }

  // Rows of the result are gates: dgatesᵀ b.
  template <class M, size_t Count>
  void sum(M& m, int64_t count, const View<E>& left, const Segment (&segments)[Count], const E* b, int64_t b_stride,
           int64_t columns, const Matrix& result, const View<A>& sums, bool add, bool may_round) const {
    if (result.data == nullptr) return;
    int64_t row = 0;
    for (const Segment& segment : segments) {
      multiply(m,
               {segment.length * p.hidden, columns, count, left.data + segment.begin * p.hidden, left.stride, true, b,
                b_stride, false, nullptr, 0, add, may_round},
               result, sums, row, 0);
      row += segment.length * p.hidden;
    }
  }

  template <class M, size_t Count>
  void sum_columns(M& m, int64_t count, const View<E>& left, const Segment (&segments)[Count], const Matrix& result,
                   const View<A>& sums, bool add) const {
    if (result.data == nullptr) return;
    int64_t column = 0;
    for (const Segment& segment : segments) {
      multiply(m,
               {1, segment.length * p.hidden, count, ones, count, false, left.data + segment.begin * p.hidden,
                left.stride, false, nullptr, 0, add, false},
               result, sums, 0, column);
      column += segment.length * p.hidden;
    }
  }

  template <class M>
  void round_sums(M& m, int64_t rows, int64_t columns, const Matrix& result, const View<A>& sums) const {
    if (result.data != nullptr) m.each(rows, columns, Copy<E, A>{view<E>(result), sums, {}});
  }
};

template <template <class, class> class Pass, class P, class Cell, class E>
std::vector<Pass<Cell, E>> lay_out(const std::vector<P>& directions, const Plan& plan, bool tf32, Arena& arena) {
  std::vector<Pass<Cell, E>> passes;
  for (const P& direction : directions) passes.emplace_back(direction, plan, tf32, arena);
  return passes;
}

// All directions of a layer. Those of the step form may have a machine each, as they do not wait for each other.
template <template <class, class> class Pass, class P, class Cell, class E, class M>
void run_layer(const std::vector<P>& directions, const Plan& plan, bool tf32, void* scratch, M* const (&machines)[2]) {
  Arena arena(scratch);
  const auto passes = lay_out<Pass, P, Cell, E>(directions, plan, tf32, arena);
  using Tail = typename Pass<Cell, E>::Tail;
  const auto machine = [&](size_t d) -> M& { return *machines[plan.persistent ? 0 : d]; };
  for (size_t d = 0; d < passes.size(); ++d) passes[d].begin(machine(d));
  const int64_t steps = directions[0].steps;
  for (int64_t first = 0; first < steps; first += plan.chunk_steps) {
    const Steps chunk{first, std::min(first + plan.chunk_steps, steps)};
    for (size_t d = 0; d < passes.size(); ++d) passes[d].before_sweep(machine(d), chunk);
    if constexpr (Tail::served) {
      if (plan.persistent) {
        typename Tail::Run runs[2];
        for (size_t d = 0; d < passes.size(); ++d) runs[d] = passes[d].run(chunk);
        const int at_once = plan.together ? 2 : 1;
        for (int d = 0; d < static_cast<int>(passes.size()); d += at_once) {
          machines[0]->template sweep<Tail>(plan, runs + d, at_once);
        }
      }
    }
    // By turns: a direction's steps together would fill the queue of launches before the other's came to it.
    constexpr int64_t turn = 16;
    for (int64_t begin = chunk.first; begin < chunk.last && !plan.persistent; begin += turn) {
      const Steps part{begin, std::min(begin + turn, chunk.last)};
      for (size_t d = 0; d < passes.size(); ++d) passes[d].sweep_by_steps(machine(d), chunk, part);
    }
    for (size_t d = 0; d < passes.size(); ++d) passes[d].after_sweep(machine(d), chunk);
  }
  for (size_t d = 0; d < passes.size(); ++d) passes[d].end(machine(d));
}

template <template <class, class> class Pass, class P, class Cell, class E>
int64_t scratch_of_layer(const std::vector<P>& directions, const Plan& plan, bool tf32) {
  Arena arena(nullptr);
  lay_out<Pass, P, Cell, E>(directions, plan, tf32, arena);
  return arena.used();
}

}  // namespace
}  // namespace pyrnnfast
