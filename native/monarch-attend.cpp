#include "monarch-attend.h"

#include "monarch-enums.h"

#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

//
// kernels
//

// the fastest first
static const monarch_kernel * const monarch_kernels[] = { &monarch_kernel_avx512, &monarch_kernel_avx2, &monarch_kernel_neon, &monarch_kernel_plain };

// tests compare kernels: MONARCH_KERNEL names the only one that may serve besides the plain path
static bool monarch_kernel_is_allowed(const monarch_kernel * kernel) {
    static const char * name = getenv("MONARCH_KERNEL");

    return !name || kernel == &monarch_kernel_plain || strcmp(name, kernel->name) == 0;
}

static const monarch_kernel * monarch_kernel_find(const monarch_attend * attend) {
    for (const monarch_kernel * kernel : monarch_kernels) {
        if (monarch_kernel_is_allowed(kernel) && kernel->supports(&attend->op, attend->k, attend->v)) {
            return kernel;
        }
    }
    return &monarch_kernel_plain;
}

static size_t monarch_kernel_work_size(int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    size_t res = 0;
    for (const monarch_kernel * kernel : monarch_kernels) {
        res = std::max(res, kernel->work_size(head_dim, n_rows, n_pages_max));
    }
    return res;
}

//
// scratch
//

static char * monarch_work_take(char ** ptr, size_t size) {
    char * res = *ptr;
    *ptr += (size + 63)/64*64;
    return res;
}

// with base == nullptr only the size counts
static size_t monarch_work_init(monarch_work * work, float ** vectors, char * base, int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    char * ptr = base;

    work->rows        = (monarch_row *) monarch_work_take(&ptr, n_rows*sizeof(monarch_row));
    *vectors          = (float *)       monarch_work_take(&ptr, 3*n_rows*head_dim*sizeof(float));
    work->mass        = (float *)       monarch_work_take(&ptr, n_rows*n_pages_max*sizeof(float));
    work->probability = (float *)       monarch_work_take(&ptr, n_pages_max*sizeof(float));
    work->rank        = (float *)       monarch_work_take(&ptr, n_pages_max*sizeof(float));
    work->chosen      = (int32_t *)     monarch_work_take(&ptr, n_pages_max*sizeof(int32_t));
    work->kernel      =                 monarch_work_take(&ptr, monarch_kernel_work_size(head_dim, n_rows, n_pages_max));

    return ptr - base;
}

int64_t monarch_attend_block_size(int64_t n_gqa, int64_t n_tokens) {
    return std::max<int64_t>(1, std::min<int64_t>(n_tokens, 64/n_gqa));
}

size_t monarch_attend_work_size(int32_t head_dim, int64_t n_gqa, int64_t n_tokens, int64_t n_pages_max) {
    monarch_work work;
    float      * vectors;
    return monarch_work_init(&work, &vectors, nullptr, head_dim, n_gqa*monarch_attend_block_size(n_gqa, n_tokens), n_pages_max);
}

//
// rows
//

void monarch_row_set_max(monarch_row * row, int64_t head_dim, float max) {
    const float scale = expf(row->max - max);

    ggml_vec_scale_f32((int) head_dim,    row->hot,  scale);
    ggml_vec_scale_f32((int) head_dim,    row->cold, scale);
    ggml_vec_scale_f32((int) row->n_mass, row->mass, scale);

    row->sum *= scale;
    row->max  = max;
}

static void monarch_rows_init(const monarch_attend * attend, int64_t head_kv, int64_t i_token0, int64_t n_tokens, monarch_work * work, float * vectors) {
    const int64_t head_dim = attend->op.codec.head_dim;

    work->n_rows = n_tokens*attend->n_gqa;

    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        const int64_t i_token = i_token0 + ir/attend->n_gqa;
        const int64_t i_head  = head_kv*attend->n_gqa + ir%attend->n_gqa;

        monarch_row * row = &work->rows[ir];

        row->q       = (const float *) ((const char *) attend->q->data + i_head*attend->q->nb[1] + i_token*attend->q->nb[2]);
        row->q_rot   = vectors + (3*ir + 0)*head_dim;
        row->hot     = vectors + (3*ir + 1)*head_dim;
        row->cold    = vectors + (3*ir + 2)*head_dim;
        row->mass    = work->mass + ir*attend->n_pages_max;
        row->n_mass  = 0;
        row->i_token = i_token;
        row->max     = -INFINITY;
        row->sum     = 0.0f;

        memcpy(row->q_rot, row->q, head_dim*sizeof(float));
        memset(row->hot,   0,      head_dim*sizeof(float));
        memset(row->cold,  0,      head_dim*sizeof(float));

        monarch_codec_rotate((int32_t) head_dim, row->q_rot);
    }
}

static void monarch_rows_write(const monarch_attend * attend, int64_t head_kv, monarch_work * work) {
    const int64_t head_dim = attend->op.codec.head_dim;

    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        monarch_row * row = &work->rows[ir];

        const int64_t i_head = head_kv*attend->n_gqa + ir%attend->n_gqa;

        float * dst = (float *) ((char *) attend->dst->data + i_head*attend->dst->nb[1] + row->i_token*attend->dst->nb[2]);

        monarch_codec_unrotate((int32_t) head_dim, row->cold);

        for (int64_t i = 0; i < head_dim; ++i) {
            dst[i] = (row->hot[i] + row->cold[i])/row->sum;
        }
    }
}

//
// the choice of pages
//

// the greatest probability of each page over the rows: estimated page mass / (hot mass + sum of estimated page masses)
static void monarch_attend_estimate(const monarch_attend * attend, monarch_work * work) {
    const int32_t n_pages = attend->n_pages;

    std::fill(work->probability, work->probability + n_pages, 0.0f);

    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        const monarch_row * row = &work->rows[ir];

        float * mass = row->mass;

        const float hot = row->max + logf(row->sum);

        float max;
        ggml_vec_max_f32(n_pages, &max, mass);
        max = std::max(max, hot);

        const float inverse = 1.0f/(expf(hot - max) + (float) ggml_vec_soft_max_f32(n_pages, mass, mass, max));

        for (int32_t i = 0; i < n_pages; ++i) {
            work->probability[i] = std::max(work->probability[i], mass[i]*inverse);
        }
    }
}

static void monarch_attend_choose(const monarch_attend * attend, int64_t head_kv, monarch_work * work, const monarch_kernel * kernel) {
    work->n_chosen = 0;

    if (attend->n_pages == 0 || attend->mode == MONARCH_MODE_WINDOW) {
        return;
    }

    if (attend->mode == MONARCH_MODE_EXACT) {
        for (int32_t i = 0; i < attend->n_pages; ++i) {
            work->chosen[i] = i;
        }
        work->n_chosen = attend->n_pages;
        return;
    }

    kernel->score(attend, head_kv, work);

    monarch_attend_estimate(attend, work);

    work->n_chosen = monarch_policy_select(&attend->policy, monarch_state_head(attend->state, attend->n_pages_max, head_kv), attend->n_pages_max,
            attend->n_pages, attend->table, work->probability, work->rank, work->chosen);
}

// rank serves as scratch: the choice is made by now
static void monarch_attend_log(const monarch_attend * attend, int64_t head_kv, monarch_work * work) {
    float * measured = work->rank;

    std::fill(measured, measured + work->n_chosen, 0.0f);

    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        const monarch_row * row = &work->rows[ir];

        for (int32_t ic = 0; ic < work->n_chosen; ++ic) {
            measured[ic] = std::max(measured[ic], row->mass[ic]/row->sum);
        }
    }

    monarch_policy_write_log(&attend->policy, monarch_state_head(attend->state, attend->n_pages_max, head_kv), attend->n_pages_max,
            attend->n_pages, attend->table, work->probability, measured, work->n_chosen, work->chosen);
}

void monarch_attend_block(
        const monarch_attend * attend,
        int64_t                head_kv,
        int64_t                i_block,
        void                 * work_data,
        monarch_attend_count * count,
        uint64_t             * score_us) {
    const int64_t n_tokens_all = attend->q->ne[2];
    const int64_t i_token0     = i_block*attend->n_block;
    const int64_t n_tokens     = std::min(attend->n_block, n_tokens_all - i_token0);

    // the last block holds the present query: it alone counts and moves the sticky state
    const bool is_last   = i_token0 + n_tokens == n_tokens_all;
    const bool is_logged = is_last && attend->mode == MONARCH_MODE_PAGED;

    const monarch_kernel * kernel = monarch_kernel_find(attend);

    monarch_work work;
    float      * vectors;
    monarch_work_init(&work, &vectors, (char *) work_data, attend->op.codec.head_dim, attend->n_gqa*attend->n_block, attend->n_pages_max);

    monarch_rows_init(attend, head_kv, i_token0, n_tokens, &work, vectors);

    kernel->hot(attend, head_kv, &work);

    const int64_t t_start = ggml_time_us();

    monarch_attend_choose(attend, head_kv, &work, kernel);

    *score_us += ggml_time_us() - t_start;

    for (int64_t ir = 0; ir < work.n_rows && is_logged; ++ir) {
        work.rows[ir].n_mass = work.n_chosen;
        std::fill(work.rows[ir].mass, work.rows[ir].mass + work.n_chosen, 0.0f);
    }

    kernel->cold(attend, head_kv, &work);

    count->n_promoted += is_last ? work.n_chosen : 0;

    if (is_logged) {
        count->n_scored += attend->n_pages;

        monarch_attend_log(attend, head_kv, &work);
    }

    monarch_rows_write(attend, head_kv, &work);
}
