// Every kernel, for AVX-512 F.
#include "instruction_set.h"

namespace pyrnnfast {
// constexpr: no code of this file runs at import.
constexpr InstructionSet kAvx512 = instruction_set<64>("avx512");
}  // namespace pyrnnfast
