#pragma once

// Page summaries: two 8-bit statistics per K dimension (minimum and maximum, or mean and standard deviation) of one page
// and one KV head, from which the logit of a query against the page is estimated without touching the page.
//
// A group of 16 physical pages of one KV head is one block, interleaved so that a kernel scores a page per 32-bit lane:
//
//   f16 offset0[16], step0[16], offset1[16], step1[16]
//   u8  value[2*head_dim/4][16][4]                       four values of every page, then the next four
//
//   the first head_dim values of a page are the first statistic: offset0 + step0*u; the others the second
//   minima are rounded down and maxima up, so that minmax stays an upper bound
//   K and q are made finite as in the codec: NaN counts as zero, infinity as the greatest f16
//
// Both scorers are a dot product of a query vector of 2*head_dim weights with the summary:
//   minmax   sum_d max(q_d min_d, q_d max_d)        Quest, arXiv:2406.10774
//   meanstd  sum_d q_d mean_d + c |q_d| std_d         c = MONARCH_MEANSTD_WEIGHT

#include <stddef.h>
#include <stdint.h>

#include "monarch-enums.h"
#include "monarch-export.h"
#include "monarch-hd.h"

#ifdef __cplusplus
extern "C" {
#endif

// c of meanstd; why this value: docs/codec.md
#define MONARCH_MEANSTD_WEIGHT 0.125f

// pages
#define MONARCH_SUMMARY_GROUP 16

// bytes per page: a group takes MONARCH_SUMMARY_GROUP times as many
MONARCH_HD static inline size_t monarch_summary_size(int32_t head_dim) {
    return 8 + 2*(size_t) head_dim;
}

// scorer: enum monarch_scorer; k: [n_tokens][head_dim], unrotated, 1 to MONARCH_MAX_PAGE_SIZE tokens
// i_page: of the group; the other pages of the group stay as they are
MONARCH_API void monarch_summary_encode(
        int32_t scorer, int32_t head_dim, int32_t n_tokens, const float * k, uint8_t * group, int32_t i_page);

// q: [head_dim], unrotated; w: [2*head_dim]
MONARCH_API void monarch_summary_query(int32_t scorer, int32_t head_dim, const float * q, float * w);

MONARCH_API float monarch_summary_score(int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page);

#ifdef __cplusplus
}
#endif
