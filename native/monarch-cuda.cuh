#pragma once

// GGML_OP_MONARCH on CUDA. Same stages as on the CPU (monarch-attend.cpp), each a kernel or two; what is chosen stays on the
// device, so launches depend on shapes alone and CUDA graphs can replay them.
//
// A group is one KV head and one block of queries, which share a choice of pages; its rows are query heads of tokens.
// Attention is split over the ring and over the chosen pages: every part leaves a maximum, a sum and an accumulator for
// each row, which a last kernel merges.

#include "monarch-cuda-device.cuh"

#include "monarch-enums.h"
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
    monarch_op_params          op;
    monarch_cuda_matrix q;
    struct monarch_cuda_matrix k;
    struct monarch_cuda_matrix v;
    struct monarch_cuda_matrix mask;
    struct monarch_cuda_matrix dst;
    const uint8_t            * pool;
    const uint8_t            * summary;
    char                     * state;
    const int32_t            * table;
    int32_t                    n_head_kv;
    int32_t                    n_gqa;
    int32_t                    n_tokens;
    int32_t                    n_kv;
    int32_t                    n_pages_max;

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
    float   * row_max;     // [n_groups][n_rows] of the estimate
    float   * row_inverse; // [n_groups][n_rows] of the estimate
    float   * row_lse;     // [n_groups][n_rows] log-sum-exp of all that was attended
    float   * mass;        // [n_groups][n_rows][n_pages_max] logarithms: estimated by page, then measured by choice
    float   * probability; // [n_groups][n_pages_max]
    float   * rank;        // [n_groups][n_pages_max]
    int32_t * chosen;      // [n_groups][n_pages_max] indices into the table, ascending
    int32_t * n_chosen;    // [n_groups]
};

struct monarch_cuda_group {
    int32_t i;       // in scratch
    int32_t head_kv;
    int32_t i_token; // the first
    int32_t n_rows;  // there may be fewer tokens in the last block
    bool    is_last;
};

MONARCH_DEVICE monarch_cuda_group monarch_group_get(const monarch_cuda_attend & a, int32_t i) {
    monarch_cuda_group res;

    res.i       = i;
    res.head_kv = i%a.n_head_kv;
    res.i_token = (a.i_block + i/a.n_head_kv)*a.n_block;

    const int32_t n_left = a.n_tokens - res.i_token;

    res.is_last = n_left <= a.n_block;
    res.n_rows  = (res.is_last ? n_left : a.n_block)*a.n_gqa;

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

MONARCH_DEVICE const monarch_table_entry * monarch_table_get(const monarch_cuda_attend & a) {
    return (const monarch_table_entry *) (a.table + MONARCH_TABLE_HEADER);
}

MONARCH_DEVICE float monarch_bits_to_float(int32_t bits) {
    float res;
    memcpy(&res, &bits, sizeof(res));
    return res;
}

MONARCH_DEVICE uint32_t monarch_float_to_bits(float x) {
    uint32_t res;
    memcpy(&res, &x, sizeof(res));
    return res;
}

MONARCH_DEVICE monarch_policy monarch_policy_get(const monarch_cuda_attend & a) {
    monarch_policy res;

    res.n_budget            = a.table[a.op.dense ? MONARCH_TABLE_DENSE_PAGES : MONARCH_TABLE_PROMOTE_PAGES];
    res.promotion_threshold = monarch_bits_to_float(a.table[MONARCH_TABLE_PROMOTION_THRESHOLD]);
    res.sticky_threshold    = a.table[MONARCH_TABLE_STICKY_THRESHOLD];
    res.importance_decay    = monarch_bits_to_float(a.table[MONARCH_TABLE_IMPORTANCE_DECAY]);

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
    res.valid  = res.page + MONARCH_TILE/8;

    return res;
}

static size_t monarch_tile_size(int32_t n_rows, int32_t head_dim) {
    const size_t n = n_rows*head_dim + (MONARCH_SLICES + 1)*n_rows*MONARCH_TILE + 3*n_rows + 2*n_rows*MONARCH_THREADS + 4*256 + 2*MONARCH_TILE/8;
    return n*sizeof(float);
}

// the rows of this block
template <int ROWS>
MONARCH_DEVICE void monarch_tile_begin(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t row0, int32_t n_rows, bool is_rotated, const monarch_tile & tile) {
    const int32_t head_dim = a.op.codec.head_dim;

    for (int32_t r = 0; r < ROWS; ++r) {
        const float * q = is_rotated ?
            a.q_rot + monarch_row_index(a, group, row0 + r)*head_dim :
            monarch_row_query(a, group, row0 + r);

        for (int32_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
            tile.q[r*head_dim + i] = r < n_rows ? q[i] : 0.0f;
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

// Threads take pairs of values of V: pair threadIdx.x % n_pairs of every n_teams'th quad of tokens
template <int ROWS>
MONARCH_DEVICE void monarch_tile_end(
        const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t row0, int32_t n_rows, int32_t part, const monarch_tile & tile,
        const float * acc_x, const float * acc_y) {
    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_pairs  = head_dim/2;
    const int32_t n_teams  = MONARCH_THREADS/n_pairs;

    const int32_t team = threadIdx.x/n_pairs;
    const int32_t p    = threadIdx.x%n_pairs;

    if (team < n_teams) {
        for (int32_t r = 0; r < ROWS; ++r) {
            tile.acc[(team*ROWS + r)*head_dim + p]           = acc_x[r];
            tile.acc[(team*ROWS + r)*head_dim + p + n_pairs] = acc_y[r];
        }
    }
    __syncthreads();

    for (int32_t r = 0; r < n_rows; ++r) {
        const size_t i_part = monarch_part_index(a, group, row0 + r, part);

        for (int32_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
            float sum = 0.0f;
            for (int32_t t = 0; t < n_teams; ++t) {
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

// grid: parts, tiles of rows, groups
template <int ROWS>
MONARCH_KERNEL monarch_attend_hot(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.z);

    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_pairs  = head_dim/2;
    const int32_t n_teams  = MONARCH_THREADS/n_pairs;
    const int32_t row0     = blockIdx.y*ROWS;

    if (row0 >= group.n_rows) {
        return;
    }

    const int32_t n_rows = group.n_rows - row0 < ROWS ? group.n_rows - row0 : ROWS;
    const int32_t warp   = threadIdx.x/MONARCH_WARP;
    const int32_t lane   = threadIdx.x%MONARCH_WARP;
    const int32_t team   = threadIdx.x/n_pairs;
    const int32_t p      = threadIdx.x%n_pairs;

    const monarch_tile tile = monarch_tile_get<ROWS>(shared, head_dim);
    monarch_tile_begin<ROWS>(a, group, row0, n_rows, false, tile);

    float acc_x[ROWS] = { 0 };
    float acc_y[ROWS] = { 0 };

    for (int32_t i0 = blockIdx.x*MONARCH_TILE; i0 < a.n_kv; i0 += a.n_hot*MONARCH_TILE) {
        // a lane takes a slot, a warp a slice of its values
        float dot[ROWS] = { 0 };
        if (i0 + lane < a.n_kv) {
            const char * k = a.k.data + group.head_kv*a.k.nb1 + (i0 + lane)*a.k.nb2;

            for (int32_t d = warp*(head_dim/MONARCH_SLICES); d < (warp + 1)*(head_dim/MONARCH_SLICES); d += 4) {
                float x[4];
                monarch_ring_load(a.k.type, k, d, x);
                for (int32_t j = 0; j < 4; ++j) {
                    for (int32_t r = 0; r < ROWS; ++r) {
                        dot[r] = fmaf(tile.q[r*head_dim + d + j], x[j], dot[r]);
                    }
                }
            }
        }
        for (int32_t r = 0; r < ROWS; ++r) {
            tile.logits[(warp*ROWS + r)*MONARCH_TILE + lane] = dot[r];
        }
        __syncthreads();

        for (int32_t r = warp; r < n_rows; r += MONARCH_SLICES) {
            const float mask = i0 + lane < a.n_kv ? monarch_mask_get(a, i0 + lane, monarch_row_token(a, group, row0 + r)) : -INFINITY;

            monarch_tile_add(tile, r, mask == -INFINITY ? mask : a.op.kq_scale*monarch_tile_logit<ROWS>(tile, r) + mask, 1.0f);
        }
        __syncthreads();

        if (team < n_teams) {
            for (int32_t r = 0; r < ROWS; ++r) {
                acc_x[r] *= tile.factor[r];
                acc_y[r] *= tile.factor[r];
            }
            for (int32_t t = team; t < MONARCH_TILE && i0 + t < a.n_kv; t += n_teams) {
                const char * v = a.v.data + group.head_kv*a.v.nb1 + (i0 + t)*a.v.nb2;

                const float x = monarch_ring_get(a.v.type, v, p);
                const float y = monarch_ring_get(a.v.type, v, p + n_pairs);
                for (int32_t r = 0; r < ROWS; ++r) {
                    acc_x[r] = fmaf(tile.weight[r*MONARCH_TILE + t], x, acc_x[r]);
                    acc_y[r] = fmaf(tile.weight[r*MONARCH_TILE + t], y, acc_y[r]);
                }
            }
        }
        __syncthreads();
    }

    monarch_tile_end<ROWS>(a, group, row0, n_rows, blockIdx.x, tile, acc_x, acc_y);
}

//
// cold pages
//

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

// adds four tokens of V, pair p; the tile's weights hold the tokens' scales
template <int ROWS>
MONARCH_DEVICE void monarch_cold_add(
        const monarch_codec & codec, const monarch_codec_layout & layout, const uint8_t * block, int32_t t, int32_t p,
        const monarch_tile & tile, const float * weight, float * acc_x, float * acc_y) {
    const int32_t n_pairs = codec.head_dim/2;

    const uint32_t quad = codec.bits_v == 16 ? 0 : monarch_quad_load(codec.bits_v, block + layout.v_codes, monarch_quad_v(n_pairs, t, p));

    for (int32_t j = 0; j < 4; ++j) {
        const char  * v    = (const char *) block + layout.v_codes + (t + j)*codec.head_dim*2;
        const int32_t code = quad >> 8*j & 255;

        const float x = codec.bits_v == 16 ? monarch_ring_get(GGML_TYPE_F16, v, p)           : tile.point[512 + code];
        const float y = codec.bits_v == 16 ? monarch_ring_get(GGML_TYPE_F16, v, p + n_pairs) : tile.point[768 + code];
        for (int32_t r = 0; r < ROWS; ++r) {
            acc_x[r] = fmaf(weight[r*MONARCH_TILE + j], x, acc_x[r]);
            acc_y[r] = fmaf(weight[r*MONARCH_TILE + j], y, acc_y[r]);
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

    const int32_t head_dim = codec.head_dim;
    const int32_t n_pairs  = head_dim/2;
    const int32_t n_teams  = MONARCH_THREADS/n_pairs;
    const int32_t n_pages  = MONARCH_TILE/codec.page_size; // of a tile
    const int32_t row0     = blockIdx.y*ROWS;

    if (row0 >= group.n_rows) {
        return;
    }

    const int32_t n_rows = group.n_rows - row0 < ROWS ? group.n_rows - row0 : ROWS;
    const int32_t warp   = threadIdx.x/MONARCH_WARP;
    const int32_t lane   = threadIdx.x%MONARCH_WARP;
    const int32_t team   = threadIdx.x/n_pairs;
    const int32_t p      = threadIdx.x%n_pairs;

    // a lane takes token t of one page of the tile
    const int32_t i_page = lane/codec.page_size;
    const int32_t t      = lane%codec.page_size;

    const int32_t mode      = a.table[MONARCH_TABLE_MODE];
    const bool    is_logged = group.is_last && mode == MONARCH_MODE_PAGED;
    const int32_t n_chosen  = a.n_chosen[group.i];

    const int32_t             * chosen = a.chosen + (size_t) group.i*a.n_pages_max;
    const monarch_table_entry * table  = monarch_table_get(a);

    const monarch_tile tile = monarch_tile_get<ROWS>(shared, head_dim);
    monarch_tile_begin<ROWS>(a, group, row0, n_rows, codec.bits_k != 16, tile);

    monarch_points_fill(codec.bits_k, tile.point,       tile.point + 256);
    monarch_points_fill(codec.bits_v, tile.point + 512, tile.point + 768);

    float acc_x[ROWS] = { 0 };
    float acc_y[ROWS] = { 0 };

    for (int32_t ic0 = blockIdx.x*n_pages; ic0 < n_chosen; ic0 += a.n_cold*n_pages) {
        if ((int32_t) threadIdx.x < n_pages) {
            const int32_t ic = ic0 + threadIdx.x;
            const int32_t i  = ic < n_chosen && mode == MONARCH_MODE_PAGED ? chosen[ic] : ic;

            tile.page [threadIdx.x] = ic < n_chosen ? table[i].page : -1;
            tile.valid[threadIdx.x] = ic < n_chosen ? (int32_t) table[i].mask : 0;
        }
        __syncthreads();

        const bool      is_valid = tile.valid[i_page] >> t & 1;
        const uint8_t * block    = a.pool + monarch_pool_offset(&codec, a.n_pages_max, group.head_kv, is_valid ? tile.page[i_page] : 0);

        float dot[ROWS] = { 0 };
        if (is_valid) {
            monarch_cold_dot<ROWS>(codec, layout, block, t, warp, tile, dot);
        }
        for (int32_t r = 0; r < ROWS; ++r) {
            tile.logits[(warp*ROWS + r)*MONARCH_TILE + lane] = dot[r];
        }
        __syncthreads();

        float scale = 0.0f;
        if (is_valid) {
            scale = codec.bits_v == 16 ? 1.0f : monarch_f16_to_f32(monarch_load_u16(block + layout.v_scales + 2*t));
        }
        for (int32_t r = warp; r < n_rows; r += MONARCH_SLICES) {
            const float weight = monarch_tile_add(tile, r, is_valid ? a.op.kq_scale*monarch_tile_logit<ROWS>(tile, r) : -INFINITY, scale);

            __syncwarp();

            if (is_logged) {
                const float sum = monarch_warp_sum(weight, codec.page_size);

                if (t == 0 && ic0 + i_page < n_chosen) {
                    a.mass[monarch_row_index(a, group, row0 + r)*a.n_pages_max + ic0 + i_page] = tile.max[r] + logf(sum);
                }
            }
        }
        __syncthreads();

        if (team < n_teams) {
            for (int32_t r = 0; r < ROWS; ++r) {
                acc_x[r] *= tile.factor[r];
                acc_y[r] *= tile.factor[r];
            }
            for (int32_t t0 = 4*team; t0 < MONARCH_TILE; t0 += 4*n_teams) {
                const int32_t page = tile.page[t0/codec.page_size];

                if (page >= 0) {
                    monarch_cold_add<ROWS>(codec, layout, a.pool + monarch_pool_offset(&codec, a.n_pages_max, group.head_kv, page),
                            t0%codec.page_size, p, tile, tile.weight + t0, acc_x, acc_y);
                }
            }
        }
        __syncthreads();
    }

    monarch_tile_end<ROWS>(a, group, row0, n_rows, a.n_hot + blockIdx.x, tile, acc_x, acc_y);
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

    float * hot  = shared;
    float * cold = shared + head_dim;

    for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
        hot [d] = monarch_parts_add(a, group, row, 0, a.n_hot, max, d);
        cold[d] = monarch_parts_add(a, group, row, a.n_hot, a.n_hot + a.n_cold, max, d);
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
        a.row_lse[monarch_row_index(a, group, row)] = max + logf(sum);
    }
}

//
// the choice of pages
//

// grid: tiles of pages, groups; shared: [n_rows][2*head_dim]
MONARCH_KERNEL monarch_score_pages(const monarch_cuda_attend a, const int32_t n_rows_max) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.y);

    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_pages  = a.table[MONARCH_TABLE_N_PAGES];
    const int32_t i        = blockIdx.x*blockDim.x + threadIdx.x;

    if (a.table[MONARCH_TABLE_MODE] != MONARCH_MODE_PAGED || (int32_t) (blockIdx.x*blockDim.x) >= n_pages) {
        return;
    }

    const monarch_table_entry entry = monarch_table_get(a)[i < n_pages ? i : 0];

    const uint8_t * summary = a.summary + monarch_summary_offset(head_dim, a.n_pages_max, group.head_kv, entry.page);
    const float     n_valid = (float) monarch_mask_count(entry.mask);

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

        for (int32_t r = 0; r < n_rows && i < n_pages; ++r) {
            a.mass[monarch_row_index(a, group, row0 + r)*a.n_pages_max + i] =
                a.op.kq_scale*monarch_summary_score_page(head_dim, shared + 2*r*head_dim, summary, entry.page%MONARCH_SUMMARY_GROUP) + logf(n_valid);
        }
        __syncthreads();
    }
}

// per row: the scale of the masses, and the inverse of hot mass + sum of estimated page masses
// grid: rows, groups; shared: one float to a warp
MONARCH_KERNEL monarch_estimate_rows(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.y);

    const int32_t n_pages = a.table[MONARCH_TABLE_N_PAGES];
    const int32_t row     = blockIdx.x;

    if (a.table[MONARCH_TABLE_MODE] != MONARCH_MODE_PAGED || row >= group.n_rows) {
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

    if (a.table[MONARCH_TABLE_MODE] != MONARCH_MODE_PAGED || i >= a.table[MONARCH_TABLE_N_PAGES]) {
        return;
    }

    float res = 0.0f;
    for (int32_t row = 0; row < group.n_rows; ++row) {
        const size_t i_row = monarch_row_index(a, group, row);

        res = fmaxf(res, expf(a.mass[i_row*a.n_pages_max + i] - a.row_max[i_row])*a.row_inverse[i_row]);
    }
    a.probability[(size_t) group.i*a.n_pages_max + i] = res;
}

// Candidates' ranks as integers in the same order, one more than their bits; 0: no candidate
MONARCH_DEVICE uint32_t monarch_select_key(const float * rank, int32_t i) {
    return rank[i] < 0.0f ? 0 : monarch_float_to_bits(rank[i]) + 1;
}

// the key of the last page that is chosen, a byte at a time; of those that have it, the last n_equal are chosen
MONARCH_DEVICE uint32_t monarch_select_threshold(const float * rank, int32_t n_pages, int32_t n_budget, int32_t * histogram, int32_t & n_equal) {
    int32_t * digit = histogram + 256;
    int32_t * left  = histogram + 257;

    uint32_t prefix = 0;
    int32_t  n_left = n_budget;

    for (int32_t shift = 24; shift >= 0; shift -= 8) {
        for (int32_t i = threadIdx.x; i < 256; i += blockDim.x) {
            histogram[i] = 0;
        }
        __syncthreads();

        for (int32_t i = threadIdx.x; i < n_pages; i += blockDim.x) {
            const uint32_t key = monarch_select_key(rank, i);

            if (key != 0 && ((uint64_t) (key ^ prefix) >> (shift + 8)) == 0) {
                atomicAdd(&histogram[key >> shift & 255], 1);
            }
        }
        __syncthreads();

        if (threadIdx.x == 0) {
            int32_t i = 255;
            for (; i > 0 && histogram[i] < n_left; --i) {
                n_left -= histogram[i];
            }
            *digit = i;
            *left  = n_left;
        }
        __syncthreads();

        prefix |= (uint32_t) *digit << shift;
        n_left  = *left;
    }

    n_equal = n_left;

    return prefix;
}

// grid: groups; shared: 258 + MONARCH_SELECT_THREADS integers
MONARCH_KERNEL monarch_select_pages(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, blockIdx.x);

    const int32_t mode    = a.table[MONARCH_TABLE_MODE];
    const int32_t n_pages = a.table[MONARCH_TABLE_N_PAGES];

    if (mode != MONARCH_MODE_PAGED) {
        if (threadIdx.x == 0) {
            a.n_chosen[group.i] = mode == MONARCH_MODE_EXACT ? n_pages : 0;
        }
        return;
    }

    const monarch_policy        policy = monarch_policy_get(a);
    const monarch_table_entry * table  = monarch_table_get(a);

    monarch_head_state * head = monarch_state_head(a.state, a.n_pages_max, group.head_kv);

    const float   * importance  = monarch_head_state_importance(head, a.n_pages_max);
    const uint8_t * count       = monarch_head_state_count     (head, a.n_pages_max);
    const float   * probability = a.probability + (size_t) group.i*a.n_pages_max;
    float         * rank        = a.rank        + (size_t) group.i*a.n_pages_max;
    int32_t       * chosen      = a.chosen      + (size_t) group.i*a.n_pages_max;

    int32_t * histogram = (int32_t *) shared;
    int32_t * sums      = histogram + 258;

    // threads take runs of neighbours, so that sums over threads are in the order of the table
    const int32_t n_run = (n_pages + blockDim.x - 1)/blockDim.x;
    const int32_t i0    = threadIdx.x*n_run;
    const int32_t i1    = i0 + n_run < n_pages ? i0 + n_run : n_pages;

    int32_t n_candidates = 0;
    for (int32_t i = i0; i < i1; ++i) {
        const int32_t page = table[i].page;

        float x;
        const bool is_candidate = monarch_policy_get_rank(&policy, count[page], importance[page], probability[i], &x);

        rank[i] = is_candidate ? x : -1.0f;
        n_candidates += is_candidate;
    }
    monarch_block_scan(n_candidates, sums);

    uint32_t threshold = 0; // all candidates are chosen
    int32_t  n_equal   = 0;
    if (sums[blockDim.x - 1] > policy.n_budget) {
        threshold = monarch_select_threshold(rank, n_pages, policy.n_budget, histogram, n_equal);
    }
    __syncthreads();

    int32_t n_own_greater = 0;
    int32_t n_own_equal   = 0;
    for (int32_t i = i0; i < i1; ++i) {
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
    for (int32_t i = i0; i < i1; ++i) {
        const uint32_t key = monarch_select_key(rank, i);

        const bool is_equal = key == threshold && threshold != 0;
        if (key > threshold || (is_equal && n_seen >= n_left_out)) {
            chosen[ic++] = i;
        }
        n_seen += is_equal;
    }
    if (threadIdx.x == 0) {
        a.n_chosen[group.i] = sums[blockDim.x - 1];
    }
}

//
// sticky state
//

// the log of the last step that succeeded; grid: KV heads
MONARCH_KERNEL monarch_apply_log(const monarch_cuda_attend a) {
    const monarch_policy policy = monarch_policy_get(a);

    monarch_head_state      * head = monarch_state_head(a.state, a.n_pages_max, blockIdx.x);
    const monarch_log_entry * log  = monarch_head_state_log(head);

    float   * importance = monarch_head_state_importance(head, a.n_pages_max);
    uint8_t * count      = monarch_head_state_count     (head, a.n_pages_max);

    const bool    is_committed = head->step == a.table[MONARCH_TABLE_COMMITTED];
    const int32_t n_log        = is_committed ? head->n_log : 0;

    // a page is logged once
    for (int32_t i = threadIdx.x; i < n_log; i += blockDim.x) {
        monarch_policy_apply_entry(&policy, &log[i], &count[log[i].page], &importance[log[i].page]);
    }
    __syncthreads();

    if (threadIdx.x == 0) {
        if (is_committed) {
            head->n_promotions += head->log_promoted;
            head->n_scored     += head->log_scored;
        }
        head->step         = a.table[MONARCH_TABLE_STEP];
        head->n_log        = 0;
        head->log_promoted = 0;
        head->log_scored   = 0;
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

// what the last block of queries promoted; grid: KV heads; shared: MONARCH_SELECT_THREADS integers
MONARCH_KERNEL monarch_write_log(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    const monarch_cuda_group group = monarch_group_get(a, (a.n_blocks - 1)*a.n_head_kv + blockIdx.x);

    monarch_head_state * head = monarch_state_head(a.state, a.n_pages_max, group.head_kv);

    const bool    is_paged = a.table[MONARCH_TABLE_MODE] == MONARCH_MODE_PAGED;
    const int32_t n_pages  = a.table[MONARCH_TABLE_N_PAGES];
    const int32_t n_chosen = a.n_chosen[group.i];

    if (threadIdx.x == 0) {
        head->log_promoted = n_chosen;
        head->log_scored   = is_paged ? n_pages : 0;
    }
    if (!is_paged) {
        return;
    }

    const monarch_policy        policy = monarch_policy_get(a);
    const monarch_table_entry * table  = monarch_table_get(a);

    const uint8_t * count       = monarch_head_state_count(head, a.n_pages_max);
    const float   * probability = a.probability + (size_t) group.i*a.n_pages_max;
    const int32_t * chosen      = a.chosen      + (size_t) group.i*a.n_pages_max;
    float         * measured    = a.rank        + (size_t) group.i*a.n_pages_max; // the choice is made by now

    for (int32_t ic = threadIdx.x; ic < n_chosen; ic += blockDim.x) {
        float res = 0.0f;
        for (int32_t row = 0; row < group.n_rows; ++row) {
            const size_t i_row = monarch_row_index(a, group, row);

            res = fmaxf(res, expf(a.mass[i_row*a.n_pages_max + ic] - a.row_lse[i_row]));
        }
        measured[ic] = res;
    }
    __syncthreads();

    const int32_t n_run = (n_pages + blockDim.x - 1)/blockDim.x;
    const int32_t i0    = (int32_t) threadIdx.x*n_run < n_pages ? (int32_t) threadIdx.x*n_run : n_pages;
    const int32_t i1    = i0 + n_run < n_pages ? i0 + n_run : n_pages;
    const int32_t ic0   = monarch_lower_bound(chosen, n_chosen, i0);

    monarch_log_entry * log = monarch_head_state_log(head);

    int32_t n_log = 0; // before this thread's own
    for (int32_t pass = 0; pass < 2; ++pass) {
        int32_t n_own = 0;
        int32_t ic    = ic0;

        for (int32_t i = i0; i < i1; ++i) {
            const int32_t page      = table[i].page;
            const bool    is_sticky = monarch_policy_is_sticky(&policy, count[page]);
            const bool    is_chosen = ic < n_chosen && chosen[ic] == i;

            if (pass == 1 && (is_sticky || is_chosen)) {
                monarch_log_entry * entry = &log[n_log + n_own];

                entry->page      = page;
                entry->flags     = (is_chosen ? MONARCH_LOG_PROMOTED : MONARCH_LOG_DROPPED) | (is_sticky ? MONARCH_LOG_STICKY : 0);
                entry->estimated = probability[i];
                entry->measured  = is_chosen ? measured[ic] : 0.0f;
            }
            n_own += is_sticky || is_chosen;
            ic    += is_chosen;
        }
        if (pass == 0) {
            n_log = monarch_block_scan(n_own, (int32_t *) shared) - n_own;
        }
    }
    if (threadIdx.x == 0) {
        head->n_log = ((const int32_t *) shared)[blockDim.x - 1];
    }
}

//
// page out
//

struct monarch_cuda_page_out {
    monarch_op_params   op;
    monarch_cuda_matrix k;
    monarch_cuda_matrix v;
    uint8_t           * pool;
    uint8_t           * summary;
    char              * state;
    const int32_t     * page_outs;
    int32_t             n_head_kv;
    int32_t             n_pages_max;
    int32_t             n_outs_max;
};

// a warp's scratch in shared memory
struct monarch_record {
    float   * x;      // [head_dim] rotated
    float   * buffer; // [head_dim]
    float   * dot;    // [2][n_pairs] with the best direction of either parity
    int32_t * angle;  // [2][n_pairs] which that is
    float   * dots;   // [MONARCH_N_FACTORS]
    float   * norms;  // [MONARCH_N_FACTORS]
    float   * lanes;  // [MONARCH_N_LANES]
    int32_t * code;   // [n_pairs]
};

MONARCH_HD static inline int32_t monarch_record_floats(int32_t head_dim) {
    return 4*head_dim + 2*MONARCH_N_FACTORS + MONARCH_N_LANES + head_dim/2;
}

MONARCH_DEVICE monarch_record monarch_record_get(float * shared, int32_t head_dim) {
    monarch_record res;

    res.x      = shared;
    res.buffer = res.x + head_dim;
    res.dot    = res.buffer + head_dim;
    res.angle  = (int32_t *) (res.dot + head_dim);
    res.dots   = (float *) (res.angle + head_dim);
    res.norms  = res.dots  + MONARCH_N_FACTORS;
    res.lanes  = res.norms + MONARCH_N_FACTORS;
    res.code   = (int32_t *) (res.lanes + MONARCH_N_LANES);

    return res;
}

// the sum of n values of the buffer in the codec's order
MONARCH_DEVICE float monarch_record_sum(const monarch_team & team, const monarch_record & r, int32_t n) {
    __syncwarp();
    if (team.i < MONARCH_N_LANES) {
        float sum = 0.0f;
        for (int32_t i = team.i; i < n; i += MONARCH_N_LANES) {
            sum += r.buffer[i];
        }
        r.lanes[team.i] = sum;
    }
    __syncwarp();

    const float res = monarch_sum_lanes(r.lanes);

    __syncwarp();
    return res;
}

template <int bits>
MONARCH_DEVICE void monarch_record_find_codes(const monarch_team & team, const monarch_record & r, int32_t n_pairs, float scale) {
    const float inverse = 1.0f/scale;

    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        const float even = r.dot[p]          *inverse;
        const float odd  = r.dot[p + n_pairs]*inverse;

        float   radius_even;
        float   radius_odd;
        int32_t ring_even;
        int32_t ring_odd;
        monarch_polar_find_ring<bits, 0>(even, radius_even, ring_even);
        monarch_polar_find_ring<bits, 1>(odd,  radius_odd,  ring_odd);

        r.code[p] = monarch_polar_choose_code<bits>(
                even, radius_even, ring_even, r.angle[p],
                odd,  radius_odd,  ring_odd,  r.angle[p + n_pairs]);
    }
    __syncwarp();
}

template <int bits>
MONARCH_DEVICE float monarch_record_fit_scale(const monarch_team & team, const monarch_record & r, int32_t n_pairs) {
    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        float px;
        float py;
        monarch_polar_point<bits>(r.code[p], px, py);
        r.buffer[p] = r.x[p]*px + r.x[p + n_pairs]*py;
    }
    const float dots = monarch_record_sum(team, r, n_pairs);

    // whole numbers below 2^24: the order does not matter
    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        float px;
        float py;
        monarch_polar_point<bits>(r.code[p], px, py);
        r.buffer[p] = px*px + py*py;
    }
    return dots/monarch_record_sum(team, r, n_pairs);
}

// codes and scale of the rotated vector r.x
template <int bits>
MONARCH_DEVICE uint16_t monarch_record_encode_codes(const monarch_team & team, const monarch_record & r, int32_t head_dim) {
    const int32_t n_pairs = head_dim/2;

    for (int32_t i = team.i; i < head_dim; i += team.n) {
        r.buffer[i] = r.x[i]*r.x[i];
    }
    const float rms = sqrtf(monarch_record_sum(team, r, head_dim)/(float) head_dim);

    uint16_t scale = 0;
    if (rms >= MONARCH_LEAST_RMS) {
        for (int32_t p = team.i; p < n_pairs; p += team.n) {
            monarch_polar_find_angle<bits, 0>(r.x[p], r.x[p + n_pairs], r.dot[p],           r.angle[p]);
            monarch_polar_find_angle<bits, 1>(r.x[p], r.x[p + n_pairs], r.dot[p + n_pairs], r.angle[p + n_pairs]);
        }
        __syncwarp();

        if (team.i < MONARCH_N_FACTORS) {
            const float inverse = 1.0f/(rms*monarch_scale_factor(team.i));

            float dots  = 0.0f;
            float norms = 0.0f;
            for (int32_t p = 0; p < n_pairs; ++p) {
                monarch_polar_add_fit<bits>(r.dot[p], r.dot[p + n_pairs], inverse, dots, norms);
            }
            r.dots [team.i] = dots;
            r.norms[team.i] = norms;
        }
        __syncwarp();

        monarch_record_find_codes<bits>(team, r, n_pairs, monarch_polar_best_fit(r.dots, r.norms));
        scale = monarch_f32_to_f16(monarch_record_fit_scale<bits>(team, r, n_pairs));
        monarch_record_find_codes<bits>(team, r, n_pairs, monarch_f16_to_f32(scale)*monarch_polar<bits>::unit);
    }
    if (scale == 0) {
        for (int32_t p = team.i; p < n_pairs; p += team.n) {
            r.code[p] = 0;
        }
        __syncwarp();
    }
    return scale;
}

// signs of what the codes leave, and the step
template <int bits>
MONARCH_DEVICE uint16_t monarch_record_encode_residual(const monarch_team & team, const monarch_record & r, int32_t head_dim, uint16_t scale, uint8_t * negative) {
    const int32_t n_pairs = head_dim/2;

    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        float px;
        float py;
        monarch_polar_point<bits>(r.code[p], px, py);

        const float rest_x = r.x[p]           - monarch_f16_to_f32(scale)*px;
        const float rest_y = r.x[p + n_pairs] - monarch_f16_to_f32(scale)*py;

        r.buffer[p]           = fabsf(rest_x);
        r.buffer[p + n_pairs] = fabsf(rest_y);
        negative[p]           = scale != 0 && rest_x < 0.0f;
        negative[p + n_pairs] = scale != 0 && rest_y < 0.0f;
    }
    const float sum = monarch_record_sum(team, r, head_dim);

    return scale == 0 ? 0 : monarch_f32_to_f16(sum/(float) head_dim);
}

// K or V of a page; codes, negative: in shared memory
struct monarch_page_half {
    const char * ring; // this head's
    size_t       nb2;
    int32_t      type;
    int32_t      bits;
    bool         is_k;
    bool         residual;
    uint8_t    * codes;    // [page_size*n_pairs] in the order of the block
    uint8_t    * negative; // [page_size][head_dim]
    uint8_t    * scales;   // in the block
    uint8_t    * steps;
};

template <int bits>
MONARCH_DEVICE void monarch_record_encode(const monarch_codec & codec, const monarch_page_half & half, const monarch_team & team, const monarch_record & r, int32_t t, const int32_t * slots) {
    const int32_t head_dim = codec.head_dim;
    const int32_t n_pairs  = head_dim/2;

    for (int32_t i = team.i; i < head_dim; i += team.n) {
        r.x[i] = monarch_f16_clamp(monarch_ring_get(half.type, half.ring + slots[t]*half.nb2, i));
    }
    __syncwarp();
    monarch_team_rotate(team, head_dim, r.x, r.buffer);

    const uint16_t scale = monarch_record_encode_codes<bits>(team, r, head_dim);
    const uint16_t step  = half.residual ? monarch_record_encode_residual<bits>(team, r, head_dim, scale, half.negative + t*head_dim) : 0;

    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        const int32_t i = half.is_k ? monarch_quad_k(codec.page_size, t, p)*4 + p%4 : monarch_quad_v(n_pairs, t, p)*4 + t%4;

        half.codes[i] = (uint8_t) r.code[p];
    }
    if (team.i == 0) {
        memcpy(half.scales + 2*t, &scale, sizeof(scale));
        if (half.residual) {
            memcpy(half.steps + 2*t, &step, sizeof(step));
        }
    }
    __syncwarp();
}

MONARCH_DEVICE void monarch_half_encode(const monarch_codec & codec, const monarch_page_half & half, float * records, const int32_t * slots, uint8_t * dst_codes, uint8_t * dst_residual) {
    const monarch_team team = { (int32_t) threadIdx.x%MONARCH_WARP, MONARCH_WARP, true };

    const int32_t head_dim  = codec.head_dim;
    const int32_t page_size = codec.page_size;
    const int32_t mask_size = page_size/8;

    if (half.bits == 16) {
        for (int32_t i = threadIdx.x; i < page_size*head_dim; i += blockDim.x) {
            const uint16_t h = monarch_f32_to_f16(monarch_f16_clamp(monarch_ring_get(half.type, half.ring + slots[i/head_dim]*half.nb2, i%head_dim)));
            memcpy(dst_codes + 2*i, &h, sizeof(h));
        }
        return;
    }

    const int32_t        warp = threadIdx.x/MONARCH_WARP;
    const monarch_record r    = monarch_record_get(records + warp*monarch_record_floats(head_dim), head_dim);

    for (int32_t t = warp; t < page_size; t += blockDim.x/MONARCH_WARP) {
        switch (half.bits) {
            case 2: monarch_record_encode<2>(codec, half, team, r, t, slots); break;
            case 3: monarch_record_encode<3>(codec, half, team, r, t, slots); break;
            case 4: monarch_record_encode<4>(codec, half, team, r, t, slots); break;
        }
    }
    __syncthreads();

    const int32_t n_chunk = MONARCH_CHUNK*half.bits/4;
    for (int32_t i = threadIdx.x; i < page_size*head_dim*half.bits/8; i += blockDim.x) {
        dst_codes[i] = monarch_chunk_byte(half.bits, half.codes + i/n_chunk*MONARCH_CHUNK, i%n_chunk);
    }
    if (half.residual) {
        for (int32_t i = threadIdx.x; i < head_dim*mask_size; i += blockDim.x) {
            uint8_t byte = 0;
            for (int32_t j = 0; j < 8; ++j) {
                byte |= half.negative[(i%mask_size*8 + j)*head_dim + i/mask_size] << j;
            }
            dst_residual[i] = byte;
        }
    }
    __syncthreads();
}

// stats: [2][head_dim] in shared memory
MONARCH_DEVICE void monarch_half_summarize(const monarch_op_params & op, const monarch_page_half & half, const int32_t * slots, float * stats, uint8_t * group, int32_t i_page) {
    const int32_t head_dim = op.codec.head_dim;
    const int32_t n_tokens = op.codec.page_size;

    for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
        float first  = monarch_f16_clamp(monarch_ring_get(half.type, half.ring + slots[0]*half.nb2, d));
        float second = first;

        if (op.scorer == MONARCH_SCORER_MINMAX) {
            for (int32_t t = 1; t < n_tokens; ++t) {
                const float x = monarch_f16_clamp(monarch_ring_get(half.type, half.ring + slots[t]*half.nb2, d));
                first  = x < first  ? x : first;
                second = x > second ? x : second;
            }
        } else {
            first = 0.0f;
            for (int32_t t = 0; t < n_tokens; ++t) {
                first += monarch_f16_clamp(monarch_ring_get(half.type, half.ring + slots[t]*half.nb2, d));
            }
            first /= (float) n_tokens;

            second = 0.0f;
            for (int32_t t = 0; t < n_tokens; ++t) {
                const float diff = monarch_f16_clamp(monarch_ring_get(half.type, half.ring + slots[t]*half.nb2, d)) - first;
                second += diff*diff;
            }
            second = sqrtf(second/(float) n_tokens);
        }
        stats[d]            = first;
        stats[d + head_dim] = second;
    }
    __syncthreads();

    for (int32_t i_half = 0; i_half < 2; ++i_half) {
        // every thread finds the same range
        const monarch_summary_range range = monarch_summary_get_range(head_dim, stats + i_half*head_dim);

        const float offset = monarch_f16_to_f32(range.offset);
        const float step   = monarch_f16_to_f32(range.step);

        if (threadIdx.x == 0) {
            memcpy(group + monarch_summary_offset_at(i_half, i_page), &range.offset, sizeof(range.offset));
            memcpy(group + monarch_summary_step_at  (i_half, i_page), &range.step,   sizeof(range.step));
        }
        for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
            group[monarch_summary_value_at(i_half*head_dim + d, i_page)] =
                monarch_summary_quantize(stats[i_half*head_dim + d], offset, step, monarch_summary_get_rounding(op.scorer, i_half));
        }
    }
}

// grid: pages to encode, KV heads; shared: monarch_page_out_shared()
MONARCH_KERNEL monarch_encode_pages(const monarch_cuda_page_out a) {
    MONARCH_SHARED(shared);

    const monarch_codec        codec  = a.op.codec;
    const monarch_codec_layout layout = monarch_codec_get_layout(&codec);

    const int32_t head_kv = blockIdx.y;

    if ((int32_t) blockIdx.x >= a.page_outs[0]) {
        return;
    }

    const int32_t * out   = a.page_outs + 1 + blockIdx.x*(1 + codec.page_size);
    const int32_t   page  = out[0];
    const int32_t * slots = out + 1;

    uint8_t * block = a.pool + monarch_pool_offset(&codec, a.n_pages_max, head_kv, page);

    float   * stats    = shared;
    float   * records  = stats + 2*codec.head_dim;
    uint8_t * codes    = (uint8_t *) (records + blockDim.x/MONARCH_WARP*monarch_record_floats(codec.head_dim));
    uint8_t * negative = codes + codec.page_size*codec.head_dim/2;

    const monarch_page_half k = {
        a.k.data + head_kv*a.k.nb1, a.k.nb2, a.k.type, codec.bits_k, true, codec.residual_k && codec.bits_k != 16,
        codes, negative, block + layout.k_scales, block + layout.k_steps,
    };
    const monarch_page_half v = {
        a.v.data + head_kv*a.v.nb1, a.v.nb2, a.v.type, codec.bits_v, false, false,
        codes, negative, block + layout.v_scales, nullptr,
    };

    monarch_half_summarize(a.op, k, slots, stats, a.summary + monarch_summary_offset(codec.head_dim, a.n_pages_max, head_kv, page), page%MONARCH_SUMMARY_GROUP);
    monarch_half_encode(codec, k, records, slots, block + layout.k_codes, block + layout.k_residual);
    monarch_half_encode(codec, v, records, slots, block + layout.v_codes, nullptr);

    // a recycled page starts without a past
    if (threadIdx.x == 0) {
        monarch_head_state * head = monarch_state_head(a.state, a.n_pages_max, head_kv);

        monarch_head_state_count     (head, a.n_pages_max)[page] = 0;
        monarch_head_state_importance(head, a.n_pages_max)[page] = 0.0f;
    }
}

static size_t monarch_page_out_shared(const monarch_codec & codec) {
    const size_t n_floats = 2*codec.head_dim + MONARCH_THREADS/MONARCH_WARP*monarch_record_floats(codec.head_dim);
    const size_t n_values = codec.page_size*codec.head_dim;

    return n_floats*sizeof(float) + n_values/2 + (codec.residual_k ? n_values : 0);
}

//
// launches
//

// scratch that more than one block of queries may take
#ifndef MONARCH_SCRATCH_MAX
#    define MONARCH_SCRATCH_MAX (128u << 20)
#endif

static monarch_op_params monarch_cuda_get_params(const ggml_tensor * dst) {
    monarch_op_params res;
    memcpy(&res, dst->op_params, sizeof(res));
    return res;
}

static monarch_cuda_matrix monarch_cuda_get_matrix(const ggml_tensor * t, size_t nb1, size_t nb2) {
    const monarch_cuda_matrix res = { (const char *) t->data, (int32_t) t->type, nb1, nb2 };
    return res;
}

static char * monarch_cuda_take(char ** ptr, size_t size) {
    char * res = *ptr;
    *ptr += (size + 255)/256*256;
    return res;
}

// returns the end of the scratch
static char * monarch_cuda_take_scratch(monarch_cuda_attend & a, char * ptr) {
    const size_t n_groups = (size_t) a.n_blocks*a.n_head_kv;
    const size_t n_rows   = n_groups*a.n_rows;
    const size_t n_parts  = n_rows*(a.n_hot + a.n_cold);
    const size_t head_dim = a.op.codec.head_dim;

    a.q_rot       = (float   *) monarch_cuda_take(&ptr, n_rows*head_dim*sizeof(float));
    a.part_max    = (float   *) monarch_cuda_take(&ptr, n_parts*sizeof(float));
    a.part_sum    = (float   *) monarch_cuda_take(&ptr, n_parts*sizeof(float));
    a.part_acc    = (float   *) monarch_cuda_take(&ptr, n_parts*head_dim*sizeof(float));
    a.row_max     = (float   *) monarch_cuda_take(&ptr, n_rows*sizeof(float));
    a.row_inverse = (float   *) monarch_cuda_take(&ptr, n_rows*sizeof(float));
    a.row_lse     = (float   *) monarch_cuda_take(&ptr, n_rows*sizeof(float));
    a.mass        = (float   *) monarch_cuda_take(&ptr, n_rows*a.n_pages_max*sizeof(float));
    a.probability = (float   *) monarch_cuda_take(&ptr, n_groups*a.n_pages_max*sizeof(float));
    a.rank        = (float   *) monarch_cuda_take(&ptr, n_groups*a.n_pages_max*sizeof(float));
    a.chosen      = (int32_t *) monarch_cuda_take(&ptr, n_groups*a.n_pages_max*sizeof(int32_t));
    a.n_chosen    = (int32_t *) monarch_cuda_take(&ptr, n_groups*sizeof(int32_t));

    return ptr;
}

static int32_t monarch_cuda_clamp(int64_t x, int64_t lo, int64_t hi) {
    return (int32_t) (x < lo ? lo : x > hi ? hi : x);
}

// the rows that a thread block attends
static int32_t monarch_cuda_row_tile(int32_t n_rows) {
    return n_rows >= 8 ? 8 : n_rows > 2 ? 4 + 4*(n_rows > 4) : n_rows;
}

// parts and launches, from shapes alone
static monarch_cuda_attend monarch_cuda_plan(const ggml_tensor * dst, int32_t n_sm) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];

    monarch_cuda_attend a = {};

    a.op          = monarch_cuda_get_params(dst);
    a.n_head_kv   = (int32_t) k->ne[1];
    a.n_gqa       = (int32_t) (q->ne[1]/k->ne[1]);
    a.n_tokens    = (int32_t) q->ne[2];
    a.n_kv        = (int32_t) k->ne[2];
    a.n_pages_max = (int32_t) dst->src[4]->ne[1];
    a.n_block     = (int32_t) monarch_attend_block_size(a.n_gqa, a.n_tokens);
    a.n_rows      = a.n_block*a.n_gqa;

    const int32_t n_blocks = (a.n_tokens + a.n_block - 1)/a.n_block;
    const int32_t row_tile = monarch_cuda_row_tile(a.n_rows);
    const int32_t n_whole  = n_blocks*a.n_head_kv*((a.n_rows + row_tile - 1)/row_tile); // thread blocks, were nothing split
    const int32_t n_pages  = MONARCH_TILE/a.op.codec.page_size;

    // about two rounds of thread blocks for the whole device
    a.n_hot  = monarch_cuda_clamp(2*n_sm/n_whole, 1, (a.n_kv + MONARCH_TILE - 1)/MONARCH_TILE);
    a.n_cold = monarch_cuda_clamp(2*n_sm/n_whole, 1, (a.n_pages_max + n_pages - 1)/n_pages);

    a.n_blocks = 1;
    const size_t size = monarch_cuda_take_scratch(a, nullptr) - (char *) nullptr;
    a.n_blocks = monarch_cuda_clamp(MONARCH_SCRATCH_MAX/size, 1, n_blocks);

    return a;
}

static size_t monarch_cuda_attend_size(const ggml_tensor * dst, int32_t n_sm) {
    monarch_cuda_attend a = monarch_cuda_plan(dst, n_sm);

    return monarch_cuda_take_scratch(a, nullptr) - (char *) nullptr;
}

template <int ROWS>
static void monarch_cuda_launch_hot(const monarch_cuda_attend & a, int32_t n_groups, cudaStream_t stream) {
    const dim3 grid(a.n_hot, (a.n_rows + ROWS - 1)/ROWS, n_groups);

    MONARCH_LAUNCH(monarch_attend_hot<ROWS>, grid, MONARCH_THREADS, monarch_tile_size(ROWS, a.op.codec.head_dim), stream, a);
}

template <int ROWS>
static void monarch_cuda_launch_cold(const monarch_cuda_attend & a, int32_t n_groups, cudaStream_t stream) {
    const dim3 grid(a.n_cold, (a.n_rows + ROWS - 1)/ROWS, n_groups);

    MONARCH_LAUNCH(monarch_attend_cold<ROWS>, grid, MONARCH_THREADS, monarch_tile_size(ROWS, a.op.codec.head_dim), stream, a);
}

static void monarch_cuda_launch_attend(const monarch_cuda_attend & a, int32_t n_groups, bool is_hot, cudaStream_t stream) {
    switch (monarch_cuda_row_tile(a.n_rows)) {
        case 1:  is_hot ? monarch_cuda_launch_hot<1>(a, n_groups, stream) : monarch_cuda_launch_cold<1>(a, n_groups, stream); break;
        case 2:  is_hot ? monarch_cuda_launch_hot<2>(a, n_groups, stream) : monarch_cuda_launch_cold<2>(a, n_groups, stream); break;
        case 4:  is_hot ? monarch_cuda_launch_hot<4>(a, n_groups, stream) : monarch_cuda_launch_cold<4>(a, n_groups, stream); break;
        default: is_hot ? monarch_cuda_launch_hot<8>(a, n_groups, stream) : monarch_cuda_launch_cold<8>(a, n_groups, stream); break;
    }
}

static void monarch_cuda_launch_select(const monarch_cuda_attend & a, int32_t n_groups, cudaStream_t stream) {
    const int32_t head_dim = a.op.codec.head_dim;
    const int32_t n_rows   = monarch_cuda_row_tile(a.n_rows); // queries in shared memory at a time

    const dim3 rows (a.n_rows, n_groups);
    const dim3 pages((a.n_pages_max + MONARCH_THREADS - 1)/MONARCH_THREADS, n_groups);

    MONARCH_LAUNCH(monarch_score_pages,    pages,    MONARCH_THREADS,        n_rows*2*head_dim*sizeof(float),                       stream, a, n_rows);
    MONARCH_LAUNCH(monarch_estimate_rows,  rows,     MONARCH_THREADS,        MONARCH_THREADS/MONARCH_WARP*sizeof(float),            stream, a);
    MONARCH_LAUNCH(monarch_estimate_pages, pages,    MONARCH_THREADS,        0,                                                     stream, a);
    MONARCH_LAUNCH(monarch_select_pages,   n_groups, MONARCH_SELECT_THREADS, (258 + MONARCH_SELECT_THREADS)*sizeof(int32_t),        stream, a);
}

static void monarch_cuda_forward_attend(ggml_tensor * dst, int32_t n_sm, void * work, cudaStream_t stream) {
    monarch_cuda_attend a = monarch_cuda_plan(dst, n_sm);

    monarch_cuda_take_scratch(a, (char *) work);

    a.q       = monarch_cuda_get_matrix(dst->src[0], dst->src[0]->nb[1], dst->src[0]->nb[2]);
    a.k       = monarch_cuda_get_matrix(dst->src[1], dst->src[1]->nb[1], dst->src[1]->nb[2]);
    a.v       = monarch_cuda_get_matrix(dst->src[2], dst->src[2]->nb[1], dst->src[2]->nb[2]);
    a.mask    = monarch_cuda_get_matrix(dst->src[3], dst->src[3]->nb[1], 0);
    a.dst     = monarch_cuda_get_matrix(dst, dst->nb[1], dst->nb[2]);
    a.pool    = (const uint8_t *) dst->src[4]->data;
    a.summary = (const uint8_t *) dst->src[5]->data;
    a.state   = (char *)          dst->src[6]->data;
    a.table   = (const int32_t *) dst->src[7]->data;

    const int32_t head_dim     = a.op.codec.head_dim;
    const int32_t n_blocks_all = (a.n_tokens + a.n_block - 1)/a.n_block;
    const int32_t n_blocks     = a.n_blocks;

    MONARCH_LAUNCH(monarch_apply_log, a.n_head_kv, MONARCH_THREADS, 0, stream, a);

    for (a.i_block = 0; a.i_block < n_blocks_all; a.i_block += n_blocks) {
        a.n_blocks = monarch_cuda_clamp(n_blocks_all - a.i_block, 1, n_blocks);

        const int32_t n_groups = a.n_blocks*a.n_head_kv;
        const dim3    rows(a.n_rows, n_groups);

        MONARCH_LAUNCH(monarch_rotate_queries, rows, MONARCH_THREADS, 2*head_dim*sizeof(float), stream, a);
        monarch_cuda_launch_attend(a, n_groups, true, stream);
        monarch_cuda_launch_select(a, n_groups, stream);
        monarch_cuda_launch_attend(a, n_groups, false, stream);
        MONARCH_LAUNCH(monarch_attend_merge, rows, MONARCH_THREADS, 3*head_dim*sizeof(float), stream, a);
    }

    a.i_block -= n_blocks; // the last launch
    MONARCH_LAUNCH(monarch_write_log, a.n_head_kv, MONARCH_SELECT_THREADS, MONARCH_SELECT_THREADS*sizeof(int32_t), stream, a);
}

static void monarch_cuda_forward_page_out(ggml_tensor * dst, cudaStream_t stream) {
    const ggml_tensor * k         = dst->src[1];
    const ggml_tensor * v         = dst->src[2];
    const ggml_tensor * page_outs = dst->src[5];

    monarch_cuda_page_out a = {};

    a.op          = monarch_cuda_get_params(dst);
    a.k           = monarch_cuda_get_matrix(k, k->nb[1], k->nb[2]);
    a.v           = monarch_cuda_get_matrix(v, v->nb[1], v->nb[2]);
    a.pool        = (uint8_t *)       dst->src[0]->data;
    a.summary     = (uint8_t *)       dst->src[3]->data;
    a.state       = (char *)          dst->src[4]->data;
    a.page_outs   = (const int32_t *) page_outs->data;
    a.n_head_kv   = (int32_t) k->ne[1];
    a.n_pages_max = (int32_t) dst->src[0]->ne[1];
    a.n_outs_max  = (int32_t) ((page_outs->ne[0] - 1)/(1 + a.op.codec.page_size));

    const dim3 grid(a.n_outs_max, a.n_head_kv);

    MONARCH_LAUNCH(monarch_encode_pages, grid, MONARCH_THREADS, monarch_page_out_shared(a.op.codec), stream, a);
}

//
// what is supported
//

static bool monarch_cuda_type_is_supported(const ggml_tensor * t) {
    return (t->type == GGML_TYPE_F16 && t->nb[0] == 2) || (t->type == GGML_TYPE_F32 && t->nb[0] == 4);
}

static bool monarch_cuda_bits_are_supported(int32_t bits) {
    return bits == 2 || bits == 3 || bits == 4 || bits == 16;
}

static bool monarch_cuda_codec_is_supported(const monarch_codec & codec) {
    return codec.head_dim > 0 && codec.head_dim <= MONARCH_MAX_HEAD_DIM && codec.head_dim%16 == 0 &&
        (codec.page_size == 8 || codec.page_size == 16 || codec.page_size == 32) &&
        monarch_cuda_bits_are_supported(codec.bits_k) && monarch_cuda_bits_are_supported(codec.bits_v);
}
