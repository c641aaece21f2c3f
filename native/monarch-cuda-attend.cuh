#pragma once

// Attention on CUDA: the hot window and the chosen cold pages.
//
// A group is one KV head and one block of queries, which share a choice of pages; its rows are query heads of tokens.
// Attention is split over the ring and over the chosen pages: every part leaves a maximum, a sum and an accumulator for
// each row, which a last kernel merges.

#include "monarch-cuda-device.cuh"

#include "monarch-enums.h"
#include "monarch-frames.h"
#include "monarch-op.h"
#include "monarch-policy.h"
#include "monarch-polar.h"
#include "monarch-state.h"
#include "monarch-summary-math.h"

#define MONARCH_THREADS        128 // of a block that attends
#define MONARCH_SELECT_THREADS 256
#define MONARCH_TILE           32  // tokens attended at a time: one to a lane
#define MONARCH_SLICES         (MONARCH_THREADS/MONARCH_TILE)

struct monarch_cuda_matrix {
    const char * data;
    int32_t      type; // ggml_type
    size_t       nb1;
    size_t       nb2;
};

struct monarch_cuda_attend {
    monarch_op_params   op;
    monarch_cuda_matrix q;
    monarch_cuda_matrix k;
    monarch_cuda_matrix v;
    monarch_cuda_matrix mask;
    monarch_cuda_matrix dst;
    const uint8_t     * pool;
    const uint8_t     * summary;
    char              * state;
    char              * frames; // null: none
    int32_t           * table;
    int32_t             n_head_kv;
    int32_t             n_gqa;
    int32_t             n_tokens;
    int32_t             n_kv;
    int32_t             n_pages_max;

    // queries
    int32_t n_block;  // tokens of a block
    int32_t n_rows;   // of a whole block
    int32_t i_block;  // the first block of this launch
    int32_t n_blocks; // of this launch

    // parts
    int32_t n_hot;
    int32_t n_cold;

    // scratch, for the groups of a launch
    float   * q_rot;       // [n_groups][n_rows][head_dim]
    float   * part_max;    // [n_groups][n_rows][n_hot + n_cold]
    float   * part_sum;
    float   * part_acc;    // [n_groups][n_rows][n_hot + n_cold][head_dim]
    float   * part_v;      // [n_groups][n_hot + n_cold][head_dim] sums over the V that the group's first token sees, in cold pages rotated
    int32_t * part_n_v;    // [n_groups][n_hot + n_cold] of them
    float   * row_max;     // [n_groups][n_rows] of the estimate
    float   * row_inverse; // [n_groups][n_rows] of the estimate
    float   * row_rest;    // [n_groups][n_rows] what goes to the mean V, on the scale of row_max
    float   * row_lse;     // [n_groups][n_rows] log-sum-exp of all that was attended
    float   * mass;        // [n_groups][n_rows][n_pages_max] logarithms: estimated by page, then measured by choice
    float   * probability; // [n_groups][n_pages_max]
    float   * rank;        // [n_groups][n_pages_max]; once the choice is made, 1 or 0: whether a page was chosen
    int32_t * chosen;      // [n_groups][n_pages_max] indices into the table, ascending
    int32_t * n_chosen;    // [n_groups]
};

struct monarch_cuda_group {
    int32_t                     i;       // in scratch
    int32_t                     head_kv;
    int32_t                     i_token; // the first
    int32_t                     n_rows;  // there may be fewer tokens in a run's last block; 0: no such group
    int32_t                     seq;
    bool                        is_last; // holds the present query of its sequence
    int32_t                     mode;
    int32_t                     n_pages;
    const monarch_table_entry * table;   // [n_pages]
};

// blocks are those of the first run, then those of the next
MONARCH_DEVICE monarch_cuda_group monarch_group_get(const monarch_cuda_attend & a, int32_t i) {
    const monarch_table_run   * runs  = monarch_table_get_runs (a.table);
    const monarch_table_entry * pages = monarch_table_get_pages(a.table);

    monarch_cuda_group res = {};

    res.i       = i;
    res.head_kv = i%a.n_head_kv;
    res.mode    = MONARCH_MODE_WINDOW;

    int32_t i_block = a.i_block + i/a.n_head_kv;

    for (int32_t j = 0; j < a.table[MONARCH_TABLE_N_RUNS]; ++j) {
        const monarch_table_run run      = runs[j];
        const int32_t           n_blocks = (run.n_tokens + a.n_block - 1)/a.n_block;

        if (i_block < n_blocks) {
            const int32_t n_left = run.n_tokens - i_block*a.n_block;

            res.i_token = run.i_token + i_block*a.n_block;
            res.n_rows  = (n_left < a.n_block ? n_left : a.n_block)*a.n_gqa;
            res.seq     = run.seq;
            res.is_last = run.is_last && n_left <= a.n_block;
            res.mode    = run.mode;
            res.n_pages = run.n_pages;
            res.table   = pages + run.first_page;
            break;
        }
        i_block -= n_blocks;
    }
    return res;
}

MONARCH_DEVICE int32_t monarch_row_token(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t row) {
    return group.i_token + row/a.n_gqa;
}

MONARCH_DEVICE const float * monarch_row_query(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t row) {
    const int32_t i_head = group.head_kv*a.n_gqa + row%a.n_gqa;

    return (const float *) (a.q.data + i_head*a.q.nb1 + monarch_row_token(a, group, row)*a.q.nb2);
}

// where a row's own things lie in scratch
MONARCH_DEVICE size_t monarch_row_index(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t row) {
    return (size_t) group.i*a.n_rows + row;
}

MONARCH_DEVICE size_t monarch_part_index(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t row, int32_t part) {
    return monarch_row_index(a, group, row)*(a.n_hot + a.n_cold) + part;
}

MONARCH_DEVICE uint32_t monarch_float_to_bits(float x) {
    uint32_t res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

//
// rotation
//

// one thread of n works on a vector in shared memory
struct monarch_team {
    int32_t i;
    int32_t n;
    bool    is_warp; // the whole block otherwise
};

MONARCH_DEVICE void monarch_team_sync(const monarch_team & team) {
    if (team.is_warp) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

MONARCH_DEVICE void monarch_team_flip(const monarch_team & team, uint32_t first, int32_t n, float * x) {
    for (int32_t i = team.i; i < n; i += team.n) {
        x[i] = monarch_rotation_flip(first + i, x[i]);
    }
    monarch_team_sync(team);
}

MONARCH_DEVICE void monarch_team_transform(const monarch_team & team, int32_t n, float * x, float * buffer) {
    float * src = x;
    float * dst = buffer;

    for (int32_t size = 1; size < n; size *= 2) {
        for (int32_t i = team.i; i < n/2; i += team.n) {
            monarch_rotation_stage(n/2, i, src, dst);
        }
        monarch_team_sync(team);

        float * swap = src;
        src = dst;
        dst = swap;
    }

    // in place where src is x: each value is its own
    const float scale = monarch_rotation_scale(n);
    for (int32_t i = team.i; i < n; i += team.n) {
        x[i] = src[i]*scale;
    }
    monarch_team_sync(team);
}

// x, buffer: [head_dim]; x is complete on entry and on return
MONARCH_DEVICE void monarch_team_rotate(const monarch_team & team, int32_t head_dim, float * x, float * buffer) {
    const int32_t n = monarch_rotation_size(head_dim);

    monarch_team_flip(team, 0, n, x);
    monarch_team_transform(team, n, x, buffer);
    if (n < head_dim) {
        monarch_team_flip(team, n, n, x + head_dim - n);
        monarch_team_transform(team, n, x + head_dim - n, buffer);
    }
}

MONARCH_DEVICE void monarch_team_unrotate(const monarch_team & team, int32_t head_dim, float * x, float * buffer) {
    const int32_t n = monarch_rotation_size(head_dim);

    if (n < head_dim) {
        monarch_team_transform(team, n, x + head_dim - n, buffer);
        monarch_team_flip(team, n, n, x + head_dim - n);
    }
    monarch_team_transform(team, n, x, buffer);
    monarch_team_flip(team, 0, n, x);
}

MONARCH_DEVICE monarch_team monarch_team_block() {
    monarch_team res = { (int32_t) threadIdx.x, (int32_t) blockDim.x, false };
    return res;
}

// grid: rows, groups; shared: [2][head_dim]
MONARCH_KERNEL monarch_rotate_queries(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.y);

    const int32_t row      = blockIdx.x;
    const int32_t head_dim = a.op.codec.head_dim;

    if (row >= group.n_rows) {
        return;
    }

    const float * q = monarch_row_query(a, group, row);

    for (int32_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
        shared[i] = q[i];
    }
    __syncthreads();

    monarch_team_rotate(monarch_team_block(), head_dim, shared, shared + head_dim);

    for (int32_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
        a.q_rot[monarch_row_index(a, group, row)*head_dim + i] = shared[i];
    }
}

//
// attention
//

// what a thread of a block that attends ROWS rows does of a tile
struct monarch_seat {
    int32_t row0;    // of the block
    int32_t n_rows;
    int32_t warp;    // its slice of K, and of the rows when they are weighed
    int32_t lane;    // its token of K
    int32_t team;    // its tokens of V; those that are not in a whole team have none
    int32_t n_teams;
    int32_t p;       // its pair of values of V
};

template <int ROWS>
MONARCH_DEVICE monarch_seat monarch_seat_get(const monarch_cuda_group & group, int32_t head_dim) {
    const int32_t n_pairs = head_dim/2;

    monarch_seat res;

    res.row0    = blockIdx.y*ROWS;
    res.n_rows  = group.n_rows - res.row0 < ROWS ? group.n_rows - res.row0 : ROWS;
    res.warp    = threadIdx.x/MONARCH_WARP;
    res.lane    = threadIdx.x%MONARCH_WARP;
    res.team    = threadIdx.x/n_pairs;
    res.n_teams = MONARCH_THREADS/n_pairs;
    res.p       = threadIdx.x%n_pairs;

    return res;
}

// shared memory of a block that attends ROWS rows; floats
struct monarch_tile {
    float   * q;      // [ROWS][head_dim]
    float   * logits; // [MONARCH_SLICES][ROWS][MONARCH_TILE]
    float   * weight; // [ROWS][MONARCH_TILE]
    float   * factor; // [ROWS] what the sums before this tile shrink by
    float   * max;    // [ROWS]
    float   * sum;    // [ROWS]
    float   * acc;    // [MONARCH_THREADS][2*ROWS] the threads' accumulators, added up at the end
    float   * point;  // [4][256] x and y of K's codes, then of V's
    int32_t * page;   // [MONARCH_TILE/8] physical pages of a tile, -1: none
    int32_t * valid;  // [MONARCH_TILE/8] their valid tokens
    int32_t * frame;  // [MONARCH_TILE/8] where copies of them are, -1: none
    int32_t * n_rows; // [MONARCH_TILE] of this block, that see a slot
    float   * seen;   // [MONARCH_TILE] what tokens count in the sums over V: 1 in the ring, the scale of V in a page; 0: not seen
};

template <int ROWS>
MONARCH_DEVICE monarch_tile monarch_tile_get(float * shared, int32_t head_dim) {
    monarch_tile res;

    res.q      = shared;
    res.logits = res.q      + ROWS*head_dim;
    res.weight = res.logits + MONARCH_SLICES*ROWS*MONARCH_TILE;
    res.factor = res.weight + ROWS*MONARCH_TILE;
    res.max    = res.factor + ROWS;
    res.sum    = res.max    + ROWS;
    res.acc    = res.sum    + ROWS;
    res.point  = res.acc    + 2*ROWS*MONARCH_THREADS;
    res.page   = (int32_t *) (res.point + 4*256);
    res.valid  = res.page   + MONARCH_TILE/8;
    res.frame  = res.valid  + MONARCH_TILE/8;
    res.n_rows = res.frame  + MONARCH_TILE/8;
    res.seen   = (float *) (res.n_rows + MONARCH_TILE);

    return res;
}

static size_t monarch_tile_size(int32_t n_rows, int32_t head_dim) {
    const size_t n = n_rows*head_dim + (MONARCH_SLICES + 1)*n_rows*MONARCH_TILE + 3*n_rows + 2*n_rows*MONARCH_THREADS + 4*256 + 3*MONARCH_TILE/8 + 2*MONARCH_TILE;
    return n*sizeof(float);
}

// the rows of this block
template <int ROWS>
MONARCH_DEVICE void monarch_tile_begin(const monarch_cuda_attend & a, const monarch_cuda_group & group, const monarch_seat & seat, bool is_rotated, const monarch_tile & tile) {
    const int32_t head_dim = a.op.codec.head_dim;

    for (int32_t r = 0; r < ROWS; ++r) {
        const float * q = is_rotated ?
            a.q_rot + monarch_row_index(a, group, seat.row0 + r)*head_dim :
            monarch_row_query(a, group, seat.row0 + r);

        for (int32_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
            tile.q[r*head_dim + i] = r < seat.n_rows ? q[i] : 0.0f;
        }
    }
    for (int32_t i = threadIdx.x; i < ROWS*MONARCH_TILE; i += blockDim.x) {
        tile.weight[i] = 0.0f;
    }
    for (int32_t r = threadIdx.x; r < ROWS; r += blockDim.x) {
        tile.factor[r] = 0.0f;
        tile.max   [r] = -INFINITY;
        tile.sum   [r] = 0.0f;
    }
    __syncthreads();
}

// what this thread's slice adds to the dot products of its token
template <int ROWS>
MONARCH_DEVICE void monarch_tile_put_dots(const monarch_tile & tile, const monarch_seat & seat, const float * dot) {
    for (int32_t r = 0; r < ROWS; ++r) {
        tile.logits[(seat.warp*ROWS + r)*MONARCH_TILE + seat.lane] = dot[r];
    }
}

// A warp adds a tile's logits of one row to its softmax; returns the token's weight. The tile's weights are scaled
MONARCH_DEVICE float monarch_tile_add(const monarch_tile & tile, int32_t row, float logit, float scale) {
    const int32_t lane = threadIdx.x%MONARCH_WARP;

    const float max_old = tile.max[row];
    const float max_new = fmaxf(max_old, monarch_warp_max(logit, MONARCH_WARP));

    // while all is masked there is nothing to compare with
    const float weight = max_new == -INFINITY ? 0.0f : expf(logit   - max_new);
    const float factor = max_old == -INFINITY ? 0.0f : expf(max_old - max_new);
    const float sum    = monarch_warp_sum(weight, MONARCH_WARP);

    tile.weight[row*MONARCH_TILE + lane] = weight*scale;

    __syncwarp(); // all lanes have read the maximum

    if (lane == 0) {
        tile.factor[row] = factor;
        tile.max   [row] = max_new;
        tile.sum   [row] = tile.sum[row]*factor + sum;
    }
    return weight;
}

// a token's logit, of which every slice has a part
template <int ROWS>
MONARCH_DEVICE float monarch_tile_logit(const monarch_tile & tile, int32_t row) {
    float res = 0.0f;
    for (int32_t s = 0; s < MONARCH_SLICES; ++s) {
        res += tile.logits[(s*ROWS + row)*MONARCH_TILE + threadIdx.x%MONARCH_WARP];
    }
    return res;
}

// accumulators move on to the scale of this tile
template <int ROWS>
MONARCH_DEVICE void monarch_tile_rescale(const monarch_tile & tile, float * acc_x, float * acc_y) {
    for (int32_t r = 0; r < ROWS; ++r) {
        acc_x[r] *= tile.factor[r];
        acc_y[r] *= tile.factor[r];
    }
}

// a pair of values of the V of a token; weight: the token's, of every row
template <int ROWS>
MONARCH_DEVICE void monarch_tile_add_v(const float * weight, float x, float y, float * acc_x, float * acc_y) {
    for (int32_t r = 0; r < ROWS; ++r) {
        acc_x[r] = fmaf(weight[r*MONARCH_TILE], x, acc_x[r]);
        acc_y[r] = fmaf(weight[r*MONARCH_TILE], y, acc_y[r]);
    }
}

// the teams' accumulators, added up
template <int ROWS>
MONARCH_DEVICE void monarch_tile_end(
        const monarch_cuda_attend & a, const monarch_cuda_group & group, const monarch_seat & seat, int32_t part, const monarch_tile & tile,
        const float * acc_x, const float * acc_y) {
    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_pairs  = head_dim/2;

    if (seat.team < seat.n_teams) {
        for (int32_t r = 0; r < ROWS; ++r) {
            tile.acc[(seat.team*ROWS + r)*head_dim + seat.p]           = acc_x[r];
            tile.acc[(seat.team*ROWS + r)*head_dim + seat.p + n_pairs] = acc_y[r];
        }
    }
    __syncthreads();

    for (int32_t r = 0; r < seat.n_rows; ++r) {
        const size_t i_part = monarch_part_index(a, group, seat.row0 + r, part);

        for (int32_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
            float sum = 0.0f;
            for (int32_t t = 0; t < seat.n_teams; ++t) {
                sum += tile.acc[(t*ROWS + r)*head_dim + i];
            }
            a.part_acc[i_part*head_dim + i] = sum;
        }
        if (threadIdx.x == 0) {
            a.part_max[i_part] = tile.max[r];
            a.part_sum[i_part] = tile.sum[r];
        }
    }
}

//
// the hot window
//

// values [i, i + 4) of a ring row
MONARCH_DEVICE void monarch_ring_load(int32_t type, const char * row, int32_t i, float * x) {
    for (int32_t j = 0; j < 4; ++j) {
        x[j] = type == GGML_TYPE_F32 ? ((const float *) row)[i + j] : monarch_f16_to_f32(((const uint16_t *) row)[i + j]);
    }
}

MONARCH_DEVICE float monarch_ring_get(int32_t type, const char * row, int32_t i) {
    return type == GGML_TYPE_F32 ? ((const float *) row)[i] : monarch_f16_to_f32(((const uint16_t *) row)[i]);
}

MONARCH_DEVICE float monarch_mask_get(const monarch_cuda_attend & a, int32_t i_kv, int32_t i_token) {
    return monarch_ring_get(a.mask.type, a.mask.data + i_token*a.mask.nb1, i_kv);
}

// whether what the pages get that are not chosen goes to the mean V of what is read (monarch-attend.cpp)
MONARCH_DEVICE bool monarch_group_has_rest(const monarch_cuda_attend & a, const monarch_cuda_group & group) {
    return group.mode == MONARCH_MODE_PAGED && group.n_pages > 0 && monarch_summary_is_estimate(a.op.scorer);
}

// a part's sums over V, of which every team of threads has some; n_seen: of a lane of the first warp
MONARCH_DEVICE void monarch_rest_end(
        const monarch_cuda_attend & a, const monarch_cuda_group & group, const monarch_seat & seat, int32_t part, const monarch_tile & tile,
        float sum_x, float sum_y, int32_t n_seen) {
    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_pairs  = head_dim/2;
    const size_t  i_part   = (size_t) group.i*(a.n_hot + a.n_cold) + part;

    __syncthreads(); // the accumulators of the rows have been read

    if (seat.team < seat.n_teams) {
        tile.acc[seat.team*head_dim + seat.p]           = sum_x;
        tile.acc[seat.team*head_dim + seat.p + n_pairs] = sum_y;
    }
    __syncthreads();

    for (int32_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
        float sum = 0.0f;
        for (int32_t t = 0; t < seat.n_teams; ++t) {
            sum += tile.acc[t*head_dim + i];
        }
        a.part_v[i_part*head_dim + i] = sum;
    }
    if (threadIdx.x < MONARCH_WARP) {
        const float n = monarch_warp_sum((float) n_seen, MONARCH_WARP);

        if (threadIdx.x == 0) {
            a.part_n_v[i_part] = (int32_t) n;
        }
    }
}

// this slice's part of a slot's dot products
template <int ROWS>
MONARCH_DEVICE void monarch_hot_dot(const monarch_cuda_attend & a, const char * k, int32_t slice, const monarch_tile & tile, float * dot) {
    const int32_t head_dim = a.op.codec.head_dim;

    for (int32_t d = slice*(head_dim/MONARCH_SLICES); d < (slice + 1)*(head_dim/MONARCH_SLICES); d += 4) {
        float x[4];
        monarch_ring_load(a.k.type, k, d, x);
        for (int32_t j = 0; j < 4; ++j) {
            for (int32_t r = 0; r < ROWS; ++r) {
                dot[r] = fmaf(tile.q[r*head_dim + d + j], x[j], dot[r]);
            }
        }
    }
}

// a warp's rows: logits of slot i_kv under the mask, and how many rows see it
template <int ROWS>
MONARCH_DEVICE void monarch_hot_weigh(const monarch_cuda_attend & a, const monarch_cuda_group & group, const monarch_seat & seat, int32_t i_kv, const monarch_tile & tile) {
    for (int32_t r = seat.warp; r < seat.n_rows; r += MONARCH_SLICES) {
        const float mask = i_kv < a.n_kv ? monarch_mask_get(a, i_kv, monarch_row_token(a, group, seat.row0 + r)) : -INFINITY;

        if (mask > -INFINITY) {
            atomicAdd(&tile.n_rows[seat.lane], 1);
        }
        monarch_tile_add(tile, r, mask == -INFINITY ? mask : a.op.kq_scale*monarch_tile_logit<ROWS>(tile, r) + mask, 1.0f);
    }
}

// grid: parts, tiles of rows, groups
template <int ROWS>
MONARCH_KERNEL monarch_attend_hot(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.z);

    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_pairs  = head_dim/2;

    if ((int32_t) blockIdx.y*ROWS >= group.n_rows) {
        return;
    }

    const monarch_seat seat = monarch_seat_get<ROWS>(group, head_dim);
    const monarch_tile tile = monarch_tile_get<ROWS>(shared, head_dim);
    monarch_tile_begin<ROWS>(a, group, seat, false, tile);

    float acc_x[ROWS] = { 0 };
    float acc_y[ROWS] = { 0 };

    // one tile of rows is enough for the sums over V
    const bool has_rest = seat.row0 == 0 && monarch_group_has_rest(a, group);

    float   sum_x  = 0.0f;
    float   sum_y  = 0.0f;
    int32_t n_seen = 0;

    for (int32_t i0 = blockIdx.x*MONARCH_TILE; i0 < a.n_kv; i0 += a.n_hot*MONARCH_TILE) {
        const int32_t i_kv = i0 + seat.lane;

        float dot[ROWS] = { 0 };
        if (i_kv < a.n_kv) {
            monarch_hot_dot<ROWS>(a, a.k.data + group.head_kv*a.k.nb1 + i_kv*a.k.nb2, seat.warp, tile, dot);
        }
        monarch_tile_put_dots<ROWS>(tile, seat, dot);
        if (seat.warp == 0) {
            tile.n_rows[seat.lane] = 0;
        }
        __syncthreads();

        monarch_hot_weigh<ROWS>(a, group, seat, i_kv, tile);
        if (seat.warp == 0) {
            const bool is_seen = has_rest && i_kv < a.n_kv && monarch_mask_get(a, i_kv, group.i_token) > -INFINITY;

            tile.seen[seat.lane] = is_seen ? 1.0f : 0.0f;
            n_seen += is_seen;
        }
        __syncthreads();

        if (seat.team < seat.n_teams) {
            monarch_tile_rescale<ROWS>(tile, acc_x, acc_y);

            for (int32_t t = seat.team; t < MONARCH_TILE && i0 + t < a.n_kv; t += seat.n_teams) {
                if (tile.n_rows[t] == 0) {
                    continue; // what no row sees may be no number
                }

                const char * v = a.v.data + group.head_kv*a.v.nb1 + (i0 + t)*a.v.nb2;

                const float x = monarch_ring_get(a.v.type, v, seat.p);
                const float y = monarch_ring_get(a.v.type, v, seat.p + n_pairs);

                monarch_tile_add_v<ROWS>(tile.weight + t, x, y, acc_x, acc_y);
                if (tile.seen[t] > 0.0f) {
                    sum_x += x;
                    sum_y += y;
                }
            }
        }
        __syncthreads();
    }

    monarch_tile_end<ROWS>(a, group, seat, blockIdx.x, tile, acc_x, acc_y);

    if (has_rest) {
        monarch_rest_end(a, group, seat, blockIdx.x, tile, sum_x, sum_y, n_seen);
    }
}

//
// cold pages
//

MONARCH_DEVICE monarch_frame_head * monarch_frame_head_get(const monarch_cuda_attend & a, int32_t head_kv) {
    return monarch_frames_head(a.frames, a.n_pages_max, a.op.n_frames, head_kv);
}

MONARCH_DEVICE int32_t monarch_cold_find_frame(const monarch_cuda_attend & a, int32_t head_kv, int32_t page) {
    return a.frames ? monarch_frame_find(monarch_frame_head_get(a, head_kv), a.op.n_frames, page) : -1;
}

MONARCH_DEVICE const uint8_t * monarch_cold_block(const monarch_cuda_attend & a, int32_t head_kv, int32_t page, int32_t frame) {
    if (frame >= 0) {
        return (const uint8_t *) a.frames + monarch_frame_offset(&a.op.codec, a.n_head_kv, a.n_pages_max, a.op.n_frames, head_kv, frame);
    }
    return a.pool + monarch_pool_offset(&a.op.codec, a.n_pages_max, head_kv, page);
}

MONARCH_DEVICE void monarch_points_fill(int32_t bits, float * x, float * y) {
    for (int32_t code = threadIdx.x; code < 256; code += blockDim.x) {
        // bits above a code's own wrap around: there are none of those
        switch (bits) {
            case 2: monarch_polar_point<2>(code & 15, x[code], y[code]); break;
            case 3: monarch_polar_point<3>(code & 63, x[code], y[code]); break;
            case 4: monarch_polar_point<4>(code,      x[code], y[code]); break;
        }
    }
}

// this slice's part of a cold token's dot products, scaled
template <int ROWS>
MONARCH_DEVICE void monarch_cold_dot(
        const monarch_codec & codec, const monarch_codec_layout & layout, const uint8_t * block, int32_t t, int32_t slice,
        const monarch_tile & tile, float * dot) {
    const int32_t head_dim = codec.head_dim;
    const int32_t n_pairs  = head_dim/2;

    if (codec.bits_k == 16) {
        const char * k = (const char *) block + layout.k_codes + t*head_dim*2;

        for (int32_t d = slice; d < head_dim; d += MONARCH_SLICES) {
            const float x = monarch_ring_get(GGML_TYPE_F16, k, d);
            for (int32_t r = 0; r < ROWS; ++r) {
                dot[r] = fmaf(tile.q[r*head_dim + d], x, dot[r]);
            }
        }
        return;
    }

    const float scale     = monarch_f16_to_f32(monarch_load_u16(block + layout.k_scales + 2*t));
    const float step      = codec.residual_k ? monarch_f16_to_f32(monarch_load_u16(block + layout.k_steps + 2*t)) : 0.0f;
    const int   mask_size = codec.page_size/8;

    for (int32_t p0 = 4*slice; p0 < n_pairs; p0 += 4*MONARCH_SLICES) {
        const uint32_t quad = monarch_quad_load(codec.bits_k, block + layout.k_codes, monarch_quad_k(codec.page_size, t, p0));

        for (int32_t j = 0; j < 4; ++j) {
            const int32_t p    = p0 + j;
            const int32_t code = quad >> 8*j & 255;

            float x = scale*tile.point[      code];
            float y = scale*tile.point[256 + code];
            if (codec.residual_k) {
                x += block[layout.k_residual +  p           *mask_size + t/8] >> t%8 & 1 ? -step : step;
                y += block[layout.k_residual + (p + n_pairs)*mask_size + t/8] >> t%8 & 1 ? -step : step;
            }
            for (int32_t r = 0; r < ROWS; ++r) {
                dot[r] = fmaf(tile.q[r*head_dim + p],           x, dot[r]);
                dot[r] = fmaf(tile.q[r*head_dim + p + n_pairs], y, dot[r]);
            }
        }
    }
}

// adds four tokens of V, pair p; the tile's weights hold the tokens' scales; seen: scales for the sums over V
template <int ROWS>
MONARCH_DEVICE void monarch_cold_add(
        const monarch_codec & codec, const monarch_codec_layout & layout, const uint8_t * block, int32_t t, int32_t p,
        const monarch_tile & tile, const float * weight, const float * seen, float * acc_x, float * acc_y, float & sum_x, float & sum_y) {
    const int32_t n_pairs = codec.head_dim/2;

    const uint32_t quad = codec.bits_v == 16 ? 0 : monarch_quad_load(codec.bits_v, block + layout.v_codes, monarch_quad_v(n_pairs, t, p));

    for (int32_t j = 0; j < 4; ++j) {
        const char  * v    = (const char *) block + layout.v_codes + (t + j)*codec.head_dim*2;
        const int32_t code = quad >> 8*j & 255;

        const float x = codec.bits_v == 16 ? monarch_ring_get(GGML_TYPE_F16, v, p)           : tile.point[512 + code];
        const float y = codec.bits_v == 16 ? monarch_ring_get(GGML_TYPE_F16, v, p + n_pairs) : tile.point[768 + code];

        monarch_tile_add_v<ROWS>(weight + j, x, y, acc_x, acc_y);
        sum_x += seen[j]*x;
        sum_y += seen[j]*y;
    }
}

// a warp's rows: logits of the tile's tokens; scale: of the token's V; ic: the chosen page it is of; n_logged: pages whose mass counts
template <int ROWS>
MONARCH_DEVICE void monarch_cold_weigh(
        const monarch_cuda_attend & a, const monarch_cuda_group & group, const monarch_seat & seat, bool is_valid, float scale, int32_t ic, int32_t n_logged,
        const monarch_tile & tile) {
    const int32_t page_size = a.op.codec.page_size;

    for (int32_t r = seat.warp; r < seat.n_rows; r += MONARCH_SLICES) {
        const float weight = monarch_tile_add(tile, r, is_valid ? a.op.kq_scale*monarch_tile_logit<ROWS>(tile, r) : -INFINITY, scale);

        __syncwarp();

        if (n_logged > 0) {
            const float sum = monarch_warp_sum(weight, page_size);

            if (seat.lane%page_size == 0 && ic < n_logged) {
                a.mass[monarch_row_index(a, group, seat.row0 + r)*a.n_pages_max + ic] = tile.max[r] + logf(sum);
            }
        }
    }
}

// grid: parts, tiles of rows, groups
template <int ROWS>
MONARCH_KERNEL monarch_attend_cold(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group   group  = monarch_group_get(a, blockIdx.z);
    const monarch_codec        codec  = a.op.codec;
    const monarch_codec_layout layout = monarch_codec_get_layout(&codec);

    const int32_t n_pages = MONARCH_TILE/codec.page_size; // of a tile

    if ((int32_t) blockIdx.y*ROWS >= group.n_rows) {
        return;
    }

    const monarch_seat seat = monarch_seat_get<ROWS>(group, codec.head_dim);
    const monarch_tile tile = monarch_tile_get<ROWS>(shared, codec.head_dim);
    monarch_tile_begin<ROWS>(a, group, seat, codec.bits_k != 16, tile);

    monarch_points_fill(codec.bits_k, tile.point,       tile.point + 256);
    monarch_points_fill(codec.bits_v, tile.point + 512, tile.point + 768);

    // a lane takes token t of one page of the tile
    const int32_t i_page = seat.lane/codec.page_size;
    const int32_t t      = seat.lane%codec.page_size;

    const int32_t * chosen = a.chosen + (size_t) group.i*a.n_pages_max;
    const int32_t n_chosen = a.n_chosen[group.i];
    const int32_t n_logged = group.is_last && group.mode == MONARCH_MODE_PAGED ? n_chosen : 0;

    float acc_x[ROWS] = { 0 };
    float acc_y[ROWS] = { 0 };

    const bool has_rest = seat.row0 == 0 && monarch_group_has_rest(a, group);

    float   sum_x  = 0.0f;
    float   sum_y  = 0.0f;
    int32_t n_seen = 0;

    for (int32_t ic0 = blockIdx.x*n_pages; ic0 < n_chosen; ic0 += a.n_cold*n_pages) {
        if ((int32_t) threadIdx.x < n_pages) {
            const int32_t ic = ic0 + threadIdx.x;
            const int32_t i  = ic < n_chosen && group.mode == MONARCH_MODE_PAGED ? chosen[ic] : ic;

            tile.page [threadIdx.x] = ic < n_chosen ? group.table[i].page : -1;
            tile.valid[threadIdx.x] = ic < n_chosen ? (int32_t) group.table[i].mask : 0;
            tile.frame[threadIdx.x] = ic < n_chosen ? monarch_cold_find_frame(a, group.head_kv, group.table[i].page) : -1;
        }
        __syncthreads();

        const bool      is_valid = tile.valid[i_page] >> t & 1;
        const uint8_t * block    = monarch_cold_block(a, group.head_kv, is_valid ? tile.page[i_page] : 0, tile.frame[i_page]);

        float dot[ROWS] = { 0 };
        if (is_valid) {
            monarch_cold_dot<ROWS>(codec, layout, block, t, seat.warp, tile, dot);
        }
        monarch_tile_put_dots<ROWS>(tile, seat, dot);
        __syncthreads();

        float scale = 0.0f;
        if (is_valid) {
            scale = codec.bits_v == 16 ? 1.0f : monarch_f16_to_f32(monarch_load_u16(block + layout.v_scales + 2*t));
        }
        monarch_cold_weigh<ROWS>(a, group, seat, is_valid, scale, ic0 + i_page, n_logged, tile);
        if (seat.warp == 0) {
            tile.seen[seat.lane] = scale;
            n_seen += is_valid;
        }
        __syncthreads();

        if (seat.team < seat.n_teams) {
            monarch_tile_rescale<ROWS>(tile, acc_x, acc_y);

            for (int32_t t0 = 4*seat.team; t0 < MONARCH_TILE; t0 += 4*seat.n_teams) {
                const int32_t page = tile.page[t0/codec.page_size];

                if (page >= 0) {
                    monarch_cold_add<ROWS>(codec, layout, monarch_cold_block(a, group.head_kv, page, tile.frame[t0/codec.page_size]),
                            t0%codec.page_size, seat.p, tile, tile.weight + t0, tile.seen + t0, acc_x, acc_y, sum_x, sum_y);
                }
            }
        }
        __syncthreads();
    }

    monarch_tile_end<ROWS>(a, group, seat, a.n_hot + blockIdx.x, tile, acc_x, acc_y);

    if (has_rest) {
        monarch_rest_end(a, group, seat, a.n_hot + blockIdx.x, tile, sum_x, sum_y, n_seen);
    }
}

//
// the parts
//

// the softmax of parts [i0, i1) of a row: maximum and sum
MONARCH_DEVICE void monarch_parts_get(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t row, int32_t i0, int32_t i1, float & max, float & sum) {
    const float * part_max = a.part_max + monarch_part_index(a, group, row, 0);
    const float * part_sum = a.part_sum + monarch_part_index(a, group, row, 0);

    max = -INFINITY;
    for (int32_t i = i0; i < i1; ++i) {
        max = fmaxf(max, part_max[i]);
    }
    sum = 0.0f;
    for (int32_t i = i0; i < i1; ++i) {
        sum += part_max[i] == -INFINITY ? 0.0f : part_sum[i]*expf(part_max[i] - max);
    }
}

// value d of the accumulators of parts [i0, i1)
MONARCH_DEVICE float monarch_parts_add(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t row, int32_t i0, int32_t i1, float max, int32_t d) {
    const float * part_max = a.part_max + monarch_part_index(a, group, row, 0);
    const float * part_acc = a.part_acc + monarch_part_index(a, group, row, 0)*a.op.codec.head_dim;

    float res = 0.0f;
    for (int32_t i = i0; i < i1; ++i) {
        if (part_max[i] > -INFINITY) {
            res += part_acc[(size_t) i*a.op.codec.head_dim + d]*expf(part_max[i] - max);
        }
    }
    return res;
}

// tokens read that the group's first token sees
MONARCH_DEVICE int32_t monarch_rest_get_n(const monarch_cuda_attend & a, const monarch_cuda_group & group) {
    int32_t res = 0;
    for (int32_t i = 0; i < a.n_hot + a.n_cold; ++i) {
        res += a.part_n_v[group.i*(a.n_hot + a.n_cold) + i];
    }
    return res;
}

// value d of the V of parts [i0, i1), added up
MONARCH_DEVICE float monarch_rest_sum_v(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t i0, int32_t i1, int32_t d) {
    float sum = 0.0f;
    for (int32_t i = i0; i < i1; ++i) {
        sum += a.part_v[((size_t) group.i*(a.n_hot + a.n_cold) + i)*a.op.codec.head_dim + d];
    }
    return sum;
}

// grid: rows, groups; shared: [3][head_dim]
MONARCH_KERNEL monarch_attend_merge(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.y);

    const int32_t row      = blockIdx.x;
    const int32_t head_dim = a.op.codec.head_dim;

    if (row >= group.n_rows) {
        return;
    }

    float max;
    float sum;
    monarch_parts_get(a, group, row, 0, a.n_hot + a.n_cold, max, sum);

    const size_t  i_row = monarch_row_index(a, group, row);
    const int32_t n_v   = monarch_group_has_rest(a, group) ? monarch_rest_get_n(a, group) : 0;
    const float   rest  = n_v > 0 ? a.row_rest[i_row] : 0.0f;

    float weight = 0.0f; // of the rest, by token
    if (rest > 0.0f) {
        const float logit   = a.row_max[i_row] + logf(rest);
        const float max_new = fmaxf(max, logit);

        weight = expf(logit - max_new);
        sum    = sum*expf(max - max_new) + weight;
        max    = max_new;

        weight /= (float) n_v;
    }

    float * hot  = shared;
    float * cold = shared + head_dim;

    for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
        hot [d] = monarch_parts_add(a, group, row, 0,       a.n_hot,            max, d);
        cold[d] = monarch_parts_add(a, group, row, a.n_hot, a.n_hot + a.n_cold, max, d);
        if (weight > 0.0f) {
            hot [d] += weight*monarch_rest_sum_v(a, group, 0,       a.n_hot,            d);
            cold[d] += weight*monarch_rest_sum_v(a, group, a.n_hot, a.n_hot + a.n_cold, d);
        }
    }
    __syncthreads();

    if (a.op.codec.bits_v != 16) {
        monarch_team_unrotate(monarch_team_block(), head_dim, cold, shared + 2*head_dim);
    }

    const int32_t i_head = group.head_kv*a.n_gqa + row%a.n_gqa;

    float * dst = (float *) ((char *) a.dst.data + i_head*a.dst.nb1 + monarch_row_token(a, group, row)*a.dst.nb2);

    for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
        dst[d] = (hot[d] + cold[d])/sum;
    }
    if (threadIdx.x == 0) {
        a.row_lse[i_row] = max + logf(sum);
    }
}
