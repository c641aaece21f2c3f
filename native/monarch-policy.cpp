#include "monarch-policy.h"

#include <algorithm>
#include <cstring>

void monarch_policy_apply_log(const monarch_policy * policy, monarch_head_state * head, int64_t n_pages_max, int32_t committed) {
    const monarch_log_entry * log = monarch_head_state_log(head);

    float   * importance = monarch_head_state_importance(head, n_pages_max);
    uint8_t * count      = monarch_head_state_count     (head, n_pages_max);

    if (head->step == committed) {
        for (int32_t i = 0; i < head->n_log; ++i) {
            const int32_t page = log[i].page;

            monarch_policy_apply_entry(policy, &log[i], &count[page], &importance[page]);
        }

        head->n_promotions += head->log_promoted;
        head->n_scored     += head->log_scored;
    }

    head->n_log        = 0;
    head->log_promoted = 0;
    head->log_scored   = 0;
}

// non-negative floats are ordered as their bits are: exponent and three bits of the mantissa
#define MONARCH_RANK_BINS 2048

static int32_t monarch_rank_get_bin(float rank) {
    uint32_t bits;
    memcpy(&bits, &rank, sizeof(bits));
    return bits >> 20;
}

// the last of the n best: of equals the later page is better; bins leave few to be sorted. A rank below 0 is none.
static int32_t monarch_rank_find_last(int32_t n_pages, const float * rank, int32_t n, int32_t * scratch) {
    int32_t counts[MONARCH_RANK_BINS] = { 0 };

    for (int32_t i = 0; i < n_pages; ++i) {
        if (rank[i] >= 0.0f) {
            counts[monarch_rank_get_bin(rank[i])]++;
        }
    }

    int32_t bin = MONARCH_RANK_BINS - 1;
    while (counts[bin] < n) {
        n -= counts[bin--];
    }

    int32_t n_scratch = 0;
    for (int32_t i = 0; i < n_pages; ++i) {
        if (rank[i] >= 0.0f && monarch_rank_get_bin(rank[i]) == bin) {
            scratch[n_scratch++] = i;
        }
    }

    std::nth_element(scratch, scratch + n - 1, scratch + n_scratch, [rank](int32_t a, int32_t b) {
        return rank[a] != rank[b] ? rank[a] > rank[b] : a > b;
    });

    return scratch[n - 1];
}

int32_t monarch_policy_select(
        const monarch_policy      * policy,
        monarch_head_state        * head,
        int64_t                     n_pages_max,
        int32_t                     n_pages,
        const monarch_table_entry * table,
        const float               * probability,
        float                     * rank,
        int32_t                   * chosen) {
    const float   * importance = monarch_head_state_importance(head, n_pages_max);
    const uint8_t * count      = monarch_head_state_count     (head, n_pages_max);

    int32_t n_ranked = 0;

    for (int32_t i = 0; i < n_pages; ++i) {
        const int32_t page = table[i].page;

        const bool is_ranked = monarch_policy_get_rank(policy, count[page], importance[page], probability[i], &rank[i]);

        rank[i]   = is_ranked ? std::max(0.0f, rank[i]) : -1.0f;
        n_ranked += is_ranked;
    }

    if (policy->n_budget == 0) {
        return 0;
    }

    const bool    is_short = n_ranked > policy->n_budget;
    const int32_t last     = is_short ? monarch_rank_find_last(n_pages, rank, policy->n_budget, chosen) : 0;
    const float   least    = is_short ? rank[last] : 0.0f;

    int32_t n_chosen = 0;

    for (int32_t i = 0; i < n_pages; ++i) {
        if (rank[i] > least || (rank[i] == least && i >= last)) {
            chosen[n_chosen++] = i;
        }
    }

    return n_chosen;
}

// the log's entry of a page: another sequence may have made it in this step
static monarch_log_entry * monarch_policy_get_entry(monarch_head_state * head, int64_t n_pages_max, int32_t page) {
    monarch_log_entry * log   = monarch_head_state_log(head);
    int32_t           * index = monarch_head_state_log_index(head, n_pages_max) + page;

    // the index of a page that was never logged is anything
    if (*index < 0 || *index >= head->n_log || log[*index].page != page) {
        *index = head->n_log++;

        log[*index] = { page, 0, INT16_MAX, 0.0f, 0.0f };
    }
    return &log[*index];
}

void monarch_policy_write_log(
        const monarch_policy      * policy,
        monarch_head_state        * head,
        int32_t                     seq,
        int64_t                     n_pages_max,
        int32_t                     n_pages,
        const monarch_table_entry * table,
        const float               * probability,
        const float               * measured,
        int32_t                     n_chosen,
        const int32_t             * chosen) {
    const uint8_t * count = monarch_head_state_count(head, n_pages_max);

    int32_t i_chosen = 0;

    for (int32_t i = 0; i < n_pages; ++i) {
        const int32_t page    = table[i].page;
        const bool    sticky  = monarch_policy_is_sticky(policy, count[page]);
        const bool    promote = i_chosen < n_chosen && chosen[i_chosen] == i;

        if (!sticky && !promote) {
            continue;
        }

        monarch_log_entry * entry = monarch_policy_get_entry(head, n_pages_max, page);

        entry->flags    |= (promote ? MONARCH_LOG_PROMOTED : MONARCH_LOG_DROPPED) | (sticky ? MONARCH_LOG_STICKY : 0);
        entry->estimated = std::max(entry->estimated, probability[i]);

        if (promote) {
            entry->seq      = std::min<int32_t>(entry->seq, seq);
            entry->measured = std::max(entry->measured, measured[i_chosen++]);
        }
    }
}
