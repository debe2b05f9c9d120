// How a pass is shared among threads. A row's results do not depend on it, to the bit: each thread runs whole tiles,
// and a tile's arithmetic does not depend on the rows beside it (tile.h).
#include "schedule.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>
#include <vector>

#include "dispatch.h"

namespace pyrnnfast {
namespace {

// Below this many operations a call takes about as long as waking a team does (some 2 µs, more after a pause).
constexpr double kSerialOperations = 4e6;
// What finishing one unit of one row costs, beside its product, in operations of the product.
constexpr double kTailOperations = 100;
// With fewer rows than this a thread, tiles are too low to be efficient and threads share the units instead.
constexpr int64_t kRowsPerThread = 4;

struct AlignedDelete {
  void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<std::byte[], AlignedDelete>;

Scratch allocate(int64_t bytes) {
  return Scratch(static_cast<std::byte*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t(64))));
}

// Steps in which any of the first `rows` sequences takes part, summed over those sequences.
int64_t work(const Problem& p, int64_t rows) {
  int64_t total = 0;
  for (int64_t t = 0; t < p.steps; ++t) total += std::min(rows, p.offsets[t + 1] - p.offsets[t]);
  return total;
}

// The first row of group g when the rows are cut into `groups` of equal work.
int64_t row_bound(const Problem& p, int64_t g, int64_t groups) {
  if (g == 0) return 0;
  const int64_t total = p.offsets[p.steps];
  if (total == p.steps * p.batch || g == groups) return p.batch * g / groups;
  int64_t low = 0, high = p.batch;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (work(p, middle) * groups < total * g) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <class P>
struct Job {
  const P& problem;
  const Kernel<P>& kernel;
  void* packed;
  int64_t blocks;
  std::vector<Barrier> barriers;  // [threads], one for each group of rows
  Barrier packing;

  static void body(void* context, int rank, int size) {
    auto& job = *static_cast<Job*>(context);
    if (job.packed != nullptr) {
      for (int64_t b = rank; b < job.blocks; b += size) job.kernel.pack(job.problem, job.packed, b);
      if (size > 1) job.packing.wait(size);
    }
    // The team may be smaller than was asked for, and is known only here.
    const int groups = static_cast<int>(std::clamp<int64_t>(job.problem.batch / kRowsPerThread, 1, size));
    const int members = static_cast<int>(std::min<int64_t>(size / groups, job.blocks));
    if (rank >= groups * members) return;
    const int group = rank / members, member = rank % members;
    const Share share{row_bound(job.problem, group, groups),
                      row_bound(job.problem, group + 1, groups),
                      job.blocks * member / members,
                      job.blocks * (member + 1) / members,
                      members > 1 ? &job.barriers[static_cast<size_t>(group)] : nullptr,
                      members};
    job.kernel.sweep(job.problem, job.packed, share);
  }
};

template <class P>
void run_kernel(const P& p, const Kernel<P>& kernel, int threads) {
  const auto rows = static_cast<double>(p.offsets[p.steps]);
  const int64_t packed_bytes = kernel.packed_bytes(p);
  const int64_t element = p.dtype == Dtype::float64 ? 8 : 4;
  const double operations =
      rows * (2.0 * static_cast<double>(packed_bytes / element) + kTailOperations * static_cast<double>(p.hidden));
  if (operations < kSerialOperations) threads = 1;
  const Scratch packed = packed_bytes > 0 ? allocate(packed_bytes) : nullptr;
  Job<P> job{p, kernel, packed.get(), kernel.blocks(p), std::vector<Barrier>(static_cast<size_t>(threads)), {}};
  parallel(threads, Job<P>::body, &job);
}

}  // namespace

void run(const Forward& p, int threads) {
  run_kernel(p, instruction_set_in_use().forward[static_cast<int>(p.cell)][static_cast<int>(p.dtype)], threads);
}

void run(const Backward& p, int threads) {
  run_kernel(p, instruction_set_in_use().backward[static_cast<int>(p.cell)][static_cast<int>(p.dtype)], threads);
}

}  // namespace pyrnnfast
