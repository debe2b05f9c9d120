// Reads a torch tensor through DLPack's C exchange table, which torch.Tensor carries as `__dlpack_c_exchange_api__`:
// no libtorch, no copy, no reference taken. The lazy negation bit does not show there: obstacles.py and
// read_plain_tensor leave such operands to torch, and passes.py resolves gradients. The declarations are the binary
// interface of DLPack 1.2 or later.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "check.h"

namespace pyrnnfast {

// An absent operand for None; py::type_error for what is no tensor. The tensor must outlive the result.
Operand read_tensor(pybind11::handle object, const char* name);
// Of a tuple; py::type_error for anything else. (A list could be emptied by another thread while the kernels run.)
std::vector<Operand> read_tensors(pybind11::handle tuple, const char* name);

// Whether an object is a plain tensor: of exactly one of these types, not lazily negated, where the rules want it, and
// of a dtype of theirs. If so, `operand` is it.
bool read_plain_tensor(pybind11::handle object, const pybind11::tuple& types, const Rules& rules, Operand& operand);
// By the rules of the CPU or of CUDA devices, wherever it is.
bool read_plain_tensor(pybind11::handle object, const pybind11::tuple& types, Operand& operand);

// Whether it is zeros that have no memory, as torch's derivatives may hand over.
bool is_zero_tensor(pybind11::handle object);

// torch's current stream of a CUDA device; any tensor will do to find torch by.
void* current_stream(pybind11::handle tensor, int device);

}  // namespace pyrnnfast
