// Measures how long one block takes to hand a value to another through global memory: the least that a step of a
// recurrence costs that is spread over more than one multiprocessor. Prints nanoseconds.
//
// Two blocks pass a counter to and fro, each in a 128-byte line of its own, so that the counter is the data and the
// flag at once: no fence, no barrier. A cooperative launch keeps both on the card at the same time.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kLine = 32;  // words
constexpr unsigned kTurns = 20000;

__global__ void ping_pong(volatile unsigned* lines, unsigned turns) {
  volatile unsigned* mine = lines + kLine * blockIdx.x;
  volatile unsigned* other = lines + kLine * (1 - blockIdx.x);
  for (unsigned turn = 1; turn <= turns; ++turn) {
    if (blockIdx.x == 0) *other = turn;
    while (*mine != turn) {
    }
    if (blockIdx.x == 1) *other = turn;
  }
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

}  // namespace

int main() {
  unsigned* lines = nullptr;
  check(cudaMalloc(&lines, 2 * kLine * sizeof(unsigned)));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> nanoseconds;
  for (int run = 0; run < 11; ++run) {
    check(cudaMemset(lines, 0, 2 * kLine * sizeof(unsigned)));
    unsigned turns = kTurns;
    void* arguments[] = {&lines, &turns};
    check(cudaEventRecord(begin));
    check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(&ping_pong), dim3(2), dim3(1), arguments, 0,
                                      nullptr));
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end));
    nanoseconds.push_back(milliseconds * 1e6f / (2 * kTurns));  // there and back
  }
  std::sort(nanoseconds.begin(), nanoseconds.end());
  std::printf("%.1f\n", nanoseconds[nanoseconds.size() / 2]);
  return 0;
}
