#pragma once

// The choice of pages on CUDA, and the sticky state that follows from it.

#include "monarch-cuda-attend.cuh"

//
// the choice of pages
//

// grid: tiles of pages, groups; shared: [n_rows][2*head_dim]
MONARCH_KERNEL monarch_score_pages(const monarch_cuda_attend a, const int32_t n_rows_max) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.y);

    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_pages  = group.n_pages;
    const int32_t i        = blockIdx.x*blockDim.x + threadIdx.x;

    if (group.mode != MONARCH_MODE_PAGED || (int32_t) (blockIdx.x*blockDim.x) >= n_pages) {
        return;
    }

    const monarch_table_entry entry = group.table[i < n_pages ? i : 0];

    const uint8_t * summary = a.summary + monarch_summary_offset(head_dim, a.n_pages_max, group.head_kv, entry.page);
    const float     log_n   = monarch_summary_log_count(a.op.scorer, monarch_mask_count(entry.mask));

    for (int32_t row0 = 0; row0 < group.n_rows; row0 += n_rows_max) {
        const int32_t n_rows = group.n_rows - row0 < n_rows_max ? group.n_rows - row0 : n_rows_max;

        for (int32_t j = threadIdx.x; j < n_rows*head_dim; j += blockDim.x) {
            const int32_t r = j/head_dim;
            const int32_t d = j%head_dim;
            const float   x = monarch_row_query(a, group, row0 + r)[d];

            shared[2*r*head_dim + d]            = monarch_summary_weight(a.op.scorer, 0, x);
            shared[2*r*head_dim + d + head_dim] = monarch_summary_weight(a.op.scorer, 1, x);
        }
        __syncthreads();

        // the second half serves as scratch
        for (int32_t r = 0; r < n_rows && a.op.scorer == MONARCH_SCORER_PARTS; ++r) {
            monarch_team_rotate(monarch_team_block(), head_dim, shared + 2*r*head_dim, shared + (2*r + 1)*head_dim);
        }

        for (int32_t r = 0; r < n_rows && i < n_pages; ++r) {
            a.mass[monarch_row_index(a, group, row0 + r)*a.n_pages_max + i] =
                a.op.kq_scale*monarch_summary_score_page(a.op.scorer, head_dim, shared + 2*r*head_dim, summary, entry.page%MONARCH_SUMMARY_GROUP) + log_n;
        }
        __syncthreads();
    }
}

// per row: the scale of the masses, and the inverse of hot mass + sum of estimated page masses
// grid: rows, groups; shared: one float to a warp
MONARCH_KERNEL monarch_estimate_rows(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.y);

    const int32_t n_pages = group.n_pages;
    const int32_t row     = blockIdx.x;

    if (group.mode != MONARCH_MODE_PAGED || row >= group.n_rows) {
        return;
    }

    const float * mass = a.mass + monarch_row_index(a, group, row)*a.n_pages_max;

    float hot_max;
    float hot_sum;
    monarch_parts_get(a, group, row, 0, a.n_hot, hot_max, hot_sum);

    const float hot = hot_max + logf(hot_sum);

    float max = hot;
    for (int32_t i = threadIdx.x; i < n_pages; i += blockDim.x) {
        max = fmaxf(max, mass[i]);
    }
    max = monarch_block_max(max, shared);

    float sum = 0.0f;
    for (int32_t i = threadIdx.x; i < n_pages; i += blockDim.x) {
        sum += expf(mass[i] - max);
    }
    sum = monarch_block_sum(sum, shared);

    if (threadIdx.x == 0) {
        a.row_max    [monarch_row_index(a, group, row)] = max;
        a.row_inverse[monarch_row_index(a, group, row)] = 1.0f/(expf(hot - max) + sum);
    }
}

// per page: its greatest probability over the rows
// grid: tiles of pages, groups
MONARCH_KERNEL monarch_estimate_pages(const monarch_cuda_attend a) {
    const monarch_cuda_group group = monarch_group_get(a, blockIdx.y);

    const int32_t i = blockIdx.x*blockDim.x + threadIdx.x;

    if (group.mode != MONARCH_MODE_PAGED || i >= group.n_pages) {
        return;
    }

    float res = 0.0f;
    for (int32_t row = 0; row < group.n_rows; ++row) {
        const size_t i_row = monarch_row_index(a, group, row);

        res = fmaxf(res, expf(a.mass[i_row*a.n_pages_max + i] - a.row_max[i_row])*a.row_inverse[i_row]);
    }
    a.probability[(size_t) group.i*a.n_pages_max + i] = res;
}

#define MONARCH_SELECT_DIGITS 256 // of a key: its bytes

// of a block that chooses; integers
struct monarch_select {
    int32_t * histogram; // [MONARCH_SELECT_DIGITS]
    int32_t * digit;     // found for all threads
    int32_t * left;
    int32_t * sums;      // [MONARCH_SELECT_THREADS]
};

static size_t monarch_select_shared() {
    return (MONARCH_SELECT_DIGITS + 2 + MONARCH_SELECT_THREADS)*sizeof(int32_t);
}

MONARCH_DEVICE monarch_select monarch_select_get(float * shared) {
    monarch_select res;

    res.histogram = (int32_t *) shared;
    res.digit     = res.histogram + MONARCH_SELECT_DIGITS;
    res.left      = res.digit + 1;
    res.sums      = res.left  + 1;

    return res;
}

// the ranks of this thread's pages, below 0 of those that are no candidates; returns how many are
MONARCH_DEVICE int32_t monarch_select_rank(const monarch_cuda_attend & a, const monarch_cuda_group & group, const monarch_policy & policy, float * rank) {
    monarch_head_state * head = monarch_state_head(a.state, a.n_pages_max, group.head_kv);

    const float         * importance  = monarch_head_state_importance(head, a.n_pages_max);
    const uint8_t       * count       = monarch_head_state_count     (head, a.n_pages_max);
    const float         * probability = a.probability + (size_t) group.i*a.n_pages_max;
    const monarch_share   share       = monarch_share_get(group.n_pages);

    int32_t res = 0;
    for (int32_t i = share.i0; i < share.i1; ++i) {
        const int32_t page = group.table[i].page;

        float x;
        const bool is_candidate = monarch_policy_get_rank(&policy, count[page], importance[page], probability[i], &x);

        rank[i] = is_candidate ? x : -1.0f;
        res += is_candidate;
    }
    return res;
}

// Candidates' ranks as integers in the same order, one more than their bits; 0: no candidate
MONARCH_DEVICE uint32_t monarch_select_key(const float * rank, int32_t i) {
    return rank[i] < 0.0f ? 0 : monarch_float_to_bits(rank[i]) + 1;
}

// the key of the last page that is chosen, a byte at a time; of those that have it, the last n_equal are chosen
MONARCH_DEVICE uint32_t monarch_select_threshold(const float * rank, int32_t n_pages, int32_t n_budget, const monarch_select & s, int32_t & n_equal) {
    uint32_t prefix = 0;
    int32_t  n_left = n_budget;

    for (int32_t shift = 24; shift >= 0; shift -= 8) {
        for (int32_t i = threadIdx.x; i < MONARCH_SELECT_DIGITS; i += blockDim.x) {
            s.histogram[i] = 0;
        }
        __syncthreads();

        for (int32_t i = threadIdx.x; i < n_pages; i += blockDim.x) {
            const uint32_t key = monarch_select_key(rank, i);

            if (key != 0 && ((uint64_t) (key ^ prefix) >> (shift + 8)) == 0) {
                atomicAdd(&s.histogram[key >> shift & 255], 1);
            }
        }
        __syncthreads();

        if (threadIdx.x == 0) {
            int32_t i = MONARCH_SELECT_DIGITS - 1;
            for (; i > 0 && s.histogram[i] < n_left; --i) {
                n_left -= s.histogram[i];
            }
            *s.digit = i;
            *s.left  = n_left;
        }
        __syncthreads();

        prefix |= (uint32_t) *s.digit << shift;
        n_left  = *s.left;
    }

    n_equal = n_left;

    return prefix;
}

// the pages whose keys are greater than the threshold, and of those that have it the last n_equal; returns how many
MONARCH_DEVICE int32_t monarch_select_write(int32_t n_pages, uint32_t threshold, int32_t n_equal, float * rank, int32_t * chosen, int32_t * sums) {
    const monarch_share share = monarch_share_get(n_pages);

    int32_t n_own_greater = 0;
    int32_t n_own_equal   = 0;
    for (int32_t i = share.i0; i < share.i1; ++i) {
        const uint32_t key = monarch_select_key(rank, i);

        n_own_greater += key > threshold;
        n_own_equal   += key == threshold && threshold != 0;
    }

    // of equals the later page wins: those that come before the last n_equal are left out
    const int32_t i_equal  = monarch_block_scan(n_own_equal, sums) - n_own_equal;
    const int32_t n_before = sums[blockDim.x - 1] - n_equal;
    __syncthreads();

    const int32_t n_left_out = n_before <= i_equal ? 0 : n_before - i_equal < n_own_equal ? n_before - i_equal : n_own_equal;
    const int32_t n_own      = n_own_greater + n_own_equal - n_left_out;

    int32_t ic = monarch_block_scan(n_own, sums) - n_own;

    int32_t n_seen = 0;
    for (int32_t i = share.i0; i < share.i1; ++i) {
        const uint32_t key = monarch_select_key(rank, i);

        const bool is_equal  = key == threshold && threshold != 0;
        const bool is_chosen = key > threshold || (is_equal && n_seen >= n_left_out);
        if (is_chosen) {
            chosen[ic++] = i;
        }
        n_seen += is_equal;
        rank[i] = is_chosen ? 1.0f : 0.0f; // from now on
    }
    return sums[blockDim.x - 1];
}

// grid: groups; shared: monarch_select_shared()
MONARCH_KERNEL monarch_select_pages(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.x);

    if (group.mode != MONARCH_MODE_PAGED) {
        if (threadIdx.x == 0) {
            a.n_chosen[group.i] = group.mode == MONARCH_MODE_EXACT ? group.n_pages : 0;
        }
        return;
    }

    const monarch_policy policy = monarch_policy_from_table(a.table, a.op.dense);
    const monarch_select s      = monarch_select_get(shared);

    float   * rank   = a.rank   + (size_t) group.i*a.n_pages_max;
    int32_t * chosen = a.chosen + (size_t) group.i*a.n_pages_max;

    monarch_block_scan(monarch_select_rank(a, group, policy, rank), s.sums);

    uint32_t threshold = 0; // all candidates are chosen
    int32_t  n_equal   = 0;
    if (s.sums[blockDim.x - 1] > policy.n_budget) {
        threshold = monarch_select_threshold(rank, group.n_pages, policy.n_budget, s, n_equal);
    }
    __syncthreads();

    const int32_t n_chosen = monarch_select_write(group.n_pages, threshold, n_equal, rank, chosen, s.sums);

    if (threadIdx.x == 0) {
        a.n_chosen[group.i] = n_chosen;
    }
}

// per row: of what is left of the estimate without the chosen pages, what goes to the mean V
// grid: rows, groups; shared: one float to a warp
MONARCH_KERNEL monarch_estimate_rest(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.y);

    const int32_t row = blockIdx.x;

    if (row >= group.n_rows || !monarch_group_has_rest(a, group)) {
        return;
    }

    const size_t  i_row = monarch_row_index(a, group, row);
    const float * mass  = a.mass + i_row*a.n_pages_max;
    const float * rank  = a.rank + (size_t) group.i*a.n_pages_max;

    float sum = 0.0f;
    for (int32_t i = threadIdx.x; i < group.n_pages; i += blockDim.x) {
        sum += rank[i] == 0.0f ? expf(mass[i] - a.row_max[i_row]) : 0.0f;
    }
    sum = monarch_block_sum(sum, shared);

    if (threadIdx.x == 0) {
        a.row_rest[i_row] = MONARCH_REST_WEIGHT*sum;
    }
}

//
// sticky state
//

// the log of the last step that succeeded; grid: KV heads
MONARCH_KERNEL monarch_apply_log(const monarch_cuda_attend a) {
    const monarch_policy policy = monarch_policy_from_table(a.table, a.op.dense);

    monarch_head_state      * head = monarch_state_head(a.state, a.n_pages_max, blockIdx.x);
    const monarch_log_entry * log  = monarch_head_state_log(head);

    float   * importance = monarch_head_state_importance(head, a.n_pages_max);
    uint8_t * count      = monarch_head_state_count     (head, a.n_pages_max);

    const int32_t n_log = head->step == a.table[MONARCH_TABLE_COMMITTED] ? head->n_log : 0;

    // a page is logged once
    for (int32_t i = threadIdx.x; i < n_log; i += blockDim.x) {
        monarch_policy_apply_entry(&policy, &log[i], &count[log[i].page], &importance[log[i].page]);
    }
    __syncthreads();

    if (threadIdx.x == 0) {
        monarch_policy_end_log(head, a.table[MONARCH_TABLE_COMMITTED]);

        head->step = a.table[MONARCH_TABLE_STEP];

        if (a.frames) {
            monarch_frame_head_get(a, blockIdx.x)->n_filled = 0;
        }
    }
}

// the first place in an ascending list whose value is not less
MONARCH_DEVICE int32_t monarch_lower_bound(const int32_t * list, int32_t n, int32_t value) {
    int32_t lo = 0;
    int32_t hi = n;
    while (lo < hi) {
        const int32_t mid = (lo + hi)/2;
        if (list[mid] < value) {
            lo = mid + 1;
        } else {
            hi = mid;
        }
    }
    return lo;
}

// what one sequence's present query promoted; by a whole block of threads
MONARCH_DEVICE void monarch_write_group_log(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t * sums) {
    monarch_head_state * head = monarch_state_head(a.state, a.n_pages_max, group.head_kv);

    const monarch_policy policy   = monarch_policy_from_table(a.table, a.op.dense);
    const int32_t        n_chosen = a.n_chosen[group.i];
    const int32_t        n_before = head->n_log;

    const uint8_t     * count       = monarch_head_state_count    (head, a.n_pages_max);
    int32_t           * index       = monarch_head_state_log_index(head, a.n_pages_max);
    monarch_log_entry * log         = monarch_head_state_log(head);
    const float       * probability = a.probability + (size_t) group.i*a.n_pages_max;
    const int32_t     * chosen      = a.chosen      + (size_t) group.i*a.n_pages_max;
    float             * measured    = a.rank        + (size_t) group.i*a.n_pages_max; // the choice is made by now

    for (int32_t ic = threadIdx.x; ic < n_chosen; ic += blockDim.x) {
        float res = 0.0f;
        for (int32_t row = 0; row < group.n_rows; ++row) {
            const size_t i_row = monarch_row_index(a, group, row);

            res = fmaxf(res, expf(a.mass[i_row*a.n_pages_max + ic] - a.row_lse[i_row]));
        }
        measured[ic] = res;
    }
    __syncthreads();

    const monarch_share share = monarch_share_get(group.n_pages);
    const int32_t       ic0   = monarch_lower_bound(chosen, n_chosen, share.i0);

    int32_t n_log = n_before; // and the new entries of the threads before this one
    for (int32_t pass = 0; pass < 2; ++pass) {
        int32_t n_new = 0;
        int32_t ic    = ic0;

        for (int32_t i = share.i0; i < share.i1; ++i) {
            const int32_t page      = group.table[i].page;
            const bool    is_sticky = monarch_policy_is_sticky(&policy, count[page]);
            const bool    is_chosen = ic < n_chosen && chosen[ic] == i;

            if (!is_sticky && !is_chosen) {
                continue;
            }

            // that another sequence made in this step
            monarch_log_entry * entry = monarch_head_state_find(head, a.n_pages_max, n_before, page);

            if (!entry && pass == 1) {
                index[page] = n_log + n_new;
                entry       = &log[index[page]];
                *entry      = monarch_policy_new_entry(page);
                n_new++;
            } else {
                n_new += !entry;
            }
            if (pass == 1) {
                monarch_policy_merge_entry(entry, group.seq, is_chosen, is_sticky, probability[i], is_chosen ? measured[ic] : 0.0f);
            }
            ic += is_chosen;
        }
        if (pass == 0) {
            n_log += monarch_block_scan(n_new, sums) - n_new;
        }
    }
    __syncthreads();

    if (threadIdx.x == 0) {
        head->n_log = n_before + sums[blockDim.x - 1];
    }
    __syncthreads();
}

// one sequence after the other: they may share pages; grid: KV heads; shared: MONARCH_SELECT_THREADS integers
MONARCH_KERNEL monarch_write_log(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    for (int32_t i = 0; i < a.n_blocks; ++i) {
        const monarch_cuda_group group = monarch_group_get(a, i*a.n_head_kv + blockIdx.x);

        if (group.n_rows == 0 || !group.is_last) {
            continue;
        }
        if (threadIdx.x == 0) {
            monarch_head_state * head = monarch_state_head(a.state, a.n_pages_max, group.head_kv);

            head->log_promoted += a.n_chosen[group.i];
            head->log_scored   += group.mode == MONARCH_MODE_PAGED ? group.n_pages : 0;
        }
        if (group.mode == MONARCH_MODE_PAGED) {
            monarch_write_group_log(a, group, (int32_t *) shared);
        }
    }
}
