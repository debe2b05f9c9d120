// The machine of pass.h on the host: every operation by plain loops, and the persistent form with a thread for each
// block. For the tests of machines without a GPU; what it computes is what the device is to compute, by the same code
// but for the few operations below.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "pass.h"

namespace pyrnnfast {
namespace {

// Sleeps of random length where threads meet and where they load, so that blocks meet in orders that they seldom do.
struct Delays {
  unsigned seed = 0;  // 0: none
};
inline Delays& delays() {
  static Delays value;
  return value;
}

// A block whose warps, lanes and threads take turns.
class HostBlock {
 public:
  HostBlock(int64_t shared_bytes, int number, std::atomic<bool>& stop)
      : shared_((static_cast<size_t>(shared_bytes) + 15) / 16),
        generator_(delays().seed + 7919u * number),
        stop_(stop) {}

  template <class T>
  struct EachLane {
    std::array<T, kLanes> value;
    T& operator[](int lane) { return value[static_cast<size_t>(lane)]; }
  };
  template <class T>
  struct EachWarp {
    std::unique_ptr<std::array<T, kWarps>> value = std::make_unique<std::array<T, kWarps>>();
    T& operator[](int warp) { return (*value)[static_cast<size_t>(warp)]; }
  };
  template <class T>
  struct EachThread {
    std::vector<T> value = std::vector<T>(kThreads);
    T& operator[](int thread) { return value[static_cast<size_t>(thread)]; }
  };

  template <class Body>
  void each_lane(const Body& body) {
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  }
  template <class Body>
  void each_warp(const Body& body) {
    // In another order every time: nothing may depend on it.
    const int first = static_cast<int>(generator_() % kWarps);
    for (int warp = 0; warp < kWarps; ++warp) body((first + warp) % kWarps);
  }
  template <class Body>
  void each_thread(const Body& body) {
    // What threads write one after the other does not come at once.
    const int late = static_cast<int>(generator_() % kThreads);
    for (int thread = 0; thread < kThreads; ++thread) {
      if (thread == late) pause();
      body(thread);
    }
  }

  template <class T>
  T* shared() {
    return reinterpret_cast<T*>(shared_.data());
  }

  void meet() { pause(); }

  void load(Words& to, const uint32_t* from) {
    for (int i = 0; i < 4; ++i) to.word[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
  }

  void store(const Words& words, uint32_t* to, bool wanted) {
    for (int i = 0; i < 4 && wanted; ++i) __atomic_store_n(to + i, words.word[i], __ATOMIC_RELAXED);
  }

  bool all(EachLane<bool>& each) {
    pause();
    for (const bool one : each.value) {
      if (one) continue;
      if (stop_.load(std::memory_order_relaxed)) throw std::runtime_error("the blocks wait for each other for ever");
      std::this_thread::yield();
      return false;
    }
    return true;
  }

  // sum [16, 8] += weights [16, depth] · from [depth, 8], as mma.sync.m16n8 lays its fragments out.
  template <class E>
  void multiply(EachLane<WeightWords>& weights, EachLane<Words>& from, EachLane<Sums4>& sum) {
    product<E>(
        [&](int lane, int row, int word) { return (row < 8 ? weights[lane].low : weights[lane].high).word[word]; },
        from, sum);
  }
  template <class E>
  void multiply(EachLane<Words>& weights, EachLane<WordPair>& from, EachLane<Sums4>& sum) {
    product<E>([&](int lane, int row, int word) { return weights[lane].word[2 * word + row / 8]; }, from, sum);
  }

 private:
  template <class E, class WordOf, class From>
  static void product(const WordOf& word_of, EachLane<From>& from, EachLane<Sums4>& sum) {
    constexpr int count = 4 / sizeof(E);
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        float total = 0;
        for (int q = 0; q < 4; ++q) {
          const From& other = from[column * 4 + q];
          for (int word = 0; word < static_cast<int>(sizeof(From) / 4); ++word) {
            const uint32_t own = word_of(row % 8 * 4 + q, row, word);
            E a[count], b[count];
            memcpy(a, &own, sizeof(a));
            memcpy(b, &other.word[word], sizeof(b));
            for (int j = 0; j < count; ++j)
              total += static_cast<float>(widened(a[j])) * static_cast<float>(widened(b[j]));
          }
        }
        sum[row % 8 * 4 + column / 2].value[row / 8 * 2 + column % 2] += total;
      }
    }
  }

  void pause() {
    if (delays().seed == 0) return;
    std::this_thread::sleep_for(std::chrono::microseconds(generator_() % 4 == 0 ? generator_() % 300 : 0));
  }

  struct alignas(16) Line {
    char bytes[16];
  };
  std::vector<Line> shared_;
  std::minstd_rand generator_;
  std::atomic<bool>& stop_;
};

class HostMachine {
 public:
  template <class Element>
  void each(int64_t rows, int64_t columns, const Element& element) {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) element(row, column);
    }
  }

  template <class E, class Out>
  void gemm(const Multiplication& m) {
    const auto* a = static_cast<const E*>(m.a);
    const auto* b = static_cast<const E*>(m.b);
    auto* out = static_cast<Out*>(m.out);
    const auto taken = [&](E value) { return m.tf32 ? for_tensor_cores<E>(widened(value)) : value; };
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.columns; ++j) {
        Accumulator<E> total = 0;
        for (int64_t k = 0; k < m.depth; ++k) {
          total += widened(taken(a[m.a_transposed ? k * m.a_stride + i : i * m.a_stride + k])) *
                   widened(taken(b[m.b_transposed ? j * m.b_stride + k : k * m.b_stride + j]));
        }
        Out& result = out[i * m.out_stride + j];
        result = Rounded<Out>::from(m.add ? total + widened(result) : total);
      }
    }
  }

  void zero(void* address, int64_t bytes) { memset(address, 0, static_cast<size_t>(bytes)); }
  void put(int64_t* address, const int64_t* values, int64_t count) {
    memcpy(address, values, static_cast<size_t>(count) * sizeof(int64_t));
  }
  void wait_for_other() {}

  template <class Tail, class Run>
  void sweep(const Plan& plan, const Run* runs, int count) {
    switch (plan.row_tiles) {
      case 1:
        return sweep_tiled<Tail, 1>(plan, runs, count);
      case 2:
        return sweep_tiled<Tail, 2>(plan, runs, count);
      default:
        return sweep_tiled<Tail, 4>(plan, runs, count);
    }
  }

 private:
  template <class Tail, int RowTiles, class Run>
  void sweep_tiled(const Plan& plan, const Run* runs, int count) {
    std::atomic<bool> stop{false}, failed{false};
    std::atomic<int> running{0};
    std::vector<std::thread> blocks;
    for (int number = 0; number < plan.unit_blocks * plan.row_groups * count; ++number) {
      ++running;
      blocks.emplace_back([&, number] {
        try {
          HostBlock block(plan.shared_bytes, number, stop);
          const int units = static_cast<int>(plan.unit_blocks),
                    own = number % (units * static_cast<int>(plan.row_groups));
          pyrnnfast::sweep<Tail, RowTiles>(runs[number / (plan.unit_blocks * plan.row_groups)], block, own % units,
                                           own / units);
        } catch (const std::exception&) {
          failed = true;
        }
        --running;
      });
    }
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (running > 0 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    stop = true;
    for (std::thread& block : blocks) block.join();
    if (failed) throw std::runtime_error("deadlock: the blocks of a persistent launch wait for each other for ever");
  }
};

}  // namespace
}  // namespace pyrnnfast
