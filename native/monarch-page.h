#pragma once

// A cold page of one KV head: its block in the pool and its summary, which follows from the block. Saved states hold the
// blocks alone, and what is left of a page that lost tokens is summarized the same way.

#include "monarch-codec.h"
#include "monarch-export.h"

#ifdef __cplusplus
extern "C" {
#endif

// mask: the tokens that are there; group, i_page: as in monarch-summary.h
MONARCH_API void monarch_page_summarize(
        const struct monarch_codec * codec, int32_t scorer, uint32_t mask, const uint8_t * block, uint8_t * group, int32_t i_page);

// k, v: [page_size][head_dim]; tokens that are not in the mask may be anything finite
MONARCH_API void monarch_page_encode(
        const struct monarch_codec * codec, int32_t scorer, uint32_t mask, const float * k, const float * v,
        uint8_t * block, uint8_t * group, int32_t i_page);

#ifdef __cplusplus
}
#endif
