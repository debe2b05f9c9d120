// What a module of Python keeps between calls: panels of its weights, for as long as these do not change.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/prepacked.h"

namespace pyrnnfast {

// Of each layer and direction of a call.
using PanelsOfCall = std::vector<KeptPanels>;

class Prepacked {
 public:
  // Those of a plain call (plain.h) with these tensors as weights; what there was of others, or of the same before they
  // changed, has been let go of. Null where they would gain nothing, for the first call with such weights, as there may
  // be others in each, and where weights are not used as they are or do not count their changes. Called and released
  // with the GIL; the panels may be used without.
  std::shared_ptr<PanelsOfCall> panels_of(const std::vector<Checked<Forward>>& layers, const pybind11::tuple& weights);
  // Of memory.
  int64_t bytes() const;

  // Somebody may have changed weights, any at all, without torch's counting it.
  static void doubt();

 private:
  struct Weight {
    pybind11::weakref tensor;
    int64_t version;  // torch's count of its changes in place; −1: it has none, as a tensor of inference mode
    const void* data;
    // Shares its memory, which no other tensor can have as long as this lives, unless it is taken from both.
    pybind11::object alias;
  };
  // Replaced, never changed but for what the panels hold: other threads come in where torch lets go of the GIL.
  struct Known {
    uint64_t doubts;
    bool counted;
    std::vector<Weight> weights;
    PanelsOfCall panels;
  };

  std::shared_ptr<Known> known_;
};

}  // namespace pyrnnfast
