#pragma once

// The ggml op of the paged cache: GGML_OP_MONARCH, with sub-kinds.
//
// Everything the op needs travels in tensors, so that graphs can be reused and split over devices:
//
//   pool      I8  [block_size, n_pages, n_head_kv]    cold records, monarch-codec.h
//   summary   I8  [group_size, n_pages/16, n_head_kv] page summaries in groups of 16 pages, monarch-summary.h
//   state     I8  [...]                               sticky state and counters of one layer, monarch-state.h
//   frames    I8  [...]                               copies of promoted pages, monarch-frames.h; null: the pool is as near
//   table     I32 [...]                               input: the step's knobs, its runs and its cold pages, monarch-table.h
//   page_outs I32 [...]                               input: the pages to encode, monarch-table.h

#include "ggml.h"

#include "monarch-codec.h"
#include "monarch-summary.h"

#ifdef __cplusplus
extern "C" {
#endif

enum monarch_op_kind {
    MONARCH_OP_ATTEND,   // hot window and cold pages in one softmax; scores and promotes pages, logs what it promoted
    MONARCH_OP_PAGE_OUT, // encodes pages from the ring; runs after the layer attended
};

// constant over the life of a context; kept in the op params of every node
struct monarch_op_params {
    int32_t              kind;
    struct monarch_codec codec;
    int32_t              scorer;
    int32_t              dense; // this layer promotes dense_tokens
    float                kq_scale;
    int32_t              n_frames; // per KV head of this layer
};

// queries that share one choice of pages: about 64 rows
MONARCH_HD static inline int64_t monarch_attend_block_size(int64_t n_gqa, int64_t n_tokens) {
    const int64_t n = 64/n_gqa < n_tokens ? 64/n_gqa : n_tokens;
    return n > 1 ? n : 1;
}

// byte offset of a physical page's block of one KV head in the pool
MONARCH_HD static inline size_t monarch_pool_offset(const struct monarch_codec * codec, int64_t n_pages, int64_t head_kv, int64_t page) {
    return (head_kv*n_pages + page)*monarch_codec_block_size(codec);
}

// byte offset of the group that holds a physical page's summary of one KV head
MONARCH_HD static inline size_t monarch_summary_offset(int32_t head_dim, int64_t n_pages, int64_t head_kv, int64_t page) {
    return (head_kv*n_pages + page/MONARCH_SUMMARY_GROUP*MONARCH_SUMMARY_GROUP)*monarch_summary_size(head_dim);
}

// what the op reads and writes, as sources of its node
enum monarch_attend_src {
    MONARCH_ATTEND_Q,
    MONARCH_ATTEND_K,
    MONARCH_ATTEND_V,
    MONARCH_ATTEND_MASK,
    MONARCH_ATTEND_POOL,
    MONARCH_ATTEND_SUMMARY,
    MONARCH_ATTEND_STATE,
    MONARCH_ATTEND_TABLE,
    MONARCH_ATTEND_FRAMES,
};

enum monarch_page_out_src {
    MONARCH_PAGE_OUT_POOL, // the first: the result is a view of it
    MONARCH_PAGE_OUT_K,
    MONARCH_PAGE_OUT_V,
    MONARCH_PAGE_OUT_SUMMARY,
    MONARCH_PAGE_OUT_STATE,
    MONARCH_PAGE_OUT_PAGES,
    MONARCH_PAGE_OUT_FRAMES,
};

// q: F32 [head_dim, n_head, n_tokens]; k, v: ring views [head_dim, n_head_kv, n_kv]; mask: F16 or F32 [n_kv, n_tokens]
// returns F32 [head_dim, n_head, n_tokens]
GGML_API struct ggml_tensor * ggml_monarch_attend(
        struct ggml_context            * ctx,
        const struct monarch_op_params * params,
        struct ggml_tensor             * q,
        struct ggml_tensor             * k,
        struct ggml_tensor             * v,
        struct ggml_tensor             * mask,
        struct ggml_tensor             * pool,
        struct ggml_tensor             * summary,
        struct ggml_tensor             * state,
        struct ggml_tensor             * frames,
        struct ggml_tensor             * table);

// k, v: the whole ring, [head_dim, n_head_kv, n_slots]; returns a view of the pool
GGML_API struct ggml_tensor * ggml_monarch_page_out(
        struct ggml_context            * ctx,
        const struct monarch_op_params * params,
        struct ggml_tensor             * k,
        struct ggml_tensor             * v,
        struct ggml_tensor             * pool,
        struct ggml_tensor             * summary,
        struct ggml_tensor             * state,
        struct ggml_tensor             * frames,
        struct ggml_tensor             * page_outs);

// What a backend's registry calls the function that gives the memory of the host that a device of its can reach:
// ggml_backend_buffer_type_t (*)(ggml_backend_dev_t).
#define MONARCH_MAPPED_BUFFER_TYPE "monarch_mapped_buffer_type"

// The tensor of the cold store. The op changes the store in place, so it runs where that lies and nowhere else: ggml's
// scheduler would let it work on a copy.
GGML_API const struct ggml_tensor * ggml_monarch_get_store(const struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
