// Memory on large pages; see memory.h.
#include "memory.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>

namespace pyrnnfast {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;

}  // namespace

void wish_for_large_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (address + bytes) / kLargePage * kLargePage;
  if (data == nullptr || begin >= end) return;
  if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) != 0) return;
  for (uintptr_t page = begin; page < end; page += kLargePage) {
    __atomic_fetch_or(reinterpret_cast<unsigned char*>(page), 0, __ATOMIC_RELAXED);
  }
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

void ReleaseBlock::operator()(Block* block) const { ::operator delete(block, std::align_val_t(block->alignment)); }

Allocation allocate(size_t bytes) {
  const size_t total = sizeof(Block) + bytes;
  const size_t alignment = total >= 2 * kLargePage ? kLargePage : alignof(Block);
  void* memory = ::operator new(total, std::align_val_t(alignment));
  wish_for_large_pages(memory, total);
  return Allocation(new (memory) Block{bytes, alignment});
}

}  // namespace pyrnnfast
