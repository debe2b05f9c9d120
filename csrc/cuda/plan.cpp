// Which form of the recurrence serves a problem on a device; see plan.h.
#include "plan.h"

#include <algorithm>

#include "../widths.h"

namespace pyrnnfast {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Forward, the products of the input; backward, the gate gradients, the states before, and perhaps x without padding.
int64_t row_bytes(const Shape& s) {
  const Widths& w = widths_of(s.cell);
  if (!s.backward) return w.gates * s.hidden * std::max(bytes_of(s.dtype), bytes_of(Dtype::float32));
  return ((w.dgates + 1) * s.hidden + s.inputs) * bytes_of(s.dtype);
}

}  // namespace

Plan step_plan(const Shape& s, int64_t chunk_bytes, std::string reason) {
  Plan plan;
  plan.reason = std::move(reason);
  plan.directions = s.directions;
  // cuBLAS counts rows in 32 bits.
  const int64_t rows = std::min(chunk_bytes / row_bytes(s), int64_t{1} << 30);
  plan.chunk_steps = std::clamp<int64_t>(rows / s.batch, 1, s.steps);
  return plan;
}

Plan make_plan(const DeviceProperties& device, const Shape& s, int64_t chunk_bytes) {
  const auto by_steps = [&](const char* reason) { return step_plan(s, chunk_bytes, reason); };
  if (device.major < 8) return by_steps("the persistent form wants compute capability 8.0 or later");
  if (!device.cooperative) return by_steps("the device has no cooperative launch");
  if (s.dtype == Dtype::float64) return by_steps("the persistent form does not serve float64");
  if (s.dtype == Dtype::float32 && !s.tf32) return by_steps("the persistent form serves float32 by way of TF32 alone");
  if (s.steps < 2) return by_steps("a single step");

  Plan plan = step_plan(s, chunk_bytes, "");
  const int gates = static_cast<int>(widths_of(s.cell).gates), element = static_cast<int>(bytes_of(s.dtype));
  const int fragment = depth_of_fragment(element), products = products_of_tile(gates, element);
  plan.unit_blocks = ceil_div(s.hidden, kUnits);
  plan.depth = s.backward ? gates * kUnits : ceil_div(plan.unit_blocks * kUnits, fragment) * fragment;
  // Of the warp that has most.
  const int64_t share = ceil_div(s.backward ? plan.unit_blocks : plan.depth / fragment, kWarps);
  bool too_many = true;
  // Both directions at once take half of the time of one after the other; then the fewer sequences to a block, the more
  // of the device is at work.
  for (int64_t at_once = s.directions; at_once > 0; --at_once) {
    for (const int tiles : {1, 2, 4}) {
      const int64_t rows = tiles * kTileRows,
                    held = s.backward ? held_tiles(products, tiles) : held_fragments(gates, tiles);
      plan.row_tiles = tiles;
      plan.row_groups = ceil_div(s.batch, rows);
      plan.spare = std::max<int64_t>(share - held, 0);
      // A fragment is two loads of 16 bytes a lane, a tile one for each product.
      const int64_t weights = kWarps * plan.spare * (s.backward ? products : gates * 2) * kLanes * 16;
      const int64_t sums = kWarps * rows * sum_stride(s.backward ? 1 : gates) * 4;
      plan.shared_bytes = weights + sums + carried_bytes(tiles) + (s.backward ? rows * operand_bytes(products) : 0);
      plan.exchange_words =
          plan.row_groups * rows * (s.backward ? plan.unit_blocks * plan.unit_blocks * kUnits : plan.depth);
      plan.blocks = at_once * plan.unit_blocks * plan.row_groups;
      const bool fits = plan.blocks <= device.multiprocessors;
      too_many &= !fits;
      if (!fits || plan.shared_bytes > device.shared_bytes) continue;
      plan.together = at_once == 2;
      plan.persistent = true;
      plan.reason = "the recurrent weights fit the chip";
      return plan;
    }
  }
  return by_steps(too_many ? "more blocks than multiprocessors" : "the recurrent weights do not fit the chip");
}

}  // namespace pyrnnfast
