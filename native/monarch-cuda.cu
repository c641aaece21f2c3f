// Compiled by itself, without the flags of ggml-cuda (monarch.cmake): -use_fast_math or fused products would change what
// pages hold.

#include "monarch-cuda.h"
#include "monarch-cuda.cuh"

bool monarch_cuda_supports_op(const ggml_tensor * dst) {
    const monarch_op_params op = monarch_cuda_get_params(dst);

    if (!monarch_cuda_codec_is_supported(op.codec) || !monarch_cuda_type_is_supported(dst->src[1]) || !monarch_cuda_type_is_supported(dst->src[2])) {
        return false;
    }
    switch (op.kind) {
        case MONARCH_OP_ATTEND:   return dst->src[0]->nb[0] == sizeof(float) && monarch_cuda_type_is_supported(dst->src[3]);
        case MONARCH_OP_PAGE_OUT: return true;
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
