#pragma once

// What the kernels of monarch-cuda.cuh are written in: CUDA, or its emulation on the CPU (tests/cuda_emulation.h).

#include "monarch-hd.h"

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_runtime.h>

#define MONARCH_KERNEL static __global__ void
#define MONARCH_DEVICE static __device__ inline

// a block's dynamic shared memory
#define MONARCH_SHARED(name) extern __shared__ __align__(16) float name[]

#define MONARCH_LAUNCH(kernel, grid, n_threads, shared, stream, ...) kernel<<<grid, n_threads, shared, stream>>>(__VA_ARGS__)

#else

#include "cuda_emulation.h"

#endif

#define MONARCH_WARP     32
#define MONARCH_ALL_LANES 0xffffffffu

// width: a power of two; every lane gets the result of its own `width` neighbours
MONARCH_DEVICE float monarch_warp_max(float x, int32_t width) {
    for (int32_t i = width/2; i > 0; i /= 2) {
        x = fmaxf(x, __shfl_xor_sync(MONARCH_ALL_LANES, x, i));
    }
    return x;
}

MONARCH_DEVICE float monarch_warp_sum(float x, int32_t width) {
    for (int32_t i = width/2; i > 0; i /= 2) {
        x += __shfl_xor_sync(MONARCH_ALL_LANES, x, i);
    }
    return x;
}

// over a block of any whole number of warps; scratch: one float to a warp
MONARCH_DEVICE float monarch_block_max(float x, float * scratch) {
    const int32_t n_warps = blockDim.x/MONARCH_WARP;

    x = monarch_warp_max(x, MONARCH_WARP);
    if (threadIdx.x % MONARCH_WARP == 0) {
        scratch[threadIdx.x/MONARCH_WARP] = x;
    }
    __syncthreads();
    for (int32_t i = 0; i < n_warps; ++i) {
        x = fmaxf(x, scratch[i]);
    }
    __syncthreads();
    return x;
}

MONARCH_DEVICE float monarch_block_sum(float x, float * scratch) {
    const int32_t n_warps = blockDim.x/MONARCH_WARP;

    x = monarch_warp_sum(x, MONARCH_WARP);
    if (threadIdx.x % MONARCH_WARP == 0) {
        scratch[threadIdx.x/MONARCH_WARP] = x;
    }
    __syncthreads();
    x = 0.0f;
    for (int32_t i = 0; i < n_warps; ++i) {
        x += scratch[i];
    }
    __syncthreads();
    return x;
}

// a thread's share of n things: neighbours, so that sums over threads are in the order of the things
struct monarch_share {
    int32_t i0;
    int32_t i1;
};

MONARCH_DEVICE monarch_share monarch_share_get(int32_t n) {
    const int32_t n_share = (n + (int32_t) blockDim.x - 1)/(int32_t) blockDim.x;
    const int32_t i0      = (int32_t) threadIdx.x*n_share;

    const monarch_share res = { i0 < n ? i0 : n, i0 + n_share < n ? i0 + n_share : n };
    return res;
}

// the sum of x over this thread and those before it; sums: one to a thread, the last one the total until it is written again
MONARCH_DEVICE int32_t monarch_block_scan(int32_t x, int32_t * sums) {
    const int32_t i = threadIdx.x;

    sums[i] = x;
    __syncthreads();
    for (int32_t step = 1; step < (int32_t) blockDim.x; step *= 2) {
        const int32_t before = i >= step ? sums[i - step] : 0;
        __syncthreads();
        sums[i] += before;
        __syncthreads();
    }
    return sums[i];
}
