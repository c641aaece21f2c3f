#include "monarch-summary.h"

#include "monarch-summary-math.h"

#include <math.h>
#include <string.h>

// Compiled as the codec is: the numpy reference gives the same bytes.

//
// statistics
//

static void token_load(int32_t head_dim, const float * k, float * x) {
    for (int32_t d = 0; d < head_dim; ++d) {
        x[d] = monarch_f16_clamp(k[d]);
    }
}

static void find_min_max(int32_t head_dim, int32_t n_tokens, const float * k, float * min, float * max) {
    float x[MONARCH_MAX_HEAD_DIM];

    token_load(head_dim, k, min);
    token_load(head_dim, k, max);
    for (int32_t t = 1; t < n_tokens; ++t) {
        token_load(head_dim, k + t*head_dim, x);
        for (int32_t d = 0; d < head_dim; ++d) {
            min[d] = x[d] < min[d] ? x[d] : min[d];
            max[d] = x[d] > max[d] ? x[d] : max[d];
        }
    }
}

static void find_mean(int32_t head_dim, int32_t n_tokens, const float * k, float * mean) {
    float x[MONARCH_MAX_HEAD_DIM];

    memset(mean, 0, head_dim*sizeof(float));
    for (int32_t t = 0; t < n_tokens; ++t) {
        token_load(head_dim, k + t*head_dim, x);
        for (int32_t d = 0; d < head_dim; ++d) {
            mean[d] += x[d];
        }
    }
    for (int32_t d = 0; d < head_dim && n_tokens > 0; ++d) {
        mean[d] /= (float) n_tokens;
    }
}

static void find_mean_std(int32_t head_dim, int32_t n_tokens, const float * k, float * mean, float * std) {
    float x[MONARCH_MAX_HEAD_DIM];

    find_mean(head_dim, n_tokens, k, mean);
    memset(std, 0, head_dim*sizeof(float));
    for (int32_t t = 0; t < n_tokens; ++t) {
        token_load(head_dim, k + t*head_dim, x);
        for (int32_t d = 0; d < head_dim; ++d) {
            const float diff = x[d] - mean[d];
            std[d] += diff*diff;
        }
    }
    for (int32_t d = 0; d < head_dim; ++d) {
        std[d] = sqrtf(std[d]/(float) n_tokens);
    }
}

//
// 8-bit affine
//

static void encode_half(int32_t scorer, int32_t head_dim, const float * x, uint8_t * group, int32_t i_page, int32_t i_half) {
    const monarch_summary_range    range    = monarch_summary_get_range(head_dim, x);
    const monarch_summary_rounding rounding = monarch_summary_get_rounding(scorer, i_half);

    const float offset = monarch_f16_to_f32(range.offset);
    const float step   = monarch_f16_to_f32(range.step);

    memcpy(group + monarch_summary_offset_at(i_half, i_page), &range.offset, sizeof(range.offset));
    memcpy(group + monarch_summary_step_at  (i_half, i_page), &range.step,   sizeof(range.step));
    for (int32_t d = 0; d < head_dim; ++d) {
        group[monarch_summary_value_at(i_half*head_dim + d, i_page)] = monarch_summary_quantize(x[d], offset, step, rounding);
    }
}

//
// parts
//

static void encode_part(int32_t head_dim, int32_t n_tokens, const float * k, uint8_t * group, int32_t i_page, int32_t i_part) {
    float x    [MONARCH_MAX_HEAD_DIM];
    float value[MONARCH_MAX_HEAD_DIM];

    find_mean(head_dim, n_tokens, k, x);
    monarch_codec_rotate(head_dim, x);

    const float sum  = monarch_summary_sum_products(head_dim, x, x);
    const float step = monarch_summary_get_step(head_dim, sum);

    for (int32_t d = 0; d < head_dim; ++d) {
        const int32_t u     = monarch_summary_encode_code(x[d], step);
        const int32_t shift = monarch_summary_code_shift(d);

        uint8_t * codes = group + monarch_summary_code_at(head_dim, i_part, d, i_page);

        *codes   = (shift == 0 ? 0 : *codes) | u << shift;
        value[d] = (float) u - 1.5f;
    }

    const float product = monarch_summary_sum_products(head_dim, x, value);

    group[monarch_summary_scale_at(i_part, i_page)] = n_tokens == 0 ? 0 : monarch_summary_encode_part_scale(sum, product);
}

static void encode_parts(int32_t head_dim, int32_t n_tokens, const float * k, uint8_t * group, int32_t i_page) {
    for (int32_t i = 0; i < MONARCH_SUMMARY_PARTS; ++i) {
        const int32_t begin = monarch_summary_part_begin(n_tokens, i);
        const int32_t end   = monarch_summary_part_begin(n_tokens, i + 1);

        encode_part(head_dim, end - begin, k + begin*head_dim, group, i_page, i);
    }
}

void monarch_summary_encode(
        int32_t scorer, int32_t head_dim, int32_t n_tokens, const float * k, uint8_t * group, int32_t i_page) {
    float first [MONARCH_MAX_HEAD_DIM] = { 0 };
    float second[MONARCH_MAX_HEAD_DIM] = { 0 };

    if (scorer == MONARCH_SCORER_PARTS) {
        encode_parts(head_dim, n_tokens, k, group, i_page);
        return;
    }
    if (scorer == MONARCH_SCORER_MINMAX) {
        find_min_max (head_dim, n_tokens, k, first, second);
    } else {
        find_mean_std(head_dim, n_tokens, k, first, second);
    }
    encode_half(scorer, head_dim, first,  group, i_page, 0);
    encode_half(scorer, head_dim, second, group, i_page, 1);
}

//
// scores
//

void monarch_summary_query(int32_t scorer, int32_t head_dim, const float * q, float * w) {
    for (int32_t d = 0; d < head_dim; ++d) {
        w[d]            = monarch_summary_weight(scorer, 0, q[d]);
        w[d + head_dim] = monarch_summary_weight(scorer, 1, q[d]);
    }
    if (scorer == MONARCH_SCORER_PARTS) {
        monarch_codec_rotate(head_dim, w);
    }
}

float monarch_summary_score(int32_t scorer, int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page) {
    return monarch_summary_score_page(scorer, head_dim, w, group, i_page);
}
