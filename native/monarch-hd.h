#pragma once

// Arithmetic that the CPU and CUDA share is written once, in headers.

#ifdef __CUDA_ARCH__
#    define MONARCH_ALIGNED_LOADS
#endif

#ifdef __CUDACC__
#    define MONARCH_HD __host__ __device__
#    define MONARCH_UNROLL _Pragma("unroll")
#else
#    define MONARCH_HD
#    define MONARCH_UNROLL _Pragma("GCC unroll 16")
#endif
