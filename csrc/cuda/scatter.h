// The persistent form back through time; what it has in common with the other pass is in persistent.h.
//
// A block has the gate gradients of its own units, and for every block computes what they add to ∂L/∂h of that one's:
//   part [16 units of the other, sequences] = (its rows of the weights, the other's columns)ᵀ · its gate gradients
// Each of a block's warps does so for every eighth of the others; which then add up the parts that are for them, always
// in the same order. So a block writes and reads as many numbers as there are hidden units, whatever the number of
// gates, where it would read all gate gradients if everybody computed ∂L/∂h of his own units. Parts are in float32.
//
// The exchange has a place for every pair of blocks. A lane writes the four sums that it has of a product at once, and
// reads four that are of the same units and sequences.
#pragma once

#include "persistent.h"

namespace pyrnnfast {
namespace {

// 8 bytes.
struct WordPair {
  uint32_t word[2];
};

// Words of a part of kTileRows sequences.
constexpr int kPartWords = kUnits * kTileRows;

template <class Tail, int RowTiles, class Block>
PYRNNFAST_DEVICE void sweep_back(const typename Tail::Run& run, Block& block, int unit_block, int group) {
  using E = typename Tail::Number;
  constexpr int rows = RowTiles * kTileRows, products = products_of_tile(Tail::gates, sizeof(E));
  constexpr int held = held_tiles(products, RowTiles), stride = sum_stride(1);
  constexpr int operand_stride = operand_bytes(products) / sizeof(E);
  // Of a product of tensor cores: its depth, what a lane has of it, what a word has.
  constexpr int depth = 32 / sizeof(E), of_lane = 8 / sizeof(E), of_word = 4 / sizeof(E);
  constexpr int at_once = 8 / RowTiles;  // blocks whose parts are loaded together
  constexpr int chains = 2;              // tiles that are computed together

  struct Tiles {
    typename Block::template EachLane<Words> tile[held][products];
  };
  typename Block::template EachWarp<Tiles> weights;
  // [warp, tile, product, lane]
  Words* const spare = block.template shared<Words>();
  // [warp, row, unit]
  float* const sums = reinterpret_cast<float*>(spare + kWarps * run.spare * products * kLanes);
  // [row, gate, unit]
  E* const operand = reinterpret_cast<E*>(sums + kWarps * rows * stride);
  Elements<Tail, RowTiles, Block> elements(run, block, unit_block, group, operand + rows * operand_stride);
  const auto spare_of = [&](int warp, int index) { return spare + (warp * run.spare + index) * products * kLanes; };

  const int blocks = run.unit_blocks, row_begin = group * rows, own = unit_block;
  // Of a warp: every eighth block.
  const auto count_of = [&](int warp) { return (blocks - warp + kWarps - 1) / kWarps; };
  static_assert(held % chains == 0, "tiles are computed together, all from registers or all from shared memory");
  const auto block_of = [&](int warp, int index) { return index * kWarps + warp; };
  const auto place_of = [&](int step, int to, int from) {
    return run.exchange_of(step) + ((group * blocks + to) * blocks + from) * RowTiles * kPartWords;
  };
  // Of a lane's four words. Those of the same sequences lie together, as nobody writes those of sequences that are not
  // there.
  const auto lane_place = [](int lane) { return (lane % 4 * 8 + lane / 4) * 4; };
  const auto is_there = [&](int tile, int lane) {
    return row_begin + tile * kTileRows + lane % 4 * 2 < run.layer.flow.batch;
  };

  block.each_warp([&](int warp) {
    const int count = count_of(warp);
    block.each_lane([&](int lane) {
#pragma unroll
      for (int k = 0; k < held * products; ++k) weights[warp].tile[k / products][k % products][lane] = Words{};
    });
    block.each_lane([&](int lane) {
#pragma unroll 1
      for (int k = 0; k < count * products; ++k) {
        const int index = k / products, product = k % products;
        E values[2 * of_lane];
#pragma unroll
        for (int j = 0; j < 2 * of_lane; ++j) {
          // Words by turns of rows lane / 4 and lane / 4 + 8.
          const int word = j / of_word, element = word / 2 * of_word + j % of_word;
          const E weight = Tail::weight(run, unit_block, block_of(warp, index), lane / 4 + word % 2 * 8,
                                        product * depth + lane % 4 * of_lane + element);
          if constexpr (sizeof(E) == sizeof(float)) {
            values[j] = for_tensor_cores<E>(weight);
          } else {
            values[j] = weight;
          }
        }
        const Words words = same_bits<Words>(values);
        if (index >= held) {
          spare_of(warp, index - held)[product * kLanes + lane] = words;
          continue;
        }
#pragma unroll
        for (int register_of = 0; register_of < held * products; ++register_of) {
          if (register_of == k) weights[warp].tile[register_of / products][register_of % products][lane] = words;
        }
      }
    });
  });
  block.each_thread([&](int thread) {
    for (int k = thread; k < rows * operand_stride; k += kThreads) operand[k] = Rounded<E>::from(0);
#pragma unroll
    for (int k = 0; k < elements.kOfThread * Tail::summed; ++k) {
      elements.of(thread).element[k / Tail::summed].sum[k % Tail::summed] = 0;
    }
  });
  elements.each([&](auto& own, auto& e, int, int, int row, int unit) { Tail::begin(run, own.of_unit, e, row, unit); },
                [](int, int) {});
  elements.begin();

  const int last = run.last_sweep_step();
  for (int step = run.first; step < last; ++step) {
    block.each_warp([&](int warp) {
      const int count = step == 0 ? 0 : count_of(warp);
      const uint32_t tag = Part::tag(step);
      typename Block::template EachLane<Sums4> sum[RowTiles];
      // Lanes of sequences that are not there load what others load, as in sweep_forward.
      typename Block::template EachLane<const uint32_t*> source[RowTiles];
      block.each_lane([&](int lane) {
#pragma unroll
        for (int n = 0; n < RowTiles; ++n) {
          sum[n][lane] = Sums4{};
          source[n][lane] = place_of(step, own, warp) +
                            (is_there(n, lane) ? n * kPartWords + lane_place(lane) : lane_place(lane - lane % 4));
        }
      });
      for (int begin = 0; begin < count; begin += at_once) {
        with_count<at_once>(count - begin, [&](auto n_blocks) {
          constexpr int together = decltype(n_blocks)::value;
          typename Block::template EachLane<Words> part[together][RowTiles];
          typename Block::template EachLane<bool> arrived;
          do {
            block.each_lane([&](int lane) {
#pragma unroll
              for (int k = 0; k < together * RowTiles; ++k) {
                block.load(part[k / RowTiles][k % RowTiles][lane],
                           source[k % RowTiles][lane] + k / RowTiles * kWarps * RowTiles * kPartWords);
              }
            });
            block.each_lane([&](int lane) {
              bool all = true;
#pragma unroll
              for (int k = 0; k < together * RowTiles; ++k) {
                all &= are_of<Part>(part[k / RowTiles][k % RowTiles][lane], tag);
              }
              arrived[lane] = all;
            });
          } while (!block.all(arrived));
          block.each_lane([&](int lane) {
#pragma unroll
            for (int g = 0; g < together; ++g) {
#pragma unroll
              for (int k = 0; k < RowTiles * 4; ++k) {
                sum[k / 4][lane].value[k % 4] += Part::value(part[g][k / 4][lane].word[k % 4]);
              }
            }
#pragma unroll
            for (int n = 0; n < RowTiles; ++n) source[n][lane] += together * kWarps * RowTiles * kPartWords;
          });
        });
      }
      // Lane: units lane / 4 and lane / 4 + 8, sequences lane % 4 · 2 and the next.
      block.each_lane([&](int lane) {
#pragma unroll
        for (int k = 0; k < RowTiles * 4; ++k) {
          const int row = k / 4 * kTileRows + lane % 4 * 2 + k % 2, unit = lane / 4 + k / 2 % 2 * 8;
          sums[(warp * rows + row) * stride + unit] = sum[k / 4][lane].value[k % 4];
        }
      });
    });
    block.meet();
    elements.step(
        step, last,
        [&](auto&, auto& e, int row, int unit) {
          const float product = sum_of_warps([&](int warp) { return sums[(warp * rows + row) * stride + unit]; });
          Tail::finish(run, e, product, operand + row * operand_stride, unit);
        },
        [](int, int) {});
    // Of these and of the sums: the next ones come in their places behind the next meeting.
    block.meet();
    const int next = step + 1;
    if (next < run.end()) {
      block.each_warp([&](int warp) {
        const int count = count_of(warp);
        const uint32_t tag = Part::tag(next);
#pragma unroll
        for (int n = 0; n < RowTiles; ++n) {
          typename Block::template EachLane<WordPair> numbers[products];
          typename Block::template EachLane<uint32_t*> target;
          block.each_lane([&](int lane) {
            const E* const row = operand + (n * kTileRows + lane / 4) * operand_stride + lane % 4 * of_lane;
#pragma unroll
            for (int product = 0; product < products; ++product) {
              numbers[product][lane] = *reinterpret_cast<const WordPair*>(row + product * depth);
            }
            target[lane] = place_of(next, warp, own) + n * kPartWords + lane_place(lane);
          });
          // Tiles [begin, begin + n).
          const auto hand_on = [&](auto n_tiles, int begin, const auto& weight_of) {
            constexpr int tiles = decltype(n_tiles)::value;
            typename Block::template EachLane<Sums4> sum[tiles];
            block.each_lane([&](int lane) {
#pragma unroll
              for (int g = 0; g < tiles; ++g) sum[g][lane] = Sums4{};
            });
#pragma unroll
            for (int product = 0; product < products; ++product) {
#pragma unroll
              for (int g = 0; g < tiles; ++g) {
                auto&& weight = weight_of(g, product);
                block.template multiply<E>(weight, numbers[product], sum[g]);
              }
            }
            block.each_lane([&](int lane) {
#pragma unroll
              for (int g = 0; g < tiles; ++g) {
                Words words;
#pragma unroll
                for (int k = 0; k < 4; ++k) words.word[k] = Part::from(sum[g][lane].value[k], tag);
                block.store(words, target[lane] + (begin + g) * kWarps * blocks * RowTiles * kPartWords,
                            is_there(n, lane));
              }
            });
          };
#pragma unroll
          for (int begin = 0; begin < held; begin += chains) {
            if (begin < count) {
              with_count<chains>(count - begin, [&](auto tiles) {
                hand_on(tiles, begin,
                        [&](int g, int product) -> auto& { return weights[warp].tile[begin + g][product]; });
              });
            }
          }
          for (int begin = held; begin < count; begin += chains) {
            with_count<chains>(count - begin, [&](auto tiles) {
              hand_on(tiles, begin, [&](int g, int product) {
                typename Block::template EachLane<Words> weight;
                block.each_lane(
                    [&](int lane) { weight[lane] = spare_of(warp, begin + g - held)[product * kLanes + lane]; });
                return weight;
              });
            });
          }
        }
      });
    }
    elements.rest(step, last);
  }
  elements.end(last);
  if (run.sums == nullptr) return;
  // Over the threads of a unit, always in the same order. The others have left the memory, as they met behind it.
  block.each_thread([&](int thread) {
#pragma unroll
    for (int k = 0; k < Tail::summed; ++k) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < elements.kOfThread; ++i) total += elements.of(thread).element[i].sum[k];
      sums[(thread / kUnits * Tail::summed + k) * kUnits + thread % kUnits] = total;
    }
  });
  block.meet();
  block.each_thread([&](int thread) {
    const int k = thread / kUnits;
    const int unit = unit_block * kUnits + thread % kUnits;
    if (k >= Tail::summed || unit >= run.layer.hidden) return;
    float* const to = run.sums + int64_t{group * Tail::summed + k} * run.layer.hidden + unit;
    float total = run.first > 0 ? *to : 0;
    for (int other = 0; other < kThreads / kUnits; ++other) {
      total += sums[(other * Tail::summed + k) * kUnits + thread % kUnits];
    }
    *to = total;
  });
}

// Either of them.
template <class Tail, int RowTiles, class Block>
PYRNNFAST_DEVICE void sweep(const typename Tail::Run& run, Block& block, int unit_block, int group) {
  if constexpr (Tail::back) {
    sweep_back<Tail, RowTiles>(run, block, unit_block, group);
  } else {
    sweep_forward<Tail, RowTiles>(run, block, unit_block, group);
  }
}

}  // namespace
}  // namespace pyrnnfast
