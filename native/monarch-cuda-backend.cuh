#pragma once

// GGML_OP_MONARCH in ggml-cuda's terms: called from its dispatch.

#include "ggml-cuda/common.cuh"

void ggml_cuda_monarch(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
