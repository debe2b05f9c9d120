// What other programs leave of the processors to the calls of this process.
//
// Threads share a step evenly and wait for one another at its end: one that has half of a core, as another program has
// the other half, makes all of them half as fast, or less, and fewer of them may be faster. Who has to share with whom
// is the system's affair and changes; what a team notices is that its threads, which never sleep, were without a core.
// Then the calls that follow have fewer threads for a while, and where they get more done with them, and the others are
// still there, for longer.
// Results do not depend on it, to the bit (schedule.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>

namespace pyrnnfast {

class Company {
 public:
  using Duration = std::chrono::nanoseconds;
  using Time = std::chrono::time_point<std::chrono::steady_clock, Duration>;

  // How many threads a call had better have at this time, of so many that it wants: if that is no more than what was
  // judged, as many as fewer_ at most, and else as many less than it wants.
  int limit(Time now, int wanted) const {
    if (now.time_since_epoch().count() >= until_.load(std::memory_order_relaxed)) return wanted;
    const int judged = judged_.load(std::memory_order_relaxed), fewer = fewer_.load(std::memory_order_relaxed);
    return wanted >= judged ? wanted - (judged - fewer) : std::min(wanted, fewer);
  }

  // Whether it would be told of a call that begins at this time: to find out what it wants to know takes time. Of
  // several in a row, as forward passes alternate with backward ones.
  bool listens(Time now) {
    if (now.time_since_epoch().count() < listens_from_.load(std::memory_order_relaxed)) return false;
    if ((in_a_row_.fetch_add(1, std::memory_order_relaxed) + 1) % kEnoughCalls == 0) pause_until(now + kPause);
    return true;
  }

  struct Call {
    int threads;
    double operations;  // of whatever kind, as long as it is always the same
    Duration taken;
    Duration without;  // a core, of all its threads together, who would have used one
  };
  // A call, which might have had several threads, is over.
  void heard(Time now, const Call& call);

 private:
  // What is judged: so long, several time slices, and so many calls, as forward passes are not backward ones.
  static constexpr std::chrono::milliseconds kEnough{20};
  static constexpr int kEnoughCalls = 4;
  // A core that is there for less than the rest of it is somebody else's, too.
  static constexpr double kMissing = 0.3;
  // A judgement holds for so many times as long as it took to come to; one that follows upon another, for twice as long
  // as that, up to the last, or to four times what it took. A first one holds only if the whole team lacks cores again
  // when it is over: the others may have been there for some milliseconds, and come back for as many every now and
  // then.
  static constexpr int kTimesAsLong = 8, kTimesAtMost = 4;
  static constexpr std::chrono::milliseconds kLast{1600};
  // Calls that are few may never end a trial.
  static constexpr std::chrono::seconds kLongestTrial{16};
  static constexpr std::chrono::milliseconds kPause{2};
  // What is older has nothing to do with the next call.
  static constexpr std::chrono::seconds kOld{1};

  struct Sum {
    int calls = 0, most_threads = 0;
    double operations = 0, taken = 0, offered = 0, without = 0;  // nanoseconds
  };

  void begin(Time until, int fewer);
  void hold(Time from, int fewer);
  void pause_until(Time until) { listens_from_.store(until.time_since_epoch().count(), std::memory_order_relaxed); }

  std::atomic<int> judged_{1}, fewer_{1};
  std::atomic<unsigned> in_a_row_{0};
  std::atomic<Duration::rep> until_{0}, listens_from_{0};
  std::mutex mutex_;  // of what follows
  Sum sum_;
  bool on_trial_ = false, in_doubt_ = false, crowded_ = false;  // crowded: by the last judgement
  double rate_ = 0, rate_of_fewer_ = 0;                         // of the team that had too few cores, and on trial
  Duration took_{0}, held_{0};
  Time ends_{}, last_{};
};

}  // namespace pyrnnfast
