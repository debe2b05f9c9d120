// The definition of one of served.h's.
#pragma once

#include "device.cuh"
#include "select.h"
#include "served.h"

namespace pyrnnfast {
namespace {

template <class E, class P>
void run_on_device(const Checked<P>& call, const Plan& plan, const Context& context, const Stream (&streams)[2]) {
  Blas blas(context.blas);
  auto* const first = static_cast<cudaStream_t>(streams[0].stream);
  auto* const second = static_cast<cudaStream_t>(streams[1].stream);
  DeviceMachine one(first, second, blas, streams[0].workspace, kWorkspaceBytes);
  DeviceMachine two(second, first, blas, streams[1].workspace, kWorkspaceBytes);
  DeviceMachine* const machines[] = {&one, &two};
  run_with<E>(call, plan, context, machines);
}

template <class E, class P>
constexpr Served<P> served() {
  return {&scratch_bytes_of<E, P>, &run_on_device<E, P>};
}

}  // namespace
}  // namespace pyrnnfast
