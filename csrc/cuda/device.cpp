// The backend of _cuda: which template serves a call, and the streams that it runs on; see backend.h.
#include <atomic>
#include <mutex>
#include <stdexcept>

#include "backend.h"
#include "runtime.h"
#include "served.h"

namespace pyrnnfast {
namespace {

std::atomic<bool> g_poison{false};

const Served<Forward>& served(const Checked<Forward>& call) {
  switch (call.directions[0].dtype) {
    case Dtype::float32:
      return kForwardFloat32;
    case Dtype::float64:
      return kForwardFloat64;
    case Dtype::bfloat16:
      return kForwardBfloat16;
    default:
      return kForwardFloat16;
  }
}

const Served<Backward>& served(const Checked<Backward>& call) {
  switch (call.directions[0].dtype) {
    case Dtype::float32:
      return kBackwardFloat32;
    case Dtype::float64:
      return kBackwardFloat64;
    case Dtype::bfloat16:
      return kBackwardBfloat16;
    default:
      return kBackwardFloat16;
  }
}

// A stream beside torch's, for the second direction; made once for each device, and never given back, as a stream is
// no good any more when the driver unloads. Each thread has its own: one that captures a graph would draw the others'
// work into it.
cudaStream_t second_stream(int device) {
  static thread_local std::vector<cudaStream_t> streams;
  const auto index = static_cast<size_t>(device);
  if (streams.size() <= index) streams.resize(index + 1, nullptr);
  if (streams[index] == nullptr) {
    check_cuda(cudaStreamCreateWithFlags(&streams[index], cudaStreamNonBlocking), "cudaStreamCreate");
  }
  return streams[index];
}

// The directions of the step form run side by side.
template <class P>
bool side_by_side(const Checked<P>& call, const Plan& plan) {
  return call.directions.size() == 2 && !plan.persistent;
}

template <class P>
int64_t bytes(const Checked<P>& call, const Plan& plan, bool tf32) {
  return served(call).scratch_bytes(call, plan, tf32) + (side_by_side(call, plan) ? 2 * kWorkspaceBytes : 0);
}

template <class P>
void run_on_streams(const Checked<P>& call, const Plan& plan, Context context) {
  // This module's own CUDA run time has to be told; the caller has told torch's.
  check_cuda(cudaSetDevice(context.device), "cudaSetDevice");
  auto* const main = static_cast<cudaStream_t>(context.stream);
  if (!side_by_side(call, plan)) {
    served(call).run(call, plan, context, {{main, nullptr}, {main, nullptr}});
    return;
  }
  auto* const workspaces = static_cast<char*>(context.scratch);
  context.scratch = workspaces + 2 * kWorkspaceBytes;
  auto* const side = second_stream(context.device);
  Event event;
  event.order(main, side);
  // Whatever happens, torch may reuse the memory only behind both.
  std::exception_ptr failure;
  try {
    served(call).run(call, plan, context, {{main, workspaces}, {side, workspaces + kWorkspaceBytes}});
  } catch (...) {
    failure = std::current_exception();
  }
  try {
    event.order(side, main);
  } catch (...) {
    if (!failure) throw;
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

const Rules kBackendRules = kCudaRules;

void set_delays(unsigned) { throw std::invalid_argument("there is no threshold 'delays' on a device"); }

void set_poison(bool poison) { g_poison = poison; }
bool poisons_products() { return g_poison; }

std::vector<DeviceProperties> devices() {
  static std::mutex mutex;
  static std::vector<DeviceProperties> found;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!found.empty()) return found;
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "CUDA");
  std::vector<DeviceProperties> all;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp p{};
    check_cuda(cudaGetDeviceProperties(&p, i), "CUDA");
    all.push_back({p.name, p.major, p.minor, p.multiProcessorCount, static_cast<int64_t>(p.sharedMemPerBlockOptin),
                   p.cooperativeLaunch != 0});
  }
  return found = all;
}

int64_t scratch_bytes(const Checked<Forward>& call, const Plan& plan, bool tf32) { return bytes(call, plan, tf32); }
int64_t scratch_bytes(const Checked<Backward>& call, const Plan& plan, bool tf32) { return bytes(call, plan, tf32); }
void run(const Checked<Forward>& call, const Plan& plan, const Context& context) {
  run_on_streams(call, plan, context);
}
void run(const Checked<Backward>& call, const Plan& plan, const Context& context) {
  run_on_streams(call, plan, context);
}

}  // namespace pyrnnfast
