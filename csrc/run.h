// Checked calls, both directions of each, while other Python threads go on.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "check.h"
#include "cpu/schedule.h"

namespace pyrnnfast {

template <class P>
void run_directions(const Checked<P>& call, int threads) {
  for (const P& direction : call.directions) run(direction, threads);
}

template <class P>
void run_without_gil(const Checked<P>& call, int threads) {
  const pybind11::gil_scoped_release release;
  run_directions(call, threads);
}

// One after the other, such as the layers of a stack.
template <class P>
void run_without_gil(const std::vector<Checked<P>>& calls, int threads) {
  const pybind11::gil_scoped_release release;
  for (const Checked<P>& call : calls) run_directions(call, threads);
}

}  // namespace pyrnnfast
