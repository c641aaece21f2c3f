// The plain path: pages are decoded to f32, then attended with f32 arithmetic. Every other kernel is tested against it.

#include "monarch-attend.h"
#include "monarch-convert.h"
#include "monarch-summary-math.h"

#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>
#include <cmath>

// tokens decoded at a time
static const int64_t MONARCH_TILE = MONARCH_MAX_PAGE_SIZE;

struct monarch_plain_work {
    float * k;       // [tile][head_dim]
    float * v;       // [tile][head_dim]
    float * weights; // [tile]
    float * query;   // [2*head_dim]
};

static monarch_plain_work monarch_plain_work_get(float * base, int64_t head_dim) {
    return {
        base,
        base + MONARCH_TILE*head_dim,
        base + MONARCH_TILE*head_dim*2,
        base + MONARCH_TILE*head_dim*2 + MONARCH_TILE,
    };
}

static size_t monarch_plain_work_size(int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    GGML_UNUSED(n_rows);
    GGML_UNUSED(n_pages_max);
    return (MONARCH_TILE*head_dim*2 + MONARCH_TILE + 2*head_dim)*sizeof(float);
}

static bool monarch_plain_supports_hot(const monarch_op_params * op, ggml_type type_k, ggml_type type_v) {
    GGML_UNUSED(op);
    GGML_UNUSED(type_k);
    GGML_UNUSED(type_v);
    return true;
}

static bool monarch_plain_supports_cold(const monarch_op_params * op) {
    GGML_UNUSED(op);
    return true;
}

static float monarch_dot(int64_t n, const float * x, const float * y) {
    float res;
    ggml_vec_dot_f32((int) n, &res, 0, x, 0, y, 0, 1);
    return res;
}

// adds n tokens to the row's softmax; weights: their logits, overwritten; returns their mass on the scale of row->max
static float monarch_row_add_tile(monarch_row * row, int64_t head_dim, int64_t n, float * weights, const float * v, float * acc) {
    const float max = *std::max_element(weights, weights + n);

    if (max == -INFINITY) {
        return 0.0f;
    }
    if (max > row->max) {
        monarch_row_set_max(row, head_dim, max);
    }

    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        if (weights[i] == -INFINITY) {
            continue; // what is masked may be no number
        }
        const float w = expf(weights[i] - row->max);

        ggml_vec_mad_f32((int) head_dim, acc, v + i*head_dim, w);
        sum += w;
    }

    row->sum += sum;

    return sum;
}

static float monarch_mask_get(const ggml_tensor * mask, int64_t i_kv, int64_t i_token) {
    const char * row = (const char *) mask->data + i_token*mask->nb[1];

    return mask->type == GGML_TYPE_F16 ? GGML_FP16_TO_FP32(((const ggml_fp16_t *) row)[i_kv]) : ((const float *) row)[i_kv];
}

// one head of n ring slots as f32
static void monarch_ring_read(const ggml_tensor * t, int64_t head_kv, int64_t i0, int64_t n, float * dst) {
    for (int64_t i = 0; i < n; ++i) {
        monarch_convert_to_f32(t->type, (const char *) t->data + head_kv*t->nb[1] + (i0 + i)*t->nb[2], dst + i*t->ne[0], t->ne[0]);
    }
}

static void monarch_plain_hot(const monarch_attend * attend, int64_t head_kv, monarch_work * work, int64_t slot0, int64_t slot1) {
    const int64_t head_dim = attend->op.codec.head_dim;

    const monarch_plain_work plain = monarch_plain_work_get((float *) work->kernel, head_dim);

    for (int64_t i0 = slot0; i0 < slot1; i0 += MONARCH_TILE) {
        const int64_t n = std::min(MONARCH_TILE, slot1 - i0);

        monarch_ring_read(attend->k, head_kv, i0, n, plain.k);
        monarch_ring_read(attend->v, head_kv, i0, n, plain.v);

        for (int64_t ir = 0; ir < work->n_rows; ++ir) {
            monarch_row * row = &work->rows[ir];

            for (int64_t i = 0; i < n; ++i) {
                const float mask = monarch_mask_get(attend->mask, i0 + i, row->i_token);

                plain.weights[i] = mask == -INFINITY ? mask : attend->op.kq_scale*monarch_dot(head_dim, row->q, plain.k + i*head_dim) + mask;
            }

            monarch_row_add_tile(row, head_dim, n, plain.weights, plain.v, row->hot);
        }
    }
}

static void monarch_plain_cold(const monarch_attend * attend, int64_t head_kv, monarch_work * work) {
    const monarch_codec * codec = &attend->op.codec;

    const int64_t head_dim = codec->head_dim;

    const monarch_plain_work plain = monarch_plain_work_get((float *) work->kernel, head_dim);

    for (int32_t ic = 0; ic < work->n_chosen; ++ic) {
        const monarch_table_entry * entry = &attend->table[work->chosen[ic]];

        const uint8_t * block = attend->pool + monarch_pool_offset(codec, attend->n_pages_max, head_kv, entry->page);

        monarch_codec_decode_page_k(codec, block, plain.k);
        monarch_codec_decode_page_v(codec, block, plain.v);

        for (int64_t ir = 0; ir < work->n_rows; ++ir) {
            monarch_row * row = &work->rows[ir];

            const float * q   = codec->bits_k == 16 ? row->q   : row->q_rot;
            float       * acc = codec->bits_v == 16 ? row->hot : row->cold;

            for (int32_t i = 0; i < codec->page_size; ++i) {
                const bool valid = entry->mask >> i & 1;

                plain.weights[i] = valid ? attend->op.kq_scale*monarch_dot(head_dim, q, plain.k + i*head_dim) : -INFINITY;
            }

            const float mass = monarch_row_add_tile(row, head_dim, codec->page_size, plain.weights, plain.v, acc);

            if (ic < row->n_mass) {
                row->mass[ic] = mass;
            }
        }
    }
}

static void monarch_plain_score(const monarch_attend * attend, int64_t head_kv, monarch_work * work, int32_t i0, int32_t i1) {
    const int32_t head_dim = attend->op.codec.head_dim;

    const monarch_plain_work plain = monarch_plain_work_get((float *) work->kernel, head_dim);

    for (int64_t ir = 0; ir < work->n_queries; ++ir) {
        const monarch_row * row = &work->rows[ir];

        monarch_summary_query(attend->op.scorer, head_dim, row->q, plain.query);

        for (int32_t i = i0; i < i1; ++i) {
            const monarch_table_entry * entry = &attend->table[i];

            const uint8_t * group = monarch_attend_get_group(attend, head_kv, entry->page);

            row->mass[i] = attend->op.kq_scale*monarch_summary_score(attend->op.scorer, head_dim, plain.query, group, entry->page%MONARCH_SUMMARY_GROUP) + monarch_summary_log_count(attend->op.scorer, monarch_mask_count(entry->mask));
        }
    }
}

static float monarch_plain_exp(int32_t n, float * x, float max) {
    double sum = 0.0;
    for (int32_t i = 0; i < n; ++i) {
        x[i] = expf(x[i] - max);
        sum += x[i];
    }
    return (float) sum;
}

const monarch_kernel monarch_kernel_plain = {
    /*.name          =*/ "plain",
    /*.supports_hot  =*/ monarch_plain_supports_hot,
    /*.supports_cold =*/ monarch_plain_supports_cold,
    /*.work_size     =*/ monarch_plain_work_size,
    /*.hot           =*/ monarch_plain_hot,
    /*.cold          =*/ monarch_plain_cold,
    /*.score         =*/ monarch_plain_score,
    /*.exp           =*/ monarch_plain_exp,
};
