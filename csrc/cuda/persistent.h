// The persistent form: the recurrence of a chunk of steps in one launch, the recurrent weights kept on the chip. Here
// forward, and what both passes have in common; back through time: scatter.h.
//
// A block owns kUnits hidden units of a group of sequences, and for a step computes
//   product [weight rows, sequences] = its rows of the weights · exchange of the step before
// by tensor cores, the depth shared among its warps; then a tail (tails.h) for each of its elements, which writes its
// part of the next exchange.
//
// Blocks meet nowhere but in the exchange, where the data is its own flag: each number is a word of 32 bits that is
// written at once, the low ones of which say of which step it is (Tagged and Part, in numbers.h). A warp loads what it
// needs, and again as long as not all of it is of the step. There are two exchanges, used by turns. Nobody writes one
// that is still being read: before a block writes step s + 1, its warps together have seen step s of all blocks, and
// have met; and those blocks had read the exchange of step s − 1 before. Neither fences nor flags are wanted, as
// nothing but the words themselves is handed over. The exchanges begin with zeros, which are of no step that is waited
// for in them first.
//
// A Block gives the code its threads: on the device those of CUDA (device.cuh); in the tests loops, and a std::thread
// for each block (host.h). `Each…` are what a lane, warp or thread keeps to itself. All loops over fragments that are
// held in registers are unrolled.
//
// The order of the product's depth inside a fragment does not matter as long as weights and exchange agree. Lane q of 4
// takes the words [4 q, 4 q + 4) of each 16, so that 4 lanes load 64 bytes that lie together; tensor cores see what a
// lane has as two products, of two words each.
#pragma once

#include <type_traits>

#include "plan.h"
#include "tails.h"

namespace pyrnnfast {
namespace {

// 16 bytes.
struct Words {
  uint32_t word[4];
};

// Whether all of them are of the step. Format: Tagged or Part.
template <class Format>
PYRNNFAST_HD bool are_of(const Words& words, uint32_t tag) {
  const uint32_t one = (words.word[0] ^ tag) | (words.word[1] ^ tag),
                 other = (words.word[2] ^ tag) | (words.word[3] ^ tag);
  return Format::tag_of(one | other) == 0;
}

// Words of the exchange that a lane loads for a fragment.
constexpr int kLoadWords = 4, kLoadedTogether = 4 * kLoadWords;
template <class E>
struct Loaded {
  static constexpr int loads = 4 / sizeof(E);
  Words part[loads];

  PYRNNFAST_HD uint32_t word(int index) const { return part[index / kLoadWords].word[index % kLoadWords]; }
  // As tensor cores take them.
  PYRNNFAST_HD Words numbers() const {
    Words result;
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(E) == sizeof(float)) {
        result.word[i] = Tagged<E>::bits(word(i));
      } else {
        result.word[i] = Tagged<E>::bits(word(2 * i)) >> 16 | Tagged<E>::bits(word(2 * i + 1));
      }
    }
    return result;
  }
};

// A lane's part of a product [16, 8]: rows lane / 4 and lane / 4 + 8, columns lane % 4 · 2 and the next.
struct Sums4 {
  float value[4];
};

// Of 16 rows of weights: those of rows `lane / 4` and `lane / 4 + 8`.
struct WeightWords {
  Words low, high;
};

// body(n) with the constant n = count, of 1 to Most: what is unrolled for exactly as many needs no conditions.
template <int Most, class Body>
PYRNNFAST_DEVICE void with_count(int count, const Body& body) {
  if constexpr (Most > 1) {
    if (count < Most) return with_count<Most - 1>(count, body);
  }
  body(std::integral_constant<int, Most>{});
}

// The elements of a block: of each thread some, all of one unit.
//
// Where half of the threads would do, there are two groups of them, each with all elements, that take the steps in
// turns. While one finishes a step, for which all wait, the other stores what it made of the step before, and fetches
// what it will want for the next. What an element carries from step to step changes hands.
template <class Tail, int RowTiles, class Block>
class Elements {
 public:
  static constexpr int kRows = RowTiles * kTileRows, kCount = kRows * kUnits;
  static constexpr int kGroups = groups_of_threads(RowTiles), kGroupThreads = kThreads / kGroups;
  static constexpr int kOfThread = (kCount + kGroupThreads - 1) / kGroupThreads;
  static_assert(kGroupThreads % kUnits == 0, "all elements of a thread are of one unit");
  using Carried = typename Tail::Carried;

  struct Own {
    typename Tail::OfUnit of_unit;
    typename Tail::Element element[kOfThread];
  };

  // `carried`: of two groups, shared memory for what the elements carry.
  PYRNNFAST_DEVICE Elements(const typename Tail::Run& run, Block& block, int unit_block, int group, void* carried)
      : run_(run),
        block_(block),
        first_unit_(unit_block * kUnits),
        first_row_(group * kRows),
        carried_(static_cast<Carried*>(carried)) {}

  PYRNNFAST_DEVICE Own& of(int thread) { return threads_[thread]; }

  // Of all groups, or of that whose turn is `step`: body(own, element, row of the block, unit of the block, row of the
  // batch, unit) where there is such; other(row, unit) of units that are none.
  template <class Body, class Other>
  PYRNNFAST_DEVICE void each(const Body& body, const Other& other) {
    block_.each_thread([&](int thread) { of_thread(thread, body, other); });
  }
  template <class Body, class Other>
  PYRNNFAST_DEVICE void at(int step, const Body& body, const Other& other) {
    block_.each_thread([&](int thread) {
      if (kGroups == 1 || thread / kGroupThreads == (step & 1)) of_thread(thread, body, other);
    });
  }
  template <class Body>
  PYRNNFAST_DEVICE void at(int step, const Body& body) {
    at(step, body, [](int, int) {});
  }

  // Before the first step, after each(Tail::begin). A meeting has to follow.
  PYRNNFAST_DEVICE void begin() {
    if constexpr (kGroups > 1) {
      at(run_.first,
         [&](auto&, auto& e, int row, int unit, int, int) { carried_[row * kUnits + unit] = Tail::give(e); });
    }
    fetch(run_.first);
  }
  // All that is done to elements at a step, between two meetings: finish(own, element, row and unit of the block).
  template <class Finish, class Other>
  PYRNNFAST_DEVICE void step(int step, int last, const Finish& finish, const Other& other) {
    at(
        step,
        [&](auto& own, auto& e, int row, int unit, int, int) {
          if constexpr (kGroups > 1) Tail::take(e, carried_[row * kUnits + unit]);
          finish(own, e, row, unit);
          if constexpr (kGroups > 1) carried_[row * kUnits + unit] = Tail::give(e);
        },
        other);
    if constexpr (kGroups > 1) between(step, last);
  }
  // Behind the second of them.
  PYRNNFAST_DEVICE void rest(int step, int last) {
    if constexpr (kGroups == 1) between(step + 1, last);
  }
  // After the last one.
  PYRNNFAST_DEVICE void end(int last) {
    if (kGroups > 1 && last > run_.first) store(last - 1);
    at(last - 1, [&](auto&, auto& e, int, int, int row, int unit) { Tail::end(run_, e, row, unit); });
  }

 private:
  template <class Body, class Other>
  PYRNNFAST_DEVICE void of_thread(int thread, const Body& body, const Other& other) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int place = i * kGroupThreads + thread % kGroupThreads, row = row_of(place / kUnits);
      const int unit = first_unit_ + place % kUnits;
      if (place >= kCount || first_row_ + row >= run_.layer.flow.batch) continue;
      if (unit < run_.layer.hidden) {
        body(threads_[thread], threads_[thread].element[i], row, place % kUnits, first_row_ + row, unit);
      } else {
        other(first_row_ + row, unit);
      }
    }
  }
  PYRNNFAST_DEVICE void fetch(int step) {
    at(step,
       [&](auto&, auto& e, int, int, int row, int unit) { Tail::template fetch<kGroups>(run_, step, e, row, unit); });
  }
  PYRNNFAST_DEVICE void store(int step) {
    at(step, [&](auto&, auto& e, int, int, int, int) { Tail::store(run_, e); });
  }
  // What is left of the step before, and what can be done ahead for the one behind: of the same group, or the only one.
  PYRNNFAST_DEVICE void between(int step, int last) {
    const int ahead = kGroups == 1 ? step : step + 1;
    if (step > run_.first) store(step - 1);
    if (ahead < last) fetch(ahead);
  }

  // The two rows of a warp are four apart, which is 16 banks of shared memory (sum_stride).
  PYRNNFAST_DEVICE static int row_of(int index) { return (index & ~7) | (index & 1) << 2 | (index >> 1 & 3); }

  const typename Tail::Run& run_;
  Block& block_;
  const int first_unit_, first_row_;
  Carried* const carried_;
  typename Block::template EachThread<Own> threads_;
};

// In pairs, so that no sum waits for seven others.
template <class Part>
PYRNNFAST_HD float sum_of_warps(const Part& part) {
  static_assert(kWarps == 8);
  return ((part(0) + part(1)) + (part(2) + part(3))) + ((part(4) + part(5)) + (part(6) + part(7)));
}

// `unit_block`: the number of its units; `group`: of its sequences.
template <class Tail, int RowTiles, class Block>
PYRNNFAST_DEVICE void sweep_forward(const typename Tail::Run& run, Block& block, int unit_block, int group) {
  using E = typename Tail::Number;
  constexpr int weight_tiles = Tail::weight_tiles, rows = RowTiles * kTileRows;
  constexpr int held = held_fragments(weight_tiles, RowTiles);
  constexpr int fragment = depth_of_fragment(sizeof(E)), lane_elements = 16 / sizeof(E);
  constexpr int loads = Loaded<E>::loads;
  // In a fragment, of a lane's element.
  const auto depth_of = [](int lane, int element) {
    return element / kLoadWords * kLoadedTogether + lane % 4 * kLoadWords + element % kLoadWords;
  };
  // The sums of an element, of which there are one for each tile of weights.
  constexpr int together = sums_together(weight_tiles), stride = sum_stride(weight_tiles) / together;
  struct alignas(4 * together) Together {
    float of[together];
  };
  // Fragments that are loaded together, and chains of products that do not wait for each other.
  constexpr int at_once = RowTiles == 1 && weight_tiles == 4 && loads == 2 ? 2 : 4 / RowTiles,
                chains = weight_tiles == 1 ? at_once : 1;

  constexpr int in_registers = at_once < held ? at_once : held > 0 ? held : 1;  // of those loaded together

  struct Fragments {
    typename Block::template EachLane<WeightWords> tile[held > 0 ? held : 1][weight_tiles];
  };
  typename Block::template EachWarp<Fragments> weights;
  // Of each warp, fragment, tile: the low half of all lanes, then the high one, against bank conflicts.
  Words* const spare = block.template shared<Words>();
  // [warp, row, unit]
  Together* const sums = reinterpret_cast<Together*>(spare + kWarps * run.spare * weight_tiles * 2 * kLanes);
  Elements<Tail, RowTiles, Block> elements(run, block, unit_block, group, sums + kWarps * rows * stride);
  const auto spare_of = [&](int warp, int index, int tile) {
    return spare + ((warp * run.spare + index) * weight_tiles + tile) * 2 * kLanes;
  };

  const int row_begin = group * rows;
  const int fragments = run.depth / fragment;
  const auto begin_of = [&](int warp) { return fragments * warp / kWarps; };
  // What fills the last fragment is nobody's; the last block writes it.
  const bool fills = unit_block == run.unit_blocks - 1 && run.depth > run.unit_blocks * kUnits;

  block.each_warp([&](int warp) {
    const auto words = [&](int tile, int row, int index, int lane) {
      E values[lane_elements];
#pragma unroll
      for (int j = 0; j < lane_elements; ++j) {
        const E weight = Tail::weight(run, unit_block, tile, row, index * fragment + depth_of(lane, j));
        if constexpr (sizeof(E) == sizeof(float)) {
          values[j] = for_tensor_cores<E>(weight);
        } else {
          values[j] = weight;
        }
      }
      return same_bits<Words>(values);
    };
    const int first = begin_of(warp), count = begin_of(warp + 1) - first;
    block.each_lane([&](int lane) {
    // The reading is not unrolled, as it would be most of the kernel then; the choice of the registers is. In 32 bits
    // the compiler takes the choice for an index, and the array from the registers.
#pragma unroll 1
      for (int64_t i = 0; i < count; ++i) {
        const int index = static_cast<int>(i);
#pragma unroll 1
        for (int tile = 0; tile < weight_tiles; ++tile) {
          const WeightWords both{words(tile, lane / 4, first + index, lane),
                                 words(tile, lane / 4 + 8, first + index, lane)};
          if (index >= held) {
            spare_of(warp, index - held, tile)[lane] = both.low;
            spare_of(warp, index - held, tile)[kLanes + lane] = both.high;
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
  const auto blank = [&](int step, int row, int unit) { Tail::blank(run, step, row, unit); };
  elements.each(
      [&](auto& own, auto& e, int, int, int row, int unit) {
        Tail::begin(run, own.of_unit, e, row, unit);
        if (fills && run.first == 0 && !run.starts_with_zeros) blank(0, row, unit + kUnits);
      },
      [&](int row, int unit) {
        if (run.first > 0 || run.starts_with_zeros) return;
        blank(0, row, unit);
        if (fills) blank(0, row, unit + kUnits);
      });
  elements.begin();

  for (int step = run.first; step < run.last; ++step) {
    block.each_warp([&](int warp) {
      const int first = begin_of(warp), count = begin_of(warp + 1) - first;
      typename Block::template EachLane<Sums4> sum[chains][weight_tiles][RowTiles];
      block.each_lane([&](int lane) {
#pragma unroll
        for (int k = 0; k < chains * weight_tiles * RowTiles; ++k) {
          sum[k / (weight_tiles * RowTiles)][k / RowTiles % weight_tiles][k % RowTiles][lane] = Sums4{};
        }
      });
      const auto tag = Tagged<E>::tag(step);
      // Lanes of sequences that are not there load what others load, and nobody asks for what comes of it.
      typename Block::template EachLane<const uint32_t*> source[RowTiles];
      block.each_lane([&](int lane) {
#pragma unroll
        for (int n = 0; n < RowTiles; ++n) {
          const int row = row_begin + n * kTileRows + lane / 4;
          source[n][lane] = run.exchange_row(step, row < run.layer.flow.batch ? row : row_begin) + first * fragment +
                            lane % 4 * kLoadWords;
        }
      });
      // Fragments [begin, begin + n). All loads are under way before the first is looked at, and made again while some
      // were too early.
      const auto add_products = [&](auto n_fragments, int begin, const auto& weight_of) {
        constexpr int count = decltype(n_fragments)::value;
        typename Block::template EachLane<Loaded<E>> from[count][RowTiles];
        typename Block::template EachLane<bool> arrived;
        do {
          block.each_lane([&](int lane) {
#pragma unroll
            for (int i = 0; i < count * RowTiles * loads; ++i) {
              const int g = i / (RowTiles * loads), n = i / loads % RowTiles, k = i % loads;
              block.load(from[g][n][lane].part[k], source[n][lane] + (begin + g) * fragment + k * kLoadedTogether);
            }
          });
          block.each_lane([&](int lane) {
            bool all = true;
#pragma unroll
            for (int i = 0; i < count * RowTiles * loads; ++i) {
              all &= are_of<Tagged<E>>(from[i / (RowTiles * loads)][i / loads % RowTiles][lane].part[i % loads], tag);
            }
            arrived[lane] = all;
          });
        } while (!block.all(arrived));
#pragma unroll
        for (int g = 0; g < count; ++g) {
          typename Block::template EachLane<Words> numbers[RowTiles];
          block.each_lane([&](int lane) {
#pragma unroll
            for (int n = 0; n < RowTiles; ++n) numbers[n][lane] = from[g][n][lane].numbers();
          });
#pragma unroll
          for (int tile = 0; tile < weight_tiles; ++tile) {
            auto&& weight = weight_of(g, tile);
#pragma unroll
            for (int n = 0; n < RowTiles; ++n) {
              block.template multiply<E>(weight, numbers[n], sum[g % chains][tile][n]);
            }
          }
        }
      };
      const int wanted = step == 0 && run.starts_with_zeros ? 0 : count;
#pragma unroll
      for (int begin = 0; begin < held; begin += at_once) {
        if (begin < wanted) {
          with_count<in_registers>(wanted < held ? wanted - begin : held - begin, [&](auto n) {
            add_products(n, begin, [&](int g, int tile) -> auto& {
              return weights[warp].tile[begin + g < held ? begin + g : 0][tile];
            });
          });
        }
      }
      for (int begin = held; begin < wanted; begin += at_once) {
        with_count<at_once>(wanted - begin, [&](auto n) {
          add_products(n, begin, [&](int g, int tile) {
            typename Block::template EachLane<WeightWords> weight;
            const Words* const both = spare_of(warp, begin + g - held, tile);
            block.each_lane([&](int lane) { weight[lane] = {both[lane], both[kLanes + lane]}; });
            return weight;
          });
        });
      }
      // Lane: rows lane / 4 and lane / 4 + 8 of the weights, sequences lane % 4 · 2 and the next.
      block.each_lane([&](int lane) {
#pragma unroll
        for (int n = 0; n < RowTiles; ++n) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int row = n * kTileRows + lane % 4 * 2 + k % 2, unit = lane / 4 + k / 2 * 8;
            Together total{};
#pragma unroll
            for (int tile = 0; tile < weight_tiles; ++tile) {
              total.of[tile] = sum[0][tile][n][lane].value[k];
#pragma unroll
              for (int chain = 1; chain < chains; ++chain) total.of[tile] += sum[chain][tile][n][lane].value[k];
            }
            sums[(warp * rows + row) * stride + unit] = total;
          }
        }
      });
    });
    block.meet();
    elements.step(
        step, run.last,
        [&](auto& own, auto& e, int row, int unit) {
          float product[weight_tiles];
          Together part[kWarps];
#pragma unroll
          for (int warp = 0; warp < kWarps; ++warp) part[warp] = sums[(warp * rows + row) * stride + unit];
#pragma unroll
          for (int tile = 0; tile < weight_tiles; ++tile) {
            product[tile] = sum_of_warps([&](int warp) { return part[warp].of[tile]; });
          }
          Tail::finish(run, step, own.of_unit, e, product);
          if (fills) Tail::fill(run, step + 1, e);
        },
        [&](int row, int unit) {
          blank(step + 1, row, unit);
          if (fills) blank(step + 1, row, unit + kUnits);
        });
    // The next step's sums come in the place of these.
    block.meet();
    elements.rest(step, run.last);
  }
  elements.end(run.last);
}

}  // namespace
}  // namespace pyrnnfast
