// dgates times a weight, which gives dx and dh0, and how the panels of the weights come about for that and for the
// recurrence.
#pragma once

#include "dgates.h"

namespace pyrnnfast {
namespace {

// E: the type of the operands in memory.
template <class Cell, class S, class E>
struct ThroughWeights {
  using T = typename S::Scalar;
  using D = Dgates<Cell, S, E>;
  using Operand = typename D::Operand;
  static constexpr bool narrow_products = kNarrowProducts<S, E>;
  static constexpr int widest = kMaxVectors * S::lanes;

  static int64_t blocks(int64_t columns) { return ceil_div(columns, widest); }
  static Block block(int64_t columns, int64_t index) { return block_at<S>(columns, kMaxVectors, index); }

  // A weight of the pass, and what is to be known for its products.
  struct Weight {
    const Matrix& matrix;  // [depth, columns]
    int64_t depth, columns;
    Region region;  // of its panels, where they are packed before
    Packing packing;
    Factor factor;
    int vectors;  // of a block of its columns
    bool used;
    bool each_step;  // each step reads it
  };
  static int64_t blocks(const Weight& w) { return ceil_div(w.columns, w.vectors * S::lanes); }
  static Block block(const Weight& w, int64_t index) { return block_at<S>(w.columns, w.vectors, index); }

  static Weight hidden(const Backward& p, const Plan& plan) {
    const bool each_step = p.steps > 1 && !p.dgates_given, used = each_step || p.dh0.data != nullptr;
    return {p.weight_hh,    Cell::gates * p.hidden, p.outputs, kPackedHidden, plan.hidden,
            Factor::hidden, plan.output_vectors,    used,      each_step};
  }
  // Used at every step, even if there is one, and so packed before wherever W_hh is packed at all.
  static Weight projection(const Backward& p, const Plan& plan) {
    const Packing packing = plan.hidden == Packing::in_place ? Packing::in_place : Packing::before;
    return {p.weight_hr, p.outputs, p.hidden, kPackedProjection, packing, Factor::projection, kMaxVectors, true, true};
  }
  static Weight input(const Backward& p, const Plan& plan) {
    const bool used = p.dx.data != nullptr;
    return {p.weight_ih, Cell::gates * p.hidden, p.inputs, kPackedInput, plan.input, Factor::input, kMaxVectors, used,
            false};
  }

  // Whether W_hh's packed elements are as narrow as in memory: where the processor multiplies such, and where few rows
  // wait for them to arrive.
  static bool narrow(const Backward& p) { return narrow_products || (!kSame<T, E> && p.batch < 8); }
  // Calls fn with a value of their type. (W_ih's is that of the left operands.)
  template <class Fn>
  static void with_hidden_type(const Backward& p, const Fn& fn) {
    if (narrow(p)) {
      fn(E{});
    } else if constexpr (!narrow_products) {
      fn(T{});
    }
  }

  // A panel is whole vectors: of a weight that is read where it lies, a last block that is not is packed all the same.
  static Packing packing_of(const Weight& w, const Block& b) {
    const bool can_lie = kSame<T, E> && b.present == b.vectors * S::lanes;
    if (w.packing != Packing::in_place || can_lie) return w.packing;
    return w.each_step ? Packing::before : Packing::at_use;
  }

  // Elements of the panels that are packed before the pass.
  static int64_t packed_elements(const Weight& w) {
    if (!w.used) return 0;
    if (w.packing == Packing::before) return packed_depth(w.depth) * padded<S>(w.columns);
    const Block last = block(w, blocks(w) - 1);
    return packing_of(w, last) == Packing::before ? packed_depth(w.depth) * widest : 0;
  }
  template <class P>
  static void pack_before(const Plan& plan, const Weight& w, const Share& share) {
    if (!w.used) return;
    const Blocks own = blocks_to_pack(blocks(w), share);
    for (int64_t index = own.begin; index < own.end; ++index) {
      const Block b = block(w, index);
      if (packing_of(w, b) != Packing::before) continue;
      pack_by_column<S>(at<const E>(w.matrix, 0, b.first), w.matrix.stride, w.depth, b.present,
                        packed_panel<P>(plan, w, b));
    }
  }
  // A panel that is there for the whole pass.
  template <class P>
  static Panel<P> panel(const Plan& plan, const Weight& w, const Block& b) {
    if constexpr (kSame<P, E>) {
      if (packing_of(w, b) == Packing::in_place) return {at<const P>(w.matrix, 0, b.first), w.matrix.stride};
    }
    return {packed_panel<P>(plan, w, b), b.vectors * S::lanes};
  }

  // What a thread has of a product: rows × blocks of columns. Where threads pack panels as they use them, each has some
  // columns, else some rows.
  struct Part {
    int64_t row_begin, row_end, block_begin, block_end;
  };
  static Part part_of(const Weight& w, int64_t rows, const Share& s) {
    const int64_t count = blocks(w);
    if (w.packing != Packing::at_use)
      return {share_of(rows, s.rank, s.size), share_of(rows, s.rank + 1, s.size), 0, count};
    return {0, rows, share_of(count, s.rank, s.size), share_of(count, s.rank + 1, s.size)};
  }

  // A thread's room (kPanels) for panels that it packs as it uses them, a stretch of several at a time: few rows of the
  // weight are read then, each for longer.
  static constexpr int64_t kSeveral = 2;
  static constexpr int64_t kPanelRoom = kDepth * widest;
  static constexpr int64_t kOwnPanels = kSeveral * kPanelRoom;
  // P may be narrower than the room was made for.
  template <class P>
  static P* own_panels(const Plan& plan, int rank) {
    return static_cast<P*>(static_cast<void*>(region<Operand>(plan, kPanels) + rank * kOwnPanels));
  }

  // A thread's room (kRows) for sums that are rounded on their way: a strip of rows of a block, or of several blocks if
  // as many rows are no more than a strip.
  static constexpr int64_t kStripRows = kDepth;
  static int64_t own_rows(const Backward& p, const Plan& plan) {
    const int64_t of_dx = p.dx.data != nullptr ? plan.chunk_rows : 0, of_dh0 = p.dh0.data != nullptr ? p.batch : 0;
    const int64_t rows = kSeveral * (of_dx > of_dh0 ? of_dx : of_dh0);
    return kSame<T, E> ? 0 : (rows < kStripRows ? rows : kStripRows) * widest;
  }

  // The part's rows and columns of out (+)= dgates W. P: the type of packed weights. `whole`: how many rows all threads
  // have together (multiply). adjust(row, b, sums): adds what else belongs to a block of a row.
  template <class P, class Adjust>
  static void product(const Backward& p, const Plan& plan, const Weight& w, const Operand* dgates, int64_t whole,
                      const Part& part, const Matrix& out, bool add, int rank, const Adjust& adjust) {
    const int64_t rows = part.row_end - part.row_begin;
    if (rows <= 0) return;
    const int64_t strip = kSame<T, E> || rows < kStripRows ? rows : kStripRows;
    const bool several = w.packing == Packing::at_use && strip * kSeveral <= kStripRows;
    const int64_t together = several ? kSeveral : 1;
    T* const own = region<T>(plan, kRows) + rank * own_rows(p, plan);
    for (int64_t first = part.row_begin; first < part.row_end; first += strip) {
      const int64_t count = part.row_end - first < strip ? part.row_end - first : strip;
      for (int64_t begin = part.block_begin; begin < part.block_end; begin += together) {
        const int64_t end = begin + together < part.block_end ? begin + together : part.block_end;
        const auto sums_of = [&](int64_t index) { return own + (index - begin) * count * widest; };
        const auto add_up = [&](int64_t index, const Panel<P>& stretch, int64_t k, int64_t depth, int64_t column) {
          const Block b = block(w, index);
          const Left<Operand> left{dgates + first * D::stride(p) + column, D::stride(p), 1};
          if constexpr (kSame<T, E>) {
            multiply<S>(left, count, whole, stretch, b.present, depth, at<T>(out, first, b.first), out.stride,
                        add || k > 0);
          } else {
            multiply<S>(left, count, whole, stretch, b.vectors * S::lanes, depth, sums_of(index), widest, k > 0);
          }
        };
        for_each_panel<P>(p, plan, w, begin, end, rank, add_up);
        for (int64_t index = begin; index < end; ++index) {
          const Block b = block(w, index);
          for (int64_t i = 0; i < count; ++i) {
            E* const to = at<E>(out, first + i, b.first);
            if constexpr (kSame<T, E>) {
              adjust(first + i, b, to);
            } else {
              T* const sums = sums_of(index) + i * widest;
              adjust(first + i, b, sums);
              narrow_row<S>(sums, b.present, to, add);
            }
          }
        }
      }
    }
  }

 private:
  template <class P>
  static P* packed_panel(const Plan& plan, const Weight& w, const Block& b) {
    return region<P>(plan, w.region) + (w.packing == Packing::before ? packed_depth(w.depth) * b.first : 0);
  }

  // Panels of the blocks begin … end − 1, of one packing, a stretch of k at a time: fn(block, panel, k, depth, column
  // of dgates).
  template <class P, class Fn>
  static void for_each_panel(const Backward& p, const Plan& plan, const Weight& w, int64_t begin, int64_t end, int rank,
                             const Fn& fn) {
    P* const own = own_panels<P>(plan, rank);
    const Block front = block(w, begin), back = block(w, end - 1);
    const Packing packing = packing_of(w, front);
    D::for_each_stretch(p, w.factor, 0, w.depth, [&](int64_t first, int64_t last, int64_t column) {
      for (int64_t k = first; k < last; k += kDepth) {
        const int64_t depth = last - k < kDepth ? last - k : kDepth;
        if (packing == Packing::at_use) {
          pack_by_column<S>(at<const E>(w.matrix, k, front.first), w.matrix.stride, depth,
                            back.first + back.present - front.first, own, kPanelRoom);
        }
        for (int64_t index = begin; index < end; ++index) {
          const Block b = block(w, index);
          Panel<P> stretch{own + (index - begin) * kPanelRoom, b.vectors * S::lanes};
          if (packing != Packing::at_use) {
            stretch = panel<P>(plan, w, b);
            stretch.data += k * stretch.stride;
            // The next stretch lies behind this one, where they are packed.
            if (packing == Packing::before) stretch.ahead = stretch.data + depth * stretch.stride;
          }
          fn(index, stretch, k, depth, column + k - first);
        }
      }
    });
  }
};

}  // namespace
}  // namespace pyrnnfast
