#pragma once

// The op's `table` input: the step's knobs, its runs of tokens, and the cold pages of each sequence. And its other input,
// `page_outs`: the pages to encode.

#include "monarch-hd.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

// the header; floats are stored as their bits
enum monarch_table_field {
    MONARCH_TABLE_N_RUNS,
    MONARCH_TABLE_N_RUNS_MAX,          // room for them after the header; the pages follow
    MONARCH_TABLE_PROMOTE_PAGES,
    MONARCH_TABLE_DENSE_PAGES,
    MONARCH_TABLE_PROMOTION_THRESHOLD, // float
    MONARCH_TABLE_STICKY_THRESHOLD,
    MONARCH_TABLE_IMPORTANCE_DECAY,    // float
    MONARCH_TABLE_STEP,                // this step
    MONARCH_TABLE_COMMITTED,           // the last step that succeeded
    MONARCH_TABLE_HEADER = 16,
};

enum monarch_page_outs_field {
    MONARCH_PAGE_OUTS_N,
    MONARCH_PAGE_OUTS_STEP, // this step
    MONARCH_PAGE_OUTS_HEADER,
};

// elements of `page_outs` with room for n pages: of each the physical page, the token mask, and a ring slot for every token
MONARCH_HD static inline int64_t monarch_page_outs_size(int64_t n, int32_t page_size) {
    return MONARCH_PAGE_OUTS_HEADER + n*(2 + page_size);
}

MONARCH_HD static inline int64_t monarch_page_outs_count(int64_t size, int32_t page_size) {
    return (size - MONARCH_PAGE_OUTS_HEADER)/(2 + page_size);
}

// the i-th page
MONARCH_HD static inline const int32_t * monarch_page_outs_get(const int32_t * page_outs, int64_t i, int32_t page_size) {
    return page_outs + monarch_page_outs_size(i, page_size);
}

// consecutive tokens of a ubatch that belong to one sequence
struct monarch_table_run {
    int32_t seq;
    int32_t i_token;    // the first
    int32_t n_tokens;
    int32_t is_last;    // the sequence's last run of this step
    int32_t mode;       // window, paged or exact: auto is resolved
    int32_t first_page; // of the sequence, in the list of pages
    int32_t n_pages;
    int32_t reserved;
};

// a cold page of a sequence
struct monarch_table_entry {
    int32_t  page; // physical
    uint32_t mask; // valid tokens
};

// tokens of a page that are valid
MONARCH_HD static inline int32_t monarch_mask_count(uint32_t mask) {
    mask -= mask >> 1 & 0x55555555;
    mask  = (mask & 0x33333333) + (mask >> 2 & 0x33333333);
    mask  = (mask + (mask >> 4)) & 0x0f0f0f0f;
    return (mask*0x01010101) >> 24;
}

MONARCH_HD static inline float monarch_table_get_float(const int32_t * table, enum monarch_table_field field) {
    float res;
    memcpy(&res, table + field, sizeof(res));
    return res;
}

// elements before the list of pages
MONARCH_HD static inline int64_t monarch_table_head_size(int64_t n_runs_max) {
    return MONARCH_TABLE_HEADER + n_runs_max*(int64_t) (sizeof(struct monarch_table_run)/sizeof(int32_t));
}

MONARCH_HD static inline struct monarch_table_run * monarch_table_get_runs(int32_t * table) {
    return (struct monarch_table_run *) (table + MONARCH_TABLE_HEADER);
}

// of all sequences, once N_RUNS_MAX is there
MONARCH_HD static inline struct monarch_table_entry * monarch_table_get_pages(int32_t * table) {
    return (struct monarch_table_entry *) (table + monarch_table_head_size(table[MONARCH_TABLE_N_RUNS_MAX]));
}
