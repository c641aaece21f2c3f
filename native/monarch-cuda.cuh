#pragma once

// GGML_OP_MONARCH on CUDA. Same stages as on the CPU (monarch-attend.cpp), each a kernel or two; what is chosen stays on the
// device, so launches depend on shapes alone and CUDA graphs can replay them.

#include "monarch-cuda-attend.cuh"
#include "monarch-cuda-frames.cuh"
#include "monarch-cuda-page-out.cuh"
#include "monarch-cuda-select.cuh"

//
// launches
//

// scratch that more than one block of queries may take
#ifndef MONARCH_SCRATCH_MAX
#    define MONARCH_SCRATCH_MAX (128u << 20)
#endif

static monarch_op_params monarch_cuda_get_params(const ggml_tensor * dst) {
    monarch_op_params res;
    memcpy(&res, dst->op_params, sizeof(res));
    return res;
}

static monarch_cuda_matrix monarch_cuda_get_matrix(const ggml_tensor * t) {
    const monarch_cuda_matrix res = { (const char *) t->data, (int32_t) t->type, t->nb[1], t->nb[2] };
    return res;
}

// null: none
static char * monarch_cuda_get_frames(const ggml_tensor * t) {
    return t ? (char *) t->data : nullptr;
}

static char * monarch_cuda_take(char ** ptr, size_t size) {
    char * res = *ptr;
    *ptr += (size + 255)/256*256;
    return res;
}

// returns the end of the scratch
static char * monarch_cuda_take_scratch(monarch_cuda_attend & a, char * ptr) {
    const size_t n_groups = (size_t) a.n_blocks*a.n_head_kv;
    const size_t n_rows   = n_groups*a.n_rows;
    const size_t n_parts  = n_rows*(a.n_hot + a.n_cold);
    const size_t head_dim = a.op.codec.head_dim;

    a.q_rot       = (float   *) monarch_cuda_take(&ptr, n_rows*head_dim*sizeof(float));
    a.part_max    = (float   *) monarch_cuda_take(&ptr, n_parts*sizeof(float));
    a.part_sum    = (float   *) monarch_cuda_take(&ptr, n_parts*sizeof(float));
    a.part_acc    = (float   *) monarch_cuda_take(&ptr, n_parts*head_dim*sizeof(float));
    a.part_v      = (float   *) monarch_cuda_take(&ptr, n_groups*(a.n_hot + a.n_cold)*head_dim*sizeof(float));
    a.part_n_v    = (int32_t *) monarch_cuda_take(&ptr, n_groups*(a.n_hot + a.n_cold)*sizeof(int32_t));
    a.row_max     = (float   *) monarch_cuda_take(&ptr, n_rows*sizeof(float));
    a.row_inverse = (float   *) monarch_cuda_take(&ptr, n_rows*sizeof(float));
    a.row_rest    = (float   *) monarch_cuda_take(&ptr, n_rows*sizeof(float));
    a.row_lse     = (float   *) monarch_cuda_take(&ptr, n_rows*sizeof(float));
    a.mass        = (float   *) monarch_cuda_take(&ptr, n_rows*a.n_pages_max*sizeof(float));
    a.probability = (float   *) monarch_cuda_take(&ptr, n_groups*a.n_pages_max*sizeof(float));
    a.rank        = (float   *) monarch_cuda_take(&ptr, n_groups*a.n_pages_max*sizeof(float));
    a.chosen      = (int32_t *) monarch_cuda_take(&ptr, n_groups*a.n_pages_max*sizeof(int32_t));
    a.n_chosen    = (int32_t *) monarch_cuda_take(&ptr, n_groups*sizeof(int32_t));

    return ptr;
}

static int32_t monarch_cuda_clamp(int64_t x, int64_t lo, int64_t hi) {
    return (int32_t) (x < lo ? lo : x > hi ? hi : x);
}

// the rows that a thread block attends
static int32_t monarch_cuda_row_tile(int32_t n_rows) {
    return n_rows > 4 ? 8 : n_rows > 2 ? 4 : n_rows;
}

// parts and launches, from shapes alone
static monarch_cuda_attend monarch_cuda_plan(const ggml_tensor * dst, int32_t n_sm) {
    const ggml_tensor * q = dst->src[MONARCH_ATTEND_Q];
    const ggml_tensor * k = dst->src[MONARCH_ATTEND_K];

    monarch_cuda_attend a = {};

    a.op          = monarch_cuda_get_params(dst);
    a.n_head_kv   = (int32_t) k->ne[1];
    a.n_gqa       = (int32_t) (q->ne[1]/k->ne[1]);
    a.n_tokens    = (int32_t) q->ne[2];
    a.n_kv        = (int32_t) k->ne[2];
    a.n_pages_max = (int32_t) dst->src[MONARCH_ATTEND_POOL]->ne[1];
    a.n_block     = (int32_t) monarch_attend_block_size(a.n_gqa, a.n_tokens);
    a.n_rows      = a.n_block*a.n_gqa;

    const int32_t n_blocks = (a.n_tokens + a.n_block - 1)/a.n_block;
    const int32_t row_tile = monarch_cuda_row_tile(a.n_rows);
    const int32_t n_whole  = n_blocks*a.n_head_kv*((a.n_rows + row_tile - 1)/row_tile); // thread blocks, were nothing split
    const int32_t n_pages  = MONARCH_TILE/a.op.codec.page_size;

    // about two rounds of thread blocks for the whole device
    a.n_hot  = monarch_cuda_clamp(2*n_sm/n_whole, 1, (a.n_kv + MONARCH_TILE - 1)/MONARCH_TILE);
    a.n_cold = monarch_cuda_clamp(2*n_sm/n_whole, 1, (a.n_pages_max + n_pages - 1)/n_pages);

    a.n_blocks = 1;
    const size_t size = monarch_cuda_take_scratch(a, nullptr) - (char *) nullptr;
    a.n_blocks = monarch_cuda_clamp(MONARCH_SCRATCH_MAX/size, 1, a.n_tokens);

    return a;
}

static size_t monarch_cuda_attend_size(const ggml_tensor * dst, int32_t n_sm) {
    monarch_cuda_attend a = monarch_cuda_plan(dst, n_sm);

    return monarch_cuda_take_scratch(a, nullptr) - (char *) nullptr;
}

template <int ROWS>
static void monarch_cuda_launch_hot(const monarch_cuda_attend & a, int32_t n_groups, cudaStream_t stream) {
    const dim3 grid(a.n_hot, (a.n_rows + ROWS - 1)/ROWS, n_groups);

    MONARCH_LAUNCH(monarch_attend_hot<ROWS>, grid, MONARCH_THREADS, monarch_tile_size(ROWS, a.op.codec.head_dim), stream, a);
}

template <int ROWS>
static void monarch_cuda_launch_cold(const monarch_cuda_attend & a, int32_t n_groups, cudaStream_t stream) {
    const dim3 grid(a.n_cold, (a.n_rows + ROWS - 1)/ROWS, n_groups);

    MONARCH_LAUNCH(monarch_attend_cold<ROWS>, grid, MONARCH_THREADS, monarch_tile_size(ROWS, a.op.codec.head_dim), stream, a);
}

static void monarch_cuda_launch_attend(const monarch_cuda_attend & a, int32_t n_groups, bool is_hot, cudaStream_t stream) {
    switch (monarch_cuda_row_tile(a.n_rows)) {
        case 1:  is_hot ? monarch_cuda_launch_hot<1>(a, n_groups, stream) : monarch_cuda_launch_cold<1>(a, n_groups, stream); break;
        case 2:  is_hot ? monarch_cuda_launch_hot<2>(a, n_groups, stream) : monarch_cuda_launch_cold<2>(a, n_groups, stream); break;
        case 4:  is_hot ? monarch_cuda_launch_hot<4>(a, n_groups, stream) : monarch_cuda_launch_cold<4>(a, n_groups, stream); break;
        default: is_hot ? monarch_cuda_launch_hot<8>(a, n_groups, stream) : monarch_cuda_launch_cold<8>(a, n_groups, stream); break;
    }
}

static void monarch_cuda_launch_select(const monarch_cuda_attend & a, int32_t n_groups, cudaStream_t stream) {
    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_rows   = monarch_cuda_row_tile(a.n_rows); // queries in shared memory at a time

    const dim3 rows (a.n_rows, n_groups);
    const dim3 pages((a.n_pages_max + MONARCH_THREADS - 1)/MONARCH_THREADS, n_groups);

    MONARCH_LAUNCH(monarch_score_pages,    pages,    MONARCH_THREADS,        n_rows*2*head_dim*sizeof(float),            stream, a, n_rows);
    MONARCH_LAUNCH(monarch_estimate_rows,  rows,     MONARCH_THREADS,        MONARCH_THREADS/MONARCH_WARP*sizeof(float), stream, a);
    MONARCH_LAUNCH(monarch_estimate_pages, pages,    MONARCH_THREADS,        0,                                          stream, a);
    MONARCH_LAUNCH(monarch_select_pages,   n_groups, MONARCH_SELECT_THREADS, monarch_select_shared(),                    stream, a);
    MONARCH_LAUNCH(monarch_estimate_rest,  rows,     MONARCH_THREADS,        MONARCH_THREADS/MONARCH_WARP*sizeof(float), stream, a);
}

static void monarch_cuda_forward_attend(ggml_tensor * dst, int32_t n_sm, void * work, cudaStream_t stream) {
    monarch_cuda_attend a = monarch_cuda_plan(dst, n_sm);

    monarch_cuda_take_scratch(a, (char *) work);

    a.q       = monarch_cuda_get_matrix(dst->src[MONARCH_ATTEND_Q]);
    a.k       = monarch_cuda_get_matrix(dst->src[MONARCH_ATTEND_K]);
    a.v       = monarch_cuda_get_matrix(dst->src[MONARCH_ATTEND_V]);
    a.mask    = monarch_cuda_get_matrix(dst->src[MONARCH_ATTEND_MASK]);
    a.dst     = monarch_cuda_get_matrix(dst);
    a.pool    = (const uint8_t *) dst->src[MONARCH_ATTEND_POOL]->data;
    a.summary = (const uint8_t *) dst->src[MONARCH_ATTEND_SUMMARY]->data;
    a.state   = (char *)          dst->src[MONARCH_ATTEND_STATE]->data;
    a.table   = (int32_t *)       dst->src[MONARCH_ATTEND_TABLE]->data;
    a.frames  = monarch_cuda_get_frames(dst->src[MONARCH_ATTEND_FRAMES]);

    const int32_t head_dim     = a.op.codec.head_dim;
    // how many runs there are is not known here: at most one to a token; groups that are not there cost little
    const int32_t n_blocks_all = a.n_tokens;
    const int32_t n_blocks     = a.n_blocks;

    MONARCH_LAUNCH(monarch_apply_log, a.n_head_kv, MONARCH_THREADS, 0, stream, a);

    for (a.i_block = 0; a.i_block < n_blocks_all; a.i_block += n_blocks) {
        a.n_blocks = monarch_cuda_clamp(n_blocks_all - a.i_block, 1, n_blocks);

        const int32_t n_groups = a.n_blocks*a.n_head_kv;
        const dim3    rows(a.n_rows, n_groups);

        MONARCH_LAUNCH(monarch_rotate_queries, rows, MONARCH_THREADS, 2*head_dim*sizeof(float), stream, a);
        monarch_cuda_launch_attend(a, n_groups, true, stream);
        monarch_cuda_launch_select(a, n_groups, stream);
        monarch_cuda_launch_attend(a, n_groups, false, stream);
        MONARCH_LAUNCH(monarch_attend_merge, rows, MONARCH_THREADS, 3*head_dim*sizeof(float), stream, a);
        MONARCH_LAUNCH(monarch_write_log, a.n_head_kv, MONARCH_SELECT_THREADS, MONARCH_SELECT_THREADS*sizeof(int32_t), stream, a);

        // filled before the next launch looks for them
        if (a.frames) {
            MONARCH_LAUNCH(monarch_plan_frames, a.n_head_kv, MONARCH_SELECT_THREADS, monarch_plan_shared(), stream, a);
            MONARCH_LAUNCH(monarch_fill_frames, dim3(MONARCH_FRAME_BATCH, a.n_head_kv), MONARCH_THREADS, 0, stream, a);
        }
    }
}

static void monarch_cuda_forward_page_out(ggml_tensor * dst, cudaStream_t stream) {
    const ggml_tensor * page_outs = dst->src[MONARCH_PAGE_OUT_PAGES];

    monarch_cuda_page_out a = {};

    a.op          = monarch_cuda_get_params(dst);
    a.k           = monarch_cuda_get_matrix(dst->src[MONARCH_PAGE_OUT_K]);
    a.v           = monarch_cuda_get_matrix(dst->src[MONARCH_PAGE_OUT_V]);
    a.pool        = (uint8_t *)       dst->src[MONARCH_PAGE_OUT_POOL]->data;
    a.summary     = (uint8_t *)       dst->src[MONARCH_PAGE_OUT_SUMMARY]->data;
    a.state       = (char *)          dst->src[MONARCH_PAGE_OUT_STATE]->data;
    a.page_outs   = (const int32_t *) page_outs->data;
    a.frames      = monarch_cuda_get_frames(dst->src[MONARCH_PAGE_OUT_FRAMES]);
    a.n_head_kv   = (int32_t) dst->src[MONARCH_PAGE_OUT_K]->ne[1];
    a.n_pages_max = (int32_t) dst->src[MONARCH_PAGE_OUT_POOL]->ne[1];
    a.n_outs_max  = (int32_t) monarch_page_outs_count(page_outs->ne[0], a.op.codec.page_size);

    const dim3 grid(a.n_outs_max, a.n_head_kv);

    MONARCH_LAUNCH(monarch_encode_pages, grid, MONARCH_THREADS, monarch_page_out_shared(a.op.codec), stream, a);
}

//
// what is supported
//

static bool monarch_cuda_type_is_supported(const ggml_tensor * t) {
    return (t->type == GGML_TYPE_F16 && t->nb[0] == 2) || (t->type == GGML_TYPE_F32 && t->nb[0] == 4);
}

static bool monarch_cuda_attend_is_supported(const ggml_tensor * dst) {
    return dst->src[MONARCH_ATTEND_Q]->nb[0] == sizeof(float) && monarch_cuda_type_is_supported(dst->src[MONARCH_ATTEND_MASK]) &&
        monarch_cuda_type_is_supported(dst->src[MONARCH_ATTEND_K]) && monarch_cuda_type_is_supported(dst->src[MONARCH_ATTEND_V]);
}

static bool monarch_cuda_page_out_is_supported(const ggml_tensor * dst) {
    return monarch_cuda_type_is_supported(dst->src[MONARCH_PAGE_OUT_K]) && monarch_cuda_type_is_supported(dst->src[MONARCH_PAGE_OUT_V]);
}
