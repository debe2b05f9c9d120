// Runs one checked problem: picks the kernel of the instruction set in use, gives it memory, shares the work.
#pragma once

#include <string>

#include "kernel.h"
#include "prepacked.h"

namespace pyrnnfast {

// One direction of a layer, on at most `threads` threads. Throws std::bad_alloc, and then nothing of it has been
// written. `kept`: what the caller keeps of the weights from call to call, if anything.
void run(const Forward& problem, int threads, KeptPanels* kept = nullptr);
void run(const Backward& problem, int threads);
void run(const Product& problem, int threads);

// Thresholds of the schedule, which results do not depend on but for rounding: tests set them to reach every road with
// small sizes. `name` is "chunk_rows", "unpacked_rows", "serial_operations", "rows_per_thread" or
// "processors"; a negative value restores the built-in one. Throws std::invalid_argument for another name.
void set_threshold(const std::string& name, int64_t value);

}  // namespace pyrnnfast
