// The plain path: pages are decoded to f32, then attended with f32 arithmetic. Every other kernel is tested against it.

#include "monarch-attend.h"

#include "monarch-enums.h"
#include "monarch-summary.h"

#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// ring slots decoded at a time
static const int64_t MONARCH_HOT_TILE = 32;

// one query head of one token
struct monarch_row {
    const float * q;     // [head_dim]
    float       * q_rot; // [head_dim] rotated like cold K
    float       * hot;   // [head_dim] sum over hot V
    float       * cold;  // [head_dim] sum over cold V, rotated
    int64_t       i_token;
    float         max;   // online softmax over both
    float         sum;
};

struct monarch_work {
    monarch_row * rows;
    float       * q_rot;
    float       * hot;
    float       * cold;
    float       * k;           // [tile][head_dim]
    float       * v;           // [tile][head_dim]
    float       * weights;     // [tile]
    float       * query;       // [2*head_dim]
    float       * logits;      // [n_rows][n_pages_max] estimated page mass, then measured, as logarithms
    float       * probability; // [n_pages_max]
    float       * rank;        // [n_pages_max]
    int32_t     * chosen;      // [n_pages_max]
};

static char * monarch_work_take(char ** ptr, size_t size) {
    char * res = *ptr;
    *ptr += (size + 63)/64*64;
    return res;
}

// with base == nullptr only the size counts
static size_t monarch_work_init(monarch_work * work, char * base, int64_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    char * ptr = base;

    work->rows        = (monarch_row *) monarch_work_take(&ptr, n_rows*sizeof(monarch_row));
    work->q_rot       = (float *)       monarch_work_take(&ptr, n_rows*head_dim*sizeof(float));
    work->hot         = (float *)       monarch_work_take(&ptr, n_rows*head_dim*sizeof(float));
    work->cold        = (float *)       monarch_work_take(&ptr, n_rows*head_dim*sizeof(float));
    work->k           = (float *)       monarch_work_take(&ptr, MONARCH_HOT_TILE*head_dim*sizeof(float));
    work->v           = (float *)       monarch_work_take(&ptr, MONARCH_HOT_TILE*head_dim*sizeof(float));
    work->weights     = (float *)       monarch_work_take(&ptr, MONARCH_HOT_TILE*sizeof(float));
    work->query       = (float *)       monarch_work_take(&ptr, 2*head_dim*sizeof(float));
    work->logits      = (float *)       monarch_work_take(&ptr, n_rows*n_pages_max*sizeof(float));
    work->probability = (float *)       monarch_work_take(&ptr, n_pages_max*sizeof(float));
    work->rank        = (float *)       monarch_work_take(&ptr, n_pages_max*sizeof(float));
    work->chosen      = (int32_t *)     monarch_work_take(&ptr, n_pages_max*sizeof(int32_t));

    return ptr - base;
}

int64_t monarch_attend_block_size(int64_t n_gqa, int64_t n_tokens) {
    return std::max<int64_t>(1, std::min<int64_t>(n_tokens, 64/n_gqa));
}

size_t monarch_attend_work_size(int32_t head_dim, int64_t n_gqa, int64_t n_tokens, int64_t n_pages_max) {
    monarch_work work;
    return monarch_work_init(&work, nullptr, head_dim, n_gqa*monarch_attend_block_size(n_gqa, n_tokens), n_pages_max);
}

static float monarch_dot(int64_t n, const float * x, const float * y) {
    float res;
    ggml_vec_dot_f32((int) n, &res, 0, x, 0, y, 0, 1);
    return res;
}

// adds n tokens to the row's softmax; weights: their logits, overwritten; returns the log-sum-exp of the tile
static float monarch_row_add_tile(monarch_row * row, int64_t head_dim, int64_t n, float * weights, const float * v, float * acc) {
    float max = -INFINITY;
    for (int64_t i = 0; i < n; ++i) {
        max = std::max(max, weights[i]);
    }

    if (max == -INFINITY) {
        return -INFINITY;
    }

    if (max > row->max) {
        const float scale = expf(row->max - max);

        ggml_vec_scale_f32((int) head_dim, row->hot,  scale);
        ggml_vec_scale_f32((int) head_dim, row->cold, scale);

        row->sum *= scale;
        row->max  = max;
    }

    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        const float w = expf(weights[i] - row->max);

        if (w != 0.0f) {
            ggml_vec_mad_f32((int) head_dim, acc, v + i*head_dim, w);
        }
        sum += w;
    }

    row->sum += sum;

    return row->max + logf(sum);
}

static float monarch_mask_get(const ggml_tensor * mask, int64_t i_kv, int64_t i_token) {
    const char * row = (const char *) mask->data + i_token*mask->nb[1];

    return mask->type == GGML_TYPE_F16 ? GGML_FP16_TO_FP32(((const ggml_fp16_t *) row)[i_kv]) : ((const float *) row)[i_kv];
}

// one head of n ring slots as f32
static void monarch_ring_read(const ggml_tensor * t, int64_t head_kv, int64_t i0, int64_t n, float * dst) {
    const ggml_to_float_t to_float = ggml_get_type_traits(t->type)->to_float;

    for (int64_t i = 0; i < n; ++i) {
        const char * src = (const char *) t->data + head_kv*t->nb[1] + (i0 + i)*t->nb[2];

        if (t->type == GGML_TYPE_F32) {
            memcpy(dst + i*t->ne[0], src, t->ne[0]*sizeof(float));
        } else {
            to_float(src, dst + i*t->ne[0], t->ne[0]);
        }
    }
}

static void monarch_attend_hot(const monarch_attend * attend, int64_t head_kv, monarch_work * work, int64_t n_rows) {
    const int64_t head_dim = attend->op.codec.head_dim;
    const int64_t n_kv     = attend->k->ne[2];

    for (int64_t i0 = 0; i0 < n_kv; i0 += MONARCH_HOT_TILE) {
        const int64_t n = std::min(MONARCH_HOT_TILE, n_kv - i0);

        monarch_ring_read(attend->k, head_kv, i0, n, work->k);
        monarch_ring_read(attend->v, head_kv, i0, n, work->v);

        for (int64_t ir = 0; ir < n_rows; ++ir) {
            monarch_row * row = &work->rows[ir];

            for (int64_t i = 0; i < n; ++i) {
                const float mask = monarch_mask_get(attend->mask, i0 + i, row->i_token);

                work->weights[i] = mask == -INFINITY ? mask : attend->op.kq_scale*monarch_dot(head_dim, row->q, work->k + i*head_dim) + mask;
            }

            monarch_row_add_tile(row, head_dim, n, work->weights, work->v, row->hot);
        }
    }
}

// attends the chosen pages; logits of row r, chosen page i become the logarithm of the page's attention mass
static void monarch_attend_cold(const monarch_attend * attend, int64_t head_kv, monarch_work * work, int64_t n_rows, int32_t n_chosen) {
    const monarch_codec * codec = &attend->op.codec;

    const int64_t head_dim   = codec->head_dim;
    const size_t  block_size = monarch_codec_block_size(codec);

    for (int32_t ic = 0; ic < n_chosen; ++ic) {
        const monarch_table_entry * entry = &attend->table[work->chosen[ic]];

        const uint8_t * block = attend->pool + (entry->page*attend->n_head_kv + head_kv)*block_size;

        monarch_codec_decode_page_k(codec, block, work->k);
        monarch_codec_decode_page_v(codec, block, work->v);

        for (int64_t ir = 0; ir < n_rows; ++ir) {
            monarch_row * row = &work->rows[ir];

            const float * q = codec->bits_k == 16 ? row->q : row->q_rot;

            for (int32_t i = 0; i < codec->page_size; ++i) {
                const bool valid = entry->mask >> i & 1;

                work->weights[i] = valid ? attend->op.kq_scale*monarch_dot(head_dim, q, work->k + i*head_dim) : -INFINITY;
            }

            float * acc = codec->bits_v == 16 ? row->hot : row->cold;

            work->logits[ir*attend->n_pages_max + ic] = monarch_row_add_tile(row, head_dim, codec->page_size, work->weights, work->v, acc);
        }
    }
}

// the greatest probability of each page over the rows, as the summaries estimate it
static void monarch_attend_score(const monarch_attend * attend, int64_t head_kv, monarch_work * work, int64_t n_rows) {
    const int32_t head_dim     = attend->op.codec.head_dim;
    const size_t  summary_size = monarch_summary_size(head_dim);

    std::fill(work->probability, work->probability + attend->n_pages, 0.0f);

    for (int64_t ir = 0; ir < n_rows; ++ir) {
        const monarch_row * row = &work->rows[ir];

        float * logits = work->logits + ir*attend->n_pages_max;

        monarch_summary_query(attend->op.scorer, head_dim, row->q, work->query);

        const float hot = row->max + logf(row->sum);

        float max = hot;
        for (int32_t i = 0; i < attend->n_pages; ++i) {
            const monarch_table_entry * entry = &attend->table[i];

            const uint8_t * summary = attend->summary + (entry->page*attend->n_head_kv + head_kv)*summary_size;

            logits[i] = attend->op.kq_scale*monarch_summary_score(head_dim, work->query, summary) + logf(__builtin_popcount(entry->mask));

            max = std::max(max, logits[i]);
        }

        float sum = expf(hot - max);
        for (int32_t i = 0; i < attend->n_pages; ++i) {
            logits[i] = expf(logits[i] - max);
            sum += logits[i];
        }

        for (int32_t i = 0; i < attend->n_pages; ++i) {
            work->probability[i] = std::max(work->probability[i], logits[i]/sum);
        }
    }
}

// rank serves as scratch for the measured masses: the choice is made by now
static void monarch_attend_log(const monarch_attend * attend, int64_t head_kv, monarch_work * work, int64_t n_rows, int32_t n_chosen) {
    for (int32_t ic = 0; ic < n_chosen; ++ic) {
        float measured = 0.0f;

        for (int64_t ir = 0; ir < n_rows; ++ir) {
            const monarch_row * row = &work->rows[ir];

            measured = std::max(measured, expf(work->logits[ir*attend->n_pages_max + ic] - row->max)/row->sum);
        }

        work->rank[ic] = measured;
    }

    monarch_policy_write_log(&attend->policy, monarch_state_head(attend->state, attend->n_pages_max, head_kv), attend->n_pages_max,
            attend->n_pages, attend->table, work->probability, work->rank, n_chosen, work->chosen);
}

static int64_t monarch_attend_init_rows(const monarch_attend * attend, int64_t head_kv, int64_t i_token0, int64_t n_tokens, monarch_work * work) {
    const int64_t head_dim = attend->op.codec.head_dim;
    const int64_t n_rows   = n_tokens*attend->n_gqa;

    for (int64_t ir = 0; ir < n_rows; ++ir) {
        const int64_t i_token = i_token0 + ir/attend->n_gqa;
        const int64_t i_head  = head_kv*attend->n_gqa + ir%attend->n_gqa;

        monarch_row * row = &work->rows[ir];

        row->q       = (const float *) ((const char *) attend->q->data + i_head*attend->q->nb[1] + i_token*attend->q->nb[2]);
        row->q_rot   = work->q_rot + ir*head_dim;
        row->hot     = work->hot   + ir*head_dim;
        row->cold    = work->cold  + ir*head_dim;
        row->i_token = i_token;
        row->max     = -INFINITY;
        row->sum     = 0.0f;

        memcpy(row->q_rot, row->q, head_dim*sizeof(float));
        memset(row->hot,   0,      head_dim*sizeof(float));
        memset(row->cold,  0,      head_dim*sizeof(float));

        monarch_codec_rotate((int32_t) head_dim, row->q_rot);
    }

    return n_rows;
}

static void monarch_attend_write(const monarch_attend * attend, int64_t head_kv, monarch_work * work, int64_t n_rows) {
    const int64_t head_dim = attend->op.codec.head_dim;

    for (int64_t ir = 0; ir < n_rows; ++ir) {
        monarch_row * row = &work->rows[ir];

        const int64_t i_head = head_kv*attend->n_gqa + ir%attend->n_gqa;

        float * dst = (float *) ((char *) attend->dst->data + i_head*attend->dst->nb[1] + row->i_token*attend->dst->nb[2]);

        monarch_codec_unrotate((int32_t) head_dim, row->cold);

        for (int64_t i = 0; i < head_dim; ++i) {
            dst[i] = (row->hot[i] + row->cold[i])/row->sum;
        }
    }
}

// chooses the cold pages of the block into work->chosen
static int32_t monarch_attend_choose(const monarch_attend * attend, int64_t head_kv, monarch_work * work, int64_t n_rows) {
    if (attend->mode == MONARCH_MODE_WINDOW || attend->n_pages == 0) {
        return 0;
    }

    if (attend->mode == MONARCH_MODE_EXACT) {
        for (int32_t i = 0; i < attend->n_pages; ++i) {
            work->chosen[i] = i;
        }
        return attend->n_pages;
    }

    monarch_attend_score(attend, head_kv, work, n_rows);

    return monarch_policy_select(&attend->policy, monarch_state_head(attend->state, attend->n_pages_max, head_kv), attend->n_pages_max,
            attend->n_pages, attend->table, work->probability, work->rank, work->chosen);
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

    monarch_work work;
    monarch_work_init(&work, (char *) work_data, attend->op.codec.head_dim, attend->n_gqa*attend->n_block, attend->n_pages_max);

    const int64_t n_rows = monarch_attend_init_rows(attend, head_kv, i_token0, n_tokens, &work);

    monarch_attend_hot(attend, head_kv, &work, n_rows);

    const int64_t t_start = ggml_time_us();

    const int32_t n_chosen = monarch_attend_choose(attend, head_kv, &work, n_rows);

    *score_us += ggml_time_us() - t_start;

    monarch_attend_cold(attend, head_kv, &work, n_rows, n_chosen);

    count->n_promoted += n_chosen;

    if (attend->mode == MONARCH_MODE_PAGED) {
        count->n_scored += attend->n_pages;

        // the last block holds the present query: it alone moves the sticky state
        if (i_token0 + n_tokens == n_tokens_all) {
            monarch_attend_log(attend, head_kv, &work, n_rows, n_chosen);
        }
    }

    monarch_attend_write(attend, head_kv, &work, n_rows);
}
