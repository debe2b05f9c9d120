// Every kernel, for AVX-512 F.
#include "recurrence.h"

namespace pyrnnfast {
const InstructionSet kAvx512 = instruction_set<64>("avx512");
}  // namespace pyrnnfast
