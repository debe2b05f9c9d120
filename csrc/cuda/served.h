// The passes for operands of one type on the device; each is compiled in a file of its own (served_*.cu).
#pragma once

#include "backend.h"

namespace pyrnnfast {

// What each direction has of its own.
struct Stream {
  void* stream = nullptr;
  void* workspace = nullptr;  // null: cuBLAS uses torch's
};
inline constexpr int64_t kWorkspaceBytes = int64_t{8} << 20;

template <class P>
struct Served {
  int64_t (*scratch_bytes)(const Checked<P>& call, const Plan& plan, bool tf32);
  void (*run)(const Checked<P>& call, const Plan& plan, const Context& context, const Stream (&streams)[2]);
};

extern const Served<Forward> kForwardFloat32, kForwardFloat64, kForwardBfloat16, kForwardFloat16;
extern const Served<Backward> kBackwardFloat32, kBackwardFloat64, kBackwardBfloat16, kBackwardFloat16;

}  // namespace pyrnnfast
