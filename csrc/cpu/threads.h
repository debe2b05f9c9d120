// The threads of torch's own OpenMP team, found in the process at run time, and a barrier among them.
//
// A second pool beside torch's would fight with its spinning workers for the cores. Nothing here links with OpenMP: the
// entry points of GNU OpenMP (which torch has loaded) are looked up by name, and without them all runs serially.
// Functions are defined in threads.cpp, not inline, as files for several instruction sets include this header.
#pragma once

#include <cstdint>

namespace pyrnnfast {

class Barrier {
 public:
  // Returns once `parties` threads have called it; may be used again at once.
  void wait(int parties);

 private:
  alignas(64) int arrived_ = 0;
  alignas(64) unsigned generation_ = 0;
};

// Threads for one call, for as long as it lives: at most as many as are wanted, as there are processors that calls at
// the same time, of other Python threads, have not taken, and as other programs leave (company.h); at least one. Inside
// a parallel region it is one.
class Team {
 public:
  // beside_others: whether it heeds what other programs want.
  explicit Team(int wanted, bool beside_others = true);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }
  // To `most` threads, if it has more.
  void shrink(int64_t most);
  // Calls body(context, rank, size) on so many threads at once, rank = 0 … size − 1, 1 ≤ size ≤ size(). It is work of
  // so many operations.
  void run(void (*body)(void* context, int rank, int size), void* context, double operations) const;

 private:
  int size_ = 1;
  int taken_ = 0;  // of the processors
  bool heeds_company_ = false;
};

// How many processors the threads of this process may use at once.
int processors();

// No more than so many, as its control groups allow (pyrnnfast/quota.py).
void set_quota(int64_t processors);

// Whatever OpenMP, the quota and other programs say; a negative number: what they say. For tests on machines that have
// few.
void set_processors(int64_t number);

// Seconds that a team of so many threads takes to meet at a barrier, on an average of `times`; throws where the team
// would be smaller. For benchmarks: it tells how far apart the processors are that the threads run on.
double seconds_to_meet(int threads, int times);

}  // namespace pyrnnfast
