#include "monarch-policy.h"

#include <algorithm>
#include <cstring>

void monarch_policy_apply_log(const monarch_policy * policy, monarch_head_state * head, int64_t n_pages_max, int32_t committed) {
    const monarch_log_entry * log = monarch_head_state_log(head);

    float   * importance = monarch_head_state_importance(head, n_pages_max);
    uint8_t * count      = monarch_head_state_count     (head, n_pages_max);

    if (head->step == committed) {
        for (int32_t i = 0; i < head->n_log; ++i) {
            __builtin_prefetch(&count     [log[i].page], 1);
            __builtin_prefetch(&importance[log[i].page], 1);
        }
        for (int32_t i = 0; i < head->n_log; ++i) {
            const int32_t page = log[i].page;

            monarch_policy_apply_entry(policy, &log[i], &count[page], &importance[page]);
        }
    }

    monarch_policy_end_log(head, committed);
}

// sets of pages whose maxima are compared before all pages are, no power of two, lest what repeats itself fall into few of them;
// pages that are passed over at a time
#define MONARCH_RANK_SETS  272
#define MONARCH_RANK_BLOCK 64

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

static int32_t monarch_rank_to_bits(float rank) {
    int32_t bits;
    memcpy(&bits, &rank, sizeof(bits));
    return bits;
}

// the n best are those above least, and those equal to it from page `first` on: of equals the later page is better
struct monarch_rank_bound {
    float   least;
    int32_t first;
};

// A rank below 0 is none. Non-negative floats are ordered as their bits are: the bound's are found by halves from `from` on,
// which at least n are as good as, and counting again is cheaper than sorting.
static monarch_rank_bound monarch_rank_find_bound(int32_t n_pages, const float * rank, int32_t n, float from) {
    int32_t lo = monarch_rank_to_bits(from); // at least n pages are as good
    int32_t hi = 0x7f800000 + 1;             // fewer are: infinity is the greatest

    int32_t n_above = 0;

    // where nothing matters most ranks are equal: those are tried first
    for (int32_t mid = lo + 1; hi - lo > 1; mid = lo + (hi - lo)/2) {
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

// What n of any pages are as good as, at least n of all are: here the maxima of a few sets.
static float monarch_rank_guess_least(int32_t n_pages, const float * rank, int32_t n) {
    float maxima[MONARCH_RANK_SETS];

    if (n > MONARCH_RANK_SETS/4 || n_pages < 2*MONARCH_RANK_SETS) {
        return 0.0f;
    }
    std::copy(rank, rank + MONARCH_RANK_SETS, maxima);

    for (int32_t i0 = MONARCH_RANK_SETS; i0 + MONARCH_RANK_SETS <= n_pages; i0 += MONARCH_RANK_SETS) {
        for (int32_t i = 0; i < MONARCH_RANK_SETS; ++i) {
            maxima[i] = maxima[i] > rank[i0 + i] ? maxima[i] : rank[i0 + i];
        }
    }

    if (monarch_rank_count(MONARCH_RANK_SETS, maxima, 0.0f) < n) {
        return 0.0f;
    }
    return monarch_rank_find_bound(MONARCH_RANK_SETS, maxima, n, 0.0f).least;
}

// Which pages are as good as least. Most are not: those are passed over many at a time.
static int32_t monarch_rank_list(int32_t n_pages, const float * rank, float least, int32_t * listed) {
    int32_t n = 0;

    for (int32_t i0 = 0; i0 < n_pages; i0 += MONARCH_RANK_BLOCK) {
        const int32_t i1 = std::min(i0 + MONARCH_RANK_BLOCK, n_pages);

        if (monarch_rank_count(i1 - i0, rank + i0, least) == 0) {
            continue;
        }
        for (int32_t i = i0; i < i1; ++i) {
            listed[n] = i;

            n += rank[i] >= least;
        }
    }
    return n;
}

// the n best of those listed, which are at least n, stay; their ranks move to the front
static void monarch_rank_keep_best(int32_t n_listed, float * rank, int32_t n, float least, int32_t * listed) {
    for (int32_t i = 0; i < n_listed; ++i) {
        rank[i] = rank[listed[i]];
    }
    const monarch_rank_bound bound = monarch_rank_find_bound(n_listed, rank, n, least);

    for (int32_t i = 0, j = 0; i < n_listed; ++i) {
        listed[j] = listed[i];

        j += rank[i] > bound.least || (rank[i] == bound.least && i >= bound.first);
    }
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
        int32_t                   * chosen,
        int32_t                   * sticky,
        int32_t                   * n_sticky) {
    const float   * importance = monarch_head_state_importance(head, n_pages_max);
    const uint8_t * count      = monarch_head_state_count     (head, n_pages_max);

    *n_sticky = 0;

    // most pages are not sticky: those are ranked many at a time
    for (int32_t i = 0; i < n_pages; ++i) {
        rank[i] = monarch_policy_rank_page(policy, 0, 0.0f, probability[i]);
    }
    for (int32_t i = 0; i < n_pages; ++i) {
        const int32_t page = table[i].page;

        if (monarch_policy_is_sticky(policy, count[page])) {
            rank[i] = monarch_policy_rank_page(policy, count[page], importance[page], probability[i]);

            sticky[(*n_sticky)++] = i;
        }
    }

    if (policy->n_budget == 0) {
        return 0;
    }

    const float   least    = monarch_rank_guess_least(n_pages, rank, policy->n_budget);
    const int32_t n_listed = monarch_rank_list(n_pages, rank, least, chosen);

    if (n_listed <= policy->n_budget) {
        return n_listed;
    }

    monarch_rank_keep_best(n_listed, rank, policy->n_budget, least, chosen);
    return policy->n_budget;
}

// the log's entry of a page: another sequence may have made it in this step
static monarch_log_entry * monarch_policy_get_entry(monarch_head_state * head, int64_t n_pages_max, int32_t page) {
    monarch_log_entry * entry = monarch_head_state_find(head, n_pages_max, head->n_log, page);

    if (!entry) {
        entry  = monarch_head_state_log(head) + head->n_log;
        *entry = monarch_policy_new_entry(page);

        monarch_head_state_log_index(head, n_pages_max)[page] = head->n_log++;
    }
    return entry;
}

void monarch_policy_write_log(
        monarch_head_state        * head,
        int32_t                     seq,
        int64_t                     n_pages_max,
        const monarch_table_entry * table,
        const float               * probability,
        const float               * measured,
        int32_t                     n_chosen,
        const int32_t             * chosen,
        int32_t                     n_sticky,
        const int32_t             * sticky) {
    int32_t i_chosen = 0;
    int32_t i_sticky = 0;

    // the index lies in memory that nobody has touched for a whole step
    for (int32_t i = 0; i < n_chosen; ++i) {
        __builtin_prefetch(monarch_head_state_log_index(head, n_pages_max) + table[chosen[i]].page, 1);
    }

    while (i_chosen < n_chosen || i_sticky < n_sticky) {
        const int32_t next_chosen = i_chosen < n_chosen ? chosen[i_chosen] : INT32_MAX;
        const int32_t next_sticky = i_sticky < n_sticky ? sticky[i_sticky] : INT32_MAX;

        const int32_t i         = std::min(next_chosen, next_sticky);
        const bool    is_chosen = i == next_chosen;
        const bool    is_sticky = i == next_sticky;

        monarch_policy_merge_entry(monarch_policy_get_entry(head, n_pages_max, table[i].page),
                seq, is_chosen, is_sticky, probability[i], is_chosen ? measured[i_chosen] : 0.0f);

        i_chosen += is_chosen;
        i_sticky += is_sticky;
    }
}
