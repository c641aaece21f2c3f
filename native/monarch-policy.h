#pragma once

// Which cold pages take part in attention, per layer and KV head: threshold, budget and sticky pages.

#include "monarch-state.h"
#include "monarch-table.h"

#include <stdint.h>

struct monarch_policy {
    int32_t n_budget;            // most pages
    float   promotion_threshold; // least estimated probability; 0: budget only
    int32_t sticky_threshold;    // 0: never sticky
    float   importance_decay;    // importance: decayed average of the attention that a sticky page got
};

// table: the op's; dense: of a layer that promotes dense_tokens
MONARCH_HD static inline struct monarch_policy monarch_policy_from_table(const int32_t * table, int32_t dense) {
    struct monarch_policy res;

    res.n_budget            = table[dense ? MONARCH_TABLE_DENSE_PAGES : MONARCH_TABLE_PROMOTE_PAGES];
    res.promotion_threshold = monarch_table_get_float(table, MONARCH_TABLE_PROMOTION_THRESHOLD);
    res.sticky_threshold    = table[MONARCH_TABLE_STICKY_THRESHOLD];
    res.importance_decay    = monarch_table_get_float(table, MONARCH_TABLE_IMPORTANCE_DECAY);

    return res;
}

//
// one page, as the CPU and CUDA share it; count, importance: its sticky state
//

MONARCH_HD static inline bool monarch_policy_is_sticky(const struct monarch_policy * policy, uint8_t count) {
    return policy->sticky_threshold > 0 && count >= policy->sticky_threshold;
}

// what a step logged
MONARCH_HD static inline void monarch_policy_apply_entry(
        const struct monarch_policy * policy, const struct monarch_log_entry * entry, uint8_t * count, float * importance) {
    if (!(entry->flags & MONARCH_LOG_PROMOTED)) {
        *count      = 0;
        *importance = 0.0f;
        return;
    }

    const float kept = monarch_policy_is_sticky(policy, *count) ? *importance : 0.0f;

    // an average, so that it compares with the estimates of pages that are not sticky
    *importance = policy->importance_decay*kept + (1.0f - policy->importance_decay)*entry->measured;
    *count      = *count < 255 ? *count + 1 : 255;
}

// whether the page may be promoted, and its rank among those
MONARCH_HD static inline bool monarch_policy_get_rank(
        const struct monarch_policy * policy, uint8_t count, float importance, float probability, float * rank) {
    if (monarch_policy_is_sticky(policy, count)) {
        *rank = probability < importance ? importance : probability;

        // a broken model or a crafted state: sorting needs an order, which NaN has not
        if (*rank != *rank) {
            *rank = 0.0f;
        }
        return true;
    }
    *rank = probability;
    return probability >= policy->promotion_threshold;
}

//
// the pages of a KV head
//

// sticky state moves on by one step, if the log in `head` is that of the last step that succeeded
void monarch_policy_apply_log(const struct monarch_policy * policy, struct monarch_head_state * head, int64_t n_pages_max, int32_t committed);

// the same of the counters alone: the pages are gone
void monarch_policy_end_log(struct monarch_head_state * head, int32_t committed);

// probability: [n_pages], estimated, indexed like the table; rank: [n_pages] scratch
// chosen: [n_pages] indices into the table, ascending; returns how many, at most n_budget
// sticky: [n_pages] the same of the pages that are sticky, chosen or not
int32_t monarch_policy_select(
        const struct monarch_policy      * policy,
        struct monarch_head_state        * head,
        int64_t                            n_pages_max,
        int32_t                            n_pages,
        const struct monarch_table_entry * table,
        const float                      * probability,
        float                            * rank,
        int32_t                          * chosen,
        int32_t                          * sticky,
        int32_t                          * n_sticky);

// logs a sequence's promotions of this step, and which sticky pages it dropped; measured: [n_chosen]
void monarch_policy_write_log(
        struct monarch_head_state        * head,
        int32_t                            seq,
        int64_t                            n_pages_max,
        const struct monarch_table_entry * table,
        const float                      * probability,
        const float                      * measured,
        int32_t                            n_chosen,
        const int32_t                    * chosen,
        int32_t                            n_sticky,
        const int32_t                    * sticky);
