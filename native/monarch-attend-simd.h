#pragma once

// The kernel for vectors of 16 or 32 bytes. monarch-attend-avx2.cpp and monarch-attend-neon.cpp include it after they have
// defined the vectors and what can be done with them:
//
//   MONARCH_LANES    32-bit lanes of a vector
//   monarch_f32      [MONARCH_LANES]    load, load_f16, store, set1, add, sub, mul, fma (a*b + c), max, floor,
//                                       scale (a*2^b for whole b), sum, top (the greatest), transpose (MONARCH_LANES vectors)
//   monarch_i32      [MONARCH_LANES]    set1, to_f32
//   monarch_i8       [4*MONARCH_LANES]  load, set1, set4 (four bytes to every lane), or, xor, negate (where the bit of the code is set),
//                                       low, high (the nibble of each byte),
//                                       bits (of 64 packed pairs of bits, those of the quarters that start at i_quarter),
//                                       table (16 bytes), lookup (of indices in a table), select (bit of the code set ? a : b), add
//   monarch_i16      [2*MONARCH_LANES]  set1, add, even, odd (unsigned bytes of a monarch_i8), to_f32 (of each pair the first or the second)
//   monarch_dot      c + products of four neighbours: a of -128 to 127, b of -127 to 127
//   monarch_dot_u7   the same for a of 0 to 127, which some processors do faster
//   monarch_round    MONARCH_TILE floats to bytes
//
// Cold pages are attended as 8-bit integers: a code is looked up as the int8 point that it stands for, which is exact; queries
// and softmax weights are rounded to 8 and 7 bits, which costs far less than the codec does. The hot window stays in f32
// arithmetic.

#include "monarch-attend.h"
#include "monarch-attend-quant.h"
#include "monarch-convert.h"
#include "monarch-exp2.h"
#include "monarch-summary-math.h"

#include "ggml.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// tokens, or pages to score, at a time
#define MONARCH_TILE    16
#define MONARCH_VECTORS (MONARCH_TILE/MONARCH_LANES)

// rows that share one load
#define MONARCH_ROWS 4

#define MONARCH_MIN(a, b) ((a) < (b) ? (a) : (b))

// of what two 2-bit values add to a score: the sum of eight tables, over MONARCH_TABLE_BYTES of codes, fits into a byte, though
// each may have been rounded up by a half
#define MONARCH_TABLE_SIZE  16
#define MONARCH_TABLE_BYTES 4
#define MONARCH_TABLES_MAX  251.0f

struct monarch_simd_work {
    int8_t * q;       // [n_rows][head_dim] quantised queries, in the order of the K codes; summary weights while scoring
    float  * q_scale; // [n_rows]
    float  * mask;    // [n_rows][MONARCH_TILE] of each token's first row
    float  * logits;  // [n_rows][MONARCH_TILE]; then the weights of hot tokens
    float  * top;     // [n_rows] the greatest logit of the tile
    float  * factor;  // [n_rows] from the scale of top to that of the row's maximum; then times the unit of the weights
    int8_t * w;       // [n_rows][MONARCH_TILE] quantised weights of cold tokens
    float  * k_rows;  // [MONARCH_TILE][head_dim] hot K
    float  * k;       // [head_dim][MONARCH_TILE]
    float  * v;       // [MONARCH_TILE][head_dim]
    int8_t * tables;  // [MONARCH_ROWS][head_dim/2][MONARCH_TABLE_SIZE] of summary weights
    float  * scores;  // [MONARCH_ROWS][n_pages_max] by physical page
    float  * log_n;   // [n_pages_max] logarithm of a page's tokens
    uint8_t * used;   // [n_pages_max/16] groups of summaries to be scored
};

// with base == NULL only the size counts
static size_t monarch_simd_work_init(struct monarch_simd_work * simd, char * base, int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    char * ptr = base;

    const int64_t n_q    = n_rows > 2*MONARCH_ROWS ? n_rows : 2*MONARCH_ROWS;
    const size_t  f_rows = (n_rows + MONARCH_LANES)*sizeof(float);
    const size_t  f_tile = MONARCH_TILE*sizeof(float);

    simd->q       = (int8_t *) monarch_work_take(&ptr, n_q*head_dim);
    simd->q_scale = (float  *) monarch_work_take(&ptr, f_rows);
    simd->mask    = (float  *) monarch_work_take(&ptr, n_rows*f_tile);
    simd->logits  = (float  *) monarch_work_take(&ptr, n_rows*f_tile);
    simd->top     = (float  *) monarch_work_take(&ptr, f_rows);
    simd->factor  = (float  *) monarch_work_take(&ptr, f_rows);
    simd->w       = (int8_t *) monarch_work_take(&ptr, n_rows*MONARCH_TILE);
    simd->k_rows  = (float  *) monarch_work_take(&ptr, head_dim*f_tile);
    simd->k       = (float  *) monarch_work_take(&ptr, head_dim*f_tile);
    simd->v       = (float  *) monarch_work_take(&ptr, head_dim*f_tile);
    simd->tables  = (int8_t *) monarch_work_take(&ptr, MONARCH_ROWS*head_dim/2*MONARCH_TABLE_SIZE);
    simd->scores  = (float  *) monarch_work_take(&ptr, MONARCH_ROWS*n_pages_max*sizeof(float));
    simd->log_n   = (float  *) monarch_work_take(&ptr, n_pages_max*sizeof(float));
    simd->used    = (uint8_t *) monarch_work_take(&ptr, n_pages_max/MONARCH_SUMMARY_GROUP);

    return ptr - base;
}

static size_t monarch_simd_work_size(int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    struct monarch_simd_work simd;
    return monarch_simd_work_init(&simd, NULL, head_dim, n_rows, n_pages_max);
}

static struct monarch_simd_work monarch_simd_work_get(const struct monarch_attend * attend, const struct monarch_work * work) {
    struct monarch_simd_work res;
    monarch_simd_work_init(&res, (char *) work->kernel, attend->op.codec.head_dim, monarch_attend_count_rows(attend), attend->n_pages_max);
    return res;
}

// what the kernel can do, if the processor can
static bool monarch_simd_supports_cold(const struct monarch_op_params * op) {
    return op->codec.page_size >= MONARCH_TILE && op->codec.bits_k <= 4 && op->codec.bits_v <= 4 && !op->codec.residual_k;
}

// e^x for x <= 0, relative error below 1e-6; what is less than 2^-100 becomes that, lest products be subnormal
static inline monarch_f32 monarch_exp(monarch_f32 x) {
    const monarch_f32 y = monarch_f32_max(monarch_f32_mul(x, monarch_f32_set1(MONARCH_LOG2_E)), monarch_f32_set1(-100.0f));
    const monarch_f32 n = monarch_f32_floor(y);
    const monarch_f32 r = monarch_f32_sub(y, n);

    monarch_f32 p = monarch_f32_set1(MONARCH_EXP2_5);
    p = monarch_f32_fma(p, r, monarch_f32_set1(MONARCH_EXP2_4));
    p = monarch_f32_fma(p, r, monarch_f32_set1(MONARCH_EXP2_3));
    p = monarch_f32_fma(p, r, monarch_f32_set1(MONARCH_EXP2_2));
    p = monarch_f32_fma(p, r, monarch_f32_set1(MONARCH_EXP2_1));
    p = monarch_f32_fma(p, r, monarch_f32_set1(MONARCH_EXP2_0));

    return monarch_f32_scale(p, n);
}

static inline float monarch_tile_top(const float * x) {
    monarch_f32 res = monarch_f32_load(x);
    for (int i = 1; i < MONARCH_VECTORS; ++i) {
        res = monarch_f32_max(res, monarch_f32_load(x + i*MONARCH_LANES));
    }
    return monarch_f32_top(res);
}

//
// hot window
//

// one head of n <= MONARCH_TILE ring slots as f32; what is missing is zero
static void monarch_hot_read(const struct ggml_tensor * t, int64_t head_kv, int64_t i0, int64_t n, int64_t head_dim, float * dst) {
    for (int64_t i = 0; i < n; ++i) {
        const char * src = (const char *) t->data + head_kv*t->nb[1] + (i0 + i)*t->nb[2];

        // a head's part of a slot is far from the next slot's: the processor does not guess it
        __builtin_prefetch(src + MONARCH_TILE*t->nb[2]);

        if (t->type != GGML_TYPE_F16) {
            monarch_convert_to_f32(t->type, src, dst + i*head_dim, head_dim);
            continue;
        }
        for (int64_t d = 0; d < head_dim; d += MONARCH_LANES) {
            monarch_f32_store(dst + i*head_dim + d, monarch_f32_load_f16(src + d*sizeof(ggml_fp16_t)));
        }
    }
    memset(dst + n*head_dim, 0, (MONARCH_TILE - n)*head_dim*sizeof(float));
}

// visible: the slots that some row sees; what lies in the others may be no number, and counts as zero
static void monarch_hot_load(const struct monarch_attend * attend, int64_t head_kv, int64_t i0, int64_t n, uint32_t visible, struct monarch_simd_work * simd) {
    const int64_t head_dim = attend->op.codec.head_dim;

    monarch_hot_read(attend->k, head_kv, i0, n, head_dim, simd->k_rows);
    monarch_hot_read(attend->v, head_kv, i0, n, head_dim, simd->v);

    for (int64_t i = 0; i < n; ++i) {
        if (!(visible >> i & 1)) {
            memset(simd->k_rows + i*head_dim, 0, head_dim*sizeof(float));
            memset(simd->v      + i*head_dim, 0, head_dim*sizeof(float));
        }
    }

    for (int64_t i = 0; i < MONARCH_TILE; i += MONARCH_LANES) {
        for (int64_t d = 0; d < head_dim; d += MONARCH_LANES) {
            monarch_f32 x[MONARCH_LANES];

            for (int j = 0; j < MONARCH_LANES; ++j) {
                x[j] = monarch_f32_load(simd->k_rows + (i + j)*head_dim + d);
            }
            monarch_f32_transpose(x);
            for (int j = 0; j < MONARCH_LANES; ++j) {
                monarch_f32_store(simd->k + (d + j)*MONARCH_TILE + i, x[j]);
            }
        }
    }
}

static void monarch_mask_read(const struct ggml_tensor * mask, int64_t i_token, int64_t i0, int64_t n, float * dst) {
    const char * src = (const char *) mask->data + i_token*mask->nb[1] + i0*mask->nb[0];

    if (mask->type == GGML_TYPE_F16) {
        ggml_fp16_t tile[MONARCH_TILE] = { 0 };

        memcpy(tile, src, n*sizeof(ggml_fp16_t));
        for (int i = 0; i < MONARCH_TILE; i += MONARCH_LANES) {
            monarch_f32_store(dst + i, monarch_f32_load_f16(tile + i));
        }
    } else {
        memcpy(dst, src, n*sizeof(float));
    }
    for (int64_t i = n; i < MONARCH_TILE; ++i) {
        dst[i] = -INFINITY;
    }
}

static inline uint32_t monarch_mask_get_visible(const float * mask, int64_t n) {
    uint32_t res = 0;
    for (int64_t i = 0; i < n; ++i) {
        res |= (uint32_t) (mask[i] > -INFINITY) << i;
    }
    return res;
}

// the mask of each token; returns the slots of the tile that some token sees
static uint32_t monarch_hot_read_mask(const struct monarch_attend * attend, const struct monarch_work * work, int64_t i0, int64_t n, struct monarch_simd_work * simd) {
    uint32_t visible = 0;
    for (int64_t ir = 0; ir < work->n_rows; ir += attend->n_gqa) {
        float * mask = simd->mask + ir*MONARCH_TILE;

        monarch_mask_read(attend->mask, work->rows[ir].i_token, i0, n, mask);
        visible |= monarch_mask_get_visible(mask, n);
    }
    return visible;
}

template <int R>
static inline void monarch_hot_dot(const struct monarch_attend * attend, const struct monarch_row * rows, int64_t ir, struct monarch_simd_work * simd) {
    const int64_t head_dim = attend->op.codec.head_dim;

    monarch_f32 acc[R][MONARCH_VECTORS];
    for (int r = 0; r < R; ++r) {
        for (int i = 0; i < MONARCH_VECTORS; ++i) {
            acc[r][i] = monarch_f32_set1(0.0f);
        }
    }

    for (int64_t d = 0; d < head_dim; ++d) {
        for (int r = 0; r < R; ++r) {
            const monarch_f32 q = monarch_f32_set1(rows[ir + r].q[d]);
            for (int i = 0; i < MONARCH_VECTORS; ++i) {
                acc[r][i] = monarch_f32_fma(monarch_f32_load(simd->k + d*MONARCH_TILE + i*MONARCH_LANES), q, acc[r][i]);
            }
        }
    }

    for (int r = 0; r < R; ++r) {
        const float * mask = simd->mask + (ir + r)/attend->n_gqa*attend->n_gqa*MONARCH_TILE;

        for (int i = 0; i < MONARCH_VECTORS; ++i) {
            monarch_f32_store(simd->logits + (ir + r)*MONARCH_TILE + i*MONARCH_LANES,
                    monarch_f32_fma(acc[r][i], monarch_f32_set1(attend->op.kq_scale), monarch_f32_load(mask + i*MONARCH_LANES)));
        }
    }
}

// logits to softmax weights
static inline void monarch_hot_weigh(struct monarch_row * row, int64_t head_dim, float * logits) {
    const float top = monarch_tile_top(logits);

    if (top == -INFINITY) {
        memset(logits, 0, MONARCH_TILE*sizeof(float));
        return;
    }
    if (top > row->max) {
        monarch_row_set_max(row, head_dim, top);
    }

    monarch_f32 sum = monarch_f32_set1(0.0f);
    for (int i = 0; i < MONARCH_TILE; i += MONARCH_LANES) {
        const monarch_f32 weights = monarch_exp(monarch_f32_sub(monarch_f32_load(logits + i), monarch_f32_set1(row->max)));

        monarch_f32_store(logits + i, weights);
        sum = monarch_f32_add(sum, weights);
    }
    row->sum += monarch_f32_sum(sum);
}

template <int R>
static inline void monarch_hot_add(int64_t head_dim, struct monarch_row * rows, int64_t ir, const struct monarch_simd_work * simd) {
    for (int64_t d = 0; d < head_dim; d += 2*MONARCH_LANES) {
        monarch_f32 lo[R];
        monarch_f32 hi[R];
        for (int r = 0; r < R; ++r) {
            lo[r] = monarch_f32_load(rows[ir + r].hot + d);
            hi[r] = monarch_f32_load(rows[ir + r].hot + d + MONARCH_LANES);
        }
        for (int64_t i = 0; i < MONARCH_TILE; ++i) {
            const monarch_f32 v_lo = monarch_f32_load(simd->v + i*head_dim + d);
            const monarch_f32 v_hi = monarch_f32_load(simd->v + i*head_dim + d + MONARCH_LANES);
            for (int r = 0; r < R; ++r) {
                const monarch_f32 w = monarch_f32_set1(simd->logits[(ir + r)*MONARCH_TILE + i]);
                lo[r] = monarch_f32_fma(v_lo, w, lo[r]);
                hi[r] = monarch_f32_fma(v_hi, w, hi[r]);
            }
        }
        for (int r = 0; r < R; ++r) {
            monarch_f32_store(rows[ir + r].hot + d,                 lo[r]);
            monarch_f32_store(rows[ir + r].hot + d + MONARCH_LANES, hi[r]);
        }
    }
}

template <int R>
static inline void monarch_hot_rows(const struct monarch_attend * attend, struct monarch_row * rows, int64_t ir, struct monarch_simd_work * simd) {
    const int64_t head_dim = attend->op.codec.head_dim;

    monarch_hot_dot<R>(attend, rows, ir, simd);
    for (int r = 0; r < R; ++r) {
        monarch_hot_weigh(&rows[ir + r], head_dim, simd->logits + (ir + r)*MONARCH_TILE);
    }
    monarch_hot_add<R>(head_dim, rows, ir, simd);
}

static void monarch_simd_hot(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work, int64_t slot0, int64_t slot1) {
    struct monarch_simd_work simd = monarch_simd_work_get(attend, work);

    for (int64_t i0 = slot0; i0 < slot1; i0 += MONARCH_TILE) {
        const int64_t n = MONARCH_MIN(MONARCH_TILE, slot1 - i0);

        const uint32_t visible = monarch_hot_read_mask(attend, work, i0, n, &simd);
        if (visible == 0) {
            continue;
        }

        monarch_hot_load(attend, head_kv, i0, n, visible, &simd);

        int64_t ir = 0;
        for (; ir + MONARCH_ROWS <= work->n_rows; ir += MONARCH_ROWS) {
            monarch_hot_rows<MONARCH_ROWS>(attend, work->rows, ir, &simd);
        }
        for (; ir < work->n_rows; ++ir) {
            monarch_hot_rows<1>(attend, work->rows, ir, &simd);
        }
    }
}

//
// codes to points
//

// vector i of the codes, as bytes
static inline monarch_i8 monarch_codes_load(int32_t bits, const uint8_t * src, int64_t i) {
    if (bits == 4) {
        return monarch_i8_load(src + i*4*MONARCH_LANES);
    }

    // 64 codes lie together
    const uint8_t * chunk = src + i/MONARCH_VECTORS*16*bits;
    const int64_t   first = i%MONARCH_VECTORS*4*MONARCH_LANES;

    const monarch_i8 packed = monarch_i8_load(chunk + first%32);
    const monarch_i8 low    = first < 32 ? monarch_i8_low(packed) : monarch_i8_high(packed);

    return bits == 2 ? low : monarch_i8_or(low, monarch_i8_bits(chunk + 32, (int) first/16));
}

// The points of all codes, in tables of 16.
//
// Up to 3 bits: x, then y, by the low nibble of the code; its bits 4 and 5 choose among four tables.
// 4 bits: |x| of the angles 0 to 3, then 4 to 7, by ring, the high nibble; bits 0 and 1 choose among four tables. The rest is
// symmetry: x is negative from angle 4 to 11, and y is the x of four angles, a quarter turn, before.
struct monarch_simd_lookup {
    monarch_i8 tables[8];
    int32_t    bits;
};

static struct monarch_simd_lookup monarch_lookup_init(int32_t bits) {
    const struct monarch_codec_points * points = monarch_codec_get_points(bits);

    struct monarch_simd_lookup res;
    res.bits = bits;

    for (int i = 0; i < 8; ++i) {
        int8_t table[16];
        for (int j = 0; j < 16; ++j) {
            table[j] = bits == 4 ? abs(points->x[16*j + i]) : i < 4 ? points->x[16*i + j] : points->y[16*(i - 4) + j];
        }
        res.tables[i] = monarch_i8_table(table);
    }
    return res;
}

// bits i_bit and i_bit + 1 of the codes choose the table
static inline monarch_i8 monarch_lookup_choose(const monarch_i8 * tables, monarch_i8 index, monarch_i8 codes, int i_bit) {
    const monarch_i8 x0 = monarch_i8_select(codes, i_bit, monarch_i8_lookup(tables[1], index), monarch_i8_lookup(tables[0], index));
    const monarch_i8 x1 = monarch_i8_select(codes, i_bit, monarch_i8_lookup(tables[3], index), monarch_i8_lookup(tables[2], index));

    return monarch_i8_select(codes, i_bit + 1, x1, x0);
}

static inline void monarch_lookup_get(const struct monarch_simd_lookup * lookup, monarch_i8 codes, monarch_i8 * x, monarch_i8 * y) {
    if (lookup->bits < 4) {
        const monarch_i8 index = monarch_i8_low(codes);

        *x = monarch_lookup_choose(lookup->tables,     index, codes, 4);
        *y = monarch_lookup_choose(lookup->tables + 4, index, codes, 4);
        return;
    }

    const monarch_i8 ring   = monarch_i8_high(codes);
    const monarch_i8 first  = monarch_lookup_choose(lookup->tables,     ring, codes, 0);
    const monarch_i8 second = monarch_lookup_choose(lookup->tables + 4, ring, codes, 0);

    *x = monarch_i8_negate(codes, 3, monarch_i8_negate(codes, 2, monarch_i8_select(codes, 2, second, first)));
    *y = monarch_i8_negate(codes, 3, monarch_i8_select(codes, 2, first, second));
}

//
// cold pages
//

static inline monarch_i8 monarch_set4(const int8_t * src) {
    int32_t res;
    memcpy(&res, src, sizeof(res));
    return monarch_i8_set4(res);
}

// acc: [R], adds the products of a vector of each x: [n][MONARCH_VECTORS] and of R rows of q: [n][4]
template <int R>
static inline void monarch_dot_rows(int64_t n, const monarch_i8 * x, const int8_t * q, int64_t stride, monarch_i32 * acc) {
    for (int64_t j = 0; j < n; ++j) {
        for (int r = 0; r < R; ++r) {
            acc[r] = monarch_dot(acc[r], x[j*MONARCH_VECTORS], monarch_set4(q + r*stride + 4*j));
        }
    }
}

// 16 tokens of a chosen page
struct monarch_simd_tile {
    const struct monarch_codec * codec;
    struct monarch_codec_layout  layout;
    struct monarch_simd_lookup   k, v;
    const uint8_t              * block;
    int32_t                      ic;   // of the page among the chosen
    int32_t                      t0;   // first token
    uint32_t                     mask; // tokens that count
};

static void monarch_cold_quantize(const struct monarch_attend * attend, const struct monarch_work * work, struct monarch_simd_work * simd) {
    const int64_t head_dim = attend->op.codec.head_dim;

    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        const float max = monarch_int8_quantize_query(head_dim, work->rows[ir].q_rot, simd->q + ir*head_dim);

        simd->q_scale[ir] = attend->op.kq_scale*max/127.0f;
    }
}

template <int R>
static inline void monarch_cold_dot(int64_t head_dim, const monarch_i8 * k, const monarch_f32 * k_scales, int64_t ir, struct monarch_simd_work * simd) {
    for (int i = 0; i < MONARCH_VECTORS; ++i) {
        monarch_i32 acc[R];
        for (int r = 0; r < R; ++r) {
            acc[r] = monarch_i32_set1(0);
        }

        monarch_dot_rows<R>(head_dim/4, k + i, simd->q + ir*head_dim, head_dim, acc);

        for (int r = 0; r < R; ++r) {
            const monarch_f32 scale = monarch_f32_mul(monarch_f32_set1(simd->q_scale[ir + r]), k_scales[i]);

            monarch_f32_store(simd->logits + (ir + r)*MONARCH_TILE + i*MONARCH_LANES, monarch_f32_mul(monarch_i32_to_f32(acc[r]), scale));
        }
    }
}

static void monarch_cold_mask(uint32_t mask, int64_t n_rows, float * logits) {
    for (int64_t i = 0; i < MONARCH_TILE; ++i) {
        for (int64_t ir = 0; ir < n_rows && !(mask >> i & 1); ++ir) {
            logits[ir*MONARCH_TILE + i] = -INFINITY;
        }
    }
}

static void monarch_cold_get_logits(const struct monarch_simd_tile * tile, const struct monarch_work * work, struct monarch_simd_work * simd) {
    const int64_t head_dim = tile->codec->head_dim;

    monarch_i8 k[MONARCH_MAX_HEAD_DIM/4*MONARCH_VECTORS]; // [quads of pairs][x and y][MONARCH_VECTORS]

    for (int64_t j = 0; j < head_dim/8; ++j) {
        const int64_t first = (j*tile->codec->page_size + tile->t0)/MONARCH_LANES;

        for (int i = 0; i < MONARCH_VECTORS; ++i) {
            const monarch_i8 codes = monarch_codes_load(tile->k.bits, tile->block + tile->layout.k_codes, first + i);

            monarch_lookup_get(&tile->k, codes, &k[2*j*MONARCH_VECTORS + i], &k[(2*j + 1)*MONARCH_VECTORS + i]);
        }
    }

    monarch_f32 scales[MONARCH_VECTORS];
    for (int i = 0; i < MONARCH_VECTORS; ++i) {
        scales[i] = monarch_f32_load_f16(tile->block + tile->layout.k_scales + 2*(tile->t0 + i*MONARCH_LANES));
    }

    int64_t ir = 0;
    for (; ir + MONARCH_ROWS <= work->n_rows; ir += MONARCH_ROWS) {
        monarch_cold_dot<MONARCH_ROWS>(head_dim, k, scales, ir, simd);
    }
    for (; ir < work->n_rows; ++ir) {
        monarch_cold_dot<1>(head_dim, k, scales, ir, simd);
    }

    if (tile->mask != 0xffff) {
        monarch_cold_mask(tile->mask, work->n_rows, simd->logits);
    }
}

// rows move to the tile's greatest logits where those are greater
static void monarch_cold_get_factors(int64_t head_dim, struct monarch_work * work, struct monarch_simd_work * simd) {
    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        struct monarch_row * row = &work->rows[ir];

        const float top = monarch_tile_top(simd->logits + ir*MONARCH_TILE);
        if (top > row->max) {
            monarch_row_set_max(row, head_dim, top);
        }
        simd->top   [ir] = top;
        simd->factor[ir] = top - row->max;
    }
    for (int64_t ir = 0; ir < work->n_rows; ir += MONARCH_LANES) {
        monarch_f32_store(simd->factor + ir, monarch_exp(monarch_f32_load(simd->factor + ir)));
    }
}

// softmax weights times the scales of V, as 7 bits relative to the greatest of a row, to which its factor moves
static void monarch_cold_weigh(const struct monarch_simd_tile * tile, const monarch_f32 * v_scales, struct monarch_work * work, struct monarch_simd_work * simd) {
    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        struct monarch_row * row = &work->rows[ir];

        const monarch_f32 top = monarch_f32_set1(simd->top[ir]);

        monarch_f32 scaled[MONARCH_VECTORS];
        monarch_f32 sum      = monarch_f32_set1(0.0f);
        monarch_f32 greatest = monarch_f32_set1(1e-30f);

        for (int i = 0; i < MONARCH_VECTORS; ++i) {
            const monarch_f32 weights = monarch_exp(monarch_f32_sub(monarch_f32_load(simd->logits + ir*MONARCH_TILE + i*MONARCH_LANES), top));

            scaled[i] = monarch_f32_mul(weights, v_scales[i]);
            sum       = monarch_f32_add(sum, weights);
            greatest  = monarch_f32_max(greatest, scaled[i]);
        }

        const float unit = monarch_f32_top(greatest)/127.0f;

        for (int i = 0; i < MONARCH_VECTORS; ++i) {
            scaled[i] = monarch_f32_mul(scaled[i], monarch_f32_set1(1.0f/unit));
        }
        monarch_round(scaled, simd->w + ir*MONARCH_TILE);

        const float mass = simd->factor[ir]*monarch_f32_sum(sum);

        simd->factor[ir] *= unit;

        row->sum += mass;
        if (tile->ic < row->n_mass) {
            row->mass[tile->ic] += mass;
        }
    }
}

// adds the tile's V, MONARCH_LANES pairs of coordinates at a time
static void monarch_cold_add(const struct monarch_simd_tile * tile, struct monarch_work * work, const struct monarch_simd_work * simd) {
    const int64_t head_dim = tile->codec->head_dim;
    const int64_t n_chunks = head_dim/2/MONARCH_LANES;

    for (int64_t c = 0; c < n_chunks; ++c) {
        monarch_i8 v_x[MONARCH_TILE/4];
        monarch_i8 v_y[MONARCH_TILE/4];

        for (int i = 0; i < MONARCH_TILE/4; ++i) {
            const monarch_i8 codes = monarch_codes_load(tile->v.bits, tile->block + tile->layout.v_codes, (tile->t0/4 + i)*n_chunks + c);

            monarch_lookup_get(&tile->v, codes, &v_x[i], &v_y[i]);
        }

        for (int64_t ir = 0; ir < work->n_rows; ++ir) {
            monarch_i32 x = monarch_i32_set1(0);
            monarch_i32 y = monarch_i32_set1(0);

            for (int i = 0; i < MONARCH_TILE/4; ++i) {
                const monarch_i8 w = monarch_set4(simd->w + ir*MONARCH_TILE + 4*i);
                x = monarch_dot_u7(x, w, v_x[i]);
                y = monarch_dot_u7(y, w, v_y[i]);
            }

            const monarch_f32 scale = monarch_f32_set1(simd->factor[ir]);

            float * dst_x = work->rows[ir].cold + c*MONARCH_LANES;
            float * dst_y = dst_x + head_dim/2;

            monarch_f32_store(dst_x, monarch_f32_fma(monarch_i32_to_f32(x), scale, monarch_f32_load(dst_x)));
            monarch_f32_store(dst_y, monarch_f32_fma(monarch_i32_to_f32(y), scale, monarch_f32_load(dst_y)));
        }
    }
}

static void monarch_cold_attend(const struct monarch_simd_tile * tile, struct monarch_work * work, struct monarch_simd_work * simd) {
    monarch_f32 v_scales[MONARCH_VECTORS];
    for (int i = 0; i < MONARCH_VECTORS; ++i) {
        v_scales[i] = monarch_f32_load_f16(tile->block + tile->layout.v_scales + 2*(tile->t0 + i*MONARCH_LANES));
    }

    monarch_cold_get_logits (tile, work, simd);
    monarch_cold_get_factors(tile->codec->head_dim, work, simd);
    monarch_cold_weigh      (tile, v_scales, work, simd);
    monarch_cold_add        (tile, work, simd);
}

// chosen pages lie anywhere: ask for them this many pages ahead
#define MONARCH_PREFETCH 2

static inline void monarch_cold_prefetch(const uint8_t * block, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) {
        __builtin_prefetch(block + i);
    }
}

static void monarch_simd_cold(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work) {
    const struct monarch_codec * codec = &attend->op.codec;

    if (work->n_chosen == 0) {
        return;
    }

    struct monarch_simd_work simd = monarch_simd_work_get(attend, work);

    struct monarch_simd_tile tile;
    tile.codec  = codec;
    tile.layout = monarch_codec_get_layout(codec);
    tile.k      = monarch_lookup_init(codec->bits_k);
    tile.v      = monarch_lookup_init(codec->bits_v);

    monarch_cold_quantize(attend, work, &simd);

    for (tile.ic = 0; tile.ic < work->n_chosen; ++tile.ic) {
        const struct monarch_table_entry * entry = &attend->table[work->chosen[tile.ic]];

        tile.block = attend->pool + monarch_pool_offset(codec, attend->n_pages_max, head_kv, entry->page);

        if (tile.ic + MONARCH_PREFETCH < work->n_chosen) {
            const int64_t page = attend->table[work->chosen[tile.ic + MONARCH_PREFETCH]].page;

            monarch_cold_prefetch(attend->pool + monarch_pool_offset(codec, attend->n_pages_max, head_kv, page), monarch_codec_block_size(codec));
        }

        for (tile.t0 = 0; tile.t0 < codec->page_size; tile.t0 += MONARCH_TILE) {
            tile.mask = entry->mask >> tile.t0 & 0xffff;
            if (tile.mask) {
                monarch_cold_attend(&tile, work, &simd);
            }
        }
    }
}

//
// scores
//

// of the rows that are scored together
struct monarch_simd_query {
    const int8_t * w;                      // [MONARCH_ROWS][2*head_dim] weights of both halves
    const int8_t * tables;                 // [MONARCH_ROWS][head_dim/2][MONARCH_TABLE_SIZE] of parts
    float          scale[MONARCH_ROWS][2]; // of w, or of the tables
    float          sum  [MONARCH_ROWS][2]; // of the weights, or what the tables lack
    int32_t        bias [MONARCH_ROWS][2]; // what taking 128 from the values takes from the dot product
};

static void monarch_score_quantize(const struct monarch_attend * attend, const struct monarch_row * row, int8_t * dst, float * scale, float * sum, int32_t * bias) {
    const int32_t head_dim = attend->op.codec.head_dim;

    monarch_int8_quantize_weights(attend->op.scorer, head_dim, row->q, dst, scale, sum);

    for (int half = 0; half < 2; ++half) {
        bias[half] = 128*monarch_int8_sum(head_dim, dst + half*head_dim);
    }
}

// scores of 16 pages for MONARCH_ROWS rows
static void monarch_score_group(const struct monarch_attend * attend, const uint8_t * group, const struct monarch_simd_query * query, float * dst, int64_t stride) {
    const int64_t head_dim = attend->op.codec.head_dim;

    monarch_i8 x[2][MONARCH_MAX_HEAD_DIM/4*MONARCH_VECTORS];
    for (int half = 0; half < 2; ++half) {
        const uint8_t * values = group + monarch_summary_value_at(half*head_dim, 0);

        for (int64_t i = 0; i < head_dim/4*MONARCH_VECTORS; ++i) {
            x[half][i] = monarch_i8_xor(monarch_i8_load(values + i*4*MONARCH_LANES), monarch_i8_set1(-128));
        }
    }

    for (int i = 0; i < MONARCH_VECTORS; ++i) {
        monarch_f32 score[MONARCH_ROWS];
        for (int r = 0; r < MONARCH_ROWS; ++r) {
            score[r] = monarch_f32_set1(0.0f);
        }

        for (int half = 0; half < 2; ++half) {
            monarch_i32 acc[MONARCH_ROWS];
            for (int r = 0; r < MONARCH_ROWS; ++r) {
                acc[r] = monarch_i32_set1(query->bias[r][half]);
            }

            monarch_dot_rows<MONARCH_ROWS>(head_dim/4, x[half] + i, query->w + half*head_dim, 2*head_dim, acc);

            const monarch_f32 offset = monarch_f32_load_f16(group + monarch_summary_offset_at(half, i*MONARCH_LANES));
            const monarch_f32 step   = monarch_f32_load_f16(group + monarch_summary_step_at  (half, i*MONARCH_LANES));

            for (int r = 0; r < MONARCH_ROWS; ++r) {
                const monarch_f32 product = monarch_f32_mul(monarch_i32_to_f32(acc[r]), monarch_f32_set1(query->scale[r][half]));

                score[r] = monarch_f32_fma(product, step,   score[r]);
                score[r] = monarch_f32_fma(offset, monarch_f32_set1(query->sum[r][half]), score[r]);
            }
        }

        for (int r = 0; r < MONARCH_ROWS; ++r) {
            monarch_f32_store(dst + r*stride + i*MONARCH_LANES, monarch_f32_mul(score[r], monarch_f32_set1(attend->op.kq_scale)));
        }
    }
}

//
// scores of parts: what the 2-bit values of two dimensions add to a row's score is looked up in a table of 16
//

// w: of the two dimensions, in steps
static void monarch_table_fill(const float * w, int8_t * table) {
    const float least = 1.5f*(w[0] - fabsf(w[0]) + w[1] - fabsf(w[1]));

    for (int32_t i = 0; i < MONARCH_TABLE_SIZE; ++i) {
        table[i] = (int8_t) (uint8_t) (w[0]*(float) (i%4) + w[1]*(float) (i/4) - least + 0.5f);
    }
}

// a row's tables; a score is scale times what they add up to, and offset
static void monarch_tables_init(const struct monarch_attend * attend, const struct monarch_row * row, int8_t * tables, float * scale, float * offset) {
    const int32_t head_dim = attend->op.codec.head_dim;

    float w[2*MONARCH_MAX_HEAD_DIM];
    monarch_summary_query(attend->op.scorer, head_dim, row->q, w);

    float max = 0.0f;
    float sum = 0.0f;
    for (int32_t d0 = 0; d0 < head_dim; d0 += 4*MONARCH_TABLE_BYTES) {
        float range = 0.0f;
        for (int32_t d = d0; d < d0 + 4*MONARCH_TABLE_BYTES && d < head_dim; ++d) {
            range += 3.0f*fabsf(w[d]);
        }

        max  = range > max ? range : max;
        sum += range;
    }

    const float inverse = max > 0.0f ? MONARCH_TABLES_MAX/max : 0.0f;
    for (int32_t d = 0; d < head_dim; d += 2) {
        const float steps[2] = { inverse*w[d], inverse*w[d + 1] };

        monarch_table_fill(steps, tables + d/2*MONARCH_TABLE_SIZE);
    }

    *scale  = max/MONARCH_TABLES_MAX;
    *offset = -0.5f*sum;
}

// what four parts of MONARCH_LANES pages add up to, in pairs: the first and third of each page, the second and fourth
static inline void monarch_parts_add(int64_t head_dim, const uint8_t * codes, const struct monarch_simd_query * query, monarch_i16 sums[2][MONARCH_ROWS]) {
    const int64_t n_bytes = head_dim/4;
    const int64_t stride  = head_dim/2*MONARCH_TABLE_SIZE;

    const int8_t * table = query->tables;

    for (int r = 0; r < MONARCH_ROWS; ++r) {
        sums[0][r] = sums[1][r] = monarch_i16_set1(0);
    }
    for (int64_t i0 = 0; i0 < n_bytes; i0 += MONARCH_TABLE_BYTES) {
        monarch_i8 sum[MONARCH_ROWS];
        for (int r = 0; r < MONARCH_ROWS; ++r) {
            sum[r] = monarch_i8_set1(0);
        }
        for (int64_t i = i0; i < MONARCH_MIN(i0 + MONARCH_TABLE_BYTES, n_bytes); ++i) {
            const monarch_i8 index = monarch_i8_load(codes + i*4*MONARCH_TILE);
            const monarch_i8 low   = monarch_i8_low (index);
            const monarch_i8 high  = monarch_i8_high(index);

            for (int r = 0; r < MONARCH_ROWS; ++r) {
                sum[r] = monarch_i8_add(sum[r], monarch_i8_lookup(monarch_i8_table(table + r*stride),                      low));
                sum[r] = monarch_i8_add(sum[r], monarch_i8_lookup(monarch_i8_table(table + r*stride + MONARCH_TABLE_SIZE), high));
            }
            table += 2*MONARCH_TABLE_SIZE;
        }
        for (int r = 0; r < MONARCH_ROWS; ++r) {
            sums[0][r] = monarch_i16_add(sums[0][r], monarch_i16_even(sum[r]));
            sums[1][r] = monarch_i16_add(sums[1][r], monarch_i16_odd (sum[r]));
        }
    }
}

// scores of 16 pages for MONARCH_ROWS rows
static void monarch_score_parts(const struct monarch_attend * attend, const uint8_t * group, const struct monarch_simd_query * query, float * dst, int64_t stride) {
    const int32_t head_dim = attend->op.codec.head_dim;

    float scales [MONARCH_SUMMARY_PARTS*MONARCH_TILE];
    float offsets[MONARCH_SUMMARY_PARTS*MONARCH_TILE];
    for (int32_t i = 0; i < MONARCH_SUMMARY_PARTS*MONARCH_TILE; ++i) {
        const uint8_t code = group[monarch_summary_scale_at(0, 0) + i];

        scales [i] = code ? attend->op.kq_scale*monarch_summary_decode_scale(code) : 0.0f;
        offsets[i] = code ? 0.0f : -INFINITY;
    }

    for (int i = 0; i < MONARCH_VECTORS; ++i) {
        monarch_f32 score[MONARCH_ROWS];
        for (int r = 0; r < MONARCH_ROWS; ++r) {
            score[r] = monarch_f32_set1(-INFINITY);
        }

        for (int i0 = 0; i0 < MONARCH_SUMMARY_PARTS; i0 += 4) {
            monarch_i16 sums[2][MONARCH_ROWS];
            monarch_parts_add(head_dim, group + monarch_summary_code_at(head_dim, i0, 0, 0) + i*4*MONARCH_LANES, query, sums);

            for (int j = 0; j < 4; ++j) {
                const monarch_f32 scale  = monarch_f32_load(scales  + (i0 + j)*MONARCH_TILE + i*MONARCH_LANES);
                const monarch_f32 offset = monarch_f32_load(offsets + (i0 + j)*MONARCH_TILE + i*MONARCH_LANES);

                for (int r = 0; r < MONARCH_ROWS; ++r) {
                    const monarch_f32 product = monarch_f32_fma(monarch_i16_to_f32(sums[j%2][r], j/2), monarch_f32_set1(query->scale[r][0]), monarch_f32_set1(query->sum[r][0]));

                    score[r] = monarch_f32_max(score[r], monarch_f32_fma(product, scale, offset));
                }
            }
        }

        for (int r = 0; r < MONARCH_ROWS; ++r) {
            monarch_f32_store(dst + r*stride + i*MONARCH_LANES, score[r]);
        }
    }
}

// of n rows; those that the kernels take with them weigh nothing
static void monarch_score_query_init(const struct monarch_attend * attend, const struct monarch_row * rows, int64_t n, const struct monarch_simd_work * simd, struct monarch_simd_query * query) {
    const int32_t head_dim  = attend->op.codec.head_dim;
    const int64_t n_table   = head_dim/2*MONARCH_TABLE_SIZE;
    const bool    has_parts = attend->op.scorer == MONARCH_SCORER_PARTS;

    memset(query, 0, sizeof(*query));
    query->w      = simd->q;
    query->tables = simd->tables;

    for (int64_t r = 0; r < n; ++r) {
        if (has_parts) {
            monarch_tables_init(attend, &rows[r], simd->tables + r*n_table, query->scale[r], query->sum[r]);
        } else {
            monarch_score_quantize(attend, &rows[r], simd->q + r*2*head_dim, query->scale[r], query->sum[r], query->bias[r]);
        }
    }
    if (has_parts) {
        memset(simd->tables + n*n_table, 0, (MONARCH_ROWS - n)*n_table);
    } else {
        memset(simd->q + n*2*head_dim, 0, (MONARCH_ROWS - n)*2*head_dim);
    }
}

static void monarch_simd_score(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work, int32_t i0, int32_t i1) {
    struct monarch_simd_work simd = monarch_simd_work_get(attend, work);

    const int64_t n_groups = attend->n_pages_max/MONARCH_SUMMARY_GROUP;

    const auto score_group = attend->op.scorer == MONARCH_SCORER_PARTS ? monarch_score_parts : monarch_score_group;

    float log_table[MONARCH_MAX_PAGE_SIZE + 1];
    monarch_score_fill_logs(attend->op.scorer, log_table);

    // groups that hold none of these pages are skipped
    memset(simd.used, 0, n_groups);

    for (int32_t i = i0; i < i1; ++i) {
        simd.used[attend->table[i].page/MONARCH_SUMMARY_GROUP] = 1;
        simd.log_n[i] = log_table[monarch_mask_count(attend->table[i].mask)];
    }

    for (int64_t ir = 0; ir < work->n_queries; ir += MONARCH_ROWS) {
        const int64_t n = MONARCH_MIN(MONARCH_ROWS, work->n_queries - ir);

        struct monarch_simd_query query;
        monarch_score_query_init(attend, &work->rows[ir], n, &simd, &query);

        for (int64_t g = 0; g < n_groups; ++g) {
            if (simd.used[g]) {
                score_group(attend, monarch_attend_get_group(attend, head_kv, g*MONARCH_SUMMARY_GROUP), &query, simd.scores + g*MONARCH_SUMMARY_GROUP, attend->n_pages_max);
            }
        }

        for (int64_t r = 0; r < n; ++r) {
            const float * scores = simd.scores + r*attend->n_pages_max;

            for (int32_t i = i0; i < i1; ++i) {
                work->rows[ir + r].mass[i] = scores[attend->table[i].page] + simd.log_n[i];
            }
        }
    }
}

static float monarch_simd_exp(int32_t n, float * x, float max) {
    monarch_f32 sum = monarch_f32_set1(0.0f);

    int32_t i = 0;
    for (; i + MONARCH_LANES <= n; i += MONARCH_LANES) {
        const monarch_f32 value = monarch_exp(monarch_f32_sub(monarch_f32_load(x + i), monarch_f32_set1(max)));

        monarch_f32_store(x + i, value);
        sum = monarch_f32_add(sum, value);
    }

    float res = monarch_f32_sum(sum);
    for (; i < n; ++i) {
        x[i] = expf(x[i] - max);
        res += x[i];
    }
    return res;
}
