// Which form of the recurrence serves a problem on a device, and how it is cut. Pure host code: knows neither CUDA nor
// torch, so that it can be tested on a table of devices that are not there.
//
// The persistent form (persistent.h) runs many steps in one launch, its blocks on the chip all at once. A block owns
// kUnits hidden units of kTileRows · row_tiles sequences; every warp has a share of the product's depth for all of
// them, or, back through time, of the other blocks.
#pragma once

#include <string>

#include "../host_device.h"
#include "../problem.h"

namespace pyrnnfast {

struct DeviceProperties {
  std::string name;
  int major = 0, minor = 0;  // the compute capability
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // of one block, at most
  bool cooperative = false;  // a launch whose blocks are on the chip all at once
};

// What a plan depends on.
struct Shape {
  CellKind cell = CellKind::rnn_tanh;
  Dtype dtype = Dtype::float32;
  bool backward = false;
  bool tf32 = false;  // float32 products may be rounded to TF32
  int64_t steps = 0, batch = 0, inputs = 0, hidden = 0, directions = 1;
};

inline constexpr int kUnits = 16, kTileRows = 8, kWarps = 8, kLanes = 32;
inline constexpr int kThreads = kWarps * kLanes;

// Elements of the product's depth that one fragment of 16 bytes for each of 4 lanes has.
PYRNNFAST_HD constexpr int depth_of_fragment(int element_bytes) { return 64 / element_bytes; }

// Forward: fragments of the weights that a warp holds in registers, for each tile of 16 rows of the weights; the others
// lie in shared memory. A fragment of a tile is 8 registers a lane; a thread has 255, and needs 4 for the sum of each
// pair of tiles besides those of its elements. More than these and ptxas spills on some architecture.
PYRNNFAST_HD constexpr int held_fragments(int weight_tiles, int row_tiles) {
  if (weight_tiles == 1) return row_tiles == 4 ? 6 : 12;
  if (row_tiles == 4) return weight_tiles == 4 ? 0 : 2;
  return weight_tiles == 4 && row_tiles == 2 ? 2 : 4;
}

// Back through time: the depth of a block's product, for each gate its units, in products of tensor cores of 32 bytes.
PYRNNFAST_HD constexpr int products_of_tile(int gates, int element_bytes) {
  return gates * kUnits * element_bytes / 32;
}
// Tiles of 16 columns of the weights that a warp holds in registers, 4 for each product; an even number, as two are
// computed together, and not so many of one product that ptxas spills.
PYRNNFAST_HD constexpr int held_tiles(int products, int row_tiles) {
  const int registers = row_tiles == 4 ? 64 : row_tiles == 2 ? 96 : 128;
  const int tiles = registers / (4 * products) / 2 * 2;
  return tiles > 12 ? 12 : tiles;
}
// Bytes of a sequence's row of the operand: 8 more than a multiple of 16 banks, as 4 rows are loaded at once.
PYRNNFAST_HD constexpr int operand_bytes(int products) {
  return products % 2 == 1 ? products * 32 : products * 32 + 32;
}
// Groups of threads that take the steps in turns (Elements), and what a sequence's elements carry then.
PYRNNFAST_HD constexpr int groups_of_threads(int row_tiles) {
  return row_tiles * kTileRows * kUnits * 2 <= kThreads ? 2 : 1;
}
inline constexpr int kCarriedBytes = 8;
PYRNNFAST_HD constexpr int carried_bytes(int row_tiles) {
  return groups_of_threads(row_tiles) > 1 ? row_tiles * kTileRows * kUnits * kCarriedBytes : 0;
}

// Partial sums of an element are loaded at once, 3 as 4. A row of them, in floats, is so long that neither the lanes of
// a product nor the two rows of a warp (Elements::row_of) want the same banks.
PYRNNFAST_HD constexpr int sums_together(int weight_tiles) { return weight_tiles == 1 ? 1 : 4; }
PYRNNFAST_HD constexpr int sum_stride(int weight_tiles) { return weight_tiles == 1 ? kUnits + 4 : 4 * (kUnits + 1); }

struct Plan {
  bool persistent = false;
  std::string reason;  // why that form
  int64_t directions = 1;
  int64_t chunk_steps = 1;   // of which the input's products, or the gate gradients, are kept at once
  int row_tiles = 0;         // 1, 2 or 4
  int64_t row_groups = 0;    // of kTileRows · row_tiles sequences
  int64_t unit_blocks = 0;   // of kUnits
  int64_t depth = 0;         // of a block's product; forward, a multiple of that of a fragment
  bool together = false;     // both directions in one launch, else one after the other
  int64_t blocks = 0;        // of one launch
  int64_t shared_bytes = 0;  // of one block
  int64_t spare = 0;         // of each warp, in shared memory: forward, fragments of each tile of weights; back, tiles
  int64_t exchange_words = 0;  // of one exchange of a direction
};

// Bytes that a chunk may take, unless a single step takes more; for tests set_threshold("chunk_bytes", …) of the
// module.
inline constexpr int64_t kChunkBytes = int64_t{128} << 20;

Plan step_plan(const Shape& shape, int64_t chunk_bytes, std::string reason);
// Persistent where it fits, else by steps.
Plan make_plan(const DeviceProperties& device, const Shape& shape, int64_t chunk_bytes);

}  // namespace pyrnnfast
