#pragma once

// Arithmetic of the page summaries (monarch-summary.h) as the CPU and CUDA share it.

#include "monarch-f16.h"
#include "monarch-hd.h"
#include "monarch-polar.h"
#include "monarch-summary.h"

#include <math.h>
#include <stdint.h>

enum monarch_summary_rounding {
    MONARCH_ROUND_DOWN,
    MONARCH_ROUND_NEAREST,
    MONARCH_ROUND_UP,
};

// of a statistic's 8-bit values
struct monarch_summary_range {
    uint16_t offset; // f16
    uint16_t step;
};

//
// groups
//

// of the offset and the step of one statistic, in bytes
MONARCH_HD static inline size_t monarch_summary_offset_at(int32_t i_half, int32_t i_page) {
    return (i_half*2*MONARCH_SUMMARY_GROUP + i_page)*sizeof(uint16_t);
}

MONARCH_HD static inline size_t monarch_summary_step_at(int32_t i_half, int32_t i_page) {
    return monarch_summary_offset_at(i_half, i_page) + MONARCH_SUMMARY_GROUP*sizeof(uint16_t);
}

MONARCH_HD static inline size_t monarch_summary_value_at(int32_t i_value, int32_t i_page) {
    return 4*MONARCH_SUMMARY_GROUP*sizeof(uint16_t) + (i_value/4*MONARCH_SUMMARY_GROUP + i_page)*4 + i_value%4;
}

//
// 8-bit affine
//

MONARCH_HD static inline enum monarch_summary_rounding monarch_summary_get_rounding(int32_t scorer, int32_t i_half) {
    if (scorer != MONARCH_SCORER_MINMAX) {
        return MONARCH_ROUND_NEAREST;
    }
    return i_half == 0 ? MONARCH_ROUND_DOWN : MONARCH_ROUND_UP;
}

MONARCH_HD static inline uint16_t monarch_f16_round_down(float x) {
    const uint16_t h = monarch_f32_to_f16(x);
    if (monarch_f16_to_f32(h) <= x) {
        return h;
    }
    if ((h & 0x7fff) == 0) {
        return 0x8001; // the least negative subnormal
    }
    return h & 0x8000 ? h + 1 : h - 1;
}

// min and max of n values, in order; the range is rounded outwards: no value lies outside
MONARCH_HD static inline struct monarch_summary_range monarch_summary_get_range(int32_t n, const float * x) {
    float min = x[0];
    float max = x[0];
    for (int32_t i = 1; i < n; ++i) {
        min = x[i] < min ? x[i] : min;
        max = x[i] > max ? x[i] : max;
    }

    struct monarch_summary_range range;

    // which zero is the minimum depends on the order, + 0 makes it +0
    range.offset = monarch_f16_round_down(min + 0.0f);

    const float offset = monarch_f16_to_f32(range.offset);

    range.step = monarch_f32_to_f16((max - offset)/255.0f);
    while (offset + 255.0f*monarch_f16_to_f32(range.step) < max) {
        range.step++;
    }
    return range;
}

MONARCH_HD static inline uint8_t monarch_summary_quantize(float x, float offset, float step, enum monarch_summary_rounding rounding) {
    if (step == 0.0f) {
        return 0;
    }
    const float ratio = (x - offset)/step;

    float u = rounding == MONARCH_ROUND_DOWN ? floorf(ratio) : rounding == MONARCH_ROUND_UP ? ceilf(ratio) : rintf(ratio);

    // the division rounds too
    if (rounding == MONARCH_ROUND_DOWN && offset + step*u > x) {
        u -= 1.0f;
    }
    if (rounding == MONARCH_ROUND_UP && offset + step*u < x) {
        u += 1.0f;
    }
    return (uint8_t) fminf(fmaxf(u, 0.0f), 255.0f);
}

//
// parts
//

// first token of a part, of a page's n valid ones
MONARCH_HD static inline int32_t monarch_summary_part_begin(int32_t n_tokens, int32_t i_part) {
    return i_part*n_tokens/MONARCH_SUMMARY_PARTS;
}

MONARCH_HD static inline size_t monarch_summary_scale_at(int32_t i_part, int32_t i_page) {
    return i_part*MONARCH_SUMMARY_GROUP + i_page;
}

// the byte that dimension d shares with three others, and where in it
MONARCH_HD static inline size_t monarch_summary_code_at(int32_t head_dim, int32_t i_part, int32_t d, int32_t i_page) {
    return MONARCH_SUMMARY_PARTS*MONARCH_SUMMARY_GROUP + ((i_part/4*head_dim + d)/4*MONARCH_SUMMARY_GROUP + i_page)*4 + i_part%4;
}

MONARCH_HD static inline int32_t monarch_summary_code_shift(int32_t d) {
    return d%4*2;
}

// 2^-20 to 3840: what keys are, and more than enough to tell them apart
#define MONARCH_SCALE_CODE_BIAS ((127 - 20) << 3)

MONARCH_HD static inline uint8_t monarch_summary_encode_scale(float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof(bits));

    const int32_t code = (int32_t) ((bits + (1u << 19)) >> 20) - MONARCH_SCALE_CODE_BIAS;

    return code < 1 ? 1 : code > 255 ? 255 : code;
}

MONARCH_HD static inline float monarch_summary_decode_scale(uint8_t code) {
    const uint32_t bits = (uint32_t) (code + MONARCH_SCALE_CODE_BIAS) << 20;

    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

MONARCH_HD static inline float monarch_summary_sum_products(int32_t n, const float * x, const float * y) {
    float lanes[MONARCH_N_LANES] = { 0 };
    for (int32_t i = 0; i < n; ++i) {
        lanes[i%MONARCH_N_LANES] += x[i]*y[i];
    }
    return monarch_sum_lanes(lanes);
}

// of the two-bit values of a rotated mean: sum of its squares
MONARCH_HD static inline float monarch_summary_get_step(int32_t head_dim, float sum) {
    return MONARCH_SUMMARY_STEP*sqrtf(sum/(float) head_dim);
}

// the scale keeps the product of a mean with itself: sum of squares, product with what its codes stand for
MONARCH_HD static inline uint8_t monarch_summary_encode_part_scale(float sum, float product) {
    return monarch_summary_encode_scale(product > 0.0f ? sum/product : 0.0f);
}

MONARCH_HD static inline int32_t monarch_summary_encode_code(float x, float step) {
    const float u = step > 0.0f ? floorf(x/step) + 2.0f : 2.0f;

    return (int32_t) fminf(fmaxf(u, 0.0f), 3.0f);
}

//
// scores
//

// whether a score says what a page would get; else it bounds that
MONARCH_HD static inline bool monarch_summary_is_estimate(int32_t scorer) {
    return scorer != MONARCH_SCORER_MINMAX;
}

// the logarithm of what a page of n_tokens gets, in units of what its score stands for: one token; a bound counts for all
MONARCH_HD static inline float monarch_summary_log_count(int32_t scorer, int32_t n_tokens) {
    const float n_scored = scorer == MONARCH_SCORER_PARTS ? fmaxf((float) n_tokens/MONARCH_SUMMARY_PARTS, 1.0f) : (float) n_tokens;
    const float weight   = monarch_summary_is_estimate(scorer) ? fminf((float) n_tokens, MONARCH_ESTIMATE_WEIGHT) : 1.0f;

    return logf(n_scored*weight);
}

// what a query's value weighs the statistic of the same dimension with
MONARCH_HD static inline float monarch_summary_weight(int32_t scorer, int32_t i_half, float q) {
    const float x = monarch_f16_clamp(q);

    if (scorer == MONARCH_SCORER_PARTS) {
        return i_half == 0 ? x : 0.0f; // then rotated
    }
    if (scorer == MONARCH_SCORER_MINMAX) {
        return i_half == 0 ? (x < 0.0f ? x : 0.0f) : (x > 0.0f ? x : 0.0f);
    }
    return i_half == 0 ? x : MONARCH_MEANSTD_WEIGHT*fabsf(x);
}

MONARCH_HD static inline float monarch_summary_score_half(int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page, int32_t i_half) {
    const float offset = monarch_f16_to_f32(monarch_load_u16(group + monarch_summary_offset_at(i_half, i_page)));
    const float step   = monarch_f16_to_f32(monarch_load_u16(group + monarch_summary_step_at  (i_half, i_page)));

    float lanes[MONARCH_N_LANES] = { 0 };
    for (int32_t d = 0; d < head_dim; d += MONARCH_N_LANES) {
        const uint32_t lo = monarch_load_u32(group + monarch_summary_value_at(i_half*head_dim + d,     i_page));
        const uint32_t hi = monarch_load_u32(group + monarch_summary_value_at(i_half*head_dim + d + 4, i_page));
        for (int32_t j = 0; j < MONARCH_N_LANES; ++j) {
            const uint32_t u = (j < 4 ? lo : hi) >> j%4*8 & 255;
            lanes[j] += w[d + j]*(offset + step*(float) u);
        }
    }
    return monarch_sum_lanes(lanes);
}

// w: [head_dim], rotated
MONARCH_HD static inline float monarch_summary_score_part(int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page, int32_t i_part) {
    float lanes[MONARCH_N_LANES] = { 0 };
    for (int32_t d = 0; d < head_dim; ++d) {
        const int32_t u = group[monarch_summary_code_at(head_dim, i_part, d, i_page)] >> monarch_summary_code_shift(d) & 3;

        lanes[d%MONARCH_N_LANES] += w[d]*((float) u - 1.5f);
    }
    return monarch_summary_decode_scale(group[monarch_summary_scale_at(i_part, i_page)])*monarch_sum_lanes(lanes);
}

MONARCH_HD static inline float monarch_summary_score_parts(int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page) {
    float res = -INFINITY;
    for (int32_t i = 0; i < MONARCH_SUMMARY_PARTS; ++i) {
        if (group[monarch_summary_scale_at(i, i_page)] != 0) {
            const float score = monarch_summary_score_part(head_dim, w, group, i_page, i);
            res = res > score ? res : score;
        }
    }
    return res;
}

// w: [2*head_dim] weights
MONARCH_HD static inline float monarch_summary_score_page(int32_t scorer, int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page) {
    if (scorer == MONARCH_SCORER_PARTS) {
        return monarch_summary_score_parts(head_dim, w, group, i_page);
    }
    return monarch_summary_score_half(head_dim, w,            group, i_page, 0) +
           monarch_summary_score_half(head_dim, w + head_dim, group, i_page, 1);
}
