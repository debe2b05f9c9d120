// One mistake of each kind that compute-sanitizer's tools look for, in a kernel of namespace pyrnnfast: a tool that
// does not report its own here would not report ours either. The mistake is named on the command line, after its tool.
#include <cstdio>
#include <cstring>

namespace pyrnnfast {
namespace {

__global__ void beyond_the_end(float* x, int count) { x[count + threadIdx.x] = 1.0f; }

// Neighbouring warps, without a barrier between writing and reading.
__global__ void race(float* x) {
  __shared__ float values[64];
  values[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void never_written(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x] + 1.0f; }

// A barrier in a branch that not all lanes of a warp take.
__global__ void divergent(float* x) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  x[threadIdx.x] = 1.0f;
}

// Lanes that are not there are named as those to wait for.
__global__ void wrong_mask(float* x) {
  if (threadIdx.x < 16) __syncwarp(0xffff0000u);
  x[threadIdx.x] = 1.0f;
}

}  // namespace
}  // namespace pyrnnfast

int main(int count, char** arguments) {
  const char* tool = count > 1 ? arguments[1] : "";
  float *x = nullptr, *y = nullptr;
  if (cudaMalloc(&x, 64 * sizeof(float)) != cudaSuccess || cudaMalloc(&y, 64 * sizeof(float)) != cudaSuccess) return 1;
  if (std::strcmp(tool, "initcheck") != 0) cudaMemset(x, 0, 64 * sizeof(float));
  if (std::strcmp(tool, "memcheck") == 0) pyrnnfast::beyond_the_end<<<1, 64>>>(x, 1 << 24);
  if (std::strcmp(tool, "racecheck") == 0) pyrnnfast::race<<<1, 64>>>(x);
  if (std::strcmp(tool, "initcheck") == 0) pyrnnfast::never_written<<<1, 64>>>(x, y);
  // Two, as what the tool makes of each depends on the architecture; the second is not reached where it sees the first.
  if (std::strcmp(tool, "synccheck") == 0) {
    pyrnnfast::divergent<<<1, 64>>>(x);
    if (cudaDeviceSynchronize() == cudaSuccess) pyrnnfast::wrong_mask<<<1, 32>>>(x);
  }
  std::printf("%s: %s\n", tool, cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;
}
