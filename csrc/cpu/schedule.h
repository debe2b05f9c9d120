// Runs one checked problem: picks the kernel of the instruction set in use, packs the weights, shares the work.
#pragma once

#include "kernel.h"

namespace pyrnnfast {

// At most `threads` threads. Throws std::bad_alloc, and then nothing has been written.
void run(const Forward& problem, int threads);
void run(const Backward& problem, int threads);

}  // namespace pyrnnfast
