// The operands of both passes out of the arguments of a Python call, which _cpu and _cuda have in common.
#pragma once

#include <initializer_list>
#include <vector>

#include "arguments.h"
#include "check.h"

namespace pyrnnfast {

// The names of the arguments: those of the operands, then `others`.
std::vector<const char*> forward_names(std::initializer_list<const char*> others);
std::vector<const char*> backward_names(std::initializer_list<const char*> others);
// How many of the names are those of operands, the cell's among them.
inline constexpr size_t kForwardOperands = 10, kBackwardOperands = 17;

ForwardOperands read_forward(const Arguments& arguments);
BackwardOperands read_backward(const Arguments& arguments);

}  // namespace pyrnnfast
