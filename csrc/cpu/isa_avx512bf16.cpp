// Every kernel, for AVX-512 F and BF16.
#include "instruction_set.h"

namespace pyrnnfast {
// constexpr: no code of this file runs at import.
constexpr InstructionSet kAvx512Bf16 = instruction_set<64>("avx512bf16");
}  // namespace pyrnnfast
