// The machine of pass.h on a CUDA device: kernels launched on one stream, products by cuBLAS, and the persistent form
// as a cooperative launch.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <optional>

#include "blas.h"
#include "pass.h"
#include "runtime.h"

namespace pyrnnfast {
namespace {

template <class Element>
__global__ void __launch_bounds__(256, 1) each_element(const Element element, int64_t rows, int64_t columns) {
  const int64_t column = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (column >= columns) return;
  const int64_t stride = int64_t{gridDim.y} * blockDim.y;
  for (int64_t row = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; row < rows; row += stride) element(row, column);
}

// Numbers that travel as arguments of a launch, as a CUDA graph must not come back for them.
struct Numbers {
  static constexpr int kCount = 448;  // arguments have 4 KB
  int64_t value[kCount];
};
__global__ void write_numbers(const Numbers numbers, int64_t* to, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) to[i] = numbers.value[i];
}

// A block of the persistent form.
struct DeviceBlock {
  template <class T>
  struct Each {
    T value;
    __device__ T& operator[](int) { return value; }
  };
  template <class T>
  using EachLane = Each<T>;
  template <class T>
  using EachWarp = Each<T>;
  template <class T>
  using EachThread = Each<T>;

  template <class Body>
  __device__ void each_lane(const Body& body) {
    body(static_cast<int>(threadIdx.x % kLanes));
  }
  template <class Body>
  __device__ void each_warp(const Body& body) {
    body(static_cast<int>(threadIdx.x / kLanes));
  }
  template <class Body>
  __device__ void each_thread(const Body& body) {
    body(static_cast<int>(threadIdx.x));
  }

  template <class T>
  __device__ T* shared() {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<T*>(memory);
  }

  __device__ void meet() { __syncthreads(); }

  // Words of other blocks, as they are at this moment. Not branched around, so that several are under way at once.
  __device__ void load(Words& to, const uint32_t* from) {
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
                 : "l"(from)
                 : "memory");
  }
  // And for them, where that is wanted.
  __device__ void store(const Words& words, uint32_t* to, bool wanted) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.s32 p, %5, 0;\n"
        "@p st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};\n"
        "}" ::"l"(to),
        "r"(words.word[0]), "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3]), "r"(static_cast<int>(wanted))
        : "memory");
  }

  __device__ bool all(Each<bool>& each) { return __all_sync(0xffffffffu, each.value); }

  // sum [16, 8] += weights [16, depth] · from [depth, 8], in two products of half the depth.
  template <class E>
  __device__ void multiply(Each<WeightWords>& weights, Each<Words>& from, Each<Sums4>& sum) {
    const Words &low = weights.value.low, &high = weights.value.high, &b = from.value;
    float (&s)[4] = sum.value.value;
    product(E{}, low.word[0], high.word[0], low.word[1], high.word[1], b.word[0], b.word[1], s);
    product(E{}, low.word[2], high.word[2], low.word[3], high.word[3], b.word[2], b.word[3], s);
  }
  // In one, words of the weights by turns of rows lane / 4 and lane / 4 + 8.
  template <class E>
  __device__ void multiply(Each<Words>& weights, Each<WordPair>& from, Each<Sums4>& sum) {
    const Words& a = weights.value;
    product(E{}, a.word[0], a.word[1], a.word[2], a.word[3], from.value.word[0], from.value.word[1], sum.value.value);
  }

 private:
  __device__ static void product(Bfloat16, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                                 float (&s)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, "
        "%3};"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  __device__ static void product(Float16, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                                 float (&s)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
  __device__ static void product(float, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                                 float (&s)[4]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
};

template <class Run>
struct Runs {
  Run run[2];
};

// Grid: blocks of units, groups of sequences, directions.
template <class Tail, int RowTiles>
__global__ void __launch_bounds__(kThreads, 1) sweep_kernel(const __grid_constant__ Runs<typename Tail::Run> runs) {
  DeviceBlock block;
  // Not by index: what then is a constant of the launch would have to be loaded, which the steps of a recurrence feel.
  if (blockIdx.z == 0) {
    sweep<Tail, RowTiles>(runs.run[0], block, blockIdx.x, blockIdx.y);
  } else {
    sweep<Tail, RowTiles>(runs.run[1], block, blockIdx.x, blockIdx.y);
  }
}

class DeviceMachine {
 public:
  // `other`: the stream of the other direction. `workspace`: for cuBLAS; null where the stream is torch's current one
  // all along.
  DeviceMachine(cudaStream_t stream, cudaStream_t other, Blas& blas, void* workspace, int64_t workspace_bytes)
      : stream_(stream), other_(other), blas_(blas), workspace_(workspace), workspace_bytes_(workspace_bytes) {}

  template <class Element>
  void each(int64_t rows, int64_t columns, const Element& element) {
    const dim3 threads(64, 4);
    const dim3 blocks(static_cast<unsigned>((columns + 63) / 64),
                      static_cast<unsigned>(std::min<int64_t>((rows + 3) / 4, 65535)));
    each_element<<<blocks, threads, 0, stream_>>>(element, rows, columns);
    check_cuda(cudaGetLastError(), "a launch");
  }

  template <class E, class Out>
  void gemm(const Multiplication& m) {
    if (workspace_ != nullptr) blas_.use(stream_, workspace_, workspace_bytes_);
    if (poisons_products() && !m.add) {
      check_cuda(cudaMemset2DAsync(m.out, m.out_stride * sizeof(Out), 0xff, m.columns * sizeof(Out), m.rows, stream_),
                 "cudaMemset2DAsync");
    }
    blas_.multiply({DtypeOf<E>::value, DtypeOf<Out>::value, m.tf32, m.a_transposed, m.b_transposed, m.rows, m.columns,
                    m.depth, m.a, m.a_stride, m.b, m.b_stride, m.out, m.out_stride, m.add});
  }

  void zero(void* address, int64_t bytes) {
    check_cuda(cudaMemsetAsync(address, 0, static_cast<size_t>(bytes), stream_), "cudaMemsetAsync");
  }

  void put(int64_t* address, const int64_t* values, int64_t count) {
    for (int64_t begin = 0; begin < count; begin += Numbers::kCount) {
      Numbers numbers;
      const int part = static_cast<int>(std::min<int64_t>(Numbers::kCount, count - begin));
      std::copy(values + begin, values + begin + part, numbers.value);
      write_numbers<<<(part + 127) / 128, 128, 0, stream_>>>(numbers, address + begin, part);
      check_cuda(cudaGetLastError(), "a launch");
    }
  }

  void wait_for_other() {
    if (other_ == stream_) return;
    if (!event_) event_.emplace();
    event_->order(other_, stream_);
  }

  template <class Tail, class Run>
  void sweep(const Plan& plan, const Run* runs, int count) {
    switch (plan.row_tiles) {
      case 1:
        return launch(sweep_kernel<Tail, 1>, plan, runs, count);
      case 2:
        return launch(sweep_kernel<Tail, 2>, plan, runs, count);
      default:
        return launch(sweep_kernel<Tail, 4>, plan, runs, count);
    }
  }

 private:
  template <class Run>
  void launch(void (*kernel)(const Runs<Run>), const Plan& plan, const Run* runs, int count) {
    Runs<Run> argument;
    for (int i = 0; i < 2; ++i) argument.run[i] = runs[i < count ? i : 0];
    void* arguments[] = {&argument};
    const auto* function = reinterpret_cast<const void*>(kernel);
    check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(plan.shared_bytes)),
               "the persistent kernel's shared memory");
    const dim3 blocks(static_cast<unsigned>(plan.unit_blocks), static_cast<unsigned>(plan.row_groups),
                      static_cast<unsigned>(count));
    check_cuda(cudaLaunchCooperativeKernel(function, blocks, dim3(kThreads), arguments,
                                           static_cast<size_t>(plan.shared_bytes), stream_),
               "the persistent kernel's launch");
  }

  cudaStream_t stream_, other_;
  Blas& blas_;
  void* workspace_;
  int64_t workspace_bytes_;
  std::optional<Event> event_;
};

}  // namespace
}  // namespace pyrnnfast
