#include "monarch-attend.h"

#include "monarch-enums.h"
#include "monarch-summary-math.h"

#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

//
// kernels
//

static const monarch_kernel * const monarch_kernels[] = {
#define MONARCH_CPU_KERNEL(name) &monarch_kernel_##name,
#include "monarch-cpu-kernels.def"
#undef MONARCH_CPU_KERNEL
};

static bool monarch_kernel_is_allowed(const monarch_kernel * kernel, bool use_ref) {
    static const char * name = getenv("MONARCH_KERNEL");

    return kernel == &monarch_kernel_plain || (!use_ref && kernel->name && (!name || strcmp(name, kernel->name) == 0));
}

void monarch_attend_find_kernels(monarch_attend * attend, bool use_ref) {
    attend->kernel_hot  = nullptr;
    attend->kernel_cold = nullptr;

    // the last supports all
    for (const monarch_kernel * kernel : monarch_kernels) {
        if (!monarch_kernel_is_allowed(kernel, use_ref)) {
            continue;
        }
        if (!attend->kernel_hot && kernel->supports_hot(&attend->op, attend->k->type, attend->v->type)) {
            attend->kernel_hot = kernel;
        }
        if (!attend->kernel_cold && kernel->supports_cold(&attend->op)) {
            attend->kernel_cold = kernel;
        }
    }
}

void monarch_attend_say_kernels(const monarch_attend * attend) {
    static std::atomic<bool> is_said { false };

    if (!is_said.exchange(true)) {
        GGML_LOG_INFO("%s: hot window: %s, cold pages: %s\n", __func__, attend->kernel_hot->name, attend->kernel_cold->name);
    }
}

static size_t monarch_kernel_work_size(int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    size_t res = 0;
    for (const monarch_kernel * kernel : monarch_kernels) {
        res = std::max(res, kernel->name ? kernel->work_size(head_dim, n_rows, n_pages_max) : 0);
    }
    return res;
}

//
// scratch
//

// with base == nullptr only the size counts
static size_t monarch_work_init(monarch_work * work, char * base, int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    char * ptr = base;

    monarch_work_take(&ptr, sizeof(monarch_work)); // *work itself, if it stays

    work->rows        = (monarch_row *) monarch_work_take(&ptr, n_rows*sizeof(monarch_row));
    work->vectors     = (float *)       monarch_work_take(&ptr, 3*n_rows*head_dim*sizeof(float));
    work->mass        = (float *)       monarch_work_take(&ptr, (n_rows + MONARCH_SCORE_ROWS - 1)*monarch_mass_stride(n_pages_max)*sizeof(float));
    work->probability = (float *)       monarch_work_take(&ptr, n_pages_max*sizeof(float));
    work->rank        = (float *)       monarch_work_take(&ptr, n_pages_max*sizeof(float));
    work->chosen      = (int32_t *)     monarch_work_take(&ptr, n_pages_max*sizeof(int32_t));
    work->sticky      = (int32_t *)     monarch_work_take(&ptr, n_pages_max*sizeof(int32_t));
    work->kernel      =                 monarch_work_take(&ptr, monarch_kernel_work_size(head_dim, n_rows, n_pages_max));

    return ptr - base;
}

size_t monarch_attend_work_size(int32_t head_dim, int64_t n_gqa, int64_t n_tokens, int64_t n_pages_max) {
    monarch_work work;
    return monarch_work_init(&work, nullptr, head_dim, n_gqa*monarch_attend_block_size(n_gqa, n_tokens) + 1, n_pages_max);
}

//
// rows
//

static bool monarch_attend_is_selective(const monarch_attend * attend) {
    return attend->n_pages > 0 && attend->mode == MONARCH_MODE_PAGED;
}

// What the pages get that are not promoted goes to the mean V of what is read: Ribar et al., SparQ Attention, 2023, who take the
// mean over all tokens. docs/defaults.md
static bool monarch_attend_has_rest(const monarch_attend * attend) {
    return monarch_attend_is_selective(attend) && monarch_summary_is_estimate(attend->op.scorer);
}

void monarch_row_set_max(monarch_row * row, int64_t head_dim, float max) {
    const float scale = expf(row->max - max);

    ggml_vec_scale_f32((int) head_dim,    row->hot,  scale);
    ggml_vec_scale_f32((int) head_dim,    row->cold, scale);
    ggml_vec_scale_f32((int) row->n_mass, row->mass, scale);

    row->sum *= scale;
    row->max  = max;
}

// q: null: of zeros
static void monarch_row_init(const monarch_attend * attend, monarch_work * work, int64_t ir, int64_t i_token, const float * q) {
    const int64_t head_dim = attend->op.codec.head_dim;

    monarch_row * row = &work->rows[ir];

    *row = {};

    row->q_rot   = work->vectors + (3*ir + 0)*head_dim;
    row->hot     = work->vectors + (3*ir + 1)*head_dim;
    row->cold    = work->vectors + (3*ir + 2)*head_dim;
    row->q       = q ? q : row->q_rot;
    row->i_token = i_token;
    row->max     = -INFINITY;

    memset(row->q_rot, 0, 3*head_dim*sizeof(float));
    if (q) {
        memcpy(row->q_rot, q, head_dim*sizeof(float));
        monarch_codec_rotate((int32_t) head_dim, row->q_rot);
    }
}

static void monarch_rows_init(const monarch_attend * attend, int64_t head_kv, int64_t i_token0, int64_t n_tokens, monarch_work * work) {
    work->n_queries = n_tokens*attend->n_gqa;
    work->n_rows    = work->n_queries + monarch_attend_has_rest(attend);

    for (int64_t ir = 0; ir < work->n_queries; ++ir) {
        const int64_t i_token = i_token0 + ir/attend->n_gqa;
        const int64_t i_head  = head_kv*attend->n_gqa + ir%attend->n_gqa;

        monarch_row_init(attend, work, ir, i_token, (const float *) ((const char *) attend->q->data + i_head*attend->q->nb[1] + i_token*attend->q->nb[2]));

        work->rows[ir].mass = work->mass + ir*monarch_mass_stride(attend->n_pages_max);
    }
    // a query of zeros attends to all alike: to the mean V of what is read
    for (int64_t ir = work->n_queries; ir < work->n_rows; ++ir) {
        monarch_row_init(attend, work, ir, i_token0, nullptr);
    }
}

// after all else: a row's output without rotation, in hot
static void monarch_row_finish(monarch_row * row, int64_t head_dim) {
    monarch_codec_unrotate((int32_t) head_dim, row->cold);

    for (int64_t i = 0; i < head_dim; ++i) {
        row->hot[i] = (row->hot[i] + row->cold[i])/row->sum;
    }
}

static void monarch_rows_write(const monarch_attend * attend, int64_t head_kv, monarch_work * work) {
    const int64_t head_dim = attend->op.codec.head_dim;

    for (int64_t ir = 0; ir < work->n_queries; ++ir) {
        monarch_row * row = &work->rows[ir];

        const int64_t i_head = head_kv*attend->n_gqa + ir%attend->n_gqa;

        monarch_row_finish(row, head_dim);

        memcpy((char *) attend->dst->data + i_head*attend->dst->nb[1] + row->i_token*attend->dst->nb[2], row->hot, head_dim*sizeof(float));
    }
}

//
// the choice of pages
//

// in lanes, so many that compilers make vectors of them
static float monarch_find_max(int32_t n, const float * x) {
    const int32_t n_lanes = 64;

    float lanes[n_lanes];
    std::fill(lanes, lanes + n_lanes, -INFINITY);

    int32_t i = 0;
    for (; i + n_lanes <= n; i += n_lanes) {
        for (int32_t j = 0; j < n_lanes; ++j) {
            lanes[j] = lanes[j] > x[i + j] ? lanes[j] : x[i + j];
        }
    }
    for (; i < n; ++i) {
        lanes[0] = std::max(lanes[0], x[i]);
    }
    return *std::max_element(lanes, lanes + n_lanes);
}

// the greatest probability of each page over the rows: estimated page mass / (hot mass + sum of estimated page masses)
static void monarch_attend_estimate(const monarch_attend * attend, monarch_work * work) {
    const int32_t n_pages = attend->n_pages;

    std::fill(work->probability, work->probability + n_pages, 0.0f);

    for (int64_t ir = 0; ir < work->n_queries; ++ir) {
        monarch_row * row = &work->rows[ir];

        float * mass = row->mass;

        const float hot = row->max + logf(row->sum);

        const float max = std::max(monarch_find_max(n_pages, mass), hot);

        row->estimate_sum = attend->kernel_cold->exp(n_pages, mass, max);
        row->estimate_max = max;

        const float inverse = 1.0f/(expf(hot - max) + row->estimate_sum);

        for (int32_t i = 0; i < n_pages; ++i) {
            const float probability = mass[i]*inverse;

            work->probability[i] = work->probability[i] > probability ? work->probability[i] : probability;
        }
    }
}

static void monarch_attend_choose_all(const monarch_attend * attend, monarch_work * work) {
    work->n_chosen = attend->mode == MONARCH_MODE_EXACT ? attend->n_pages : 0;
    work->n_sticky = 0;

    std::iota(work->chosen, work->chosen + work->n_chosen, 0);
}

// of what the pages were estimated to get that were not chosen, what goes to the mean V
static float monarch_row_get_rest(const monarch_row * row, int32_t n_chosen, const int32_t * chosen) {
    float res = row->estimate_sum;
    for (int32_t ic = 0; ic < n_chosen; ++ic) {
        res -= row->mass[chosen[ic]];
    }
    return MONARCH_REST_WEIGHT*res;
}

static void monarch_row_add_rest(monarch_row * row, int64_t head_dim, const float * v) {
    if (!(row->rest > 0.0f)) {
        return; // nothing but rounding, or what a broken model makes
    }

    // estimates may be far above what there is: not all of them, what is left of them has a say in the maximum
    const float logit = row->estimate_max + logf(row->rest);

    if (logit > row->max) {
        monarch_row_set_max(row, head_dim, logit);
    }

    const float w = expf(logit - row->max);

    ggml_vec_mad_f32((int) head_dim, row->hot, v, w);
    row->sum += w;
}

static void monarch_attend_add_rest(const monarch_attend * attend, monarch_work * work) {
    const int64_t head_dim = attend->op.codec.head_dim;

    monarch_row * mean = &work->rows[work->n_queries];

    if (work->n_rows == work->n_queries || mean->sum == 0.0f) {
        return;
    }

    monarch_row_finish(mean, head_dim);

    for (int64_t ir = 0; ir < work->n_queries; ++ir) {
        monarch_row_add_rest(&work->rows[ir], head_dim, mean->hot);
    }
}

// from the scores of all pages
static void monarch_attend_choose(const monarch_attend * attend, int64_t head_kv, monarch_work * work) {
    monarch_attend_estimate(attend, work);

    work->n_chosen = monarch_policy_select(&attend->policy, monarch_state_head(attend->state, attend->n_pages_max, head_kv), attend->n_pages_max,
            attend->n_pages, attend->table, work->probability, work->rank, work->chosen, work->sticky, &work->n_sticky);

    for (int64_t ir = 0; ir < work->n_queries && work->n_chosen < attend->n_pages; ++ir) {
        work->rows[ir].rest = monarch_row_get_rest(&work->rows[ir], work->n_chosen, work->chosen);
    }
}

static void monarch_rows_clear_mass(monarch_work * work) {
    for (int64_t ir = 0; ir < work->n_queries; ++ir) {
        work->rows[ir].n_mass = work->n_chosen;
        std::fill(work->rows[ir].mass, work->rows[ir].mass + work->n_chosen, 0.0f);
    }
}

// rank serves as scratch: the choice is made by now
static void monarch_attend_log(const monarch_attend * attend, int64_t head_kv, monarch_work * work) {
    float * measured = work->rank;

    std::fill(measured, measured + work->n_chosen, 0.0f);

    for (int64_t ir = 0; ir < work->n_queries; ++ir) {
        const monarch_row * row = &work->rows[ir];

        for (int32_t ic = 0; ic < work->n_chosen; ++ic) {
            measured[ic] = std::max(measured[ic], row->mass[ic]/row->sum);
        }
    }

    // the same head's log gets what other sequences promoted
    while (attend->locks[head_kv].test_and_set(std::memory_order_acquire)) {
    }

    monarch_policy_write_log(monarch_state_head(attend->state, attend->n_pages_max, head_kv), attend->seq, attend->n_pages_max,
            attend->table, work->probability, measured, work->n_chosen, work->chosen, work->n_sticky, work->sticky);

    attend->locks[head_kv].clear(std::memory_order_release);
}

void monarch_attend_block(
        const monarch_attend * attend,
        int64_t                head_kv,
        int64_t                i_block,
        void                 * work_data,
        monarch_attend_count * count,
        uint64_t             * score_us) {
    const int64_t i_token0 = i_block*attend->n_block;
    const int64_t n_tokens = std::min(attend->n_block, attend->n_tokens - i_token0);

    // a sequence's last block holds its present query: it alone counts and moves the sticky state
    const bool is_last   = attend->is_last && i_token0 + n_tokens == attend->n_tokens;
    const bool is_logged = is_last && attend->mode == MONARCH_MODE_PAGED;

    monarch_work work;
    monarch_work_init(&work, (char *) work_data, attend->op.codec.head_dim, monarch_attend_count_rows(attend), attend->n_pages_max);

    monarch_rows_init(attend, head_kv, attend->i_token + i_token0, n_tokens, &work);

    attend->kernel_hot->hot(attend, head_kv, &work, 0, attend->k->ne[2]);

    const int64_t t_start = ggml_time_us();

    if (monarch_attend_is_selective(attend)) {
        attend->kernel_cold->score(attend, head_kv, &work, 0, attend->n_pages);
        monarch_attend_choose(attend, head_kv, &work);
    } else {
        monarch_attend_choose_all(attend, &work);
    }

    *score_us += ggml_time_us() - t_start;

    if (is_logged) {
        monarch_rows_clear_mass(&work);
    }

    attend->kernel_cold->cold(attend, head_kv, &work);

    monarch_attend_add_rest(attend, &work);

    count->n_promoted += is_last ? work.n_chosen : 0;

    if (is_logged) {
        count->n_scored += attend->n_pages;

        monarch_attend_log(attend, head_kv, &work);
    }

    monarch_rows_write(attend, head_kv, &work);
}

//
// one block by several threads
//

static monarch_work * monarch_part_get(const monarch_attend * attend, const monarch_part * part, int64_t i_part) {
    return (monarch_work *) (part->works + i_part*monarch_attend_work_size(attend->op.codec.head_dim, attend->n_gqa, attend->q->ne[2], attend->n_pages_max));
}

// where part i of n items begins, in whole steps
static int64_t monarch_part_bound(const monarch_part * part, int64_t n, int64_t step, int64_t i) {
    return std::min(n, (n + step - 1)/step*i/part->n_parts*step);
}

void monarch_attend_part_begin(const monarch_attend * attend, const monarch_part * part) {
    monarch_work shared;
    monarch_work_init(&shared, (char *) monarch_part_get(attend, part, 0), attend->op.codec.head_dim, monarch_attend_count_rows(attend), attend->n_pages_max);

    monarch_work * work = monarch_part_get(attend, part, part->i_part);
    monarch_work_init(work, (char *) work, attend->op.codec.head_dim, monarch_attend_count_rows(attend), attend->n_pages_max);

    // all parts of a head write to one array of masses
    work->mass = shared.mass;

    monarch_rows_init(attend, part->head_kv, 0, attend->q->ne[2], work);

    const int64_t n_kv = attend->k->ne[2];

    attend->kernel_hot->hot(attend, part->head_kv, work,
            monarch_part_bound(part, n_kv, MONARCH_HOT_STEP, part->i_part), monarch_part_bound(part, n_kv, MONARCH_HOT_STEP, part->i_part + 1));

    if (monarch_attend_is_selective(attend)) {
        const int32_t n = attend->n_pages;

        attend->kernel_cold->score(attend, part->head_kv, work,
                monarch_part_bound(part, n, MONARCH_SUMMARY_GROUP, part->i_part), monarch_part_bound(part, n, MONARCH_SUMMARY_GROUP, part->i_part + 1));
    }
}

// the rows of all parts as those of part 0, which nobody else works on now
static void monarch_part_merge_rows(const monarch_attend * attend, const monarch_part * part) {
    const int64_t head_dim = attend->op.codec.head_dim;

    monarch_work * work = monarch_part_get(attend, part, 0);

    for (int64_t i = 1; i < part->n_parts; ++i) {
        monarch_work * other = monarch_part_get(attend, part, i);

        for (int64_t ir = 0; ir < work->n_rows; ++ir) {
            monarch_row * dst = &work->rows[ir];
            monarch_row * src = &other->rows[ir];

            const float max = std::max(dst->max, src->max);
            if (max > -INFINITY) {
                monarch_row_set_max(dst, head_dim, max);
                monarch_row_set_max(src, head_dim, max);
            }

            ggml_vec_add_f32((int) head_dim, dst->hot,  dst->hot,  src->hot);
            ggml_vec_add_f32((int) head_dim, dst->cold, dst->cold, src->cold);
            dst->sum    += src->sum;
            dst->n_mass += src->n_mass;

            // it has given all that it had
            src->sum    = 0.0f;
            src->max    = -INFINITY;
            src->n_mass = 0;
            std::fill(src->hot,  src->hot  + head_dim, 0.0f);
            std::fill(src->cold, src->cold + head_dim, 0.0f);
        }
    }
}

void monarch_attend_part_choose(const monarch_attend * attend, const monarch_part * part) {
    monarch_work * work = monarch_part_get(attend, part, 0);

    if (monarch_attend_is_selective(attend)) {
        monarch_part_merge_rows(attend, part);
        monarch_attend_choose(attend, part->head_kv, work);
    } else {
        monarch_attend_choose_all(attend, work);
    }
}

void monarch_attend_part_cold(const monarch_attend * attend, const monarch_part * part) {
    const monarch_work * shared = monarch_part_get(attend, part, 0);

    const int64_t i0 = monarch_part_bound(part, shared->n_chosen, MONARCH_COLD_STEP, part->i_part);
    const int64_t i1 = monarch_part_bound(part, shared->n_chosen, MONARCH_COLD_STEP, part->i_part + 1);

    // part 0's own number of pages stays the whole one
    monarch_work work = *monarch_part_get(attend, part, part->i_part);

    work.chosen   = shared->chosen + i0;
    work.n_chosen = i1 - i0;

    for (int64_t ir = 0; ir < work.n_queries; ++ir) {
        work.rows[ir].mass = work.mass + ir*monarch_mass_stride(attend->n_pages_max) + i0;
    }
    if (attend->mode == MONARCH_MODE_PAGED) {
        monarch_rows_clear_mass(&work);
    }

    attend->kernel_cold->cold(attend, part->head_kv, &work);
}

void monarch_attend_part_end(const monarch_attend * attend, const monarch_part * part, monarch_attend_count * count) {
    monarch_work * work = monarch_part_get(attend, part, 0);

    monarch_part_merge_rows(attend, part);
    monarch_attend_add_rest(attend, work);

    count->n_promoted += work->n_chosen;

    if (attend->mode == MONARCH_MODE_PAGED) {
        count->n_scored += attend->n_pages;

        monarch_attend_log(attend, part->head_kv, work);
    }

    monarch_rows_write(attend, part->head_kv, work);
}
