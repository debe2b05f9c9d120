// What does each part of a step cost a persistent recurrent kernel on Hopper: a product, a barrier, a handoff within a
// cluster, one through the L2 cache, a fence, a cell's arithmetic, the reading of its operands? Prints one JSON object
// a line, the median of several launches with the least and the most of them.
//
// nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a constants.cu -o constants && ./constants
//
// Cycles are those of the multiprocessor's clock; "ns" beside them is the same span by %globaltimer, whose ticks may be
// a microsecond long. A fault on the card makes every later call of its process fail, so the measurements run in a
// child process, and another child goes on behind the one that failed.
//
// Answer, on an NVIDIA H200 (benchmarks/results/h200-lab.json, and the table in docs/performance.md), in cycles: a
// dependent product 24, a barrier of a block 29, a word to a neighbour in a cluster 265 to 288, through L2 478 to 660
// where the data is its own flag and 1035 to 1184 with release and acquire, a fence 496 to 585, an LSTM's cell 479 by
// expf and 184 by __expf, 16 KB from L2 519.
#include <cooperative_groups.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int kRepetitions = 7;
constexpr int kLine = 128;                 // bytes
constexpr unsigned kPatience = 1u << 20;   // polls: at most a second, even of the L2 cache
constexpr int kWorkspace = 4 << 20;        // bytes
constexpr int kMostBlocks = 1024;          // that report
constexpr unsigned kSecondsToOpen = 60;    // a cold driver takes its time
constexpr unsigned kSecondsToMeasure = 5;  // each needs milliseconds
constexpr double kSecondsInAll = 30;

enum Error : unsigned { kNone, kTimedOut, kWrongValue };

struct Report {
  long long cycles;  // 0: this block did not take the time
  long long nanoseconds;
  unsigned error;
  unsigned sink;  // keeps what was timed from being optimised away
};

// ---------------------------------------------------------------------------------------------- what kernels share

__device__ long long global_timer() {
  long long nanoseconds;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds)::"memory");
  return nanoseconds;
}

struct Stopwatch {
  long long nanoseconds;
  long long cycles;

  __device__ Stopwatch() {
    nanoseconds = global_timer();
    cycles = clock64();
  }

  __device__ void stop(Report* report, unsigned error, unsigned sink) {
    const long long cycles_now = clock64();
    const long long nanoseconds_now = global_timer();
    *report = {cycles_now - cycles, nanoseconds_now - nanoseconds, error, sink};
  }
};

__device__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

__device__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ unsigned cluster_size() {
  unsigned size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// The address, in the cluster's window, of what lies at `address` in the shared memory of block `rank`.
__device__ unsigned in_block(unsigned address, unsigned rank) {
  unsigned mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// The same as a generic address.
__device__ unsigned long long generic_in_block(const void* pointer, unsigned rank) {
  unsigned long long mapped;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(pointer), "r"(rank));
  return mapped;
}

__device__ unsigned load_shared(unsigned address) {
  unsigned value;
  asm volatile("ld.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

template <class Load>
__device__ bool poll(Load load, unsigned wanted) {
#pragma unroll 1
  for (unsigned tries = 0; tries < kPatience; ++tries) {
    if (load() == wanted) return true;
  }
  return false;
}

// ------------------------------------------------------------------------------------------------------------ clock

__global__ void spin(Report* report, long long cycles) {
  Stopwatch watch;
  unsigned turns = 0;
#pragma unroll 1
  while (turns < (1u << 28) && clock64() - watch.cycles < cycles) ++turns;
  watch.stop(report, kNone, turns);
}

// --------------------------------------------------------------------------------------------------------- products

struct Bf16 {
  static __device__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct Tf32 {
  static __device__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

template <class Product, int kChains>
__global__ void multiply(Report* report, unsigned steps) {
  // 2^-7 in either half, as bf16, and about that as tf32: the sums stay finite.
  const unsigned bits = 0x3c003c00u + threadIdx.x;
  const unsigned a[4] = {bits, bits + 1, bits + 2, bits + 3};
  const unsigned b[2] = {bits + 4, bits + 5};
  float c[kChains][4] = {};
  block_barrier();
  Stopwatch watch;
#pragma unroll 8
  for (unsigned step = 0; step < steps; ++step) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) Product::multiply(c[chain], a, b);
  }
  block_barrier();
  float sum = 0;
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < 4; ++i) sum += c[chain][i];
  }
  if (threadIdx.x == 0) watch.stop(report, kNone, __float_as_uint(sum));
}

// --------------------------------------------------------------------------------------------------------- barriers

__global__ void meet_in_block(Report* report, unsigned times) {
  block_barrier();
  Stopwatch watch;
#pragma unroll 16
  for (unsigned i = 0; i < times; ++i) block_barrier();
  if (threadIdx.x == 0) watch.stop(report, kNone, 0);
}

// Without kRelease, nothing that was written before is promised to the others: what is left of the fence is the
// barrier.
template <bool kRelease>
__global__ void meet_in_cluster(Report* reports, unsigned times) {
  cluster_barrier();
  Stopwatch watch;
#pragma unroll 8
  for (unsigned i = 0; i < times; ++i) {
    if constexpr (kRelease) {
      cluster_barrier();
    } else {
      asm volatile("barrier.cluster.arrive.relaxed.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    }
  }
  if (threadIdx.x == 0) watch.stop(reports + blockIdx.x, kNone, 0);
}

__global__ void meet_in_grid(Report* reports, unsigned times) {
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  grid.sync();
  Stopwatch watch;
  for (unsigned i = 0; i < times; ++i) grid.sync();
  if (threadIdx.x == 0) watch.stop(reports + blockIdx.x, kNone, 0);
}

// ------------------------------------------------------------------------------------------ distributed shared memory

template <int kWords>
__device__ void send_async(unsigned address, unsigned value, unsigned barrier) {
  static_assert(kWords == 1 || kWords == 4);
  if constexpr (kWords == 1) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address), "r"(value),
                 "r"(barrier)
                 : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %1, %1, %1}, [%2];" ::"r"(address),
        "r"(value), "r"(barrier)
        : "memory");
  }
}

// The wait as libraries write it acquires at the scope of the block. By the letter of the memory model what another
// block sent needs the cluster's, for which the compiler adds an invalidation of the L1 cache.
template <bool kClusterScope>
__device__ unsigned phase_is_over(unsigned barrier, unsigned parity) {
  unsigned over;
  if constexpr (kClusterScope) {
    asm volatile(
        "{\n\t.reg .pred over;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, over;\n\t}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } else {
    asm volatile(
        "{\n\t.reg .pred over;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, over;\n\t}"
        : "=r"(over)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
  return over;
}

// The first and the last block of a cluster pass a number to and fro. One way is st.async, the wait, and the reading of
// what came, on which the answer depends.
template <int kWords, bool kClusterScope>
__global__ void pass_async(Report* report, unsigned turns) {
  __shared__ alignas(16) unsigned inbox[4];
  __shared__ alignas(8) unsigned long long arrivals;
  const unsigned here = shared_address(inbox);
  const unsigned barrier = shared_address(&arrivals);
  const unsigned rank = cluster_rank();
  const unsigned last = cluster_size() - 1;
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_barrier();
  if (threadIdx.x == 0 && (rank == 0 || rank == last)) {
    const bool first = rank == 0;
    const unsigned there = in_block(here, first ? last : 0);
    const unsigned barrier_there = in_block(barrier, first ? last : 0);
    unsigned value = 0;
    unsigned error = kNone;
    Stopwatch watch;
    for (unsigned turn = 1; turn <= turns && error == kNone; ++turn) {
      if (first) send_async<kWords>(there, value + 1, barrier_there);
      // What comes before this leaves the count below zero, and the phase open.
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(4 * kWords) : "memory");
      if (!poll([&] { return phase_is_over<kClusterScope>(barrier, (turn - 1) & 1); }, 1)) error = kTimedOut;
      value = load_shared(here);
      if (!first) send_async<kWords>(there, value, barrier_there);
    }
    if (error == kNone && value != turns) error = kWrongValue;
    if (first) watch.stop(report, error, value);
  }
  __syncwarp();
  cluster_barrier();  // nobody leaves while something is on its way to it
}

// The same with a plain store, where the number is its own flag. Stores to shared::cluster are compiled to generic
// ones, so the address is made generic before the loop.
__global__ void pass_plain(Report* report, unsigned turns) {
  __shared__ unsigned inbox;
  const unsigned here = shared_address(&inbox);
  const unsigned rank = cluster_rank();
  const unsigned last = cluster_size() - 1;
  if (threadIdx.x == 0) inbox = 0;
  cluster_barrier();
  if (threadIdx.x == 0 && (rank == 0 || rank == last)) {
    const bool first = rank == 0;
    const unsigned long long there = generic_in_block(&inbox, first ? last : 0);
    const auto load = [&] {
      unsigned value;
      asm volatile("ld.relaxed.cluster.shared::cta.u32 %0, [%1];" : "=r"(value) : "r"(here) : "memory");
      return value;
    };
    const auto store = [&](unsigned value) {
      asm volatile("st.relaxed.cluster.u32 [%0], %1;" ::"l"(there), "r"(value) : "memory");
    };
    unsigned error = kNone;
    Stopwatch watch;
    for (unsigned turn = 1; turn <= turns && error == kNone; ++turn) {
      if (first) store(turn);
      if (!poll(load, turn)) error = kTimedOut;
      if (!first) store(turn);
    }
    if (first) watch.stop(report, error, 0);
  }
  __syncwarp();
  cluster_barrier();
}

// Loads that each give the address of the next, from the own shared memory.
__global__ void chase_own(Report* report, unsigned steps) {
  constexpr unsigned kRing = 1024;
  __shared__ unsigned ring[kRing];
  for (unsigned i = threadIdx.x; i < kRing; i += blockDim.x) ring[i] = shared_address(ring + (i + 1) % kRing);
  block_barrier();
  if (threadIdx.x != 0) return;
  unsigned address = shared_address(ring);
  Stopwatch watch;
#pragma unroll 16
  for (unsigned step = 0; step < steps; ++step) {
    asm volatile("ld.shared::cta.u32 %0, [%0];" : "+r"(address)::"memory");
  }
  watch.stop(report, kNone, address);
}

// The same from the shared memory of the cluster's last block. ld.shared::cluster is compiled to a generic load, so the
// ring holds generic addresses, lest their making counts.
__global__ void chase_last(Report* report, unsigned steps) {
  constexpr unsigned kRing = 1024;
  __shared__ unsigned long long ring[kRing];
  const unsigned last = cluster_size() - 1;
  for (unsigned i = threadIdx.x; i < kRing; i += blockDim.x) ring[i] = generic_in_block(ring + (i + 1) % kRing, last);
  cluster_barrier();
  if (threadIdx.x == 0 && cluster_rank() == 0) {
    unsigned long long address = generic_in_block(ring, last);
    Stopwatch watch;
#pragma unroll 16
    for (unsigned step = 0; step < steps; ++step) asm volatile("ld.u64 %0, [%0];" : "+l"(address)::"memory");
    watch.stop(report, kNone, static_cast<unsigned>(address));
  }
  __syncwarp();
  cluster_barrier();
}

// ------------------------------------------------------------------------------------------------ through the L2 cache

__global__ void chase_global(Report* report, unsigned long long address, unsigned steps) {
  const auto walk = [&] {
#pragma unroll 16
    for (unsigned step = 0; step < steps; ++step) {
      asm volatile("ld.global.cg.u64 %0, [%0];" : "+l"(address)::"memory");
    }
  };
  walk();
  Stopwatch watch;
  walk();
  watch.stop(report, kNone, static_cast<unsigned>(address));
}

struct Relaxed {
  static __device__ unsigned load(const unsigned* flag) {
    unsigned value;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
  }
  static __device__ void store(unsigned* flag, unsigned value) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
  }
};

struct Ordered {
  static __device__ unsigned load(const unsigned* flag) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
  }
  static __device__ void store(unsigned* flag, unsigned value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
  }
};

// What one block gets from the other.
struct Mailbox {
  alignas(kLine) unsigned flag;
  alignas(kLine) unsigned short values[256];
};

// Block 0 and block `partner` pass a number to and fro; the number is the flag, or lies beside it in a line of its own.
template <class Order, bool kBeside>
__global__ void pass_global(Report* report, Mailbox* boxes, unsigned partner, unsigned turns) {
  if (threadIdx.x != 0 || (blockIdx.x != 0 && blockIdx.x != partner)) return;
  const bool first = blockIdx.x == 0;
  Mailbox* here = boxes + (first ? 0 : 1);
  Mailbox* there = boxes + (first ? 1 : 0);
  unsigned value = 0;
  const auto send = [&](unsigned turn) {
    if constexpr (kBeside) asm volatile("st.global.u32 [%0], %1;" ::"l"(there->values), "r"(value) : "memory");
    Order::store(&there->flag, turn);
  };
  unsigned error = kNone;
  Stopwatch watch;
  for (unsigned turn = 1; turn <= turns && error == kNone; ++turn) {
    if (first) {
      ++value;
      send(turn);
    }
    if (!poll([&] { return Order::load(&here->flag); }, turn)) error = kTimedOut;
    if constexpr (kBeside) {
      asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(value) : "l"(here->values) : "memory");
    }
    if (!first) send(turn);
  }
  if (kBeside && error == kNone && value != turns) error = kWrongValue;
  if (first) watch.stop(report, error, value);
}

// The same as a persistent kernel does it. One way is: each of 256 threads stores two bytes, the block meets, its first
// thread raises the flag; the other block's first warp sees it, reads 256 of the bytes, and spreads them through shared
// memory, where the block meets a second time.
__global__ void publish(Report* report, Mailbox* boxes, unsigned partner, unsigned turns) {
  if (blockIdx.x != 0 && blockIdx.x != partner) return;
  __shared__ uint2 received[32];
  __shared__ unsigned late;
  const bool first = blockIdx.x == 0;
  Mailbox* here = boxes + (first ? 0 : 1);
  Mailbox* there = boxes + (first ? 1 : 0);
  const unsigned thread = threadIdx.x;
  const unsigned slot = shared_address(received) + 2 * (thread % 128);
  unsigned short value = 0;
  const auto send = [&](unsigned turn) {
    asm volatile("st.global.u16 [%0], %1;" ::"l"(there->values + thread), "h"(value) : "memory");
    block_barrier();
    if (thread == 0) Ordered::store(&there->flag, turn);
  };
  if (thread == 0) late = 0;
  bool wrong = false;
  block_barrier();
  Stopwatch watch;
  for (unsigned turn = 1; turn <= turns; ++turn) {
    if (first) {
      ++value;
      send(turn);
    }
    if (thread < 32) {
      if (!poll([&] { return Ordered::load(&here->flag); }, turn)) late = 1;
      uint2 pair;
      asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];"
                   : "=r"(pair.x), "=r"(pair.y)
                   : "l"(here->values + 4 * thread)
                   : "memory");
      received[thread] = pair;
    }
    block_barrier();
    if (late != 0) break;
    asm volatile("ld.shared::cta.u16 %0, [%1];" : "=h"(value) : "r"(slot) : "memory");
    wrong |= value != static_cast<unsigned short>(turn);
    if (!first) send(turn);
  }
  const unsigned error = late != 0 ? kTimedOut : __syncthreads_or(wrong) ? kWrongValue : kNone;
  if (thread == 0 && first) watch.stop(report, error, value);
}

// ----------------------------------------------------------------------------------------------------------- fences

struct NoFence {
  static __device__ void fence() {}
};

struct AcquireRelease {
  static __device__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
};

struct ThreadFence {
  static __device__ void fence() { __threadfence(); }
};

template <class Fence>
__global__ void store_and_fence(Report* report, unsigned* words, unsigned times) {
  block_barrier();
  Stopwatch watch;
#pragma unroll 8
  for (unsigned i = 0; i < times; ++i) {
    // eight places in turn, or the assembler makes one store of several where no fence stands between
    unsigned* word = words + 256 * (i % 8) + threadIdx.x;
    asm volatile("st.global.u32 [%0], %1;" ::"l"(word), "r"(i) : "memory");
    Fence::fence();
  }
  block_barrier();
  if (threadIdx.x == 0) watch.stop(report, kNone, 0);
}

// ---------------------------------------------------------------------------------------------------- a cell's tail

struct FullPrecision {
  static __device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
  static __device__ float tanh(float x) { return tanhf(x); }
};

struct FastExp {
  static __device__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
  static __device__ float tanh(float x) { return 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * x)); }
};

struct FastTanh {
  static __device__ float sigmoid(float x) { return fmaf(0.5f, tanh(0.5f * x), 0.5f); }
  static __device__ float tanh(float x) {
    float result;
    asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
  }
};

// Steps of an LSTM's cell, each of which needs the state that the one before gave. The lanes of a warp differ, as
// those of a layer do.
template <class Activation>
__global__ void lstm_tail(Report* report, float spread, unsigned steps) {
  const float x = spread * (static_cast<float>(threadIdx.x % 32) - 15.5f);
  float c = 0;
  float h = 0;
  block_barrier();
  Stopwatch watch;
  for (unsigned step = 0; step < steps; ++step) {
    const float input = Activation::sigmoid(fmaf(h, 0.5f, x));
    const float forget = Activation::sigmoid(fmaf(h, -0.75f, x));
    const float candidate = Activation::tanh(fmaf(h, 0.25f, x));
    const float output = Activation::sigmoid(fmaf(h, -0.5f, x));
    c = fmaf(forget, c, input * candidate);
    h = output * Activation::tanh(c);
  }
  const int odd = __syncthreads_or(h == 2.0f);  // waits for everybody's last step
  if (threadIdx.x == 0) watch.stop(report, odd ? kWrongValue : kNone, __float_as_uint(h));
}

// -------------------------------------------------------------------------------------------------- reading operands

constexpr int kReaders = 256;

__global__ void read_shared(Report* report, unsigned passes) {
  extern __shared__ uint4 operands[];
  constexpr int kLoads = (64 << 10) / (kReaders * 16);
  for (int i = 0; i < kLoads; ++i) operands[i * kReaders + threadIdx.x] = make_uint4(i, i + 1, i + 2, threadIdx.x);
  const unsigned address = shared_address(operands + threadIdx.x);
  unsigned sum = 0;
  block_barrier();
  Stopwatch watch;
  for (unsigned pass = 0; pass < passes; ++pass) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      uint4 v;
      // volatile, or the assembler lets one load serve several passes
      asm volatile("ld.volatile.shared::cta.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                   : "r"(address + i * kReaders * 16)
                   : "memory");
      sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
  }
  const int any = __syncthreads_or(sum != 0);
  if (threadIdx.x == 0) watch.stop(report, kNone, sum + any);
}

// 16 KB of zeros, four loads of 16 bytes by each thread, then a barrier.
__global__ void read_global(Report* reports, const uint4* operands, unsigned passes) {
  __shared__ unsigned seen;
  constexpr int kLoads = (16 << 10) / (kReaders * 16);
  if (threadIdx.x == 0) seen = 0;
  block_barrier();
  Stopwatch watch;
  for (unsigned pass = 0; pass < passes; ++pass) {
    uint4 v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(v[i].x), "=r"(v[i].y), "=r"(v[i].z), "=r"(v[i].w)
                   : "l"(operands + i * kReaders + threadIdx.x)
                   : "memory");
    }
    unsigned any = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) any |= v[i].x | v[i].y | v[i].z | v[i].w;
    if (any != 0) seen = any;  // never, but nobody reaches the barrier before its loads are back
    block_barrier();
  }
  if (threadIdx.x == 0) watch.stop(reports + blockIdx.x, seen != 0 ? kWrongValue : kNone, seen);
}

// ------------------------------------------------------------------------------------------------------- the host's

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void check(cudaError_t error) {
  if (error != cudaSuccess) throw Failure(std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error));
}

struct Card {
  int multiprocessors = 0;
  Report* reports = nullptr;
  unsigned char* memory = nullptr;
};

Card open_card() {
  Card card;
  check(cudaSetDevice(0));
  check(cudaDeviceGetAttribute(&card.multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  if (card.multiprocessors > kMostBlocks) throw Failure("more multiprocessors than reports");
  check(cudaMalloc(&card.reports, kMostBlocks * sizeof(Report)));
  check(cudaMalloc(&card.memory, kWorkspace));
  return card;
}

struct Shape {
  int blocks;
  int threads;
  int cluster = 1;
  int shared = 0;
  bool cooperative = false;
};

struct Configuration {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  explicit Configuration(const Shape& shape) {
    config.gridDim = dim3(shape.blocks);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.attrs = attributes;
    if (shape.cluster > 1) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = shape.cluster;
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
    }
    if (shape.cooperative) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
};

template <class... Parameters>
void allow(void (*kernel)(Parameters...), const Shape& shape) {
  if (shape.cluster > 8) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  if (shape.shared > (48 << 10)) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared));
  }
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Shape& shape, Arguments... arguments) {
  allow(kernel, shape);
  const Configuration configuration(shape);
  check(cudaLaunchKernelEx(&configuration.config, kernel, arguments...));
}

struct Summary {
  double median;
  double least;
  double most;
};

Summary summarise(std::vector<double> values) {
  if (values.empty()) throw Failure("no block took the time");
  std::sort(values.begin(), values.end());
  return {values[values.size() / 2], values.front(), values.back()};
}

struct Timing {  // of one operation
  Summary cycles;
  Summary nanoseconds;
};

// Calls `start` with the number of the repetition, and reads what its kernel reports, of `blocks` blocks. The first is
// to warm up.
template <class Start>
Timing time(const Card& card, int blocks, double operations, Start start) {
  std::vector<double> cycles, nanoseconds;
  for (int repetition = 0; repetition <= kRepetitions; ++repetition) {
    check(cudaMemset(card.reports, 0, kMostBlocks * sizeof(Report)));
    start(repetition);
    check(cudaDeviceSynchronize());
    std::vector<Report> reports(blocks);
    check(cudaMemcpy(reports.data(), card.reports, blocks * sizeof(Report), cudaMemcpyDeviceToHost));
    for (const Report& report : reports) {
      if (report.error == kTimedOut) throw Failure("a block waited in vain");
      if (report.error == kWrongValue) throw Failure("a block got a wrong value");
      if (report.cycles == 0 || repetition == 0) continue;
      cycles.push_back(report.cycles / operations);
      nanoseconds.push_back(report.nanoseconds / operations);
    }
  }
  return {summarise(cycles), summarise(nanoseconds)};
}

struct Result {
  double value;
  const char* unit;
  std::string more;  // further fields, each behind a comma
};

std::string field(const char* name, double value) {
  char text[64];
  std::snprintf(text, sizeof text, ", \"%s\": %.6g", name, value);
  return text;
}

Result in_cycles(const Timing& timing) {
  return {
      timing.cycles.median, "cycles",
      field("min", timing.cycles.least) + field("max", timing.cycles.most) + field("ns", timing.nanoseconds.median)};
}

Result in_nanoseconds(const Timing& timing) {
  return {timing.nanoseconds.median, "ns",
          field("min", timing.nanoseconds.least) + field("max", timing.nanoseconds.most) +
              field("cycles", timing.cycles.median)};
}

Result bytes_per_cycle(const Timing& timing, double bytes) {
  return {bytes / timing.cycles.median, "bytes/cycle",
          field("min", bytes / timing.cycles.most) + field("max", bytes / timing.cycles.least)};
}

// --------------------------------------------------------------------------------------------------- measurements

Result describe(const Card& card) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  int kilohertz = 0;
  int l2_bytes = 0;
  check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrClockRate, 0));
  check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, 0));
  return {static_cast<double>(card.multiprocessors), "multiprocessors",
          std::string(", \"device\": \"") + properties.name + "\"" + field("clock_khz", kilohertz) +
              field("l2_bytes", l2_bytes)};
}

// The first of two long kernels takes the card out of its idle clock.
Result clock_rate(const Card& card) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float milliseconds = 0;
  for (int run = 0; run < 2; ++run) {
    check(cudaEventRecord(begin));
    launch(spin, {1, 1}, card.reports, 200'000'000LL);
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    check(cudaEventElapsedTime(&milliseconds, begin, end));
  }
  Report report;
  check(cudaMemcpy(&report, card.reports, sizeof report, cudaMemcpyDeviceToHost));
  return {report.cycles / (milliseconds * 1e6), "GHz",
          field("by_globaltimer", static_cast<double>(report.cycles) / report.nanoseconds)};
}

template <class Product, int kChains>
Result product(const Card& card, int threads) {
  constexpr unsigned kSteps = 8192;
  const double per_partition = threads <= 128 ? 1 : threads / 128;
  return in_cycles(time(card, 1, kSteps * kChains * per_partition,
                        [&](int) { launch(multiply<Product, kChains>, {1, threads}, card.reports, kSteps); }));
}

Result barrier_of_block(const Card& card, int threads) {
  constexpr unsigned kTimes = 16384;
  return in_cycles(time(card, 1, kTimes, [&](int) { launch(meet_in_block, {1, threads}, card.reports, kTimes); }));
}

Result barrier_of_cluster(const Card& card, int cluster, void (*kernel)(Report*, unsigned)) {
  constexpr unsigned kTimes = 4096;
  return in_cycles(
      time(card, cluster, kTimes, [&](int) { launch(kernel, {cluster, 256, cluster}, card.reports, kTimes); }));
}

Result barrier_of_grid(const Card& card, int blocks) {
  constexpr unsigned kTimes = 1000;
  const Shape shape{blocks, 256, 1, 0, true};
  return in_nanoseconds(time(card, blocks, kTimes, [&](int) { launch(meet_in_grid, shape, card.reports, kTimes); }));
}

Result one_way_in_cluster(const Card& card, int cluster, void (*kernel)(Report*, unsigned)) {
  constexpr unsigned kTurns = 2000;
  return in_cycles(
      time(card, 1, 2.0 * kTurns, [&](int) { launch(kernel, {cluster, 32, cluster}, card.reports, kTurns); }));
}

Result shared_latency(const Card& card, int cluster, void (*kernel)(Report*, unsigned)) {
  constexpr unsigned kSteps = 8192;
  return in_cycles(time(card, 1, kSteps, [&](int) { launch(kernel, {cluster, 32, cluster}, card.reports, kSteps); }));
}

Result active_clusters(int cluster, int kilobytes) {
  const Shape shape{cluster, 256, cluster, kilobytes << 10};
  allow(meet_in_cluster<true>, shape);
  const Configuration configuration(shape);
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, meet_in_cluster<true>, &configuration.config));
  return {static_cast<double>(clusters), "clusters", ""};
}

// A ring through all lines of 1 MB, in random order.
Result l2_latency(const Card& card) {
  constexpr int kLines = (1 << 20) / kLine;
  constexpr int kWords = kLine / sizeof(std::uint64_t);
  const std::uint64_t base = reinterpret_cast<std::uintptr_t>(card.memory);
  std::vector<int> order(kLines);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(1));
  std::vector<std::uint64_t> ring(kLines * kWords);
  for (int i = 0; i < kLines; ++i) ring[order[i] * kWords] = base + kLine * order[(i + 1) % kLines];
  check(cudaMemcpy(card.memory, ring.data(), 1 << 20, cudaMemcpyHostToDevice));
  return in_cycles(time(card, 1, kLines, [&](int) {
    launch(chase_global, {1, 1}, card.reports, static_cast<unsigned long long>(base), static_cast<unsigned>(kLines));
  }));
}

// Other lines in each repetition, because which part of the L2 cache a line lies in matters.
Result one_way_in_grid(const Card& card, bool to_last, void (*kernel)(Report*, Mailbox*, unsigned, unsigned)) {
  constexpr unsigned kTurns = 1000;
  const unsigned partner = to_last ? card.multiprocessors - 1 : 1;
  const Shape shape{card.multiprocessors, 256, 1, 0, true};
  return in_cycles(time(card, 1, 2.0 * kTurns, [&](int repetition) {
    Mailbox* boxes = reinterpret_cast<Mailbox*>(card.memory) + 37 * repetition;
    check(cudaMemset(boxes, 0, 2 * sizeof(Mailbox)));
    launch(kernel, shape, card.reports, boxes, partner, kTurns);
  }));
}

Result fence(const Card& card, int threads, void (*kernel)(Report*, unsigned*, unsigned)) {
  constexpr unsigned kTimes = 4096;
  return in_cycles(time(card, 1, kTimes, [&](int) {
    launch(kernel, {1, threads}, card.reports, reinterpret_cast<unsigned*>(card.memory), kTimes);
  }));
}

Result tail(const Card& card, void (*kernel)(Report*, float, unsigned)) {
  constexpr unsigned kSteps = 4096;
  return in_cycles(time(card, 1, kSteps, [&](int) { launch(kernel, {1, 128}, card.reports, 0.125f, kSteps); }));
}

Result shared_bandwidth(const Card& card) {
  constexpr unsigned kPasses = 1024;
  constexpr int kBytes = 64 << 10;
  return bytes_per_cycle(
      time(card, 1, kPasses, [&](int) { launch(read_shared, {1, kReaders, 1, kBytes}, card.reports, kPasses); }),
      kBytes);
}

Result l2_read(const Card& card, int blocks) {
  constexpr unsigned kPasses = 1024;
  check(cudaMemset(card.memory, 0, 16 << 10));
  return in_cycles(time(card, blocks, kPasses, [&](int) {
    launch(read_global, {blocks, kReaders}, card.reports, reinterpret_cast<const uint4*>(card.memory), kPasses);
  }));
}

struct Measurement {
  std::string name;
  std::function<Result(const Card&)> measure;
};

template <class Product>
void add_products(std::vector<Measurement>& list, const std::string& name) {
  list.push_back({name + "_latency", [](const Card& card) { return product<Product, 1>(card, 32); }});
  list.push_back({name + "_8_warps_1_chain", [](const Card& card) { return product<Product, 1>(card, 256); }});
  list.push_back({name + "_8_warps_2_chains", [](const Card& card) { return product<Product, 2>(card, 256); }});
  list.push_back({name + "_8_warps_4_chains", [](const Card& card) { return product<Product, 4>(card, 256); }});
}

std::vector<Measurement> measurements() {
  std::vector<Measurement> list;
  list.push_back({"device", describe});
  list.push_back({"sm_clock", clock_rate});
  add_products<Bf16>(list, "mma_m16n8k16_bf16");
  add_products<Tf32>(list, "mma_m16n8k8_tf32");
  for (const int threads : {128, 256}) {
    list.push_back({"bar_sync_" + std::to_string(threads) + "_threads",
                    [=](const Card& card) { return barrier_of_block(card, threads); }});
  }
  for (const int cluster : {2, 4, 8, 16}) {
    const std::string suffix = "_" + std::to_string(cluster) + "_blocks";
    list.push_back({"cluster_barrier" + suffix,
                    [=](const Card& card) { return barrier_of_cluster(card, cluster, meet_in_cluster<true>); }});
    list.push_back({"cluster_barrier_relaxed" + suffix,
                    [=](const Card& card) { return barrier_of_cluster(card, cluster, meet_in_cluster<false>); }});
  }
  list.push_back({"shared_load_latency_own", [](const Card& card) { return shared_latency(card, 1, chase_own); }});
  for (const int cluster : {2, 8, 16}) {
    const std::string suffix = "_cluster_" + std::to_string(cluster);
    list.push_back({"st_async_b32_one_way" + suffix,
                    [=](const Card& card) { return one_way_in_cluster(card, cluster, pass_async<1, false>); }});
    list.push_back({"st_async_b32_acquire_cluster_one_way" + suffix,
                    [=](const Card& card) { return one_way_in_cluster(card, cluster, pass_async<1, true>); }});
    list.push_back({"st_async_v4_b32_one_way" + suffix,
                    [=](const Card& card) { return one_way_in_cluster(card, cluster, pass_async<4, false>); }});
    list.push_back({"st_shared_cluster_polled_one_way" + suffix,
                    [=](const Card& card) { return one_way_in_cluster(card, cluster, pass_plain); }});
    list.push_back({"shared_load_latency_last" + suffix,
                    [=](const Card& card) { return shared_latency(card, cluster, chase_last); }});
  }
  for (const int cluster : {8, 16}) {
    for (const int kilobytes : {64, 128, 200}) {
      list.push_back(
          {"active_clusters_of_" + std::to_string(cluster) + "_with_" + std::to_string(kilobytes) + "_kb_shared",
           [=](const Card&) { return active_clusters(cluster, kilobytes); }});
    }
  }
  list.push_back({"l2_load_latency", l2_latency});
  for (const bool last : {false, true}) {
    const std::string suffix = last ? "_one_way_to_last_block" : "_one_way_to_block_1";
    list.push_back({"global_relaxed" + suffix,
                    [=](const Card& card) { return one_way_in_grid(card, last, pass_global<Relaxed, false>); }});
    list.push_back({"global_release_acquire" + suffix,
                    [=](const Card& card) { return one_way_in_grid(card, last, pass_global<Ordered, false>); }});
    list.push_back({"global_release_acquire_with_a_word" + suffix,
                    [=](const Card& card) { return one_way_in_grid(card, last, pass_global<Ordered, true>); }});
    list.push_back({"global_publish" + suffix, [=](const Card& card) { return one_way_in_grid(card, last, publish); }});
  }
  for (const int threads : {1, 256}) {
    const std::string suffix = threads == 1 ? "_1_thread" : "_" + std::to_string(threads) + "_threads";
    list.push_back(
        {"store" + suffix, [=](const Card& card) { return fence(card, threads, store_and_fence<NoFence>); }});
    list.push_back({"store_and_fence_acq_rel" + suffix,
                    [=](const Card& card) { return fence(card, threads, store_and_fence<AcquireRelease>); }});
    list.push_back({"store_and_threadfence" + suffix,
                    [=](const Card& card) { return fence(card, threads, store_and_fence<ThreadFence>); }});
  }
  for (const int blocks : {32, 64, 132}) {
    list.push_back({"grid_sync_" + std::to_string(blocks) + "_blocks",
                    [=](const Card& card) { return barrier_of_grid(card, blocks); }});
  }
  list.push_back({"lstm_tail_expf_division", [](const Card& card) { return tail(card, lstm_tail<FullPrecision>); }});
  list.push_back({"lstm_tail_fast_exp_fdividef", [](const Card& card) { return tail(card, lstm_tail<FastExp>); }});
  list.push_back({"lstm_tail_tanh_approx", [](const Card& card) { return tail(card, lstm_tail<FastTanh>); }});
  list.push_back({"ld_shared_v4_bandwidth", shared_bandwidth});
  list.push_back({"l2_read_16_kb_1_block", [](const Card& card) { return l2_read(card, 1); }});
  list.push_back({"l2_read_16_kb_all_blocks", [](const Card& card) { return l2_read(card, card.multiprocessors); }});
  list.push_back({"sm_clock_at_the_end", clock_rate});
  return list;
}

// ------------------------------------------------------------------------------------------------------- processes

void print_error(const std::string& name, const std::string& what) {
  std::printf("{\"name\": \"%s\", \"error\": \"%s\"}\n", name.c_str(), what.c_str());
  std::fflush(stdout);
}

// Returns whether all went well; keeps in `reached` how far it got, for the parent of this process.
bool measure_from(int first, const std::vector<Measurement>& list, volatile int* reached) {
  bool fine = true;
  try {
    alarm(kSecondsToOpen);
    const Card card = open_card();
    for (int i = first; i < static_cast<int>(list.size()); ++i) {
      *reached = i;
      alarm(kSecondsToMeasure);
      try {
        const Result result = list[i].measure(card);
        std::printf("{\"name\": \"%s\", \"value\": %.6g, \"unit\": \"%s\"%s}\n", list[i].name.c_str(), result.value,
                    result.unit, result.more.c_str());
        std::fflush(stdout);
      } catch (const std::exception& failure) {
        fine = false;
        print_error(list[i].name, failure.what());
        cudaGetLastError();  // forgets what can be forgotten
        if (cudaDeviceSynchronize() != cudaSuccess) return false;
      }
    }
    *reached = static_cast<int>(list.size());
  } catch (const std::exception& failure) {
    print_error("open", failure.what());
    return false;
  }
  return fine;
}

}  // namespace

int main() {
  const std::vector<Measurement> list = measurements();
  const auto begin = std::chrono::steady_clock::now();
  void* page = mmap(nullptr, sizeof(int), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) {
    print_error("mmap", "no shared page");
    return 1;
  }
  volatile int* reached = static_cast<int*>(page);
  bool fine = true;
  for (int first = 0; first < static_cast<int>(list.size()); first = *reached + 1) {
    if (std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() > kSecondsInAll) {
      print_error("all", "out of time before " + list[first].name);
      return 1;
    }
    *reached = first - 1;
    const pid_t child = fork();
    if (child < 0) {
      print_error("fork", "no process");
      return 1;
    }
    if (child == 0) _exit(measure_from(first, list, reached) ? 0 : 1);
    int status = 0;
    if (waitpid(child, &status, 0) != child) {
      print_error("waitpid", "no status");
      return 1;
    }
    if (*reached < first) {
      print_error("open", "no card");
      return 1;
    }
    if (WIFSIGNALED(status) && *reached < static_cast<int>(list.size()))
      print_error(list[*reached].name, "ended by signal " + std::to_string(WTERMSIG(status)));
    if (status != 0) fine = false;
  }
  return fine ? 0 : 1;
}
