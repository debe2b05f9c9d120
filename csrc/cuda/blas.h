// Matrix products by the cuBLAS that torch has loaded, through torch's own handle: no second library, and nothing to
// link against.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace pyrnnfast {

// By rows: out [rows, columns] = a [rows, depth] · b [depth, columns].
struct BlasProduct {
  Dtype dtype;      // of a and b
  Dtype out_dtype;  // of out: the same, or what is computed with
  bool tf32;
  bool a_transposed, b_transposed;
  int64_t rows, columns, depth;
  const void* a;
  int64_t a_stride;
  const void* b;
  int64_t b_stride;
  void* out;
  int64_t out_stride;
  bool add;
};

// For the duration of a call: products are not narrower than they are asked to be.
class Blas {
 public:
  // Throws std::runtime_error where no cuBLAS is loaded.
  explicit Blas(void* handle);
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  // All that follows goes to that stream, with that workspace. Without a call, to torch's current ones.
  void use(void* stream, void* workspace, int64_t bytes);
  // Throws std::runtime_error where cuBLAS refuses, std::invalid_argument where a size is beyond 32 bits.
  void multiply(const BlasProduct& product);

 private:
  void* handle_;
  int mode_ = 0;
  void* stream_ = nullptr;
  bool own_stream_ = false;
};

}  // namespace pyrnnfast
