#pragma once

// GGML_OP_MONARCH on the CPU backend: called from ggml-cpu's dispatch.

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

void   ggml_compute_forward_monarch(const struct ggml_compute_params * params, struct ggml_tensor * dst);
size_t ggml_compute_forward_monarch_work_size(const struct ggml_tensor * dst, int n_tasks);

#ifdef __cplusplus
}
#endif
