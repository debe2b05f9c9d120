// Every kernel, for the baseline of the processor.
#include "recurrence.h"

namespace pyrnnfast {
const InstructionSet kGeneric = instruction_set<16>("generic");
}  // namespace pyrnnfast
