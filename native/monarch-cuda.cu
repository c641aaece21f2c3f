// Compiled by itself, without the flags of ggml-cuda (monarch.cmake): -use_fast_math or fused products would change what
// pages hold.

#include "monarch-cuda.h"
#include "monarch-cuda.cuh"

bool monarch_cuda_supports_op(const ggml_tensor * dst) {
    const monarch_op_params op = monarch_cuda_get_params(dst);

    if (!monarch_codec_is_valid(&op.codec)) {
        return false;
    }
    switch (op.kind) {
        case MONARCH_OP_ATTEND:   return monarch_cuda_attend_is_supported  (dst);
        case MONARCH_OP_PAGE_OUT: return monarch_cuda_page_out_is_supported(dst);
        default:                  return false;
    }
}

size_t monarch_cuda_work_size(const ggml_tensor * dst, int32_t n_sm) {
    return monarch_cuda_get_params(dst).kind == MONARCH_OP_ATTEND ? monarch_cuda_attend_size(dst, n_sm) : 0;
}

void monarch_cuda_forward(ggml_tensor * dst, int32_t n_sm, void * work, void * stream) {
    if (monarch_cuda_get_params(dst).kind == MONARCH_OP_ATTEND) {
        monarch_cuda_forward_attend(dst, n_sm, work, (cudaStream_t) stream);
    } else {
        monarch_cuda_forward_page_out(dst, (cudaStream_t) stream);
    }
}
