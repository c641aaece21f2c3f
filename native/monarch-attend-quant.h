#pragma once

// Queries as 8-bit integers, for kernels that attend and score with integer dot products. monarch-attend-avx512.cpp and
// monarch-attend-simd.h include it: static, for each is compiled for instructions that others may not have.

#include "monarch-attend.h"
#include "monarch-summary-math.h"

#include <math.h>
#include <string.h>

// x in units of a 127th of its greatest magnitude, which is returned
static inline float monarch_int8_quantize(int64_t n, const float * x, int8_t * dst) {
    float max = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    }

    const float inverse = max > 0.0f ? 127.0f/max : 0.0f;
    for (int64_t i = 0; i < n; ++i) {
        dst[i] = (int8_t) lrintf(inverse*x[i]);
    }
    return max;
}

static inline int32_t monarch_int8_sum(int64_t n, const int8_t * x) {
    int32_t res = 0;
    for (int64_t i = 0; i < n; ++i) {
        res += x[i];
    }
    return res;
}

// a rotated query, four x and four y coordinates in turn, as the K codes lie; returns its greatest magnitude
static inline float monarch_int8_quantize_query(int64_t head_dim, const float * q_rot, int8_t * dst) {
    float sorted[MONARCH_MAX_HEAD_DIM];
    for (int64_t pair = 0; pair < head_dim/2; pair += 4) {
        memcpy(sorted + 2*pair + 0, q_rot + pair,              4*sizeof(float));
        memcpy(sorted + 2*pair + 4, q_rot + pair + head_dim/2, 4*sizeof(float));
    }
    return monarch_int8_quantize(head_dim, sorted, dst);
}

// weights of a row's summary dot product; both halves have their own scale, and their sum as it was before
static inline void monarch_int8_quantize_weights(int32_t scorer, int32_t head_dim, const float * q, int8_t * dst, float * scale, float * sum) {
    float w[2*MONARCH_MAX_HEAD_DIM];
    monarch_summary_query(scorer, head_dim, q, w);

    for (int half = 0; half < 2; ++half) {
        const float * src = w + half*head_dim;

        sum[half] = 0.0f;
        for (int32_t i = 0; i < head_dim; ++i) {
            sum[half] += src[i];
        }
        scale[half] = monarch_int8_quantize(head_dim, src, dst + half*head_dim)/127.0f;
    }
}

// by the number of tokens of a page; table: [MONARCH_MAX_PAGE_SIZE + 1]
static inline void monarch_score_fill_logs(int32_t scorer, float * table) {
    for (int32_t i = 0; i <= MONARCH_MAX_PAGE_SIZE; ++i) {
        table[i] = monarch_summary_log_count(scorer, i);
    }
}
