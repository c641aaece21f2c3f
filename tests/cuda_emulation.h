#pragma once

// CUDA on the CPU, for tests: every thread of a block is a fibre that runs until it must wait for others. What kernels do
// wrong shows: shared memory starts as NaN and is followed by a guard, barriers that not all threads reach (or that are not
// the same one) end the program, and cuda_emulation_order changes who goes first, so that races change results.

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <vector>

struct dim3 {
    uint32_t x, y, z;

    dim3(uint32_t x = 1, uint32_t y = 1, uint32_t z = 1) : x(x), y(y), z(z) {
    }
};

typedef void * cudaStream_t;

static dim3 threadIdx, blockIdx, blockDim, gridDim;

// 0: ascending, 1: descending, others: shuffled
static uint32_t cuda_emulation_order = 0;
static uint64_t cuda_emulation_launches = 0;

enum cuda_fibre_state {
    CUDA_FIBRE_NEW,      // has no stack yet
    CUDA_FIBRE_READY,
    CUDA_FIBRE_AT_WARP,  // waits for its warp
    CUDA_FIBRE_AT_BLOCK, // waits for its block
    CUDA_FIBRE_DONE,
};

struct cuda_fibre {
    ucontext_t        context;
    jmp_buf           jump;
    std::vector<char> stack;
    cuda_fibre_state  state;
    int               line;       // of the barrier
    uint32_t          n_shuffles;
    uint32_t          shuffled[2];
};

static const uint32_t CUDA_WARP        = 32;
static const uint32_t CUDA_MAX_THREADS = 1024;

static struct {
    cuda_fibre              fibres[CUDA_MAX_THREADS]; // they do not move: their stacks point to them
    std::function<void()>   kernel;
    jmp_buf                 jump;
    uint32_t                current;
    float                 * shared;
} cuda_block;

static void cuda_fail(const char * what, int line) {
    fprintf(stderr, "emulation: %s (line %d, block %u %u %u, thread %u)\n", what, line, blockIdx.x, blockIdx.y, blockIdx.z, cuda_block.current);
    abort();
}

// kernel after kernel: a fibre begins but once
static void cuda_fibre_run() {
    while (true) {
        cuda_block.kernel();

        cuda_fibre & fibre = cuda_block.fibres[cuda_block.current];

        fibre.state = CUDA_FIBRE_DONE;
        if (!_setjmp(fibre.jump)) {
            longjmp(cuda_block.jump, 1);
        }
    }
}

static void cuda_fibre_wait(cuda_fibre_state state, int line) {
    cuda_fibre & fibre = cuda_block.fibres[cuda_block.current];

    fibre.state = state;
    fibre.line  = line;
    if (!_setjmp(fibre.jump)) {
        longjmp(cuda_block.jump, 1);
    }
    threadIdx = dim3(cuda_block.current, 0, 0);
}

static void cuda_fibre_resume(uint32_t i) {
    cuda_fibre & fibre = cuda_block.fibres[i];

    cuda_block.current = i;
    threadIdx = dim3(i, 0, 0);
    if (_setjmp(cuda_block.jump)) {
        return;
    }
    if (fibre.state == CUDA_FIBRE_NEW) {
        fibre.state = CUDA_FIBRE_READY;
        fibre.stack.resize(64 << 10);
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp   = fibre.stack.data();
        fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link          = nullptr;
        makecontext(&fibre.context, cuda_fibre_run, 0);
        setcontext(&fibre.context);
    }
    fibre.state = CUDA_FIBRE_READY;
    longjmp(fibre.jump, 1);
}

// lets threads [i0, i1) go on if all of them wait for one another
static bool cuda_release(uint32_t i0, uint32_t i1, cuda_fibre_state state) {
    uint32_t n = 0;
    for (uint32_t i = i0; i < i1; ++i) {
        n += cuda_block.fibres[i].state == state;
    }
    if (n < i1 - i0) {
        return false;
    }
    for (uint32_t i = i0; i < i1; ++i) {
        if (cuda_block.fibres[i].line != cuda_block.fibres[i0].line) {
            cuda_fail("threads wait at different barriers", cuda_block.fibres[i].line);
        }
        cuda_block.fibres[i].state = CUDA_FIBRE_READY;
    }
    return true;
}

static bool cuda_release_any(uint32_t n) {
    bool res = cuda_release(0, n, CUDA_FIBRE_AT_BLOCK);

    for (uint32_t i = 0; i < n; i += CUDA_WARP) {
        res |= cuda_release(i, i + CUDA_WARP, CUDA_FIBRE_AT_WARP);
    }
    return res;
}

static std::vector<uint32_t> cuda_order(uint32_t n) {
    static uint32_t seed = 1;

    std::vector<uint32_t> res(n);
    std::iota(res.begin(), res.end(), 0);
    if (cuda_emulation_order == 1) {
        std::reverse(res.begin(), res.end());
    }
    for (uint32_t i = n; cuda_emulation_order > 1 && i > 1; --i) {
        seed = seed*1664525u + 1013904223u;
        std::swap(res[i - 1], res[(seed >> 8)%i]);
    }
    return res;
}

static void cuda_block_run(uint32_t n) {
    for (uint32_t i = 0; i < n; ++i) {
        cuda_block.fibres[i].state      = cuda_block.fibres[i].stack.empty() ? CUDA_FIBRE_NEW : CUDA_FIBRE_READY;
        cuda_block.fibres[i].n_shuffles = 0;
    }

    const std::vector<uint32_t> order = cuda_order(n);

    uint32_t n_done = 0;
    while (n_done < n) {
        for (uint32_t i : order) {
            if (cuda_block.fibres[i].state <= CUDA_FIBRE_READY) {
                cuda_fibre_resume(i);
            }
        }
        n_done = 0;
        for (uint32_t i = 0; i < n; ++i) {
            n_done += cuda_block.fibres[i].state == CUDA_FIBRE_DONE;
        }
        if (n_done < n && !cuda_release_any(n)) {
            cuda_fail("not all threads reach a barrier", cuda_block.fibres[0].line);
        }
    }
}

static void cuda_launch(const dim3 & grid, uint32_t n_threads, size_t shared_size, const std::function<void()> & kernel) {
    if (n_threads%CUDA_WARP != 0 || n_threads > CUDA_MAX_THREADS || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
        cuda_fail("no such launch", 0);
    }
    if (shared_size > 48 << 10) {
        cuda_fail("more shared memory than a block has", 0);
    }

    cuda_emulation_launches++;
    cuda_block.kernel = kernel;
    gridDim           = grid;
    blockDim          = dim3(n_threads);

    for (uint32_t i : cuda_order(grid.x*grid.y*grid.z)) {
        blockIdx = dim3(i%grid.x, i/grid.x%grid.y, i/grid.x/grid.y);

        // NaN, and a guard of the same behind it
        std::vector<uint8_t> shared(shared_size + 1024, 0xff);

        cuda_block.shared = (float *) shared.data();
        cuda_block_run(n_threads);

        for (size_t j = shared_size; j < shared.size(); ++j) {
            if (shared[j] != 0xff) {
                cuda_fail("written past the end of shared memory", 0);
            }
        }
    }
}

static float cuda_shuffle_xor(float x, int32_t i, int line) {
    cuda_fibre & fibre = cuda_block.fibres[cuda_block.current];

    // a lane is never two shuffles ahead of another
    const uint32_t slot = fibre.n_shuffles++%2;

    memcpy(&fibre.shuffled[slot], &x, sizeof(x));
    cuda_fibre_wait(CUDA_FIBRE_AT_WARP, line);

    float res;
    memcpy(&res, &cuda_block.fibres[cuda_block.current ^ i].shuffled[slot], sizeof(res));
    return res;
}

static inline int32_t atomicAdd(int32_t * x, int32_t y) {
    const int32_t res = *x;
    *x += y;
    return res;
}

#define __syncthreads()               cuda_fibre_wait(CUDA_FIBRE_AT_BLOCK, __LINE__)
#define __syncwarp()                  cuda_fibre_wait(CUDA_FIBRE_AT_WARP,  __LINE__)
#define __shfl_xor_sync(lanes, x, i)  cuda_shuffle_xor(x, i, __LINE__)

#define MONARCH_KERNEL static void
#define MONARCH_DEVICE static inline
#define MONARCH_SHARED(name) float * name = cuda_block.shared
#define MONARCH_LAUNCH(kernel, grid, n_threads, shared, stream, ...) cuda_launch(grid, n_threads, shared, [=] { (void) (stream); kernel(__VA_ARGS__); })
