#pragma once

// Attention of one KV head and one block of queries over the hot window and the chosen cold pages, in one softmax.
//
// The driver (monarch-attend.cpp) walks a block through its stages; a kernel does the arithmetic of a stage.

#include "monarch-op.h"
#include "monarch-policy.h"

#include <atomic>

// what one call of the op works on; from `seq` on of one run
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
    struct monarch_policy              policy;
    int64_t                            n_pages_max;
    int64_t                            n_head_kv;
    int64_t                            n_gqa;   // query heads per KV head
    int64_t                            n_block; // queries that share one choice of pages
    std::atomic_flag                 * locks;   // [n_head_kv] of the logs
    const struct monarch_kernel      * kernel_hot;
    const struct monarch_kernel      * kernel_cold; // of scores and pages

    int32_t                            seq;
    int64_t                            i_token;
    int64_t                            n_tokens;
    bool                               is_last; // of its sequence in this step
    int32_t                            mode;
    const struct monarch_table_entry * table;   // [n_pages]
    int32_t                            n_pages;
};

// one query head of one token
struct monarch_row {
    const float * q;        // [head_dim]
    float       * q_rot;    // [head_dim] rotated like cold K
    float       * hot;      // [head_dim] sum over V that is not rotated
    float       * cold;     // [head_dim] sum over V that is
    float       * mass;     // [n_mass] attention mass of the pages attended so far, on the scale of max
    int64_t       n_mass;
    int64_t       i_token;
    float         max;      // online softmax over hot and cold
    float         sum;
    float         estimate_max; // the scale of mass, while it is estimated
    float         estimate_sum; // of all pages, on that scale
    float         rest;         // what goes to the mean V, on that scale
};

// of scratch and of each array in it: a vector that straddles two cache lines takes twice as long
#define MONARCH_WORK_ALIGNMENT 64

static inline char * monarch_work_take(char ** ptr, size_t size) {
    char * res = *ptr;
    *ptr += (size + MONARCH_WORK_ALIGNMENT - 1)/MONARCH_WORK_ALIGNMENT*MONARCH_WORK_ALIGNMENT;
    return res;
}

// a thread's scratch
struct monarch_work {
    struct monarch_row * rows;        // [n_rows] those of queries, then that of the mean, if there is a rest
    int64_t              n_rows;      // that attend
    int64_t              n_queries;   // that are scored and written
    float              * vectors;     // [n_rows][3][head_dim]
    float              * mass;        // [n_rows + MONARCH_SCORE_ROWS - 1][monarch_mass_stride] estimated, then measured
    float              * probability; // [n_pages_max]
    float              * rank;        // [n_pages_max]
    int32_t            * chosen;      // [n_pages_max] indices into the table
    int32_t              n_chosen;
    int32_t            * sticky;      // [n_pages_max] the same of the pages that are sticky
    int32_t              n_sticky;
    void               * kernel;      // what the kernel asked for
};

// rows of a whole block: of queries, and of the mean
static inline int64_t monarch_attend_count_rows(const struct monarch_attend * attend) {
    return attend->n_gqa*attend->n_block + 1;
}

// slots and chosen pages that kernels take together: parts do not cut them apart
#define MONARCH_HOT_STEP  16
#define MONARCH_COLD_STEP 2

// rows that kernels score together: the last may write masses of rows that are not there
#define MONARCH_SCORE_ROWS 8

// odd in cache lines, lest the rows' masses of a page compete for one set of the cache
static inline int64_t monarch_mass_stride(int64_t n_pages_max) {
    const int64_t n_line = MONARCH_WORK_ALIGNMENT/sizeof(float);

    return ((n_pages_max + n_line - 1)/n_line | 1)*n_line;
}

// the summaries of a page's group
static inline const uint8_t * monarch_attend_get_group(const struct monarch_attend * attend, int64_t head_kv, int64_t page) {
    return attend->summary + monarch_summary_offset(attend->op.codec.head_dim, attend->n_pages_max, head_kv, page);
}

// all of it is null if it is not compiled in
struct monarch_kernel {
    const char * name;

    bool   (*supports_hot) (const struct monarch_op_params * op, enum ggml_type type_k, enum ggml_type type_v);
    bool   (*supports_cold)(const struct monarch_op_params * op);
    size_t (*work_size)(int32_t head_dim, int64_t n_rows, int64_t n_pages_max); // bytes

    // slots [i0, i1) of the ring under the mask; i0 is a multiple of MONARCH_HOT_STEP
    void (*hot)(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work, int64_t i0, int64_t i1);

    // the chosen pages; fills the rows' masses if they ask for them
    void (*cold)(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work);

    // mass[row][page]: the logarithm of the estimated attention mass of pages [i0, i1) of the table
    void (*score)(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work, int32_t i0, int32_t i1);

    // x = e^(x - max), where none is above max; returns their sum
    float (*exp)(int32_t n, float * x, float max);
};

#define MONARCH_CPU_KERNEL(name) extern const struct monarch_kernel monarch_kernel_##name;
#include "monarch-cpu-kernels.def"
#undef MONARCH_CPU_KERNEL

// moves a row's softmax to a greater maximum
void monarch_row_set_max(struct monarch_row * row, int64_t head_dim, float max);

// counters of one thread and one KV head
struct monarch_attend_count {
    int32_t n_promoted;
    int32_t n_scored;
};

// use_ref: the plain path alone
void monarch_attend_find_kernels(struct monarch_attend * attend, bool use_ref);

// once per process: which kernels serve
void monarch_attend_say_kernels(const struct monarch_attend * attend);

// bytes of scratch for one block, or for one part of it
size_t monarch_attend_work_size(int32_t head_dim, int64_t n_gqa, int64_t n_tokens, int64_t n_pages_max);

// One thread attends a block of the run in one go: its tokens from i_block*n_block on, KV head head_kv. Adds to score_us the
// time spent on choosing pages.
void monarch_attend_block(
        const struct monarch_attend * attend,
        int64_t                       head_kv,
        int64_t                       i_block,
        void                        * work_data,
        struct monarch_attend_count * count,
        uint64_t                    * score_us);

// Several threads share the one block of a KV head, if that is all there is: each has a part of the ring and of the
// pages. All parts finish a stage before one begins the next; works: [n_parts] of monarch_attend_work_size().
struct monarch_part {
    int64_t head_kv;
    int64_t i_part;
    int64_t n_parts;
    char  * works;
};

void monarch_attend_part_begin(const struct monarch_attend * attend, const struct monarch_part * part);  // hot, scores
void monarch_attend_part_choose(const struct monarch_attend * attend, const struct monarch_part * part); // by part 0
void monarch_attend_part_cold (const struct monarch_attend * attend, const struct monarch_part * part);
void monarch_attend_part_end  (const struct monarch_attend * attend, const struct monarch_part * part, struct monarch_attend_count * count); // by part 0
