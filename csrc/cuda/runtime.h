// CUDA's run time in C++: errors as exceptions, events that give themselves back.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace pyrnnfast {

// Whether NaN is written to where cuBLAS is about to write: see set_poison in backend.h.
bool poisons_products();

namespace {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // else the next launch would be blamed for it
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

class Event {
 public:
  Event() { check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // What `later` is given from now on waits for what `earlier` has been given.
  void order(cudaStream_t earlier, cudaStream_t later) {
    check_cuda(cudaEventRecord(event_, earlier), "cudaEventRecord");
    check_cuda(cudaStreamWaitEvent(later, event_, 0), "cudaStreamWaitEvent");
  }

 private:
  cudaEvent_t event_ = nullptr;
};

}  // namespace
}  // namespace pyrnnfast
