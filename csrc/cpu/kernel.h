// What an instruction set offers: for each cell and type the passes forward and back, each cut into blocks of hidden
// units so that schedule.cpp can share it among threads without knowing how wide a vector is.
#pragma once

#include "../problem.h"
#include "threads.h"

namespace pyrnnfast {

// One thread's part of a pass: rows × blocks of units. Threads that share rows meet at `barrier` after every step.
struct Share {
  int64_t row_begin, row_end;
  int64_t block_begin, block_end;
  Barrier* barrier;  // null: no other thread works on these rows
  int parties;
};

template <class P>
struct Kernel {
  int64_t (*blocks)(const P&);                                // of hidden units
  int64_t (*packed_bytes)(const P&);                          // of the packed weights; 0: none are needed
  void (*pack)(const P&, void* packed, int64_t block);        // the weights of one block
  void (*sweep)(const P&, const void* packed, const Share&);  // all time steps
};

using ActivationFn = void (*)(const void* x, void* out, int64_t count);
enum class Activation { sigmoid, tanh };

struct InstructionSet {
  const char* name;
  Kernel<Forward> forward[kCellKinds][kDtypes];
  Kernel<Backward> backward[kCellKinds][kDtypes];
  ActivationFn activation[2][kDtypes];  // for the tests of activations.h
};

extern const InstructionSet kGeneric;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace pyrnnfast
