// Panels that are kept; see prepacked.h.
#include "prepacked.h"

#include <cstring>
#include <utility>

#include "../widths.h"

namespace pyrnnfast {
namespace {

// Some elements from all over a matrix, so that no rows and no columns of any number are left out.
uint64_t sample_of(const Matrix& m, int64_t rows, int64_t columns, int64_t element, uint64_t sample) {
  constexpr int64_t count = 16, stride = 7;  // without a common divisor
  if (m.data == nullptr) return sample;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = (rows - 1) * i / (count - 1), column = (columns - 1) * (i * stride % count) / (count - 1);
    uint64_t bits = 0;
    std::memcpy(&bits, static_cast<const char*>(m.data) + (row * m.stride + column) * element,
                static_cast<size_t>(element));
    sample = (sample ^ bits) * 0x9e3779b97f4a7c15;  // odd, and so nothing of what was there is lost
    sample ^= sample >> 32;
  }
  return sample;
}

}  // namespace

PanelKey key_of(const Forward& p, const InstructionSet& isa, const Plan& plan, const int64_t* bytes) {
  PanelKey key{&isa, p.cell, p.dtype, plan.output_vectors, p.inputs, p.hidden, p.outputs, {}, 0};
  for (size_t i = 0; i < kPanelRegions.size(); ++i) key.bytes[i] = bytes[kPanelRegions[i]];
  const int64_t rows = widths_of(p.cell).gates * p.hidden, element = bytes_of(p.dtype);
  key.sample = sample_of(p.weight_hh, rows, p.outputs, element, key.sample);
  key.sample = sample_of(p.weight_ih, rows, p.inputs, element, key.sample);
  key.sample = sample_of(p.weight_hr, p.outputs, p.hidden, element, key.sample);
  return key;
}

Panels::Panels(const PanelKey& of) : key(of) {
  // A cache line between them, as between all regions.
  constexpr int64_t line = 64;
  EachPanelRegion<int64_t> begin;
  int64_t total = 0;
  for (size_t i = 0; i < begin.size(); ++i) {
    begin[i] = total;
    total += (key.bytes[i] + 2 * line - 1) / line * line;
  }
  memory = allocate(static_cast<size_t>(total));
  for (size_t i = 0; i < begin.size(); ++i) region[i] = memory->data() + begin[i];
}

std::shared_ptr<Panels> KeptPanels::find(const PanelKey& wanted) {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (lock) {
    for (const auto& panels : kept_) {
      if (panels != nullptr && panels->key == wanted) return panels;
    }
    // Before there are others.
    kept_.back() = nullptr;
    if (kept_.front() != nullptr && kept_.front()->key.sample != wanted.sample) kept_.front() = nullptr;
  }
  return std::make_shared<Panels>(wanted);
}

void KeptPanels::keep(std::shared_ptr<Panels> filled) {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock) return;
  // Another call may have come first.
  for (const auto& panels : kept_) {
    if (panels != nullptr && panels->key == filled->key) return;
  }
  kept_.back() = std::move(kept_.front());
  kept_.front() = std::move(filled);
}

int64_t KeptPanels::bytes() {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  int64_t total = 0;
  if (lock) {
    for (const auto& panels : kept_) total += panels == nullptr ? 0 : static_cast<int64_t>(panels->memory->bytes);
  }
  return total;
}

}  // namespace pyrnnfast
