#pragma once

// Which cold pages take part in attention, per layer and KV head: threshold, budget and sticky pages.

#include "monarch-state.h"

#include <stdint.h>

struct monarch_policy {
    int32_t n_budget;            // most pages
    float   promotion_threshold; // least estimated probability; 0: budget only
    int32_t sticky_threshold;    // 0: never sticky
    float   importance_decay;
};

// one entry of the page table as the op sees it
struct monarch_table_entry {
    int32_t  page; // physical
    uint32_t mask; // valid tokens
};

// tokens of a page that are valid
static inline int32_t monarch_mask_count(uint32_t mask) {
    int32_t res = 0;
    for (; mask; mask &= mask - 1) {
        res++;
    }
    return res;
}

// sticky state moves on by one step, if the log in `head` is that of the last step that succeeded
void monarch_policy_apply_log(const struct monarch_policy * policy, struct monarch_head_state * head, int64_t n_pages_max, int32_t committed);

// probability: [n_pages], estimated, indexed like the table; rank: [n_pages] scratch
// chosen: indices into the table, ascending; returns how many, at most n_budget
int32_t monarch_policy_select(
        const struct monarch_policy      * policy,
        struct monarch_head_state        * head,
        int64_t                            n_pages_max,
        int32_t                            n_pages,
        const struct monarch_table_entry * table,
        const float                      * probability,
        float                            * rank,
        int32_t                          * chosen);

// logs a sequence's promotions of this step; measured: [n_chosen]
void monarch_policy_write_log(
        const struct monarch_policy      * policy,
        struct monarch_head_state        * head,
        int32_t                            seq,
        int64_t                            n_pages_max,
        int32_t                            n_pages,
        const struct monarch_table_entry * table,
        const float                      * probability,
        const float                      * measured,
        int32_t                            n_chosen,
        const int32_t                    * chosen);
