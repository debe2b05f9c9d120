// Every kernel, for NEON, which every 64-bit ARM has.
#include "instruction_set.h"

namespace pyrnnfast {
// constexpr: no code of this file runs at import.
constexpr InstructionSet kNeon = instruction_set<16>("neon");
}  // namespace pyrnnfast
