#pragma once

// Attention of one KV head and one block of queries over the hot window and the chosen cold pages, in one softmax.
//
// The driver (monarch-attend.cpp) walks a block through its stages; a kernel does the arithmetic of a stage.

#include "monarch-op.h"
#include "monarch-policy.h"

// what one call of the op works on
struct monarch_attend {
    struct monarch_op_params           op;
    const struct ggml_tensor         * q;
    const struct ggml_tensor         * k;
    const struct ggml_tensor         * v;
    const struct ggml_tensor         * mask;
    struct ggml_tensor               * dst;
    const uint8_t                    * pool;
    const uint8_t                    * summary;
    char                             * state;
    const struct monarch_table_entry * table;
    struct monarch_policy              policy;
    int32_t                            mode;
    int32_t                            n_pages;
    int64_t                            n_pages_max;
    int64_t                            n_head_kv;
    int64_t                            n_gqa;   // query heads per KV head
    int64_t                            n_block; // queries that share one choice of pages
};

// one query head of one token
struct monarch_row {
    const float * q;       // [head_dim]
    float       * q_rot;   // [head_dim] rotated like cold K
    float       * hot;     // [head_dim] sum over V that is not rotated
    float       * cold;    // [head_dim] sum over V that is
    float       * mass;    // [n_mass] attention mass of the pages attended so far, on the scale of max
    int64_t       n_mass;
    int64_t       i_token;
    float         max;     // online softmax over hot and cold
    float         sum;
};

// a thread's scratch
struct monarch_work {
    struct monarch_row * rows;        // [n_rows]
    int64_t              n_rows;
    float              * mass;        // [n_rows][n_pages_max] estimated, then measured
    float              * probability; // [n_pages_max]
    float              * rank;        // [n_pages_max]
    int32_t            * chosen;      // [n_pages_max] indices into the table
    int32_t              n_chosen;
    void               * kernel;      // what the kernel asked for
};

struct monarch_kernel {
    const char * name;

    bool   (*supports) (const struct monarch_op_params * op, const struct ggml_tensor * k, const struct ggml_tensor * v);
    size_t (*work_size)(int32_t head_dim, int64_t n_rows, int64_t n_pages_max); // bytes

    // the ring under the mask
    void (*hot)(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work);

    // the chosen pages; fills the rows' masses if they ask for them
    void (*cold)(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work);

    // mass[row][page]: the logarithm of the page's estimated attention mass
    void (*score)(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work);
};

extern const struct monarch_kernel monarch_kernel_plain;
extern const struct monarch_kernel monarch_kernel_avx512;
extern const struct monarch_kernel monarch_kernel_avx2;
extern const struct monarch_kernel monarch_kernel_neon;

// moves a row's softmax to a greater maximum
void monarch_row_set_max(struct monarch_row * row, int64_t head_dim, float max);

// counters of one thread and one KV head
struct monarch_attend_count {
    int32_t n_promoted;
    int32_t n_scored;
};

// queries per block: about 64 rows
int64_t monarch_attend_block_size(int64_t n_gqa, int64_t n_tokens);

// bytes of scratch that a thread needs
size_t monarch_attend_work_size(int32_t head_dim, int64_t n_gqa, int64_t n_tokens, int64_t n_pages_max);

// tokens [i_block*n_block, ...) of KV head head_kv; adds to score_us the time spent on choosing pages
void monarch_attend_block(
        const struct monarch_attend * attend,
        int64_t                       head_kv,
        int64_t                       i_block,
        void                        * work_data,
        struct monarch_attend_count * count,
        uint64_t                    * score_us);
