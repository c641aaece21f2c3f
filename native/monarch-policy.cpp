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

static int32_t monarch_rank_count(int32_t n_pages, const float * rank, float least) {
    int32_t res = 0;
    for (int32_t i = 0; i < n_pages; ++i) {
        res += rank[i] >= least;
    }
    return res;
}

static float monarch_rank_from_bits(int32_t bits) {
    float rank;
    memcpy(&rank, &bits, sizeof(rank));
    return rank;
}

// the n best are those above least, and those equal to it from page `first` on: of equals the later page is better
struct monarch_rank_bound {
    float   least;
    int32_t first;
};

// More than n pages are ranked; a rank below 0 is none. Non-negative floats are ordered as their bits are: the bound's are
// found by halves, and counting again is cheaper than sorting.
static monarch_rank_bound monarch_rank_find_bound(int32_t n_pages, const float * rank, int32_t n) {
    int32_t lo = 0;              // at least n pages are as good
    int32_t hi = 0x7f800000 + 1; // fewer are: infinity is the greatest

    int32_t n_above = 0;

    while (hi - lo > 1) {
        const int32_t mid   = lo + (hi - lo)/2;
        const int32_t count = monarch_rank_count(n_pages, rank, monarch_rank_from_bits(mid));

        if (count == n) {
            return { monarch_rank_from_bits(mid), 0 };
        }
        if (count > n) {
            lo = mid;
        } else {
            hi      = mid;
            n_above = count;
        }
    }

    const float least = monarch_rank_from_bits(lo);

    int32_t first = n_pages;
    while (n_above < n) {
        n_above += rank[--first] == least;
    }
    return { least, first };
}

static float monarch_policy_rank_page(const monarch_policy * policy, uint8_t count, float importance, float probability) {
    float rank;
    const bool is_ranked = monarch_policy_get_rank(policy, count, importance, probability, &rank);

    return is_ranked ? std::max(0.0f, rank) : -1.0f;
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

    // most pages are not sticky: those are ranked many at a time
    for (int32_t i = 0; i < n_pages; ++i) {
        rank[i] = monarch_policy_rank_page(policy, 0, 0.0f, probability[i]);
    }
    for (int32_t i = 0; i < n_pages; ++i) {
        const int32_t page = table[i].page;

        if (monarch_policy_is_sticky(policy, count[page])) {
            rank[i] = monarch_policy_rank_page(policy, count[page], importance[page], probability[i]);
        }
    }

    if (policy->n_budget == 0) {
        return 0;
    }

    const bool is_short = monarch_rank_count(n_pages, rank, 0.0f) > policy->n_budget;

    const monarch_rank_bound bound = is_short ? monarch_rank_find_bound(n_pages, rank, policy->n_budget) : monarch_rank_bound { 0.0f, 0 };

    int32_t n_chosen = 0;

    for (int32_t i = 0; i < n_pages; ++i) {
        chosen[n_chosen] = i;

        n_chosen += rank[i] > bound.least || (rank[i] == bound.least && i >= bound.first);
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
