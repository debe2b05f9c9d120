// What other programs leave of the processors; see company.h.
#include "company.h"

#include <algorithm>

namespace pyrnnfast {

void Company::heard(Time now, const Call& call) {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return;
  if (on_trial_ && now >= ends_) {  // long ago, and the team has all its threads again
    on_trial_ = false;
    sum_ = {};
  }
  if (now - call.taken - last_ > kOld) {
    in_doubt_ = false;
    sum_ = {};
  }
  last_ = now;
  const auto taken = static_cast<double>(call.taken.count());
  sum_.calls += 1;
  sum_.most_threads = std::max(sum_.most_threads, call.threads);
  sum_.operations += call.operations;
  sum_.taken += taken;
  sum_.offered += taken * call.threads;
  sum_.without += static_cast<double>(call.without.count());
  if (sum_.calls < kEnoughCalls || sum_.taken < Duration(kEnough).count()) return;
  const Sum sum = sum_;
  sum_ = {};
  const double rate = sum.operations / sum.taken;
  if (on_trial_) {
    on_trial_ = false;
    rate_of_fewer_ = rate;
    in_doubt_ = !crowded_ && rate > rate_;
    if (in_doubt_) return begin(now, fewer_);  // over: the team has all its threads again
    return hold(now, rate > rate_ ? fewer_ : judged_);
  }
  const double had = sum.most_threads * (1 - sum.without / sum.offered);
  const bool was_in_doubt = in_doubt_ && sum.most_threads == judged_;
  in_doubt_ = false;
  if (sum.most_threads < 2 || had > sum.most_threads - kMissing) {
    held_ = Duration(0);
    crowded_ = false;
    return;
  }
  if (was_in_doubt) return hold(now, rate_of_fewer_ > rate ? fewer_ : judged_);
  on_trial_ = true;
  rate_ = rate;
  took_ = Duration(static_cast<Duration::rep>(sum.taken));
  judged_ = sum.most_threads;
  begin(now + std::max<Duration>(kTimesAsLong * took_, kLongestTrial),
        std::clamp(static_cast<int>(had + 0.5), 1, sum.most_threads - 1));
}

void Company::hold(Time from, int fewer) {
  const Duration longest = std::max<Duration>(kLast, kTimesAtMost * took_);
  held_ = std::clamp(2 * held_, std::min(kTimesAsLong * took_, longest), longest);
  crowded_ = fewer < judged_;
  begin(from + held_, fewer);
  pause_until(ends_);
}

void Company::begin(Time until, int fewer) {
  ends_ = until;
  fewer_.store(fewer, std::memory_order_relaxed);
  until_.store(until.time_since_epoch().count(), std::memory_order_relaxed);
}

}  // namespace pyrnnfast
