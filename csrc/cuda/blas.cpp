// Matrix products by torch's cuBLAS; see blas.h. The declarations are cuBLAS's binary interface, the same since
// CUDA 11.
#include "blas.h"

#include <dlfcn.h>

#include <limits>
#include <stdexcept>
#include <string>

namespace pyrnnfast {
namespace {

constexpr int kNotTransposed = 0, kTransposed = 1;               // cublasOperation_t
constexpr int kFloat = 0, kDouble = 1, kHalf = 2, kBfloat = 14;  // cudaDataType
constexpr int kComputeFloat = 68, kComputeDouble = 70, kComputeTf32 = 77;
constexpr int kDefaultAlgorithm = -1;
constexpr int kDefaultMath = 0, kNoReducedPrecision = 16;  // sums of float16 products are float32 throughout

struct Functions {
  int (*gemm)(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int a_type,
              int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type, int ldc, int compute,
              int algorithm);
  int (*set_stream)(void* handle, void* stream);
  int (*set_workspace)(void* handle, void* workspace, size_t bytes);
  int (*set_math_mode)(void* handle, int mode);
  int (*get_math_mode)(void* handle, int* mode);
};

template <class F>
void find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(std::string("cuBLAS has no function ") + name);
}

Functions load() {
  // The one that torch is linked to, as others may be loaded beside it. Where torch's CUDA half has another name, the
  // one that is there.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library != nullptr && dlsym(library, "cublasGemmEx") == nullptr) library = nullptr;
  for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so.11"}) {
    if (library == nullptr) library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  }
  if (library == nullptr) throw std::runtime_error("torch has loaded no cuBLAS");
  Functions f{};
  find(library, "cublasGemmEx", f.gemm);
  find(library, "cublasSetStream_v2", f.set_stream);
  find(library, "cublasSetWorkspace_v2", f.set_workspace);
  find(library, "cublasSetMathMode", f.set_math_mode);
  find(library, "cublasGetMathMode", f.get_math_mode);
  return f;
}

const Functions& functions() {
  static const Functions f = load();
  return f;
}

void check(int status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string(what) + " failed with cuBLAS status " + std::to_string(status));
}

int type_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32:
      return kFloat;
    case Dtype::float64:
      return kDouble;
    case Dtype::bfloat16:
      return kBfloat;
    default:
      return kHalf;
  }
}

// Not std::invalid_argument, by which the door says that a call is not what it has to be: this one runs already.
int narrow(int64_t size) {
  if (size > std::numeric_limits<int>::max()) throw std::length_error("a size or a stride is beyond 32 bits");
  return static_cast<int>(size);
}

}  // namespace

Blas::Blas(void* handle) : handle_(handle) {
  check(functions().get_math_mode(handle_, &mode_), "cublasGetMathMode");
  check(functions().set_math_mode(handle_, kDefaultMath | kNoReducedPrecision), "cublasSetMathMode");
}

Blas::~Blas() { functions().set_math_mode(handle_, mode_); }

void Blas::use(void* stream, void* workspace, int64_t bytes) {
  if (own_stream_ && stream == stream_) return;
  check(functions().set_stream(handle_, stream), "cublasSetStream");
  // Behind the other, which it makes forgotten.
  check(functions().set_workspace(handle_, workspace, static_cast<size_t>(bytes)), "cublasSetWorkspace");
  stream_ = stream;
  own_stream_ = true;
}

void Blas::multiply(const BlasProduct& p) {
  const bool wide = p.dtype == Dtype::float64;
  const double one = 1, add = p.add ? 1 : 0;
  const float one_narrow = 1, add_narrow = p.add ? 1 : 0;
  const int compute = wide ? kComputeDouble : p.dtype == Dtype::float32 && p.tf32 ? kComputeTf32 : kComputeFloat;
  // cuBLAS counts by columns: outᵀ = bᵀ aᵀ.
  check(functions().gemm(handle_, p.b_transposed ? kTransposed : kNotTransposed,
                         p.a_transposed ? kTransposed : kNotTransposed, narrow(p.columns), narrow(p.rows),
                         narrow(p.depth), wide ? static_cast<const void*>(&one) : &one_narrow, p.b, type_of(p.dtype),
                         narrow(p.b_stride), p.a, type_of(p.dtype), narrow(p.a_stride),
                         wide ? static_cast<const void*>(&add) : &add_narrow, p.out, type_of(p.out_dtype),
                         narrow(p.out_stride), compute, kDefaultAlgorithm),
        "cublasGemmEx");
}

}  // namespace pyrnnfast
