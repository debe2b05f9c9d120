// Panels of a forward pass's weights that outlive the call that packed them, where a caller asks for that: packing
// takes as long as several steps of few sequences do.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <tuple>

#include "kernel.h"
#include "memory.h"

namespace pyrnnfast {

// The regions of panels.
inline constexpr std::array kPanelRegions{kPackedHidden, kPackedInput, kPackedProjection};
template <class T>
using EachPanelRegion = std::array<T, kPanelRegions.size()>;

// How panels are laid out, and of what. Sizes and types, too: a weight may be seen in several ways where it lies.
struct PanelKey {
  const InstructionSet* isa;
  CellKind cell;
  Dtype dtype;
  int output_vectors;
  int64_t inputs, hidden, outputs;
  EachPanelRegion<int64_t> bytes;
  // Some elements of the weights. Who keeps panels asks torch whether a weight has changed, but there are changes of
  // which torch does not know (`.data`, NumPy, shared memory): one of a whole weight, as by an optimizer, shows here.
  uint64_t sample;

  auto all() const { return std::tie(isa, cell, dtype, output_vectors, inputs, hidden, outputs, bytes, sample); }
  bool operator==(const PanelKey& other) const { return all() == other.all(); }
};

// `bytes`: the layout of a call that packs all its weights before.
PanelKey key_of(const Forward& p, const InstructionSet& isa, const Plan& plan, const int64_t* bytes);

struct Panels {
  explicit Panels(const PanelKey& of);

  PanelKey key;
  bool filled = false;
  Allocation memory;
  EachPanelRegion<void*> region;
};

// Those of one layer and direction, of weights that are the same in all calls unless their sample differs. Calls at the
// same time may share them.
class KeptPanels {
 public:
  // The ones that are kept, or else new ones, to be filled and then kept. Neither waits for another call: who forks
  // while a thread of his is here has a child in which it would be for ever.
  std::shared_ptr<Panels> find(const PanelKey& wanted);
  void keep(std::shared_ptr<Panels> filled);
  int64_t bytes();

 private:
  std::mutex mutex_;
  // The newest first. Of a narrow type, calls with few sequences and with many want different ones; and so do
  // projections with different numbers of threads.
  std::array<std::shared_ptr<Panels>, 2> kept_;
};

}  // namespace pyrnnfast
