// Every kernel, for AVX2 and FMA.
#include "recurrence.h"

namespace pyrnnfast {
const InstructionSet kAvx2 = instruction_set<32>("avx2");
}  // namespace pyrnnfast
