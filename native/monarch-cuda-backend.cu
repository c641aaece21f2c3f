#include "monarch-cuda-backend.cuh"

#include "monarch-cuda.h"

#include "ggml-backend-impl.h"

void ggml_cuda_monarch(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const int32_t n_sm = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;

    ggml_cuda_pool_alloc<char> work(ctx.pool());

    const size_t size = monarch_cuda_work_size(dst, n_sm);
    if (size > 0) {
        work.alloc(size);
    }

    monarch_cuda_forward(dst, n_sm, work.get(), ctx.stream());
}

//
// memory of the host that devices reach
//

static const char * ggml_cuda_monarch_mapped_get_name(ggml_backend_buffer_type_t buft) {
    return GGML_CUDA_NAME "_Mapped";

    GGML_UNUSED(buft);
}

static void ggml_cuda_monarch_mapped_free_buffer(ggml_backend_buffer_t buffer) {
    CUDA_CHECK(cudaFreeHost(buffer->context));
}

// with unified addressing, which every device here has, it is at the same address for the host and for all devices
static ggml_backend_buffer_t ggml_cuda_monarch_mapped_alloc_buffer(ggml_backend_buffer_type_t buft, size_t size) {
    void * ptr = nullptr;

    const cudaError_t err = cudaHostAlloc(&ptr, size, cudaHostAllocMapped | cudaHostAllocPortable);
    if (err != cudaSuccess) {
        (void) cudaGetLastError(); // it is reported here
        GGML_LOG_ERROR("%s: %.2f MiB of pinned memory: %s\n", __func__, size/1024.0/1024.0, cudaGetErrorString(err));
        return nullptr;
    }

    ggml_backend_buffer_t buffer = ggml_backend_cpu_buffer_from_ptr(ptr, size);

    buffer->buft              = buft;
    buffer->iface.free_buffer = ggml_cuda_monarch_mapped_free_buffer;

    return buffer;
}

ggml_backend_buffer_type_t ggml_cuda_monarch_mapped_buffer_type(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type res = {
        /* .iface   = */ {
            /* .get_name       = */ ggml_cuda_monarch_mapped_get_name,
            /* .alloc_buffer   = */ ggml_cuda_monarch_mapped_alloc_buffer,
            /* .get_alignment  = */ ggml_backend_cpu_buffer_type()->iface.get_alignment,
            /* .get_max_size   = */ nullptr,
            /* .get_alloc_size = */ ggml_backend_cpu_buffer_type()->iface.get_alloc_size,
            /* .is_host        = */ ggml_backend_cpu_buffer_type()->iface.is_host,
        },
        /* .device  = */ ggml_backend_reg_dev_get(ggml_backend_dev_backend_reg(dev), 0),
        /* .context = */ nullptr,
    };

    return &res;
}

bool ggml_cuda_monarch_is_mapped(ggml_backend_buffer_type_t buft) {
    return buft->iface.get_name == ggml_cuda_monarch_mapped_get_name;
}
