// Where does a step of the persistent kernels go, on the card?
//
// Launches csrc/cuda's own sweeps, without torch and without the products around them, and prints nanoseconds a step:
// of inference, of the forward pass that saves what training wants, and of the backward pass. With timeline.patch
// applied to csrc (git apply benchmarks/lab/timeline.patch, made for commit e65165f) more can be asked:
//   -DMARKS    the clock of a multiprocessor at 10 places of a step, of every warp of three blocks over 16 steps
//   -DNOSTORE  nothing is stored but the exchange; -DNOFETCH: no operand of the next step is loaded
//   -DNOWAIT   whatever stands in the exchange is taken, so that no block waits for another
//
// nvcc -O3 -std=c++17 -arch=sm_90 benchmarks/lab/timeline.cu -o timeline && ./timeline
//
// Answer, on an NVIDIA H200 (benchmarks/results/h200-timeline.json, by an earlier form of this file, with the same
// launches), LSTM, float16, ns a step of the forward pass of training and of the backward pass:
//                                        H = 256, B = 8    512, 16        1024, 16       512, 64
//   the kernels as they are              1260 / 1497       1434 / 1931    2167 / 2947    2154 / 2928
//   no block waits for another           1247 / 1477       1396 / 1712    1804 / 2318    2160 / 2880
//   no loads of the next operands         947 / 1150       1148 / 1497    1894 / 2599    1770 / 2431
//   neither, and no stores                786 / 1057        952 / 1247    1387 / 1870    1381 / 1977
// So it is not the exchange that a step waits for, but its own loads. The machine code says why: before a warp looks at
// the exchange for the first time, it waits for all the loads that it has under way (the marks: 500 to 1000 cycles
// later than a warp that has none). And back through time what is asked of the sequences' lengths, the constants and
// addresses of a step take longer (870 cycles) than the other half of the threads takes to finish it. ahead.patch is
// what follows from that; no card has run it yet.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/device.cuh"
#include "../../csrc/cuda/plan.cpp"

bool pyrnnfast::poisons_products() { return false; }

namespace pyrnnfast {
namespace {

constexpr int kLaunches = 5;
constexpr int64_t kAllAtOnce = int64_t{8} << 30;  // bytes of a chunk

template <class T>
T* allocate(int64_t count) {
  T* result;
  check_cuda(cudaMalloc(&result, count * sizeof(T)), "memory");
  check_cuda(cudaMemset(result, 0, count * sizeof(T)), "memory");
  return result;
}

template <class E>
__global__ void fill(E* to, int64_t count, float scale, uint32_t seed) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    uint32_t x = static_cast<uint32_t>(i) * 2654435761u + seed * 40503u;
    x = (x ^ x >> 15) * 0x2c1b3c6du;
    x = (x ^ x >> 12) * 0x297a2d39u;
    x ^= x >> 15;
    to[i] = Rounded<E>::from((static_cast<float>(x & 0xffff) / 32768.0f - 1.0f) * scale);
  }
}

// The process ends before anybody wants the memory back.
template <class E>
E* numbers(int64_t count, float scale, uint32_t seed) {
  E* const result = allocate<E>(count);
  fill<<<1024, 256>>>(result, count, scale, seed);
  check_cuda(cudaDeviceSynchronize(), "numbers");
  return result;
}

// Milliseconds, the median.
template <class Tail, int RowTiles>
float time_of(const Plan& plan, const typename Tail::Run& run, uint32_t* exchange) {
  Runs<typename Tail::Run> runs;
  runs.run[0] = runs.run[1] = run;
  void* arguments[] = {&runs};
  const auto* const kernel = reinterpret_cast<const void*>(sweep_kernel<Tail, RowTiles>);
  const auto shared = static_cast<size_t>(plan.shared_bytes);
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
             "shared memory");
  cudaEvent_t begin, end;
  check_cuda(cudaEventCreate(&begin), "event");
  check_cuda(cudaEventCreate(&end), "event");
  std::vector<float> times(kLaunches);
  for (float& time : times) {
    check_cuda(cudaMemset(exchange, 0, 2 * plan.exchange_words * sizeof(uint32_t)), "memory");
    check_cuda(cudaEventRecord(begin), "event");
    const dim3 blocks(static_cast<unsigned>(plan.unit_blocks), static_cast<unsigned>(plan.row_groups));
    check_cuda(cudaLaunchCooperativeKernel(kernel, blocks, dim3(kThreads), arguments, shared, nullptr), "launch");
    check_cuda(cudaEventRecord(end), "event");
    check_cuda(cudaEventSynchronize(end), "kernel");
    check_cuda(cudaEventElapsedTime(&time, begin, end), "event");
  }
  std::sort(times.begin(), times.end());
  return times[kLaunches / 2];
}

template <class Tail>
float time_by_tiles(const Plan& plan, const typename Tail::Run& run, uint32_t* exchange) {
  switch (plan.row_tiles) {
    case 1:
      return time_of<Tail, 1>(plan, run, exchange);
    case 2:
      return time_of<Tail, 2>(plan, run, exchange);
    default:
      return time_of<Tail, 4>(plan, run, exchange);
  }
}

#ifdef MARKS
// Of each mark the median over the steps of one parity, in cycles from the first warp's begin of its step; the last
// column: how often the exchange was looked at.
void print_marks() {
  static unsigned marks[3][kWarps][kMarkSteps][kMarkKinds];
  check_cuda(cudaMemcpyFromSymbol(marks, g_marks, sizeof(marks)), "marks");
  for (int block = 0; block < 3; ++block) {
    for (int parity = 0; parity < 2; ++parity) {
      for (int warp = 0; warp < kWarps; ++warp) {
        std::printf("  b%d p%d w%d:", block, parity, warp);
        for (int kind = 0; kind < kMarkKinds; ++kind) {
          std::vector<int> found;
          for (int step = parity; step < kMarkSteps; step += 2) {
            const unsigned mark = marks[block][warp][step][kind];
            unsigned from = marks[block][0][step][0];
            for (int other = 1; other < kWarps; ++other) {
              const unsigned begin = marks[block][other][step][0];
              if (static_cast<int>(begin - from) < 0) from = begin;
            }
            if (mark != 0) found.push_back(static_cast<int>(kind == kMarkKinds - 1 ? mark : mark - from));
          }
          std::sort(found.begin(), found.end());
          if (found.empty()) {
            std::printf("      -");
          } else {
            std::printf(" %6d", found[found.size() / 2]);
          }
        }
        std::printf("\n");
      }
    }
  }
  static const unsigned zeros[3][kWarps][kMarkSteps][kMarkKinds] = {};
  check_cuda(cudaMemcpyToSymbol(g_marks, zeros, sizeof(zeros)), "marks");
}
#else
void print_marks() {}
#endif

enum class Mode { inference, forward, backward };

template <class Cell, class E>
void measure(const char* name, CellKind kind, int64_t steps, int64_t batch, int64_t hidden) {
  const DeviceProperties device{"H200", 9, 0, 132, 232448, true};
  std::vector<int64_t> offsets;
  for (int64_t t = 0; t <= steps; ++t) offsets.push_back(t * batch);
  const int64_t gates = Cell::gates * hidden, rows = steps * batch;
  const auto fill_in = [&](Problem& p, bool training) {
    p.cell = kind;
    p.dtype = DtypeOf<E>::value;
    p.steps = steps;
    p.batch = batch;
    p.inputs = p.hidden = hidden;
    p.offsets = offsets.data();
    p.weight_hh = {numbers<E>(gates * hidden, 1.0f / std::sqrt(static_cast<float>(hidden)), 1), hidden};
    p.bias_ih = {numbers<E>(gates, 0.1f, 2), gates};
    p.bias_hh = {numbers<E>(gates, 0.1f, 3), gates};
    p.y = {numbers<E>(rows * hidden, 1.0f, 8), hidden};
    if (!training) return;
    if (Cell::saved > 0) p.saved = {numbers<E>(rows * Cell::saved * hidden, 0.9f, 9), Cell::saved * hidden};
    if (Cell::has_cell) p.cells = {numbers<float>(rows * hidden, 1.0f, 10), hidden};
  };
  for (const Mode mode : {Mode::inference, Mode::forward, Mode::backward}) {
    Shape shape;
    shape.cell = kind;
    shape.dtype = DtypeOf<E>::value;
    shape.backward = mode == Mode::backward;
    shape.steps = steps;
    shape.batch = batch;
    shape.inputs = shape.hidden = hidden;
    const Plan plan = make_plan(device, shape, kAllAtOnce);
    if (!plan.persistent) {
      std::printf("%s T%d B%d H%d: %s\n", name, int(steps), int(batch), int(hidden), plan.reason.c_str());
      continue;
    }
    float milliseconds = 0;
    if (mode == Mode::backward) {
      Backward p;
      fill_in(p, true);
      p.grad_y = {numbers<E>(rows * hidden, 0.1f, 6), hidden};
      p.dweight_hh = {allocate<E>(1), hidden};
      p.dbias_ih = {allocate<E>(gates), gates};
      Arena count(nullptr);
      BackwardPass<Cell, E>(p, plan, false, count);
      Arena arena(allocate<char>(count.used()));
      const BackwardPass<Cell, E> pass(p, plan, false, arena);
      milliseconds = time_by_tiles<BackwardTail<Cell, E>>(plan, pass.run({0, steps}), pass.exchange);
    } else {
      Forward p;
      fill_in(p, mode == Mode::forward);
      p.h_n = {allocate<E>(batch * hidden), hidden};
      p.c_n = {allocate<E>(batch * hidden), hidden};
      Arena count(nullptr);
      ForwardPass<Cell, E>(p, plan, false, count);
      Arena arena(allocate<char>(count.used()));
      const ForwardPass<Cell, E> pass(p, plan, false, arena);
      const float* const x = numbers<float>(rows * gates, 1.0f, 5);
      check_cuda(cudaMemcpy(pass.xgates.data, x, rows * gates * sizeof(float), cudaMemcpyDeviceToDevice), "x");
      milliseconds = time_by_tiles<ForwardTail<Cell, E>>(plan, pass.run({0, steps}), pass.exchange);
    }
    std::printf("%s %s T%d B%d H%d blocks %d x %d tiles %d: %.1f ns a step\n", name,
                mode == Mode::inference ? "inference"
                : mode == Mode::forward ? "forward"
                                        : "backward",
                int(steps), int(batch), int(hidden), int(plan.unit_blocks), int(plan.row_groups), plan.row_tiles,
                milliseconds * 1e6 / static_cast<double>(steps));
    print_marks();
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace pyrnnfast

int main() {
  using namespace pyrnnfast;
  measure<Lstm, Float16>("lstm", CellKind::lstm, 1024, 8, 256);
  measure<Lstm, Float16>("lstm", CellKind::lstm, 1024, 16, 512);
  measure<Lstm, Float16>("lstm", CellKind::lstm, 1024, 16, 1024);
  measure<Lstm, Float16>("lstm", CellKind::lstm, 1024, 64, 512);
  measure<Rnn<false>, Float16>("rnn", CellKind::rnn_tanh, 1024, 16, 512);
  return 0;
}
