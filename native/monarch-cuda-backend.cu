#include "monarch-cuda-backend.cuh"

#include "monarch-cuda.h"

void ggml_cuda_monarch(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const int32_t n_sm = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;

    ggml_cuda_pool_alloc<char> work(ctx.pool());

    const size_t size = monarch_cuda_work_size(dst, n_sm);
    if (size > 0) {
        work.alloc(size);
    }

    monarch_cuda_forward(dst, n_sm, work.get(), ctx.stream());
}
