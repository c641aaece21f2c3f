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

// what a sequence did with a page in this step; measured: of a page that it promoted
MONARCH_HD static inline void monarch_policy_merge_entry(
        struct monarch_log_entry * entry, int32_t seq, bool is_promoted, bool is_sticky, float estimated, float measured) {
    entry->flags    |= (is_promoted ? MONARCH_LOG_PROMOTED : MONARCH_LOG_DROPPED) | (is_sticky ? MONARCH_LOG_STICKY : 0);
    entry->estimated = entry->estimated < estimated ? estimated : entry->estimated;

    if (is_promoted) {
        entry->seq      = seq < entry->seq ? (int16_t) seq : entry->seq;
        entry->measured = entry->measured < measured ? measured : entry->measured;
    }
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

// before any sequence did something with the page
MONARCH_HD static inline struct monarch_log_entry monarch_policy_new_entry(int32_t page) {
    const struct monarch_log_entry res = { page, 0, INT16_MAX, 0.0f, 0.0f };
    return res;
}

//
// the pages of a KV head
//

// counters move on by one step, if they are those of the last step that succeeded; the log in `head` is gone
MONARCH_HD static inline void monarch_policy_end_log(struct monarch_head_state * head, int32_t committed) {
    if (head->step == committed) {
        head->n_promotions += head->log_promoted;
        head->n_scored     += head->log_scored;
    }

    head->n_log        = 0;
    head->log_promoted = 0;
    head->log_scored   = 0;
}

// the same, and sticky state by that log
void monarch_policy_apply_log(const struct monarch_policy * policy, struct monarch_head_state * head, int64_t n_pages_max, int32_t committed);

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
