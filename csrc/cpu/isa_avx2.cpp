// Every kernel, for AVX2 and FMA.
#include "instruction_set.h"

namespace pyrnnfast {
// constexpr: no code of this file runs at import.
constexpr InstructionSet kAvx2 = instruction_set<32>("avx2");
}  // namespace pyrnnfast
