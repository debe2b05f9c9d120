// The CUDA path on the host (host.h), for tests on machines without a GPU: the module _emulation.
#include "backend.h"
#include "host.h"
#include "select.h"

namespace pyrnnfast {

// As on the device, but for where the memory is.
const Rules kBackendRules{Memory::cpu, true, false};
const char* const kArchitectures = "";
const char* const kToolkit = "";

std::vector<DeviceProperties> devices() {
  // Of an H100.
  return {{"emulation", 9, 0, 132, 232448, true}};
}

namespace {

template <class P>
int64_t bytes(const Checked<P>& call, const Plan& plan, bool tf32) {
  return with_dtype(call.directions[0].dtype,
                    [&](auto number) { return scratch_bytes_of<decltype(number)>(call, plan, tf32); });
}

template <class P>
void run_on_host(const Checked<P>& call, const Plan& plan, const Context& context) {
  HostMachine machine;
  HostMachine* const machines[] = {&machine, &machine};
  with_dtype(call.directions[0].dtype, [&](auto number) { run_with<decltype(number)>(call, plan, context, machines); });
}

}  // namespace

int64_t scratch_bytes(const Checked<Forward>& call, const Plan& plan, bool tf32) { return bytes(call, plan, tf32); }
int64_t scratch_bytes(const Checked<Backward>& call, const Plan& plan, bool tf32) { return bytes(call, plan, tf32); }
void run(const Checked<Forward>& call, const Plan& plan, const Context& context) { run_on_host(call, plan, context); }
void run(const Checked<Backward>& call, const Plan& plan, const Context& context) { run_on_host(call, plan, context); }

void set_delays(unsigned seed) { delays().seed = seed; }
void set_poison(bool) { throw std::invalid_argument("there is no threshold 'poison' on the host"); }

}  // namespace pyrnnfast
