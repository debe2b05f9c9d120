// What an instruction set offers: for each cell and type the passes forward and back, each in a few stages that
// schedule.cpp runs in order and shares among threads without knowing how wide a vector is.
#pragma once

#include "../problem.h"
#include "threads.h"

namespace pyrnnfast {

// The call's own memory, apart from its operands. Elements are of the type that is computed with.
enum Region {
  // W_hh in panels, for the recurrent product, and W_ih, for the input's product (forward) or for dx (backward): see
  // weights.h. Forward, where they are packed at use: one panel for each thread.
  kPackedHidden,
  kPackedInput,
  kPackedProjection,  // W_hr
  kUnprojected,       // [B, H], forward: h of a step before its projection
  kBias,              // forward: [G·H + H] in the order of the tile; backward: the running sums of dgates' rows
  kState0,            // forward: h before and after the step by turns, [B, P] each
  kState1,
  // [B, H], forward: c of the last step, or h where the state is rounded; backward: what the cell carries back.
  kCell,
  kGates0,  // rows of one chunk, forward: the input's product; backward: dgates, by turns
  kGates1,
  kPairs,  // dgates of one chunk with pairs of rows side by side, where the products want pairs
  // Forward: rows of one chunk of x, [chunk, I], where they have to be widened; backward, for each thread: a strip of
  // rows of dx or dh0 before they are rounded.
  kRows,
  kPanels,     // backward, for each thread: a stretch of a few panels
  kSumsInput,  // dW_ih, dW_hh and dW_hr before they are rounded
  kSumsHidden,
  kSumsProjection,
  kRegions
};

// How the panels of a weight come about.
enum class Packing {
  in_place,  // not at all: it is read where it lies, which pays for a few rows
  before,    // all of them before the pass
  kept,      // by an earlier call (prepacked.h), forward alone
  at_use     // where panels are used once: each by the thread that uses it, in whose second cache it stays
};

// What schedule.cpp has decided about a call, and where its regions stand.
struct Plan {
  Packing hidden, input;  // of W_hh and W_ih; forward both are packed, or neither
  int64_t chunk_rows;     // at most so many rows in a chunk of steps, unless one step has more
  int threads;
  int output_vectors;  // of a block of the columns of a projected h
  void* region[kRegions];
};

// The steps [first, last) of time.
struct Chunk {
  int64_t first, last;
  int index;  // in the order of the pass; −1: there is no such chunk
};

// One thread's part of a pass; of its rows, where they are ragged, of a chunk.
struct Share {
  int rank, size;  // of the whole team
  // Of the recurrence: rows × blocks of units; no rows: nothing. Threads that share rows meet at `barrier` after each
  // step.
  int64_t row_begin, row_end;
  int64_t block_begin, block_end;
  int member, members;  // of those who share the rows
  Barrier* barrier;     // null: nobody else
};

template <class P>
struct Kernel {
  // Into how many blocks so many columns are cut: hidden units; backward, those of W_ih as well.
  int64_t (*blocks)(int64_t columns);
  int (*output_vectors)(const P&, int members);           // see Plan
  void (*layout)(const P&, const Plan&, int64_t* bytes);  // of each region
  void (*begin)(const P&, const Plan&, const Share&);     // packs weights for the whole pass, sets the first states
  // The recurrence over a chunk; `before` is the chunk that came before it in the order of the pass.
  void (*sweep)(const P&, const Plan&, const Chunk& chunk, const Chunk& before, const Share&);
  // The products over all rows of a chunk: before its sweep in the forward pass, after it in the backward pass.
  void (*products)(const P&, const Plan&, const Chunk& chunk, const Share&);
  void (*end)(const P&, const Plan&, const Chunk& last, const Share&);
};

using ActivationFn = void (*)(const void* x, void* out, int64_t count);
enum class Activation { sigmoid, tanh };

// out = a b for one thread's share of the rows; `panel` holds kDepth × kMaxVectors vectors.
using ProductFn = void (*)(const Product&, void* panel, int rank, int size);

struct InstructionSet {
  const char* name;
  Kernel<Forward> forward[kCellKinds][kDtypes];
  Kernel<Backward> backward[kCellKinds][kDtypes];
  // Forward, a single step of up to (I + H) / this many rows does better with weights read where they lie than with
  // packed ones: packing takes as long for every k, and adding up the vectors of dot products as long for every row.
  int64_t depth_per_row[kDtypes];
  // But no more than these: panels that are packed at use take a part of that time.
  int64_t most_unpacked_rows[kDtypes];
  // For benchmarks and tests, in float32 and float64.
  ActivationFn activation[2][2];
  ProductFn product[2];
  int64_t product_panel_bytes;
};

#if defined(__aarch64__)
extern const InstructionSet kNeon;
#else
extern const InstructionSet kGeneric;
#endif
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
extern const InstructionSet kAvx512Bf16;
#endif

}  // namespace pyrnnfast
