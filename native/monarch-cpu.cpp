#include "monarch-cpu.h"

#include "monarch-enums.h"
#include "monarch-attend.h"
#include "monarch-convert.h"
#include "monarch-page.h"
#include "monarch-summary.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <algorithm>
#include <cstring>
#include <numeric>

static monarch_op_params monarch_op_get_params(const ggml_tensor * dst) {
    monarch_op_params res;
    memcpy(&res, dst->op_params, sizeof(res));
    return res;
}

static int32_t * monarch_attend_get_table(const ggml_tensor * dst) {
    return (int32_t *) dst->src[MONARCH_ATTEND_TABLE]->data;
}

//
// attend
//

static monarch_attend monarch_attend_init(ggml_tensor * dst) {
    monarch_attend res = {};

    res.op          = monarch_op_get_params(dst);
    res.q           = dst->src[MONARCH_ATTEND_Q];
    res.k           = dst->src[MONARCH_ATTEND_K];
    res.v           = dst->src[MONARCH_ATTEND_V];
    res.mask        = dst->src[MONARCH_ATTEND_MASK];
    res.dst         = dst;
    res.pool        = (const uint8_t *) dst->src[MONARCH_ATTEND_POOL]->data;
    res.summary     = (const uint8_t *) dst->src[MONARCH_ATTEND_SUMMARY]->data;
    res.state       = (char *)          dst->src[MONARCH_ATTEND_STATE]->data;
    res.policy      = monarch_policy_from_table(monarch_attend_get_table(dst), res.op.dense);
    res.n_pages_max = dst->src[MONARCH_ATTEND_POOL]->ne[1];
    res.n_head_kv   = res.k->ne[1];
    res.n_gqa       = res.q->ne[1]/res.n_head_kv;
    res.n_block     = monarch_attend_block_size(res.n_gqa, res.q->ne[2]);

    return res;
}

// the same for one run
static monarch_attend monarch_attend_get_run(const monarch_attend & attend, const ggml_tensor * dst, int32_t i) {
    int32_t * table = monarch_attend_get_table(dst);

    const monarch_table_run   * run   = monarch_table_get_runs (table) + i;
    const monarch_table_entry * pages = monarch_table_get_pages(table);

    monarch_attend res = attend;

    res.seq      = run->seq;
    res.i_token  = run->i_token;
    res.n_tokens = run->n_tokens;
    res.is_last  = run->is_last;
    res.mode     = run->mode;
    res.table    = pages + run->first_page;
    res.n_pages  = run->n_pages;

    return res;
}

static int32_t monarch_attend_n_runs(const ggml_tensor * dst) {
    return monarch_attend_get_table(dst)[MONARCH_TABLE_N_RUNS];
}

static bool monarch_attend_has_one_block(const monarch_attend & attend, const ggml_tensor * dst) {
    return monarch_attend_n_runs(dst) == 1 && monarch_attend_get_run(attend, dst, 0).n_tokens <= attend.n_block;
}

// scratch of one block or of one part
static size_t monarch_attend_scratch_size(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[MONARCH_ATTEND_Q];

    return monarch_attend_work_size(q->ne[0], q->ne[1]/dst->src[MONARCH_ATTEND_K]->ne[1], q->ne[2], dst->src[MONARCH_ATTEND_POOL]->ne[1]);
}

// parts that a KV head's only block is cut into, so that every thread has as much to do
static int64_t monarch_attend_n_parts(const ggml_tensor * dst, int64_t n_tasks) {
    const int64_t n_head_kv = dst->src[MONARCH_ATTEND_K]->ne[1];
    const int64_t n_gqa     = dst->src[MONARCH_ATTEND_Q]->ne[1]/n_head_kv;
    const int64_t n_tokens  = dst->src[MONARCH_ATTEND_Q]->ne[2];

    if (n_tokens > monarch_attend_block_size(n_gqa, n_tokens) || n_head_kv % n_tasks == 0) {
        return 1;
    }
    return std::min(n_tasks/std::gcd(n_tasks, n_head_kv), (2*n_tasks + n_head_kv - 1)/n_head_kv);
}

// ggml's work data lies anywhere
static char * monarch_work_align(void * data) {
    return (char *) GGML_PAD((uintptr_t) data, MONARCH_WORK_ALIGNMENT);
}

// [n_tasks][n_head_kv] counters, [n_head_kv] locks
static size_t monarch_attend_counts_size(const ggml_tensor * dst, int64_t n_tasks) {
    return GGML_PAD((n_tasks*sizeof(monarch_attend_count) + sizeof(std::atomic_flag))*dst->src[MONARCH_ATTEND_K]->ne[1], MONARCH_WORK_ALIGNMENT);
}

// fewer threads may have come than the scratch was planned for, and several sequences
static int64_t monarch_attend_fit_parts(const ggml_compute_params * params, const ggml_tensor * dst) {
    if (monarch_attend_n_runs(dst) > 1) {
        return 1;
    }

    const int64_t n_head_kv = dst->src[MONARCH_ATTEND_K]->ne[1];
    const int64_t n_bytes   = params->wsize - MONARCH_WORK_ALIGNMENT - monarch_attend_counts_size(dst, params->nth);
    const int64_t n_fit     = n_bytes/(int64_t) monarch_attend_scratch_size(dst)/n_head_kv;

    return std::max<int64_t>(1, std::min(monarch_attend_n_parts(dst, params->nth), n_fit));
}

// Every head's only block, by the thread that the head belongs to from its log to its counters: nobody waits. Returns the time
// spent on choosing pages.
static uint64_t monarch_attend_heads(const ggml_compute_params * params, const monarch_attend & run, char * scratch, monarch_attend_count * count) {
    uint64_t score_us = 0;

    for (int64_t h = params->ith; h < run.n_head_kv; h += params->nth) {
        monarch_attend_block(&run, h, 0, scratch, &count[h], &score_us);
    }
    return score_us;
}

// many blocks: a thread takes the next when it is done with one, for not all cores are as fast
static uint64_t monarch_attend_blocks(const ggml_compute_params * params, const monarch_attend & attend, const ggml_tensor * dst, char * scratch, monarch_attend_count * count) {
    uint64_t score_us = 0;
    int64_t  next     = params->ith;
    int64_t  first    = 0; // of this run

    for (int32_t i_run = 0; i_run < monarch_attend_n_runs(dst); ++i_run) {
        const monarch_attend run = monarch_attend_get_run(attend, dst, i_run);

        const int64_t n_blocks = (run.n_tokens + run.n_block - 1)/run.n_block;

        for (; next < first + run.n_head_kv*n_blocks; next = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            const int64_t h = (next - first)/n_blocks;

            monarch_attend_block(&run, h, (next - first)%n_blocks, scratch, &count[h], &score_us);
        }
        first += run.n_head_kv*n_blocks;
    }
    return score_us;
}

// a block by several threads, stage by stage
static uint64_t monarch_attend_parts(const ggml_compute_params * params, const monarch_attend & attend, const ggml_tensor * dst, int64_t n_parts, char * scratch, monarch_attend_count * count) {
    const size_t size = monarch_attend_scratch_size(dst);

    const auto get_part = [&](int64_t i) {
        return monarch_part { i/n_parts, i%n_parts, n_parts, scratch + i/n_parts*n_parts*size };
    };

    for (int64_t i = params->ith; i < attend.n_head_kv*n_parts; i += params->nth) {
        const monarch_part part = get_part(i);
        monarch_attend_part_begin(&attend, &part);
    }
    ggml_barrier(params->threadpool);

    const int64_t t_start = ggml_time_us();

    for (int64_t h = params->ith; h < attend.n_head_kv; h += params->nth) {
        const monarch_part part = get_part(h*n_parts);
        monarch_attend_part_choose(&attend, &part);
    }
    ggml_barrier(params->threadpool);

    const uint64_t score_us = ggml_time_us() - t_start;

    for (int64_t i = params->ith; i < attend.n_head_kv*n_parts; i += params->nth) {
        const monarch_part part = get_part(i);
        monarch_attend_part_cold(&attend, &part);
    }
    ggml_barrier(params->threadpool);

    for (int64_t h = params->ith; h < attend.n_head_kv; h += params->nth) {
        const monarch_part part = get_part(h*n_parts);
        monarch_attend_part_end(&attend, &part, &count[h]);
    }
    return score_us;
}

// the heads that belong to a thread
static void monarch_attend_apply_logs(const ggml_compute_params * params, const monarch_attend & attend, const int32_t * table) {
    for (int64_t h = params->ith; h < attend.n_head_kv; h += params->nth) {
        monarch_head_state * head = monarch_state_head(attend.state, attend.n_pages_max, h);

        monarch_policy_apply_log(&attend.policy, head, attend.n_pages_max, table[MONARCH_TABLE_COMMITTED]);

        head->step = table[MONARCH_TABLE_STEP];

        attend.locks[h].clear();
    }
}

// of the same; counts: [n][n_head_kv]
static void monarch_attend_add_counts(const ggml_compute_params * params, const monarch_attend & attend, const monarch_attend_count * counts, int n) {
    for (int64_t h = params->ith; h < attend.n_head_kv; h += params->nth) {
        monarch_head_state * head = monarch_state_head(attend.state, attend.n_pages_max, h);

        for (int i = 0; i < n; ++i) {
            head->log_promoted += counts[i*attend.n_head_kv + h].n_promoted;
            head->log_scored   += counts[i*attend.n_head_kv + h].n_scored;
        }
    }
}

static void monarch_attend_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    monarch_attend attend = monarch_attend_init(dst);

    const int64_t n_parts = monarch_attend_fit_parts(params, dst);
    const int64_t t_start = ggml_time_us();

    char * work = monarch_work_align(params->wdata);

    monarch_attend_count * counts = (monarch_attend_count *) work;
    monarch_attend_count * count  = counts + params->ith*attend.n_head_kv;

    attend.locks = (std::atomic_flag *) (counts + params->nth*attend.n_head_kv);

    monarch_attend_find_kernels(&attend, params->use_ref);

    char * scratches = work + monarch_attend_counts_size(dst, params->nth);
    char * scratch   = scratches + params->ith*monarch_attend_scratch_size(dst);

    if (params->ith == 0) {
        monarch_attend_say_kernels(&attend);
    }

    std::fill(count, count + attend.n_head_kv, monarch_attend_count{});

    monarch_attend_apply_logs(params, attend, monarch_attend_get_table(dst));

    uint64_t score_us;

    if (n_parts == 1 && monarch_attend_has_one_block(attend, dst)) {
        score_us = monarch_attend_heads(params, monarch_attend_get_run(attend, dst, 0), scratch, count);

        monarch_attend_add_counts(params, attend, count, 1);
    } else {
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);

        score_us = n_parts == 1 ?
            monarch_attend_blocks(params, attend, dst, scratch, count) :
            monarch_attend_parts (params, monarch_attend_get_run(attend, dst, 0), dst, n_parts, scratches, count);

        ggml_barrier(params->threadpool);

        monarch_attend_add_counts(params, attend, counts, params->nth);
    }

    if (params->ith == 0) {
        monarch_layer_state * layer = (monarch_layer_state *) attend.state;

        layer->score_us  += score_us;
        layer->attend_us += ggml_time_us() - t_start - score_us;
    }
}

//
// page out
//

static void monarch_page_out_read(const ggml_tensor * t, int64_t head_kv, const int32_t * slots, int32_t n, float * dst) {
    for (int32_t i = 0; i < n; ++i) {
        monarch_convert_to_f32(t->type, (const char *) t->data + head_kv*t->nb[1] + slots[i]*t->nb[2], dst + i*t->ne[0], t->ne[0]);
    }
}

static void monarch_page_out_forward(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * pool    = dst->src[MONARCH_PAGE_OUT_POOL];
    const ggml_tensor * k       = dst->src[MONARCH_PAGE_OUT_K];
    const ggml_tensor * v       = dst->src[MONARCH_PAGE_OUT_V];
    const ggml_tensor * summary = dst->src[MONARCH_PAGE_OUT_SUMMARY];
    const ggml_tensor * state   = dst->src[MONARCH_PAGE_OUT_STATE];

    const int32_t * page_outs = (const int32_t *) dst->src[MONARCH_PAGE_OUT_PAGES]->data;
    const int32_t   n_outs    = page_outs[MONARCH_PAGE_OUTS_N];

    if (params->ith == 0) {
        ((monarch_layer_state *) state->data)->encoded = page_outs[MONARCH_PAGE_OUTS_STEP];
    }
    if (n_outs == 0) {
        return;
    }

    const int64_t t_start = ggml_time_us();

    const monarch_op_params op = monarch_op_get_params(dst);

    const int32_t head_dim  = op.codec.head_dim;
    const int32_t page_size = op.codec.page_size;
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_pages   = pool->ne[1];

    float * k_page = (float *) params->wdata + params->ith*2*page_size*head_dim;
    float * v_page = k_page + page_size*head_dim;

    for (int64_t i = params->ith; i < n_outs*n_head_kv; i += params->nth) {
        const int64_t   h     = i%n_head_kv;
        const int32_t * out   = monarch_page_outs_get(page_outs, i/n_head_kv, page_size);
        const int64_t   page  = out[0];

        monarch_page_out_read(k, h, out + 2, page_size, k_page);
        monarch_page_out_read(v, h, out + 2, page_size, v_page);

        monarch_page_encode(&op.codec, op.scorer, out[1], k_page, v_page,
                (uint8_t *) pool   ->data + monarch_pool_offset(&op.codec, n_pages, h, page),
                (uint8_t *) summary->data + monarch_summary_offset(head_dim, n_pages, h, page), page%MONARCH_SUMMARY_GROUP);

        monarch_head_state_forget(monarch_state_head(state->data, n_pages, h), n_pages, page);
    }

    if (params->ith == 0) {
        ((monarch_layer_state *) state->data)->encode_us += ggml_time_us() - t_start;
    }
}

//
// dispatch
//

void ggml_compute_forward_monarch(const ggml_compute_params * params, ggml_tensor * dst) {
    switch (monarch_op_get_params(dst).kind) {
        case MONARCH_OP_ATTEND:   monarch_attend_forward  (params, dst); break;
        case MONARCH_OP_PAGE_OUT: monarch_page_out_forward(params, dst); break;
        default:                  GGML_ABORT("unknown monarch op");
    }
}

size_t ggml_compute_forward_monarch_work_size(const ggml_tensor * dst, int n_tasks) {
    const monarch_op_params op = monarch_op_get_params(dst);

    if (op.kind == MONARCH_OP_PAGE_OUT) {
        return n_tasks*2*op.codec.page_size*op.codec.head_dim*sizeof(float);
    }

    const int64_t n_parts   = monarch_attend_n_parts(dst, n_tasks);
    const int64_t n_scratch = n_parts == 1 ? n_tasks : dst->src[MONARCH_ATTEND_K]->ne[1]*n_parts;

    return MONARCH_WORK_ALIGNMENT + monarch_attend_counts_size(dst, n_tasks) + n_scratch*monarch_attend_scratch_size(dst);
}
