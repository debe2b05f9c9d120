// Which instruction set runs; see dispatch.h.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pyrnnfast {
namespace {

const InstructionSet* find(const std::string& name, const std::string& asked_by) {
  std::string names;
  for (const InstructionSet* isa : instruction_sets()) {
    if (name == isa->name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa->name);
  }
  throw std::invalid_argument(asked_by + " '" + name + "': this processor and build offer " + names);
}

const InstructionSet* initial() {
  const char* name = std::getenv("PYRNNFAST_ISA");
  return name != nullptr && *name != '\0' ? find(name, "PYRNNFAST_ISA") : instruction_sets().front();
}

std::atomic<const InstructionSet*>& in_use() {
  static std::atomic<const InstructionSet*> isa{initial()};
  return isa;
}

}  // namespace

std::vector<const InstructionSet*> instruction_sets() {
  std::vector<const InstructionSet*> all;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bf16")) all.push_back(&kAvx512Bf16);
  if (__builtin_cpu_supports("avx512f")) all.push_back(&kAvx512);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    all.push_back(&kAvx2);
#endif
#if defined(__aarch64__)
  all.push_back(&kNeon);
#else
  all.push_back(&kGeneric);
#endif
  return all;
}

const InstructionSet& instruction_set_in_use() { return *in_use().load(std::memory_order_relaxed); }

void select_instruction_set(const std::string& name) { in_use() = find(name, "instruction set"); }

}  // namespace pyrnnfast
