// The threads of torch's own OpenMP team; see threads.h.
#include "threads.h"

#include <dlfcn.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <stdexcept>

namespace pyrnnfast {
namespace {

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread_num)();
  int (*num_threads)();
  int (*in_parallel)();
  int (*num_procs)();
};

template <class Fn>
bool look_up(void* where, Fn*& fn, const char* name) {
  fn = reinterpret_cast<Fn*>(dlsym(where, name));
  return fn != nullptr;
}

// All of it in one place.
bool find(void* where, OpenMp& omp) {
  return look_up(where, omp.parallel, "GOMP_parallel") && look_up(where, omp.thread_num, "omp_get_thread_num") &&
         look_up(where, omp.num_threads, "omp_get_num_threads") && look_up(where, omp.in_parallel, "omp_in_parallel") &&
         look_up(where, omp.num_procs, "omp_get_num_procs");
}

const OpenMp* open_mp() {
  static OpenMp omp{};
  static const bool found = [] {
    // Where torch's own library finds it: for everybody it is there only in some builds of torch (not on ARM), and a
    // process may have more than one.
    void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    return (torch != nullptr && find(torch, omp)) || find(RTLD_DEFAULT, omp);
  }();
  return found ? &omp : nullptr;
}

struct Call {
  void (*body)(void*, int, int);
  void* context;
  const OpenMp* omp;
};

void enter(void* data) {
  const auto& call = *static_cast<const Call*>(data);
  // The team's size is what the region reports, not what was asked for: a barrier for more would never open.
  call.body(call.context, call.omp->thread_num(), call.omp->num_threads());
}

// So often, and then for so long, a barrier is looked at before the core is offered to others. Where there are more
// threads than cores, the one that is waited for may want this very core: it is offered at once. Else others that want
// it are other programs, which then have it for milliseconds, and the thread that is waited for comes in microseconds,
// unless another program has its core.
constexpr int kSpins = 32;
constexpr std::chrono::microseconds kPatience{50};

std::atomic_flag team_taken = ATOMIC_FLAG_INIT;
std::atomic<bool> team_is_crowded{false};  // the one that has been taken

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // some ten nanoseconds; "yield" takes none on most processors
#endif
}

}  // namespace

void Barrier::wait(int parties) {
  const unsigned generation = __atomic_load_n(&generation_, __ATOMIC_RELAXED);
  if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == parties) {
    __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&generation_, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  const auto open = [&] { return __atomic_load_n(&generation_, __ATOMIC_ACQUIRE) != generation; };
  for (int spins = 0; spins < kSpins; ++spins) {
    if (open()) return;
    pause_cpu();
  }
  if (!team_is_crowded.load(std::memory_order_relaxed)) {
    const auto end = std::chrono::steady_clock::now() + kPatience;
    do {
      if (open()) return;
      pause_cpu();
    } while (std::chrono::steady_clock::now() < end);
  }
  while (!open()) sched_yield();
}

void parallel(int threads, void (*body)(void*, int, int), void* context) {
  const OpenMp* omp = threads > 1 ? open_mp() : nullptr;
  if (omp == nullptr || omp->in_parallel() || team_taken.test_and_set(std::memory_order_acquire)) {
    body(context, 0, 1);
    return;
  }
  team_is_crowded.store(threads > omp->num_procs(), std::memory_order_relaxed);
  Call call{body, context, omp};
  omp->parallel(enter, &call, static_cast<unsigned>(threads), 0);
  team_taken.clear(std::memory_order_release);
}

double seconds_to_meet(int threads, int times) {
  struct Meetings {
    Barrier barrier;
    int times, size;
    double seconds;
  } meetings{{}, times, 0, 0};
  const auto body = [](void* context, int rank, int size) {
    auto& m = *static_cast<Meetings*>(context);
    m.barrier.wait(size);
    if (rank == 0) m.size = size;
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < m.times; ++i) m.barrier.wait(size);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    if (rank == 0) m.seconds = taken.count() / m.times;
  };
  parallel(threads, body, &meetings);
  if (meetings.size != threads) throw std::runtime_error("there is no team of so many threads");
  return meetings.seconds;
}

}  // namespace pyrnnfast
