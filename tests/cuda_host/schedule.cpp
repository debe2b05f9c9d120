// One LSTM forward and back through time in the persistent form on the host, again and again with other delays: prints
// a number that tells the bits of all results, once for each seed. For test_schedule.py, which builds it also with
// faults put in, and with ThreadSanitizer. So only what it needs is instantiated.
#include <cstdio>
#include <cstdlib>

#include "host.h"

using namespace pyrnnfast;

namespace {

// Of a direction with ragged sequences that overlap several blocks.
constexpr int64_t kHidden = 100, kInputs = 3, kGates = 4 * kHidden;
constexpr int64_t kBatch[] = {11, 11, 10, 9, 9, 8, 5, 5, 3, 1};
constexpr int64_t kSteps = sizeof(kBatch) / sizeof(kBatch[0]);

class Numbers {
 public:
  Matrix random(int64_t rows, int64_t columns) {
    Matrix m = empty(rows, columns);
    auto* at = static_cast<float*>(m.data);
    for (int64_t i = 0; i < rows * columns; ++i) at[i] = static_cast<float>(generator_() % 2001) / 2000.0f - 0.5f;
    return m;
  }
  Matrix empty(int64_t rows, int64_t columns) {
    memory_.emplace_back(static_cast<size_t>(rows * columns), 0.0f);
    return {memory_.back().data(), columns};
  }
  // Of all bits.
  uint64_t digest() const {
    uint64_t hash = 14695981039346656037u;
    for (const auto& numbers : memory_) {
      for (const float number : numbers) hash = (hash ^ same_bits<uint32_t>(number)) * 1099511628211u;
    }
    return hash;
  }

 private:
  std::minstd_rand generator_{1};
  std::vector<std::vector<float>> memory_;
};

template <class P>
Plan plan_of(const P& p, bool backward) {
  const Shape shape{p.cell, p.dtype, backward, true, p.steps, p.batch, p.inputs, p.hidden, 1};
  return make_plan({"host", 8, 0, 132, 232448, true}, shape, kChunkBytes);
}

template <template <class, class> class Pass, class P>
void run_tf32(const P& problem, bool backward) {
  const std::vector<P> directions{problem};
  const Plan plan = plan_of(problem, backward);
  std::vector<double> scratch(static_cast<size_t>(
      scratch_of_layer<Pass, P, Lstm, float>(directions, plan, true) / int64_t{sizeof(double)} + 1));
  HostMachine machine;
  HostMachine* const machines[] = {&machine, &machine};
  run_layer<Pass, P, Lstm, float>(directions, plan, true, scratch.data(), machines);
}

uint64_t results() {
  std::vector<int64_t> offsets{0};
  for (const int64_t size : kBatch) offsets.push_back(offsets.back() + size);
  const int64_t rows = offsets.back(), batch = kBatch[0];
  Numbers numbers;
  Forward f;
  f.cell = CellKind::lstm;
  f.steps = kSteps;
  f.batch = batch;
  f.inputs = kInputs;
  f.hidden = kHidden;
  f.offsets = offsets.data();
  f.x = numbers.random(rows, kInputs);
  f.weight_ih = numbers.random(kGates, kInputs);
  f.weight_hh = numbers.random(kGates, kHidden);
  f.h0 = numbers.random(batch, kHidden);
  f.c0 = numbers.random(batch, kHidden);
  f.y = numbers.empty(rows, kHidden);
  f.saved = numbers.empty(rows, kGates);
  f.cells = numbers.empty(rows, kHidden);
  f.h_n = numbers.empty(batch, kHidden);
  f.c_n = numbers.empty(batch, kHidden);
  run_tf32<ForwardPass>(f, false);
  Backward b;
  static_cast<Problem&>(b) = f;
  b.grad_y = numbers.random(rows, kHidden);
  b.dh0 = numbers.empty(batch, kHidden);
  b.dgates = numbers.empty(rows, kGates);
  run_tf32<BackwardPass>(b, true);
  return numbers.digest();
}

}  // namespace

int main(int, char** arguments) {
  for (int seed = std::atoi(arguments[1]); seed < std::atoi(arguments[2]); ++seed) {
    delays().seed = static_cast<unsigned>(seed);
    try {
      std::printf("%016llx\n", static_cast<unsigned long long>(results()));
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
    }
    std::fflush(stdout);
  }
}
