// The threads of torch's own OpenMP team; see threads.h.
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <stdexcept>

#include "company.h"

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

// The calls that go on, of those that want several threads, and what they have taken of the processors.
std::atomic<int> calls{0}, taken{0};

const OpenMp* open_mp() {
  static OpenMp omp{};
  static const bool found = [] {
    // Where torch's own library finds it: for everybody it is there only in some builds of torch (not on ARM), and a
    // process may have more than one.
    void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    // A child has none of the threads whose calls went on when it was forked.
    pthread_atfork(nullptr, nullptr, [] { calls = taken = 0; });
    return (torch != nullptr && find(torch, omp)) || find(RTLD_DEFAULT, omp);
  }();
  return found ? &omp : nullptr;
}

using Clock = std::chrono::steady_clock;

std::chrono::nanoseconds time_on_a_core() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

// A thread that sleeps needs so long to come: that it is late by that does not tell of others.
constexpr std::chrono::microseconds kWaking{60};

struct Call {
  void (*body)(void*, int, int);
  void* context;
  const OpenMp* omp;
  Clock::time_point begin;
  bool listened_to;
  std::atomic<int64_t> without{0};  // nanoseconds
};

void enter(void* data) {
  auto& call = *static_cast<Call*>(data);
  const auto run = [&] {
    // The team's size is what the region reports, not what was asked for: a barrier for more would never open.
    call.body(call.context, call.omp->thread_num(), call.omp->num_threads());
  };
  if (!call.listened_to) return run();
  const auto begin = Clock::now();
  const auto had = time_on_a_core();
  run();
  const std::chrono::nanoseconds none{0}, late = begin - call.begin - kWaking;
  const std::chrono::nanoseconds away = (Clock::now() - begin) - (time_on_a_core() - had);
  call.without.fetch_add((std::max(late, none) + std::max(away, none)).count(), std::memory_order_relaxed);
}

Company company;

// So often, and then for so long, a barrier is looked at before the core is offered to others. There are no more
// threads than processors: others that want this one are other programs, or calls that came later, which then have it
// for milliseconds, and the thread that is waited for comes in microseconds, unless one of them has its core.
constexpr int kSpins = 32;
constexpr std::chrono::microseconds kPatience{50};

std::atomic<int64_t> quota{INT_MAX};
std::atomic<int64_t> processors_set{-1};

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
  const auto end = std::chrono::steady_clock::now() + kPatience;
  do {
    if (open()) return;
    pause_cpu();
  } while (std::chrono::steady_clock::now() < end);
  while (!open()) sched_yield();
}

int processors() {
  const int64_t set = processors_set.load(std::memory_order_relaxed);
  const OpenMp* omp = open_mp();
  const int64_t found = omp == nullptr ? 1 : std::min<int64_t>(omp->num_procs(), quota.load(std::memory_order_relaxed));
  return static_cast<int>(std::clamp<int64_t>(set < 0 ? found : set, 1, INT_MAX));
}

void set_quota(int64_t number) { quota = number; }

void set_processors(int64_t number) { processors_set = number; }

Team::Team(int wanted, bool beside_others) {
  if (wanted <= 1) return;
  const OpenMp* omp = open_mp();
  if (omp == nullptr || omp->in_parallel()) return;
  heeds_company_ = beside_others && processors_set.load(std::memory_order_relaxed) < 0;
  // Each thread of Python has a team of its own: all of them together would fight for the cores. Who comes later takes
  // what is left, were it nothing, and its next call may have an even share.
  const int all = processors(), before = calls.fetch_add(1);
  int share = std::min(wanted, all / (before + 1));
  if (heeds_company_ && before == 0) share = company.limit(Clock::now(), share);
  int others = taken.load();
  do {
    size_ = std::max(std::min(share, all - others), 1);
  } while (!taken.compare_exchange_weak(others, others + size_));
  taken_ = size_;
}

Team::~Team() {
  if (taken_ == 0) return;
  taken.fetch_sub(taken_);
  calls.fetch_sub(1);
}

void Team::shrink(int64_t most) {
  if (size_ <= most) return;
  size_ = static_cast<int>(most);
  taken.fetch_sub(taken_ - size_);
  taken_ = size_;
}

void Team::run(void (*body)(void*, int, int), void* context, double operations) const {
  const auto begin = Clock::now();
  const bool listened_to = heeds_company_ && calls.load() == 1 && company.listens(begin);
  int64_t without = 0;
  if (size_ == 1) {
    body(context, 0, 1);
  } else {
    const OpenMp* omp = open_mp();
    Call call{body, context, omp, begin, listened_to};
    omp->parallel(enter, &call, static_cast<unsigned>(size_), 0);
    without = call.without.load();
  }
  if (!listened_to || calls.load() != 1) return;
  const auto now = Clock::now();
  company.heard(now, {size_, operations, now - begin, std::chrono::nanoseconds(without)});
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
  Team(threads, false).run(body, &meetings, 0);
  if (meetings.size != threads) throw std::runtime_error("there is no team of so many threads");
  return meetings.seconds;
}

}  // namespace pyrnnfast
