// The tensors of plain calls: read as the kernels want them, and allocated by torch, as all of its own results are.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "plain.h"

namespace pyrnnfast {

// What kind of stack a call is for.
struct Form {
  std::string cell;
  const Widths* widths = nullptr;
  int64_t layers = 0, directions = 0;
  bool single_step = false, batch_first = false;

  int64_t runs() const { return layers * directions; }
  // Of all weights as Reader::read_weights has them.
  bool projects(const std::vector<Operand>& weights) const {
    return static_cast<int64_t>(weights.size()) == 5 * runs();
  }
  // Where it has weight number i of those of a call, which has `each` for a layer and direction.
  static size_t place_of(size_t i, size_t each) {
    const size_t kind = i % each;
    if (each % 2 == 0) return i / each * 4 + kind;
    return i / each * 5 + (kind + 1 == each ? 4 : kind);
  }
};

// The operands that both passes of a call have; see plain.h.
struct PlainCall {
  explicit PlainCall(const Arguments& arguments);

  pybind11::tuple types, form;
  pybind11::handle x, batch_sizes;
  pybind11::tuple weights;
};

// Whether it is one. Of truth values only the objects True and False count; others are left to torch.
bool read_form(const pybind11::tuple& given, Form& form);

// Of x, y and their gradients, and of states.
enum class Layout { step, packed, unbatched, time_major, batch_first };

// Reads tensors, and keeps what it has to copy for that.
class Reader {
 public:
  // By the rules of the kernels. Where `resolve` says so, tensors may be of other types than these, too, and those that
  // are lazily negated are resolved; what cannot be read is refused by an exception.
  Reader(const pybind11::tuple& types, const Rules& rules, bool resolve)
      : types_(types), rules_(rules), resolve_(resolve) {}

  // Whether it is a plain tensor of so many dimensions; if so, `o` is it, or a copy, contiguous. One that is
  // expanded is copied if it has at most so many elements, or if asked to resolve: what has the wrong shape may be
  // small in memory and a copy of it endless.
  bool read(pybind11::handle tensor, int dimensions, Operand& o, int64_t expanded = 0);
  // The same of x, y and their gradients: as [T, B, columns] or, of steps and packed data, [N, columns].
  bool read_rows(pybind11::handle tensor, Layout layout, Operand& o);
  // The same of x with so many columns, from which the layout follows.
  bool read_x(const PlainCall& call, const Form& form, int64_t inputs, Layout& layout, Operand& o);
  // The same of states: as [layers·D, B, H] or, of steps, [B, H].
  bool read_states(pybind11::handle tensor, Layout layout, Operand& o, int64_t expanded = 0);
  // The same of the weights of each layer and direction, by fours, or by fives with projections; biases that there are
  // not are absent.
  bool read_weights(const pybind11::tuple& given, const Form& form, std::vector<Operand>& weights);

 private:
  bool plain(pybind11::handle& tensor, Operand& o);
  bool place(pybind11::handle tensor, Layout layout, Operand& o, int64_t expanded = 0);
  bool compact(pybind11::handle tensor, Operand& o, int64_t expanded = 0);
  pybind11::handle keep(pybind11::object tensor);

  const pybind11::tuple& types_;
  const Rules& rules_;
  bool resolve_;
  std::vector<pybind11::object> kept_;
};

// like.new_empty(sizes)
pybind11::object new_empty(pybind11::handle like, const int64_t* sizes, int dimensions);
// like.new_empty(rows, columns), which is float32 where `wide`
pybind11::object new_matrix(pybind11::handle like, int64_t rows, int64_t columns, bool wide = false);
// A tensor like x, whose rows are `rows`, of other columns; `o` is its rows, likewise.
pybind11::object new_rows(pybind11::handle x, const Operand& rows, Layout layout, int64_t columns, Operand& o);
// The same of states for a batch of B: [layers·D, B, H] or, of steps, [B, H].
pybind11::object new_states(pybind11::handle like, const Form& form, Layout layout, int64_t B, int64_t hidden,
                            Operand& o);

bool requires_grad(pybind11::handle tensor);

}  // namespace pyrnnfast
