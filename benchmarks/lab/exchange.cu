// How long a step of a recurrence takes that is spread over several multiprocessors, by how they exchange the state.
//
// The skeleton of the persistent form's forward pass, an LSTM of 8 sequences: a block owns 16 or 32 units, its weights
// are in registers, a product by tensor cores whose depth is shared among 8 warps, a tail, an exchange. No input, no
// output, nothing saved. All ways of exchanging compute the same bits, which is checked.
//
//   flags    one flag a block, set with release behind a barrier of the block; read with acquire, then the data
//   warps    one flag for each warp that writes: no barrier in front of it
//   tagged   8 bytes of which 4 are the number of the step: the data is its own flag
//   marked   the data is its own flag where it is no longer the mark that its writer had left there; four buffers
//   unfenced the same without the fence that the memory model wants behind a mark, to know what that costs
//   cluster  pushed into every block's shared memory, an mbarrier for each warp that reads
//
// nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a exchange.cu -o exchange && ./exchange
//
// Answer, on an NVIDIA H200 (benchmarks/results/h200-lab.json), ns a step at H = 256, 512, 1024 in blocks of 16 units:
//   flags 1885, 2306, 3217   warps 1718, 1867, 1931   tagged 1045, 1260, 2077   marked 1148, 1378, 2004
//   cluster 844 at 256; at 512, in blocks of 32 units, 1293
// So what costs is flags with fences; the data as its own flag through L2 comes near what a cluster gives.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace {

constexpr int kRows = 8, kWarps = 8, kThreads = 256, kGates = 4;
constexpr int kSpins = 1 << 20;  // then something is wrong
constexpr uint32_t kMark = 0xffffffffu;

struct Run {
  int steps, blocks, depth;  // blocks of a group
  unsigned char* exchange;   // of all groups, zero at the beginning, but for `marked`
  int64_t exchange_bytes;    // of a group
  int* flags;                // [groups, blocks, 4]
  int* error;
  float* out;  // [groups, kRows, depth]
};

__device__ uint32_t hash(uint32_t x) {
  x = (x ^ 61) ^ (x >> 16);
  x *= 9;
  x ^= x >> 4;
  x *= 0x27d4eb2d;
  return x ^ (x >> 15);
}
// Small, of both signs.
__device__ float number(uint32_t x) { return (static_cast<int>(hash(x) & 0xffff) - 0x8000) * (1.0f / 0x80000); }
__device__ uint32_t bf16_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

struct Guard {
  int* error;
  int left = kSpins;
  __device__ bool go_on() {
    if (--left > 0) return true;
    if (left == 0) atomicExch(error, 1);
    return false;
  }
};

// Each has:
//   begin / end                             by all threads
//   load<F>(step, warp, lane, from)         the F fragments of a warp of the state before `step`
//   store(step, thread, row, unit, h)       the state after it, by the threads of the tail
//   publish(step)                           by all threads
// Writers: of a block, each with a flag of its own; one, or every warp of the tail.
template <int M, int Writers>
struct FlagsOf {
  static constexpr bool cluster = false;
  static constexpr int element_bytes = 2, buffers = 2;
  const Run& run;
  Guard guard;
  int block;
  int* flags;
  uint16_t* data;
  __device__ FlagsOf(const Run& r, int group, int b) : run(r), guard{r.error}, block(b) {
    flags = r.flags + group * r.blocks * 4 * M;
    data = reinterpret_cast<uint16_t*>(r.exchange + group * r.exchange_bytes);
  }
  __device__ void begin() {}
  __device__ void end() {}
  __device__ uint16_t* at(int step, int row) { return data + ((step % 2) * kRows + row) * run.depth; }
  template <int F>
  __device__ void load(int step, int warp, int lane, uint4 (&from)[F]) {
    const int first = warp * F * 32 / (16 * M) * Writers, last = (((warp + 1) * F * 32 - 1) / (16 * M) + 1) * Writers;
    if (step > 0) {
      for (int i = first + lane; i < last; i += 32) {
        int seen;
        do {
          asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flags + i) : "memory");
        } while (seen < step && guard.go_on());
      }
    }
    __syncwarp();
#pragma unroll
    for (int f = 0; f < F; ++f) {
      const uint16_t* p = at(step, lane / 4) + (warp * F + f) * 32 + lane % 4 * 8;
      asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(from[f].x), "=r"(from[f].y), "=r"(from[f].z), "=r"(from[f].w)
                   : "l"(p));
    }
  }
  __device__ void store(int step, int, int row, int unit, uint32_t h) {
    at(step + 1, row)[unit] = static_cast<uint16_t>(h);
  }
  __device__ void publish(int step) {
    const int warp = threadIdx.x / 32;
    if (Writers == 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    if (threadIdx.x % 32 == 0 && warp < Writers) {
      asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flags + block * Writers + warp), "r"(step + 1)
                   : "memory");
    }
  }
};
template <int M>
using Flags = FlagsOf<M, 1>;
template <int M>
using Warps = FlagsOf<M, 4 * M>;

template <int M>
struct Tagged {
  static constexpr bool cluster = false;
  static constexpr int element_bytes = 4, buffers = 2;
  const Run& run;
  Guard guard;
  uint2* data;
  __device__ Tagged(const Run& r, int group, int) : run(r), guard{r.error} {
    data = reinterpret_cast<uint2*>(r.exchange + group * r.exchange_bytes);
  }
  __device__ void begin() {}
  __device__ void end() {}
  __device__ uint2* at(int step, int row) { return data + ((step % 2) * kRows + row) * (run.depth / 2); }
  template <int F>
  __device__ void load(int step, int warp, int lane, uint4 (&from)[F]) {
    const uint32_t tag = static_cast<uint32_t>(step);
    uint4 a[F], b[F];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int f = 0; f < F; ++f) {
        const uint2* p = at(step, lane / 4) + (warp * F + f) * 16 + lane % 4 * 4;
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a[f].x), "=r"(a[f].y), "=r"(a[f].z), "=r"(a[f].w)
                     : "l"(p)
                     : "memory");
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[f].x), "=r"(b[f].y), "=r"(b[f].z), "=r"(b[f].w)
                     : "l"(p + 2)
                     : "memory");
      }
#pragma unroll
      for (int f = 0; f < F; ++f) {
        all = all && a[f].y == tag && a[f].w == tag && b[f].y == tag && b[f].w == tag;
      }
    } while (!__all_sync(0xffffffffu, all) && guard.go_on());
#pragma unroll
    for (int f = 0; f < F; ++f) from[f] = {a[f].x, a[f].z, b[f].x, b[f].z};
  }
  __device__ void store(int step, int, int row, int unit, uint32_t h) {
    const uint32_t next = __shfl_down_sync(0xffffffffu, h, 1);
    if (unit % 2 == 0) {
      asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(at(step + 1, row) + unit / 2),
                   "r"(h | next << 16), "r"(step + 1)
                   : "memory");
    }
  }
  __device__ void publish(int) {}
};

template <int M, bool Fenced>
struct MarkedBy {
  static constexpr bool cluster = false;
  static constexpr int element_bytes = 2, buffers = 4;
  const Run& run;
  Guard guard;
  uint32_t* data;
  __device__ MarkedBy(const Run& r, int group, int) : run(r), guard{r.error} {
    data = reinterpret_cast<uint32_t*>(r.exchange + group * r.exchange_bytes);
  }
  __device__ void begin() {}
  __device__ void end() {}
  __device__ uint32_t* at(int step, int row) { return data + ((step % 4) * kRows + row) * (run.depth / 2); }
  template <int F>
  __device__ void load(int step, int warp, int lane, uint4 (&from)[F]) {
    bool all;
    do {
      all = true;
#pragma unroll
      for (int f = 0; f < F; ++f) {
        const uint32_t* p = at(step, lane / 4) + (warp * F + f) * 16 + lane % 4 * 4;
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(from[f].x), "=r"(from[f].y), "=r"(from[f].z), "=r"(from[f].w)
                     : "l"(p)
                     : "memory");
      }
#pragma unroll
      for (int f = 0; f < F; ++f) {
        all = all && from[f].x != kMark && from[f].y != kMark && from[f].z != kMark && from[f].w != kMark;
      }
    } while (!__all_sync(0xffffffffu, all) && guard.go_on());
  }
  __device__ void store(int step, int, int row, int unit, uint32_t h) {
    const uint32_t next = __shfl_down_sync(0xffffffffu, h, 1);
    if (unit % 2 == 0) {
      asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at(step + 1, row) + unit / 2), "r"(h | next << 16)
                   : "memory");
      // What was read at the step before this one by everybody who has written the state of this one.
      asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at(step + 3, row) + unit / 2), "r"(kMark) : "memory");
    }
    // Whoever reads the next state sees that mark.
    if (Fenced) asm volatile("fence.acq_rel.gpu;" ::: "memory");
  }
  __device__ void publish(int) {}
};

template <int M>
using Marked = MarkedBy<M, true>;
template <int M>
using Unfenced = MarkedBy<M, false>;

template <int M>
struct Cluster {
  static constexpr bool cluster = true;
  static constexpr int element_bytes = 0, buffers = 0;
  static constexpr int kMostDepth = 16 * 16 * M;
  static constexpr int kStride = kMostDepth + 8;  // elements: against bank conflicts
  struct Memory {
    alignas(16) uint16_t state[2][kRows][kStride];
    alignas(16) uint16_t own[kRows][16 * M];
    alignas(8) uint64_t arrived[2][kWarps];
  };
  const Run& run;
  Guard guard;
  int block;
  Memory* memory;
  __device__ Cluster(const Run& r, int, int b) : run(r), guard{r.error}, block(b) {
    __shared__ Memory own;
    memory = &own;
  }
  __device__ static void meet() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  __device__ void begin() {
    for (int i = threadIdx.x; i < 2 * kRows * kStride; i += kThreads) (&memory->state[0][0][0])[i] = 0;
    if (threadIdx.x < 2 * kWarps) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&memory->arrived[0][0] + threadIdx.x))
                   : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    meet();
  }
  __device__ void end() { meet(); }
  template <int F>
  __device__ void load(int step, int warp, int lane, uint4 (&from)[F]) {
    if (step > 0) {
      const uint32_t barrier = shared_address(&memory->arrived[step % 2][warp]);
      if (lane == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(F * 32 * kRows * 2)
                     : "memory");
      }
      // The phases of a buffer's barrier: steps 2, 4, … and 1, 3, …
      const uint32_t parity = static_cast<uint32_t>((step - 1) / 2 % 2);
      uint32_t done;
      do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, "
            "0, p;\n}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
      } while (!done && guard.go_on());
      __syncwarp();
    }
#pragma unroll
    for (int f = 0; f < F; ++f) {
      from[f] = *reinterpret_cast<const uint4*>(&memory->state[step % 2][lane / 4][(warp * F + f) * 32 + lane % 4 * 8]);
    }
  }
  __device__ void store(int step, int thread, int row, int unit, uint32_t h) {
    constexpr int units = 16 * M;
    memory->own[row][unit % units] = static_cast<uint16_t>(h);
    __syncwarp();
    // 64 bytes of a warp, in 4 pieces, to all; 8 of them at once.
    const int lane = thread % 32, piece = thread / 32 * 4 + lane % 4, piece_row = piece / (2 * M),
              column = piece % (2 * M) * 8;
    const uint4 value = *reinterpret_cast<const uint4*>(&memory->own[piece_row][column]);
    const int place = block * units + column;
    const uint32_t to = shared_address(&memory->state[(step + 1) % 2][piece_row][place]);
    const int reader = place / 32 / (run.depth / 32 / kWarps);
    const uint32_t barrier = shared_address(&memory->arrived[(step + 1) % 2][reader]);
    for (int peer = lane / 4; peer < run.blocks; peer += 8) {
      uint32_t remote, remote_barrier;
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(to), "r"(peer));
      asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(barrier), "r"(peer));
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
              remote),
          "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(remote_barrier)
          : "memory");
    }
    __syncwarp();
  }
  __device__ void publish(int) {}
};

template <bool Fast>
__device__ float sigmoid(float x) {
  if (Fast) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}
template <bool Fast>
__device__ float hyperbolic(float x) {
  if (Fast) return 2.0f * sigmoid<true>(2.0f * x) - 1.0f;
  return tanhf(x);
}

// F: fragments of 32 of the depth that a warp has. The group of a block is blockIdx.y.
template <template <int> class Way, int M, int F, bool Fast>
__global__ void __launch_bounds__(kThreads, 1) skeleton(const __grid_constant__ Run run) {
  constexpr int tiles = kGates * M, units = 16 * M, stride = tiles * 16 + 4;
  extern __shared__ float memory[];
  const int block = blockIdx.x, group = blockIdx.y, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  Way<M> way(run, group, block);
  uint32_t weights[F][tiles][8];
#pragma unroll
  for (int f = 0; f < F; ++f) {
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const uint32_t seed = (((block * tiles + t) * 64 + warp * F + f) * 32 + lane) * 16 + k * 2;
        weights[f][t][k] = bf16_of(number(seed)) | bf16_of(number(seed + 1)) << 16;
      }
    }
  }
  const bool tail = thread < 128 * M;
  const int row = thread / units, own_unit = thread % units, unit = block * units + own_unit;
  float c = tail ? number(row * 4096 + unit) * 8 : 0.0f, h = 0.0f;
  way.begin();
  for (int step = 0; step < run.steps; ++step) {
    uint4 from[F];
    way.template load<F>(step, warp, lane, from);
    // By turns: whoever writes those of a step has met all that have read those of the step before the last one.
    float* const sums = memory + step % 2 * kWarps * kRows * stride;
    float sum[tiles][4] = {};
#pragma unroll
    for (int f = 0; f < F; ++f) {
#pragma unroll
      for (int t = 0; t < tiles; ++t) {
        const uint32_t (&w)[8] = weights[f][t];
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
            "%1, %2, %3};"
            : "+f"(sum[t][0]), "+f"(sum[t][1]), "+f"(sum[t][2]), "+f"(sum[t][3])
            : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(from[f].x), "r"(from[f].y));
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
            "%1, %2, %3};"
            : "+f"(sum[t][0]), "+f"(sum[t][1]), "+f"(sum[t][2]), "+f"(sum[t][3])
            : "r"(w[4]), "r"(w[5]), "r"(w[6]), "r"(w[7]), "r"(from[f].z), "r"(from[f].w));
      }
    }
#pragma unroll
    for (int t = 0; t < tiles; ++t) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sums[(warp * kRows + lane % 4 * 2 + k % 2) * stride + t * 16 + lane / 4 + k / 2 * 8] = sum[t][k];
      }
    }
    __syncthreads();
    if (tail) {
      float gate[kGates];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        gate[g] = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) gate[g] += sums[(w * kRows + row) * stride + g * units + own_unit];
      }
      c = sigmoid<Fast>(gate[1] + 0.5f) * c + sigmoid<Fast>(gate[0]) * hyperbolic<Fast>(gate[2] + 0.1f);
      const uint32_t bits = bf16_of(sigmoid<Fast>(gate[3]) * hyperbolic<Fast>(c));
      h = __uint_as_float(bits << 16);
      way.store(step, thread, row, unit, bits);
    }
    way.publish(step);
  }
  way.end();
  if (tail) run.out[(group * kRows + row) * run.depth + unit] = h;
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("{\"error\": \"%s: %s\"}\n", what, cudaGetErrorString(error));
  std::fflush(stdout);
}

constexpr int kSteps = 2000, kSamples = 5;

// Nanoseconds a step.
template <template <int> class Way, int M, int F, bool Fast>
double time_of(const char* name, int groups, std::vector<float>& result) {
  const int blocks = F * 16 / M, depth = F * 256;
  const auto kernel = skeleton<Way, M, F, Fast>;
  const int shared = 2 * kWarps * kRows * (kGates * M * 16 + 4) * 4;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), "shared memory");
  if (Way<M>::cluster) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
  }
  Run run{};
  run.steps = kSteps;
  run.blocks = blocks;
  run.depth = depth;
  run.exchange_bytes = std::max(int64_t{Way<M>::buffers} * kRows * depth * Way<M>::element_bytes, int64_t{256});
  const size_t flags = size_t{4} * 4 * M * blocks * groups, out = sizeof(float) * groups * kRows * depth;
  check(cudaMalloc(&run.exchange, run.exchange_bytes * groups), "memory");
  check(cudaMalloc(&run.flags, flags), "memory");
  check(cudaMalloc(&run.error, 4), "memory");
  check(cudaMalloc(&run.out, out), "memory");
  check(cudaMemset(run.error, 0, 4), "memory");
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int sample = 0; sample < kSamples; ++sample) {
    check(cudaMemset(run.flags, 0, flags), "memory");
    if (Way<M>::buffers == 4) {
      check(cudaMemset(run.exchange, 0xff, run.exchange_bytes * groups), "memory");
      for (int g = 0; g < groups; ++g) {
        check(cudaMemset(run.exchange + g * run.exchange_bytes, 0, run.exchange_bytes / 4), "memory");
      }
    } else {
      check(cudaMemset(run.exchange, 0, run.exchange_bytes * groups), "memory");
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks, groups);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    cudaLaunchAttribute attribute{};
    if (Way<M>::cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = blocks;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    }
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaEventRecord(begin), "event");
    check(cudaLaunchKernelEx(&config, kernel, run), name);
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), "kernel");
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    times.push_back(milliseconds * 1e6f / kSteps);
  }
  int error = 0;
  check(cudaMemcpy(&error, run.error, 4, cudaMemcpyDeviceToHost), "copy");
  result.resize(out / sizeof(float));
  check(cudaMemcpy(result.data(), run.out, out, cudaMemcpyDeviceToHost), "copy");
  check(cudaFree(run.exchange), "free");
  check(cudaFree(run.flags), "free");
  check(cudaFree(run.error), "free");
  check(cudaFree(run.out), "free");
  std::sort(times.begin(), times.end());
  return error ? -1.0 : times[kSamples / 2];
}

template <template <int> class Way, int M, int F, bool Fast>
void measure(const char* name, int groups, std::vector<float>& expected) {
  std::vector<float> found;
  const double ns = time_of<Way, M, F, Fast>(name, groups, found);
  if (expected.empty()) expected = found;
  float largest = 0;
  for (float value : found) largest = std::max(largest, std::abs(value));
  const bool same = !found.empty() && found.size() == expected.size() && largest > 0.01f &&
                    std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)) == 0;
  std::printf(
      "{\"way\": \"%s\", \"H\": %d, \"units\": %d, \"blocks\": %d, \"groups\": %d, \"fast\": %d, "
      "\"ns_per_step\": %.1f, \"same_bits\": %s}\n",
      name, F * 256, 16 * M, F * 16 / M, groups, Fast, ns, same ? "true" : "false");
  std::fflush(stdout);
}

template <int M, int F, bool Fast>
void ways(int groups) {
  std::vector<float> expected;
  measure<Flags, M, F, Fast>("flags", groups, expected);
  measure<Warps, M, F, Fast>("warps", groups, expected);
  measure<Tagged, M, F, Fast>("tagged", groups, expected);
  measure<Marked, M, F, Fast>("marked", groups, expected);
  measure<Unfenced, M, F, Fast>("unfenced", groups, expected);
  if constexpr (F * 16 / M <= 16) measure<Cluster, M, F, Fast>("cluster", groups, expected);
}

}  // namespace

int main() {
  // H = 256 in 16 blocks and in 8, 512 in 32 and in 16, 768 in 48, 1024 in 64.
  ways<1, 1, true>(1);
  ways<1, 1, false>(1);
  ways<1, 1, true>(6);
  ways<2, 1, true>(1);
  ways<1, 2, true>(1);
  ways<1, 2, true>(4);
  ways<2, 2, true>(1);
  ways<2, 2, true>(6);
  ways<1, 3, true>(1);
  ways<1, 4, true>(1);
  ways<1, 4, true>(2);
  return 0;
}
