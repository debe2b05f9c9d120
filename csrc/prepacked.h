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
  // changed, has been let go of. Null where weights are not used as they are, or do not count their changes. Called
  // with the GIL; the panels may be used without.
  std::shared_ptr<PanelsOfCall> panels_of(const std::vector<Checked<Forward>>& layers, const pybind11::tuple& weights);

 private:
  struct Weight {
    const void* data;
    // Shares the weight's memory, which no other tensor can have as long as this lives, and its version: torch's count
    // of changes in place.
    pybind11::object alias;
    int64_t version;
  };
  // Never changed but for what the panels hold, as torch lets go of the GIL where it likes.
  struct Known {
    std::vector<Weight> weights;
    PanelsOfCall panels;
  };

  std::shared_ptr<Known> known_;
};

}  // namespace pyrnnfast
