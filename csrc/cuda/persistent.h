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
// nothing but the words themselves is handed over. The exchanges begin with zeros, which have the tag of a step that is
// far away.
//
// A Block gives the code its threads: on the device those of CUDA (device.cuh); in the tests loops, and a std::thread
// for each block (host.h). `Each…` are what a lane, warp or thread keeps to itself. All loops over fragments that are
// held in registers are unrolled.
//
// The order of the product's depth inside a fragment does not matter as long as weights and exchange agree. Lane q of 4
// takes the words [4 q, 4 q + 4) of each 16, so that 4 lanes load 64 bytes that lie together; tensor cores see what a
// lane has as two products, of two words each.
#pragma once

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

// The elements of a block: of each thread some, all of one unit.
template <class Tail, int RowTiles, class Block>
class Elements {
 public:
  static constexpr int kRows = RowTiles * kTileRows, kOfThread = (kRows * kUnits + kThreads - 1) / kThreads;
  static_assert(kThreads % kUnits == 0, "all elements of a thread are of one unit");

  struct Own {
    typename Tail::OfUnit of_unit;
    typename Tail::Element element[kOfThread];
  };

  PYRNNFAST_DEVICE Elements(const typename Tail::Run& run, Block& block, int unit_block, int group)
      : run_(run), block_(block), first_unit_(unit_block * kUnits), first_row_(group * kRows) {}

  PYRNNFAST_DEVICE Own& of(int thread) { return threads_[thread]; }

  // body(own, element, row of the block, unit of the block, row of the batch, unit) where there is such; other(row,
  // unit) of units that are none.
  template <class Body, class Other>
  PYRNNFAST_DEVICE void each(const Body& body, const Other& other) {
    block_.each_thread([&](int thread) {
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
        const int place = i * kThreads + thread, row = row_of(place / kUnits);
        const int unit = first_unit_ + place % kUnits;
        if (place >= kRows * kUnits || first_row_ + row >= run_.layer.flow.batch) continue;
        if (unit < run_.layer.hidden) {
          body(threads_[thread], threads_[thread].element[i], row, place % kUnits, first_row_ + row, unit);
        } else {
          other(first_row_ + row, unit);
        }
      }
    });
  }
  template <class Body>
  PYRNNFAST_DEVICE void each(const Body& body) {
    each(body, [](int, int) {});
  }

 private:
  // The two rows of a warp are four apart, so that their sums, whose rows are 4 banks apart, do not lie in the same
  // banks of shared memory.
  PYRNNFAST_DEVICE static int row_of(int index) { return (index & ~7) | (index & 1) << 2 | (index >> 1 & 3); }

  const typename Tail::Run& run_;
  Block& block_;
  const int first_unit_, first_row_;
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

  struct Fragments {
    typename Block::template EachLane<WeightWords> tile[held > 0 ? held : 1][weight_tiles];
  };
  typename Block::template EachWarp<Fragments> weights;
  Elements<Tail, RowTiles, Block> elements(run, block, unit_block, group);
  // Of each warp, fragment, tile: the low half of all lanes, then the high one, against bank conflicts.
  Words* const spare = block.template shared<Words>();
  // [warp, row, unit]
  Together* const sums = reinterpret_cast<Together*>(spare + kWarps * run.spare * weight_tiles * 2 * kLanes);
  const auto spare_of = [&](int warp, int index, int tile) {
    return spare + ((warp * run.spare + index) * weight_tiles + tile) * 2 * kLanes;
  };

  const int row_begin = group * rows;
  const int fragments = run.depth / fragment;
  const auto begin_of = [&](int warp) { return fragments * warp / kWarps; };
  // The depth that some block writes; what is beyond fills a fragment.
  const int written = run.unit_blocks * kUnits;
  const int tile_stride = kTileRows * run.depth;

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
  elements.each([&](auto& own, auto& e, int, int, int row, int unit) { Tail::begin(run, own.of_unit, e, row, unit); },
                [&](int row, int unit) {
                  if (run.first == 0 && !run.starts_with_zeros) Tail::blank(run, 0, row, unit);
                });

  for (int step = run.first; step < run.last; ++step) {
    elements.each([&](auto&, auto& e, int, int, int row, int unit) { Tail::fetch(run, step, e, row, unit); });
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
      typename Block::template EachLane<const uint32_t*> source;
      block.each_lane([&](int lane) {
        source[lane] = run.exchange_row(step, row_begin + lane / 4) + first * fragment + lane % 4 * kLoadWords;
      });
      // Fragments [begin, begin + at_once), as far as they are before `end`. All loads are under way before the first
      // is looked at; those that were too early are made again. What nobody writes is zeros of the step.
      const auto add_products = [&](int begin, int end, const auto& weight_of) {
        typename Block::template EachLane<Loaded<E>> from[at_once][RowTiles];
        typename Block::template EachLane<bool> arrived;
        block.each_lane([&](int lane) {
#pragma unroll
          for (int i = 0; i < at_once * RowTiles * loads * kLoadWords; ++i) {
            from[i / (RowTiles * loads * kLoadWords)][i / (loads * kLoadWords) % RowTiles][lane]
                .part[i / kLoadWords % loads]
                .word[i % kLoadWords] = tag;
          }
        });
        bool again = false;
        do {
          block.each_lane([&](int lane) {
#pragma unroll
            for (int g = 0; g < at_once; ++g) {
#pragma unroll
              for (int n = 0; n < RowTiles; ++n) {
                const bool row_is_there = row_begin + n * kTileRows + lane / 4 < run.layer.flow.batch;
#pragma unroll
                for (int k = 0; k < loads; ++k) {
                  const int depth = (begin + g) * fragment + k * kLoadedTogether;
                  Words& part = from[g][n][lane].part[k];
                  const bool present = row_is_there && begin + g < end && first * fragment + depth < written;
                  block.load(part, source[lane] + n * tile_stride + depth,
                             present && (!again || !are_of<Tagged<E>>(part, tag)));
                }
              }
            }
          });
          block.each_lane([&](int lane) {
            bool all = true;
#pragma unroll
            for (int i = 0; i < at_once * RowTiles * loads; ++i) {
              all &= are_of<Tagged<E>>(from[i / (RowTiles * loads)][i / loads % RowTiles][lane].part[i % loads], tag);
            }
            arrived[lane] = all;
          });
          again = true;
        } while (!block.all(arrived));
#pragma unroll
        for (int g = 0; g < at_once; ++g) {
          if (begin + g < end) {
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
        }
      };
      const int wanted = step == 0 && run.starts_with_zeros ? 0 : count;
#pragma unroll
      for (int begin = 0; begin < held; begin += at_once) {
        if (begin < wanted) {
          add_products(begin, wanted < held ? wanted : held, [&](int g, int tile) -> auto& {
            return weights[warp].tile[begin + g < held ? begin + g : 0][tile];
          });
        }
      }
      for (int begin = held; begin < wanted; begin += at_once) {
        add_products(begin, wanted, [&](int g, int tile) {
          typename Block::template EachLane<WeightWords> weight;
          const Words* const both = spare_of(warp, begin + g - held, tile);
          block.each_lane([&](int lane) { weight[lane] = {both[lane], both[kLanes + lane]}; });
          return weight;
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
    elements.each(
        [&](auto& own, auto& e, int own_row, int own_unit, int, int) {
          float product[weight_tiles];
          Together part[kWarps];
#pragma unroll
          for (int warp = 0; warp < kWarps; ++warp) part[warp] = sums[(warp * rows + own_row) * stride + own_unit];
#pragma unroll
          for (int tile = 0; tile < weight_tiles; ++tile) {
            product[tile] = sum_of_warps([&](int warp) { return part[warp].of[tile]; });
          }
          Tail::finish(run, step, own.of_unit, e, product);
        },
        [&](int row, int unit) { Tail::blank(run, step + 1, row, unit); });
    // The next step's sums come in the place of these.
    block.meet();
    elements.each([&](auto&, auto& e, int, int, int, int) { Tail::store(run, e); });
  }
  elements.each([&](auto&, auto& e, int, int, int row, int unit) { Tail::end(run, e, row, unit); });
}

}  // namespace
}  // namespace pyrnnfast
