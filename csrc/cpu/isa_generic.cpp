// Every kernel, for the baseline of the processor.
#include "instruction_set.h"

namespace pyrnnfast {
// constexpr: no code of this file runs at import.
constexpr InstructionSet kGeneric = instruction_set<16>("generic");
}  // namespace pyrnnfast
