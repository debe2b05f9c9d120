// The threads of torch's own OpenMP team, found in the process at run time, and a barrier among them.
//
// A second pool beside torch's would fight with its spinning workers for the cores. Nothing here links with OpenMP: the
// entry points of GNU OpenMP (which torch has loaded) are looked up by name, and without them all runs serially.
// Functions are defined in threads.cpp, not inline, as files for several instruction sets include this header.
#pragma once

namespace pyrnnfast {

class Barrier {
 public:
  // Returns once `parties` threads have called it; may be used again at once.
  void wait(int parties);

 private:
  alignas(64) int arrived_ = 0;
  alignas(64) unsigned generation_ = 0;
};

// Calls body(context, rank, size) on `size` threads at once, rank = 0 … size − 1, 1 ≤ size ≤ threads. One call at a
// time has the team; a concurrent one, or one from inside a parallel region, gets size = 1.
void parallel(int threads, void (*body)(void* context, int rank, int size), void* context);

// Seconds that a team of so many threads takes to meet at a barrier, on an average of `times`; throws where the team
// would be smaller. For benchmarks: it tells how far apart the processors are that the threads run on.
double seconds_to_meet(int threads, int times);

}  // namespace pyrnnfast
