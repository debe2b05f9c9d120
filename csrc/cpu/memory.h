// Memory for scratch and for packed weights: aligned to cache lines, and on large pages where there is much of it.
#pragma once

#include <cstddef>
#include <memory>

namespace pyrnnfast {

// Large memory comes fresh from the system, page by page at the first touch: large pages are fewer. A wish only;
// refusal is no error. Granted ones are touched here, without a change to what stands there, and by one thread: two
// that find the same one untouched may wait for each other fifty times as long as it takes to clear it.
void wish_for_large_pages(void* data, size_t bytes);

struct alignas(64) Block {
  size_t bytes, alignment;

  std::byte* data() { return reinterpret_cast<std::byte*>(this + 1); }
};
struct ReleaseBlock {
  void operator()(Block* block) const;
};
using Allocation = std::unique_ptr<Block, ReleaseBlock>;

// Throws std::bad_alloc.
Allocation allocate(size_t bytes);

}  // namespace pyrnnfast
