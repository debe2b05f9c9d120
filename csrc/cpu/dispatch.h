// Which instruction set runs.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"

namespace pyrnnfast {

// Those that this build has and this processor can run, the best first; the last one runs on every processor of the
// build's kind.
std::vector<const InstructionSet*> instruction_sets();

// The best, or the one that the environment variable PYRNNFAST_ISA names; select_instruction_set changes it.
// Both throw std::invalid_argument for a name that is not in instruction_sets().
const InstructionSet& instruction_set_in_use();
void select_instruction_set(const std::string& name);

}  // namespace pyrnnfast
