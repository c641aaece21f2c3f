#pragma once

// Attention of one KV head and one block of queries over the hot window and the promoted cold pages, in one softmax.

#include "monarch-op.h"
#include "monarch-policy.h"

// what one call of the op works on
struct monarch_attend {
    struct monarch_op_params    op;
    const struct ggml_tensor  * q;
    const struct ggml_tensor  * k;
    const struct ggml_tensor  * v;
    const struct ggml_tensor  * mask;
    struct ggml_tensor        * dst;
    const uint8_t             * pool;
    const uint8_t             * summary;
    char                      * state;
    const struct monarch_table_entry * table;
    struct monarch_policy       policy;
    int32_t                     mode;
    int32_t                     n_pages;
    int64_t                     n_pages_max;
    int64_t                     n_head_kv;
    int64_t                     n_gqa;          // query heads per KV head
    int64_t                     n_block;        // queries that share one choice of pages
};

// counters of one thread and one KV head
struct monarch_attend_count {
    int32_t n_promoted;
    int32_t n_scored;
};

// queries per block: about 64 rows, a row being one query head of one token
int64_t monarch_attend_block_size(int64_t n_gqa, int64_t n_tokens);

// bytes of scratch that a thread needs
size_t monarch_attend_work_size(int32_t head_dim, int64_t n_gqa, int64_t n_tokens, int64_t n_pages_max);

// tokens [i_block*n_block, ...) of KV head head_kv; adds to score_us the time spent on choosing pages
void monarch_attend_block(
        const struct monarch_attend * attend,
        int64_t                       head_kv,
        int64_t                       i_block,
        void                        * work,
        struct monarch_attend_count * count,
        uint64_t                    * score_us);
