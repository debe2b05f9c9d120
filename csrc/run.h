// A checked call, both directions of it, while other Python threads go on.
#pragma once

#include <pybind11/pybind11.h>

#include "check.h"
#include "cpu/schedule.h"

namespace pyrnnfast {

template <class P>
void run_without_gil(const Checked<P>& call, int threads) {
  const pybind11::gil_scoped_release release;
  for (const P& direction : call.directions) run(direction, threads);
}

}  // namespace pyrnnfast
