// What stands behind the bindings of the CUDA path: the device (device.cpp), or, in the tests, the host
// (emulation.cpp).
#pragma once

#include <string>
#include <vector>

#include "../check.h"
#include "plan.h"

namespace pyrnnfast {

// What a call has from torch, apart from its operands.
struct Context {
  int device = 0;
  void* stream = nullptr;
  void* blas = nullptr;  // torch's cuBLAS handle of this thread and device
  bool tf32 = false;
  void* scratch = nullptr;
};

// The rules of the door.
extern const Rules kBackendRules;

// What it was compiled for, as CMAKE_CUDA_ARCHITECTURES says it, and with which toolkit; empty for the host.
extern const char* const kArchitectures;
extern const char* const kToolkit;

// Random delays in the persistent form, which only the host has. 0: none.
void set_delays(unsigned seed);

// On a device, NaN before every product that cuBLAS writes: compute-sanitizer's initcheck does not see the copy engine
// write, by which some of cuBLAS's kernels do.
void set_poison(bool poison);

// Throws std::runtime_error with the driver's words where there is no driver or no device.
std::vector<DeviceProperties> devices();

int64_t scratch_bytes(const Checked<Forward>& call, const Plan& plan, bool tf32);
int64_t scratch_bytes(const Checked<Backward>& call, const Plan& plan, bool tf32);
// Throws std::runtime_error where the device or a library refuses.
void run(const Checked<Forward>& call, const Plan& plan, const Context& context);
void run(const Checked<Backward>& call, const Plan& plan, const Context& context);

}  // namespace pyrnnfast
