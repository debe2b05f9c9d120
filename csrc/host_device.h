// The marks of functions that a CUDA device may run, too, or alone; nothing for other compilers than nvcc.
#pragma once

#if defined(__CUDACC__)
#define PYRNNFAST_HD __host__ __device__
#define PYRNNFAST_DEVICE __device__
#else
#define PYRNNFAST_HD
#define PYRNNFAST_DEVICE
#endif
