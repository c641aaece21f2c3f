#pragma once

// GGML_OP_MONARCH on CUDA, without ggml-cuda: monarch-cuda-backend.cu calls it.

#include "monarch-op.h"

#include <stddef.h>
#include <stdint.h>

// whether the kernels take these types, shapes and knobs; where the tensors lie is the caller's business
bool monarch_cuda_supports_op(const struct ggml_tensor * dst);

// bytes of scratch
size_t monarch_cuda_work_size(const struct ggml_tensor * dst, int32_t n_sm);

// work: on the device; stream: a cudaStream_t; launches only: nothing waits, nothing is read back
void monarch_cuda_forward(struct ggml_tensor * dst, int32_t n_sm, void * work, void * stream);
