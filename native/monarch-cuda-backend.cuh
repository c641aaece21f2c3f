#pragma once

// GGML_OP_MONARCH in ggml-cuda's terms: called from its dispatch.

#include "ggml-cuda/common.cuh"

void ggml_cuda_monarch(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Pinned memory of the host that all CUDA devices reach, for cold pages. ggml-cuda's own pinned memory is for transfers: its
// backend does not compute on it.
ggml_backend_buffer_type_t ggml_cuda_monarch_mapped_buffer_type(ggml_backend_dev_t dev);

bool ggml_cuda_monarch_is_mapped(ggml_backend_buffer_type_t buft);
