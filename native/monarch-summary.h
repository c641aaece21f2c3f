#pragma once

// Page summaries, of one page and one KV head, from which the logit of a query against the page is estimated without
// touching the page: two 8-bit statistics per K dimension (minimum and maximum, or mean and standard deviation), or the
// means of the page's eight parts in 2 bits per dimension. All take the same room.
//
// A group of 16 physical pages of one KV head is one block, interleaved so that a kernel scores a page per 32-bit lane.
//
// minmax and meanstd:
//
//   f16 offset0[16], step0[16], offset1[16], step1[16]
//   u8  value[2*head_dim/4][16][4]                       four values of every page, then the next four
//
//   the first head_dim values of a page are the first statistic: offset0 + step0*u; the others the second
//   minima are rounded down and maxima up, so that minmax stays an upper bound
//   K and q are made finite as in the codec: NaN counts as zero, infinity as the greatest f16
//
// parts: part i holds the tokens from i*n/8 to (i + 1)*n/8 of the n that are valid (of 16: pairs), rotated like the codec's K:
//
//   u8  scale[8][16]                                     5 bits of exponent, 3 of mantissa; 0: a part without tokens
//   u8  value[2][head_dim/4][16][4]                      four dimensions, 2 bits each, of four parts of every page
//
//   a value u stands for scale*(u - 1.5); 64 bytes are 64 indices of tables that say what these dimensions add to a score
//
// minmax and meanstd are a dot product of a query vector of 2*head_dim weights with the summary, parts the greatest of eight:
//   minmax   sum_d max(q_d min_d, q_d max_d)        Quest, arXiv:2406.10774
//   meanstd  sum_d q_d mean_d + c |q_d| std_d         c = MONARCH_MEANSTD_WEIGHT
//   parts    max_i sum_d q_d part_id                  docs/defaults.md

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

// what a page gets, in units of what its best part, or its mean, would: docs/defaults.md
#define MONARCH_ESTIMATE_WEIGHT 3

// how much of what is left out goes to the mean V, which stands for it roughly: docs/defaults.md
#define MONARCH_REST_WEIGHT 0.5f

// of a Gaussian in 2 bits, in units of its standard deviation: Max, 1960
#define MONARCH_SUMMARY_STEP 0.9957f

// pages
#define MONARCH_SUMMARY_GROUP 16

// of a page
#define MONARCH_SUMMARY_PARTS 8

// bytes per page: a group takes MONARCH_SUMMARY_GROUP times as many
MONARCH_HD static inline size_t monarch_summary_size(int32_t head_dim) {
    return 8 + 2*(size_t) head_dim;
}

// scorer: enum monarch_scorer; k: [n_tokens][head_dim], unrotated, 1 to MONARCH_MAX_PAGE_SIZE tokens
// i_page: of the group; the other pages of the group stay as they are
MONARCH_API void monarch_summary_encode(
        int32_t scorer, int32_t head_dim, int32_t n_tokens, const float * k, uint8_t * group, int32_t i_page);

// q: [head_dim], unrotated; w: [2*head_dim], of which parts uses the first half
MONARCH_API void monarch_summary_query(int32_t scorer, int32_t head_dim, const float * q, float * w);

MONARCH_API float monarch_summary_score(int32_t scorer, int32_t head_dim, const float * w, const uint8_t * group, int32_t i_page);

#ifdef __cplusplus
}
#endif
