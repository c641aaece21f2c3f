#include "monarch-summary.h"

#include "monarch-codec.h"
#include "monarch-f16.h"

#include <math.h>
#include <string.h>

// Compiled as the codec is: the numpy reference gives the same bytes.

#define GROUP   MONARCH_SUMMARY_GROUP
#define N_LANES 8

enum rounding {
    ROUND_DOWN,
    ROUND_NEAREST,
    ROUND_UP,
};

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

static void find_mean_std(int32_t head_dim, int32_t n_tokens, const float * k, float * mean, float * std) {
    float x[MONARCH_MAX_HEAD_DIM];

    memset(mean, 0, head_dim*sizeof(float));
    memset(std,  0, head_dim*sizeof(float));
    for (int32_t t = 0; t < n_tokens; ++t) {
        token_load(head_dim, k + t*head_dim, x);
        for (int32_t d = 0; d < head_dim; ++d) {
            mean[d] += x[d];
        }
    }
    for (int32_t d = 0; d < head_dim; ++d) {
        mean[d] /= (float) n_tokens;
    }
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
// groups
//

enum head {
    HEAD_OFFSET,
    HEAD_STEP,
    N_HEADS, // of each statistic
};

// in bytes
static size_t head_offset(int32_t i_half, enum head head, int32_t i_page) {
    return ((i_half*N_HEADS + head)*GROUP + i_page)*sizeof(uint16_t);
}

static size_t value_offset(int32_t i_value, int32_t i_page) {
    return 2*N_HEADS*GROUP*sizeof(uint16_t) + (i_value/4*GROUP + i_page)*4 + i_value%4;
}

//
// 8-bit affine
//

static uint16_t f16_round_down(float x) {
    const uint16_t h = monarch_f32_to_f16(x);
    if (monarch_f16_to_f32(h) <= x) {
        return h;
    }
    if ((h & 0x7fff) == 0) {
        return 0x8001; // the least negative subnormal
    }
    return h & 0x8000 ? h + 1 : h - 1;
}

static uint8_t quantize(float x, float offset, float step, enum rounding rounding) {
    if (step == 0.0f) {
        return 0;
    }
    const float ratio = (x - offset)/step;

    float u = rounding == ROUND_DOWN ? floorf(ratio) : rounding == ROUND_UP ? ceilf(ratio) : rintf(ratio);

    // the division rounds too
    if (rounding == ROUND_DOWN && offset + step*u > x) {
        u -= 1.0f;
    }
    if (rounding == ROUND_UP && offset + step*u < x) {
        u += 1.0f;
    }
    return (uint8_t) fminf(fmaxf(u, 0.0f), 255.0f);
}

static void encode_half(
        int32_t head_dim, enum rounding rounding, const float * x, uint8_t * group, int32_t i_page, int32_t i_half) {
    float min = x[0];
    float max = x[0];
    for (int32_t d = 1; d < head_dim; ++d) {
        min = x[d] < min ? x[d] : min;
        max = x[d] > max ? x[d] : max;
    }

    // the range is rounded outwards: no value lies outside; which zero is the minimum depends on the order, + 0 makes it +0
    const uint16_t offset_f16 = f16_round_down(min + 0.0f);
    const float    offset     = monarch_f16_to_f32(offset_f16);

    uint16_t step_f16 = monarch_f32_to_f16((max - offset)/255.0f);
    while (offset + 255.0f*monarch_f16_to_f32(step_f16) < max) {
        step_f16++;
    }
    const float step = monarch_f16_to_f32(step_f16);

    memcpy(group + head_offset(i_half, HEAD_OFFSET, i_page), &offset_f16, sizeof(offset_f16));
    memcpy(group + head_offset(i_half, HEAD_STEP,   i_page), &step_f16,   sizeof(step_f16));
    for (int32_t d = 0; d < head_dim; ++d) {
        group[value_offset(i_half*head_dim + d, i_page)] = quantize(x[d], offset, step, rounding);
    }
}

void monarch_summary_encode(
        int32_t scorer, int32_t head_dim, int32_t n_tokens, const float * k, uint8_t * group, int32_t i_page) {
    float first [MONARCH_MAX_HEAD_DIM] = { 0 };
    float second[MONARCH_MAX_HEAD_DIM] = { 0 };

    const bool minmax = scorer == MONARCH_SCORER_MINMAX;

    if (minmax) {
        find_min_max (head_dim, n_tokens, k, first, second);
    } else {
        find_mean_std(head_dim, n_tokens, k, first, second);
    }
    encode_half(head_dim, minmax ? ROUND_DOWN : ROUND_NEAREST, first,  group, i_page, 0);
    encode_half(head_dim, minmax ? ROUND_UP   : ROUND_NEAREST, second, group, i_page, 1);
}

//
// scores
//

void monarch_summary_query(int32_t scorer, int32_t head_dim, const float * q, float * w) {
    for (int32_t d = 0; d < head_dim; ++d) {
        const float x = monarch_f16_clamp(q[d]);

        if (scorer == MONARCH_SCORER_MINMAX) {
            w[d]            = x < 0.0f ? x : 0.0f;
            w[d + head_dim] = x > 0.0f ? x : 0.0f;
        } else {
            w[d]            = x;
            w[d + head_dim] = MONARCH_MEANSTD_WEIGHT*fabsf(x);
        }
    }
}

static float score_half(int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page, int32_t i_half) {
    uint16_t offset_f16;
    uint16_t step_f16;
    memcpy(&offset_f16, group + head_offset(i_half, HEAD_OFFSET, i_page), sizeof(offset_f16));
    memcpy(&step_f16,   group + head_offset(i_half, HEAD_STEP,   i_page), sizeof(step_f16));

    const float offset = monarch_f16_to_f32(offset_f16);
    const float step   = monarch_f16_to_f32(step_f16);

    float lanes[N_LANES] = { 0 };
    for (int32_t d = 0; d < head_dim; d += N_LANES) {
        for (int32_t j = 0; j < N_LANES; ++j) {
            const uint8_t u = group[value_offset(i_half*head_dim + d + j, i_page)];
            lanes[j] += w[d + j]*(offset + step*(float) u);
        }
    }
    float sum = 0.0f;
    for (int32_t j = 0; j < N_LANES; ++j) {
        sum += lanes[j];
    }
    return sum;
}

float monarch_summary_score(int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page) {
    return score_half(head_dim, w,            group, i_page, 0) +
           score_half(head_dim, w + head_dim, group, i_page, 1);
}
