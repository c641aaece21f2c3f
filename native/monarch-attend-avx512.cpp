// AVX-512 with VNNI and VBMI. Cold pages are attended as 8-bit integers: a code is looked up as the int8 point that it
// stands for, which is exact; queries and softmax weights are rounded to 8 bits per page, which costs far less than the
// codec does. The hot window stays in f32 arithmetic.
//
// Compiled with the flags for these instructions whatever the rest is compiled for, and used where the CPU has them.

#include "monarch-attend.h"
#include "monarch-attend-quant.h"
#include "monarch-exp2.h"
#include "monarch-summary-math.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512VBMI__)

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define MONARCH_LANES 16

// cold tokens that share one rounding of their weights, in groups of MONARCH_LANES
#define MONARCH_GROUPS MONARCH_COLD_STEP
#define MONARCH_TILE   (MONARCH_GROUPS*MONARCH_LANES)

// of what 2-bit values add to a score over MONARCH_TABLE_BYTES of codes, in up to MONARCH_TABLES tables, a signed byte holds two
// thirds of the most: only keys that lie nearly as the query does reach more, and are the best as it is; two such sums are averaged
#define MONARCH_TABLE_SIZE  64
#define MONARCH_TABLE_BYTES 8
#define MONARCH_TABLES      11
#define MONARCH_TABLES_MAX  (1.5f*127.0f)

#define MONARCH_SUM_BYTES   (2*MONARCH_TABLE_BYTES)
#define MONARCH_SUMS_MAX    (MONARCH_MAX_HEAD_DIM/4/MONARCH_SUM_BYTES)

// a constant, so that the rows of a block are at constant offsets
#define MONARCH_Q_STRIDE MONARCH_MAX_HEAD_DIM

#define MONARCH_MIN(a, b) ((a) < (b) ? (a) : (b))

// a byte of codes is an index by its first three values; with the next two, their fourth values make another index
static inline int64_t monarch_tables_count(int64_t head_dim) {
    const int64_t n_bytes = head_dim/4;
    const int64_t n_last  = n_bytes%MONARCH_TABLE_BYTES;

    return n_bytes/MONARCH_TABLE_BYTES*MONARCH_TABLES + n_last + (n_last + 2)/3;
}

struct monarch_avx512_work {
    int8_t  * q;       // [n_rows][MONARCH_Q_STRIDE] quantised queries, in the order of the K codes; summary weights while scoring
    int32_t * q_bias;  // [n_rows] what adding 128 to K adds to the dot products
    float   * q_scale; // [n_rows]
    float   * sums;    // [n_rows][16] what the present stage adds to the rows' sums, lane by lane
    float   * weights; // [8][16]
    float   * logits;  // [n_rows][MONARCH_TILE] of cold tokens
    uint8_t * w;       // [n_rows][MONARCH_TILE] quantised weights
    float   * w_scale; // [n_rows]
    float   * k;       // [head_dim/16][4][4][16] one tile of hot K, monarch_hot_load_k()
    float   * v;       // [16][head_dim]
    uint8_t * tables;  // [n_tables][MONARCH_SCORE_ROWS][MONARCH_TABLE_SIZE] of summary weights
    float   * scores;  // [MONARCH_SCORE_ROWS][monarch_mass_stride] by physical page, of those that are not scored in place
    float   * log_n;   // [n_pages_max] logarithm of a page's tokens
    int32_t * runs;    // [n_pages_max/16] first physical page where 16 table entries name consecutive ones with as many tokens, else -1
    uint8_t * used;    // [n_pages_max/16] groups of summaries to be scored by physical page
};

static size_t monarch_avx512_work_init(struct monarch_avx512_work * work, char * base, int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    char * ptr = base;

    work->q       = (int8_t  *) monarch_work_take(&ptr, (n_rows + MONARCH_SCORE_ROWS*2)*MONARCH_Q_STRIDE);
    work->q_bias  = (int32_t *) monarch_work_take(&ptr, n_rows*sizeof(int32_t));
    work->q_scale = (float   *) monarch_work_take(&ptr, n_rows*sizeof(float));
    work->sums    = (float   *) monarch_work_take(&ptr, n_rows*MONARCH_LANES*sizeof(float));
    work->weights = (float   *) monarch_work_take(&ptr, 8*MONARCH_LANES*sizeof(float));
    work->logits  = (float   *) monarch_work_take(&ptr, n_rows*MONARCH_TILE*sizeof(float));
    work->w       = (uint8_t *) monarch_work_take(&ptr, n_rows*MONARCH_TILE);
    work->w_scale = (float   *) monarch_work_take(&ptr, n_rows*sizeof(float));
    work->k       = (float   *) monarch_work_take(&ptr, head_dim*MONARCH_LANES*sizeof(float));
    work->v       = (float   *) monarch_work_take(&ptr, head_dim*MONARCH_LANES*sizeof(float));
    work->tables  = (uint8_t *) monarch_work_take(&ptr, MONARCH_SCORE_ROWS*monarch_tables_count(head_dim)*MONARCH_TABLE_SIZE);
    work->scores  = (float   *) monarch_work_take(&ptr, MONARCH_SCORE_ROWS*monarch_mass_stride(n_pages_max)*sizeof(float));
    work->log_n   = (float   *) monarch_work_take(&ptr, n_pages_max*sizeof(float));
    work->runs    = (int32_t *) monarch_work_take(&ptr, n_pages_max/MONARCH_LANES*sizeof(int32_t));
    work->used    = (uint8_t *) monarch_work_take(&ptr, n_pages_max/MONARCH_LANES);

    return ptr - base;
}

static size_t monarch_avx512_work_size(int32_t head_dim, int64_t n_rows, int64_t n_pages_max) {
    struct monarch_avx512_work work;
    return monarch_avx512_work_init(&work, NULL, head_dim, n_rows, n_pages_max);
}

static bool monarch_avx512_has_cpu() {
    static const bool res = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");

    return res;
}

static bool monarch_ring_is_supported(enum ggml_type type, int32_t head_dim) {
    return type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 || (type == GGML_TYPE_Q8_0 && head_dim % 32 == 0);
}

static bool monarch_avx512_supports_hot(const struct monarch_op_params * op, enum ggml_type type_k, enum ggml_type type_v) {
    return monarch_avx512_has_cpu() && monarch_ring_is_supported(type_k, op->codec.head_dim) && monarch_ring_is_supported(type_v, op->codec.head_dim);
}

static bool monarch_avx512_supports_cold(const struct monarch_op_params * op) {
    return monarch_avx512_has_cpu() && op->codec.head_dim % 32 == 0 && op->codec.page_size >= MONARCH_LANES &&
        op->codec.bits_k <= 4 && op->codec.bits_v <= 4 && !op->codec.residual_k;
}

// e^x for x <= 0, relative error below 1e-6
static inline __m512 monarch_exp(__m512 x) {
    const __m512 y = _mm512_max_ps(_mm512_mul_ps(x, _mm512_set1_ps(MONARCH_LOG2_E)), _mm512_set1_ps(-126.0f));
    const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF);

    __m512 p = _mm512_set1_ps(MONARCH_EXP2_5);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(MONARCH_EXP2_4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(MONARCH_EXP2_3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(MONARCH_EXP2_2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(MONARCH_EXP2_1));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(MONARCH_EXP2_0));

    return _mm512_scalef_ps(p, y);
}

// softmax weights of 16 tokens on the scale of row->max, which grows if it must; masked tokens weigh nothing
static inline __m512 monarch_row_weigh(struct monarch_row * row, int64_t head_dim, __m512 logits, __mmask16 mask, float * sums) {
    if (_mm512_mask_cmp_ps_mask(mask, logits, _mm512_set1_ps(row->max), _CMP_GT_OQ)) {
        const float max = _mm512_mask_reduce_max_ps(mask, logits);

        _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(expf(row->max - max))));

        monarch_row_set_max(row, head_dim, max);
    }

    const __m512 weights = _mm512_maskz_mov_ps(mask, monarch_exp(_mm512_sub_ps(logits, _mm512_set1_ps(row->max))));

    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), weights));

    return weights;
}

static void monarch_sums_clear(const struct monarch_work * work, struct monarch_avx512_work * avx512) {
    memset(avx512->sums, 0, work->n_rows*MONARCH_LANES*sizeof(float));
}

static void monarch_sums_add(struct monarch_work * work, const struct monarch_avx512_work * avx512) {
    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        work->rows[ir].sum += _mm512_reduce_add_ps(_mm512_loadu_ps(avx512->sums + ir*MONARCH_LANES));
    }
}

//
// hot window
//

static inline const char * monarch_ring_row(const struct ggml_tensor * t, int64_t head_kv, int64_t slot) {
    return (const char *) t->data + head_kv*t->nb[1] + slot*t->nb[2];
}

// 16 values of a row from d on
template <enum ggml_type T>
static inline __m512 monarch_ring_load(const char * row, int64_t d) {
    if (T == GGML_TYPE_F16) {
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (row + d*sizeof(ggml_fp16_t))));
    }
    if (T == GGML_TYPE_BF16) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *) (row + d*sizeof(ggml_bf16_t)));

        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    const block_q8_0 * block = (const block_q8_0 *) row + d/QK8_0;

    const __m512 values = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) (block->qs + d%QK8_0))));

    return _mm512_mul_ps(values, _mm512_set1_ps(_mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(block->d)))));
}

// A head's part of a slot is far from the next slot's: the processor does not guess it. Into the second cache: of lines for the
// first, fewer may be under way, and loads of them waited twice as long.
static inline void monarch_ring_prefetch(const struct ggml_tensor * t, int64_t head_kv, int64_t slot) {
    const char * row = monarch_ring_row(t, head_kv, slot);

    for (size_t i = 0; i < t->nb[1]; i += 64) {
        _mm_prefetch(row + i, _MM_HINT_T1);
    }
}

// 16 dimensions of four slots, one to a vector: lane 4*b + s of vector i gets dimension 4*b + i of slot s
static inline void monarch_transpose_four(__m512 * x) {
    const __m512 lo01 = _mm512_unpacklo_ps(x[0], x[1]);
    const __m512 hi01 = _mm512_unpackhi_ps(x[0], x[1]);
    const __m512 lo23 = _mm512_unpacklo_ps(x[2], x[3]);
    const __m512 hi23 = _mm512_unpackhi_ps(x[2], x[3]);

    x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(lo01), _mm512_castps_pd(lo23)));
    x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(lo01), _mm512_castps_pd(lo23)));
    x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(hi01), _mm512_castps_pd(hi23)));
    x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(hi01), _mm512_castps_pd(hi23)));
}

// four slots of one head as [head_dim/16][4] vectors, 4 apart; those not visible are zero
template <enum ggml_type T>
static inline void monarch_hot_convert_k(const struct ggml_tensor * t, int64_t head_kv, int64_t head_dim, int64_t slot, uint32_t visible, float * dst) {
    const char * row = monarch_ring_row(t, head_kv, slot);

    for (int64_t d = 0; d < head_dim; d += MONARCH_LANES, dst += 16*MONARCH_LANES) {
        __m512 x[4];
        for (int64_t s = 0; s < 4; ++s) {
            x[s] = visible >> s & 1 ? monarch_ring_load<T>(row + s*t->nb[2], d) : _mm512_setzero_ps();
        }

        monarch_transpose_four(x);

        for (int64_t i = 0; i < 4; ++i) {
            _mm512_storeu_ps(dst + 4*i*MONARCH_LANES, x[i]);
        }
    }
}

// the same, [4][head_dim]
template <enum ggml_type T>
static inline void monarch_hot_convert_v(const struct ggml_tensor * t, int64_t head_kv, int64_t head_dim, int64_t slot, uint32_t visible, float * dst) {
    const char * row = monarch_ring_row(t, head_kv, slot);

    for (int64_t s = 0; s < 4; ++s) {
        for (int64_t d = 0; d < head_dim; d += MONARCH_LANES, dst += MONARCH_LANES) {
            _mm512_storeu_ps(dst, visible >> s & 1 ? monarch_ring_load<T>(row + s*t->nb[2], d) : _mm512_setzero_ps());
        }
    }
}

static inline void monarch_hot_load_k(const struct ggml_tensor * t, int64_t head_kv, int64_t head_dim, int64_t slot, uint32_t visible, float * dst) {
    switch (t->type) {
        case GGML_TYPE_F16:  monarch_hot_convert_k<GGML_TYPE_F16> (t, head_kv, head_dim, slot, visible, dst); break;
        case GGML_TYPE_BF16: monarch_hot_convert_k<GGML_TYPE_BF16>(t, head_kv, head_dim, slot, visible, dst); break;
        default:             monarch_hot_convert_k<GGML_TYPE_Q8_0>(t, head_kv, head_dim, slot, visible, dst); break;
    }
}

static inline void monarch_hot_load_v(const struct ggml_tensor * t, int64_t head_kv, int64_t head_dim, int64_t slot, uint32_t visible, float * dst) {
    switch (t->type) {
        case GGML_TYPE_F16:  monarch_hot_convert_v<GGML_TYPE_F16> (t, head_kv, head_dim, slot, visible, dst); break;
        case GGML_TYPE_BF16: monarch_hot_convert_v<GGML_TYPE_BF16>(t, head_kv, head_dim, slot, visible, dst); break;
        default:             monarch_hot_convert_v<GGML_TYPE_Q8_0>(t, head_kv, head_dim, slot, visible, dst); break;
    }
}

// 16 slots of one head, of which some row sees those visible: what lies in the others may be no number. Asks for the next 16,
// as steadily as it reads: all at once would make the loads wait.
static void monarch_hot_load(const struct monarch_attend * attend, int64_t head_kv, int64_t i0, uint32_t visible, struct monarch_avx512_work * work) {
    const int64_t head_dim = attend->op.codec.head_dim;
    const int64_t i_last   = attend->k->ne[2] - 1;

    for (int64_t i = 0; i < MONARCH_LANES; i += 4) {
        for (int64_t j = i0 + MONARCH_LANES + i; j < i0 + MONARCH_LANES + i + 4; ++j) {
            monarch_ring_prefetch(attend->k, head_kv, MONARCH_MIN(j, i_last));
            monarch_ring_prefetch(attend->v, head_kv, MONARCH_MIN(j, i_last));
        }

        monarch_hot_load_k(attend->k, head_kv, head_dim, i0 + i, visible >> i, work->k + i/4*MONARCH_LANES);
        monarch_hot_load_v(attend->v, head_kv, head_dim, i0 + i, visible >> i, work->v + i*head_dim);
    }
}

static inline __m512 monarch_mask_load(const struct ggml_tensor * mask, int64_t i_token, int64_t i0, __mmask16 valid) {
    const char * row = (const char *) mask->data + i_token*mask->nb[1];

    if (mask->type == GGML_TYPE_F16) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, row + i0*sizeof(ggml_fp16_t)));
    }
    return _mm512_maskz_loadu_ps(valid, row + i0*sizeof(float));
}

// slots of the tile that the token sees
static inline __mmask16 monarch_mask_visible(const struct ggml_tensor * mask, int64_t i_token, int64_t i0, __mmask16 valid) {
    return _mm512_mask_cmp_ps_mask(valid, monarch_mask_load(mask, i_token, i0, valid), _mm512_set1_ps(-INFINITY), _CMP_GT_OQ);
}

// adds N*16 values of the tile's V
template <int R, int N>
static inline void monarch_hot_add(const struct monarch_avx512_work * work, struct monarch_row * rows, int64_t head_dim, int64_t d) {
    __m512 acc[R][N];
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            acc[r][n] = _mm512_loadu_ps(rows[r].hot + d + n*MONARCH_LANES);
        }
    }
    for (int64_t i = 0; i < MONARCH_LANES; ++i) {
        for (int r = 0; r < R; ++r) {
            const __m512 w = _mm512_set1_ps(work->weights[r*MONARCH_LANES + i]);
            for (int n = 0; n < N; ++n) {
                acc[r][n] = _mm512_fmadd_ps(_mm512_loadu_ps(work->v + i*head_dim + d + n*MONARCH_LANES), w, acc[r][n]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int n = 0; n < N; ++n) {
            _mm512_storeu_ps(rows[r].hot + d + n*MONARCH_LANES, acc[r][n]);
        }
    }
}

// each slot's sum over its four lanes; x: four slots each
static inline __m512 monarch_hot_sum_lanes(const __m512 * x) {
    const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x88), _mm512_shuffle_f32x4(x[0], x[1], 0xdd));
    const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x88), _mm512_shuffle_f32x4(x[2], x[3], 0xdd));

    return _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd));
}

// dot products of R rows with the tile's K: slots need not lie in lanes of their own before the sum over dimensions
template <int R>
static inline void monarch_hot_dot(int64_t head_dim, const float * k, const struct monarch_row * rows, __m512 * dst) {
    __m512 acc[R][4];
    for (int r = 0; r < R; ++r) {
        for (int g = 0; g < 4; ++g) {
            acc[r][g] = _mm512_setzero_ps();
        }
    }

    for (int64_t d = 0; d < head_dim; d += MONARCH_LANES) {
        for (int i = 0; i < 4; ++i, k += 4*MONARCH_LANES) {
            for (int r = 0; r < R; ++r) {
                const __m512 q = _mm512_permutevar_ps(_mm512_loadu_ps(rows[r].q + d), _mm512_set1_epi32(i));
                for (int g = 0; g < 4; ++g) {
                    acc[r][g] = _mm512_fmadd_ps(_mm512_loadu_ps(k + g*MONARCH_LANES), q, acc[r][g]);
                }
            }
        }
    }

    for (int r = 0; r < R; ++r) {
        dst[r] = monarch_hot_sum_lanes(acc[r]);
    }
}

template <int R>
static inline void monarch_hot_rows(const struct monarch_attend * attend, struct monarch_avx512_work * work, struct monarch_row * rows, float * sums, int64_t i0, __mmask16 valid) {
    const int64_t head_dim = attend->op.codec.head_dim;

    __m512 dot[R];
    for (int r = 0; r < R; r += 4) {
        monarch_hot_dot<MONARCH_MIN(R, 4)>(head_dim, work->k, rows + r, dot + r);
    }

    for (int r = 0; r < R; ++r) {
        const __m512    mask    = monarch_mask_load(attend->mask, rows[r].i_token, i0, valid);
        const __mmask16 visible = _mm512_mask_cmp_ps_mask(valid, mask, _mm512_set1_ps(-INFINITY), _CMP_GT_OQ);
        const __m512    logits  = _mm512_fmadd_ps(dot[r], _mm512_set1_ps(attend->op.kq_scale), mask);

        const __m512 weights = visible ? monarch_row_weigh(&rows[r], head_dim, logits, visible, sums + r*MONARCH_LANES) : _mm512_setzero_ps();

        _mm512_storeu_ps(work->weights + r*MONARCH_LANES, weights);
    }

    int64_t d = 0;
    for (; d + 2*MONARCH_LANES <= head_dim; d += 2*MONARCH_LANES) {
        monarch_hot_add<R, 2>(work, rows, head_dim, d);
    }
    if (d < head_dim) {
        monarch_hot_add<R, 1>(work, rows, head_dim, d);
    }
}

static struct monarch_avx512_work monarch_avx512_work_get(const struct monarch_attend * attend, const struct monarch_work * work) {
    struct monarch_avx512_work res;
    monarch_avx512_work_init(&res, (char *) work->kernel, attend->op.codec.head_dim, monarch_attend_count_rows(attend), attend->n_pages_max);
    return res;
}

// slots of the tile that some row sees
static __mmask16 monarch_hot_get_visible(const struct monarch_attend * attend, const struct monarch_work * work, int64_t i0, __mmask16 valid) {
    __mmask16 res = 0;
    for (int64_t ir = 0; ir < work->n_rows; ir += attend->n_gqa) {
        res |= monarch_mask_visible(attend->mask, work->rows[ir].i_token, i0, valid);
    }
    return res;
}

static void monarch_avx512_hot(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work, int64_t slot0, int64_t slot1) {
    struct monarch_avx512_work avx512 = monarch_avx512_work_get(attend, work);

    monarch_sums_clear(work, &avx512);

    for (int64_t i0 = slot0; i0 < slot1; i0 += MONARCH_LANES) {
        const int64_t   n     = MONARCH_MIN(MONARCH_LANES, slot1 - i0);
        const __mmask16 valid = (__mmask16) ((1u << n) - 1);

        const __mmask16 visible = monarch_hot_get_visible(attend, work, i0, valid);
        if (!visible) {
            continue;
        }

        monarch_hot_load(attend, head_kv, i0, visible, &avx512);

        int64_t ir = 0;
        for (; ir + 8 <= work->n_rows; ir += 8) {
            monarch_hot_rows<8>(attend, &avx512, work->rows + ir, avx512.sums + ir*MONARCH_LANES, i0, valid);
        }
        for (; ir + 4 <= work->n_rows; ir += 4) {
            monarch_hot_rows<4>(attend, &avx512, work->rows + ir, avx512.sums + ir*MONARCH_LANES, i0, valid);
        }
        for (; ir + 2 <= work->n_rows; ir += 2) {
            monarch_hot_rows<2>(attend, &avx512, work->rows + ir, avx512.sums + ir*MONARCH_LANES, i0, valid);
        }
        for (; ir < work->n_rows; ++ir) {
            monarch_hot_rows<1>(attend, &avx512, work->rows + ir, avx512.sums + ir*MONARCH_LANES, i0, valid);
        }
    }

    monarch_sums_add(work, &avx512);
}

//
// cold pages
//

// codes of the chunk as bytes
static inline __m512i monarch_codes_load(int32_t bits, const uint8_t * src, int64_t i_chunk) {
    const __m256i nibble = _mm256_set1_epi8(15);

    if (bits == 4) {
        return _mm512_loadu_si512(src + 64*i_chunk);
    }

    const uint8_t * chunk = src + 16*bits*i_chunk;

    const __m256i packed = _mm256_loadu_si256((const __m256i *) chunk);
    const __m256i lo     = _mm256_and_si256(packed, nibble);
    const __m256i hi     = _mm256_and_si256(_mm256_srli_epi16(packed, 4), nibble);
    const __m512i low    = _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);

    if (bits == 2) {
        return low;
    }

    // two more bits of 64 codes in 16 bytes: quarter i of the codes takes bits 2i and 2i + 1
    const __m512i rest   = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *) (chunk + 32)));
    const __m512i shifts = _mm512_set_epi64(6, 6, 4, 4, 2, 2, 0, 0);
    const __m512i high   = _mm512_and_si512(_mm512_srlv_epi64(rest, shifts), _mm512_set1_epi8(3));

    return _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
}

// one coordinate of the 256 points
struct monarch_lookup {
    __m512i t0, t1, t2, t3;
};

static inline struct monarch_lookup monarch_lookup_init(const int8_t * table, uint8_t flip) {
    const __m512i f = _mm512_set1_epi8((char) flip);

    struct monarch_lookup res;
    res.t0 = _mm512_xor_si512(_mm512_loadu_si512(table +   0), f);
    res.t1 = _mm512_xor_si512(_mm512_loadu_si512(table +  64), f);
    res.t2 = _mm512_xor_si512(_mm512_loadu_si512(table + 128), f);
    res.t3 = _mm512_xor_si512(_mm512_loadu_si512(table + 192), f);
    return res;
}

static inline __m512i monarch_lookup_get(const struct monarch_lookup * lookup, __m512i codes) {
    const __m512i lo = _mm512_permutex2var_epi8(lookup->t0, codes, lookup->t1);
    const __m512i hi = _mm512_permutex2var_epi8(lookup->t2, codes, lookup->t3);

    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), lo, hi);
}

// Asks for the same codes of a page to come. Chosen pages lie anywhere, and lines that are asked for all at once make the
// loads between them wait.
static inline void monarch_codes_prefetch(int32_t bits, const uint8_t * next, int64_t i_chunk) {
    _mm_prefetch((const char *) next + 16*bits*i_chunk, _MM_HINT_T1);
}

static void monarch_cold_quantize(const struct monarch_attend * attend, const struct monarch_work * work, struct monarch_avx512_work * avx512) {
    const int64_t head_dim = attend->op.codec.head_dim;

    for (int64_t ir = 0; ir < work->n_rows; ++ir) {
        int8_t * q = avx512->q + ir*MONARCH_Q_STRIDE;

        const float max = monarch_int8_quantize_query(head_dim, work->rows[ir].q_rot, q);

        avx512->q_bias [ir] = 128*monarch_int8_sum(head_dim, q);
        avx512->q_scale[ir] = attend->op.kq_scale*max/127.0f;
    }
}

static inline int32_t monarch_load_i32(const void * src) {
    int32_t res;
    memcpy(&res, src, sizeof(res));
    return res;
}

static inline __m512 monarch_scales_load(const uint8_t * src) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) src));
}

// 16 tokens of a chosen page
struct monarch_group {
    const uint8_t * block;
    const uint8_t * next; // a block to come
    int32_t         ic;   // of the page among the chosen
    int32_t         t0;   // first token
    __mmask16       mask; // tokens that count
};

// Scales of V of a group: a power of two, by whose logarithm logits are raised, and what is left, 1 to 2: the greatest of what
// is raised has nearly the greatest weight times scale, to which all are rounded.
struct monarch_v_scales {
    __m512 raise;
    __m512 inverse; // of the power
    __m512 rest;    // in units of a weight's 8 bits
};

// greatest value of those 8 bits, half: the rest is below 2
#define MONARCH_WEIGHT_UNIT 127.5f

static inline struct monarch_v_scales monarch_v_scales_load(const uint8_t * src) {
    // a token whose V is zero counts all the same
    const __m512 scales = _mm512_max_ps(monarch_scales_load(src), _mm512_set1_ps(0x1p-24f));
    const __m512 power  = _mm512_getexp_ps(scales);

    struct monarch_v_scales res;
    res.raise   = _mm512_mul_ps(power, _mm512_set1_ps(0.693147181f));
    res.inverse = _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_sub_ps(_mm512_setzero_ps(), power));
    res.rest    = _mm512_mul_ps(_mm512_getmant_ps(scales, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src), _mm512_set1_ps(MONARCH_WEIGHT_UNIT));
    return res;
}

struct monarch_cold {
    struct monarch_lookup       k_x, k_y; // plus 128
    struct monarch_lookup       v_x, v_y;
    struct monarch_codec_layout layout;
    struct monarch_group        groups  [MONARCH_GROUPS];
    struct monarch_v_scales     v_scales[MONARCH_GROUPS];
    int32_t                     n_groups;
};

// raised logits of 16 tokens for R rows; k_x, k_y: [head_dim/8]
template <int R>
static inline void monarch_cold_dot(int64_t head_dim, const __m512i * k_x, const __m512i * k_y, __m512 k_scale, __m512 raise, __mmask16 mask, const struct monarch_avx512_work * avx512, int64_t ir, float * logits) {
    const int8_t * q = avx512->q + ir*MONARCH_Q_STRIDE;

    __m512i dot[R];
    for (int r = 0; r < R; ++r) {
        dot[r] = _mm512_set1_epi32(-avx512->q_bias[ir + r]);
    }
    for (int64_t j = 0; j < head_dim/8; ++j) {
        for (int r = 0; r < R; ++r) {
            dot[r] = _mm512_dpbusd_epi32(dot[r], k_x[j], _mm512_set1_epi32(monarch_load_i32(q + r*MONARCH_Q_STRIDE + 8*j + 0)));
            dot[r] = _mm512_dpbusd_epi32(dot[r], k_y[j], _mm512_set1_epi32(monarch_load_i32(q + r*MONARCH_Q_STRIDE + 8*j + 4)));
        }
    }
    for (int r = 0; r < R; ++r) {
        const __m512 scaled = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), _mm512_mul_ps(k_scale, _mm512_set1_ps(avx512->q_scale[ir + r])), raise);

        _mm512_storeu_ps(logits + (ir + r)*MONARCH_TILE, _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, scaled));
    }
}

// group ig of the tile
static void monarch_cold_get_logits(const struct monarch_attend * attend, const struct monarch_cold * cold, const struct monarch_work * work, struct monarch_avx512_work * avx512, int32_t ig) {
    const struct monarch_codec * codec = &attend->op.codec;
    const struct monarch_group * group = &cold->groups[ig];

    const int64_t head_dim = codec->head_dim;

    __m512i x[MONARCH_MAX_HEAD_DIM/8];
    __m512i y[MONARCH_MAX_HEAD_DIM/8];

    for (int64_t j = 0; j < head_dim/8; ++j) {
        const int64_t i_chunk = (j*codec->page_size + group->t0)/MONARCH_LANES;

        monarch_codes_prefetch(codec->bits_k, group->next + cold->layout.k_codes, i_chunk);

        const __m512i codes = monarch_codes_load(codec->bits_k, group->block + cold->layout.k_codes, i_chunk);

        x[j] = monarch_lookup_get(&cold->k_x, codes);
        y[j] = monarch_lookup_get(&cold->k_y, codes);
    }

    const __m512 scale = monarch_scales_load(group->block + cold->layout.k_scales + 2*group->t0);
    const __m512 raise = cold->v_scales[ig].raise;

    float * logits = avx512->logits + ig*MONARCH_LANES;

    int64_t ir = 0;
    for (; ir + 8 <= work->n_rows; ir += 8) {
        monarch_cold_dot<8>(head_dim, x, y, scale, raise, group->mask, avx512, ir, logits);
    }
    for (; ir + 4 <= work->n_rows; ir += 4) {
        monarch_cold_dot<4>(head_dim, x, y, scale, raise, group->mask, avx512, ir, logits);
    }
    for (; ir < work->n_rows; ++ir) {
        monarch_cold_dot<1>(head_dim, x, y, scale, raise, group->mask, avx512, ir, logits);
    }
}

// the maximum of each of R <= 4 vectors, one to a lane
template <int R>
static inline __m128 monarch_max_each(const __m512 * x) {
    const __m512 x0 = x[0];
    const __m512 x1 = x[R > 1 ? 1 : 0];
    const __m512 x2 = x[R > 2 ? 2 : 0];
    const __m512 x3 = x[R > 3 ? 3 : 0];

    const __m512 a = _mm512_max_ps(_mm512_unpacklo_ps(x0, x1), _mm512_unpackhi_ps(x0, x1)); // x0 x1 x0 x1
    const __m512 b = _mm512_max_ps(_mm512_unpacklo_ps(x2, x3), _mm512_unpackhi_ps(x2, x3)); // x2 x3 x2 x3
    const __m512 c = _mm512_max_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); // x0 x1 x2 x3

    const __m256 d = _mm256_max_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));

    return _mm_max_ps(_mm256_castps256_ps128(d), _mm256_extractf128_ps(d, 1));
}

static inline float monarch_lane_get(__m128 x, int i) {
    float lanes[4];
    _mm_storeu_ps(lanes, x);
    return lanes[i];
}

// softmax weights of a tile times the scales of V, as 8 bits relative to nearly the greatest of the row
template <int R>
static inline void monarch_cold_weigh(const struct monarch_cold * cold, struct monarch_work * work, struct monarch_avx512_work * avx512, int64_t head_dim, int64_t ir) {
    struct monarch_row * rows = work->rows + ir;

    const int32_t n_groups = cold->n_groups;

    __m512 tops[R];
    for (int r = 0; r < R; ++r) {
        tops[r] = _mm512_loadu_ps(avx512->logits + (ir + r)*MONARCH_TILE);
        for (int32_t ig = 1; ig < n_groups; ++ig) {
            tops[r] = _mm512_max_ps(tops[r], _mm512_loadu_ps(avx512->logits + (ir + r)*MONARCH_TILE + ig*MONARCH_LANES));
        }
    }

    const __m128 top = monarch_max_each<R>(tops);

    for (int r = 0; r < R; ++r) {
        const float max = monarch_lane_get(top, r);
        if (max > rows[r].max) {
            float * sums = avx512->sums + (ir + r)*MONARCH_LANES;

            _mm512_storeu_ps(sums, _mm512_mul_ps(_mm512_loadu_ps(sums), _mm512_set1_ps(expf(rows[r].max - max))));

            monarch_row_set_max(&rows[r], head_dim, max);
        }
    }

    const __m128 max    = _mm_setr_ps(rows[0].max, rows[R > 1 ? 1 : 0].max, rows[R > 2 ? 2 : 0].max, rows[R > 3 ? 3 : 0].max);
    const __m128 factor = _mm512_castps512_ps128(monarch_exp(_mm512_castps128_ps512(_mm_sub_ps(top, max))));

    for (int r = 0; r < R; ++r) {
        const __m512 top_r    = _mm512_set1_ps(monarch_lane_get(top, r));
        const float  factor_r = monarch_lane_get(factor, r);

        __m512 sum = _mm512_setzero_ps();

        for (int32_t ig = 0; ig < n_groups; ++ig) {
            const __m512 scaled  = monarch_exp(_mm512_sub_ps(_mm512_loadu_ps(avx512->logits + (ir + r)*MONARCH_TILE + ig*MONARCH_LANES), top_r));
            const __m512 inverse = cold->v_scales[ig].inverse;

            if (cold->groups[ig].ic < rows[r].n_mass) {
                rows[r].mass[cold->groups[ig].ic] += factor_r*_mm512_reduce_add_ps(_mm512_mul_ps(scaled, inverse));
            }
            sum = _mm512_fmadd_ps(scaled, inverse, sum);

            const __m128i w = _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(scaled, cold->v_scales[ig].rest)));

            _mm_storeu_si128((__m128i *) (avx512->w + (ir + r)*MONARCH_TILE + ig*MONARCH_LANES), w);
        }

        float * sums = avx512->sums + (ir + r)*MONARCH_LANES;

        _mm512_storeu_ps(sums, _mm512_fmadd_ps(sum, _mm512_set1_ps(factor_r), _mm512_loadu_ps(sums)));

        avx512->w_scale[ir + r] = factor_r/MONARCH_WEIGHT_UNIT;
    }
}

static void monarch_cold_weigh_rows(const struct monarch_attend * attend, const struct monarch_cold * cold, struct monarch_work * work, struct monarch_avx512_work * avx512) {
    const int64_t head_dim = attend->op.codec.head_dim;

    int64_t ir = 0;
    for (; ir + 4 <= work->n_rows; ir += 4) {
        monarch_cold_weigh<4>(cold, work, avx512, head_dim, ir);
    }
    for (; ir < work->n_rows; ++ir) {
        monarch_cold_weigh<1>(cold, work, avx512, head_dim, ir);
    }
}

// adds the tile's V, G groups, 32 pairs of coordinates at a time
template <int G>
static inline void monarch_cold_add(const struct monarch_attend * attend, const struct monarch_cold * cold, struct monarch_work * work, const struct monarch_avx512_work * avx512) {
    const struct monarch_codec * codec = &attend->op.codec;

    const int64_t head_dim = codec->head_dim;
    const int64_t n_chunk  = head_dim/32;

    for (int64_t c = 0; c < n_chunk; ++c) {
        __m512i v_x[4*G];
        __m512i v_y[4*G];

        for (int g = 0; g < G; ++g) {
            const struct monarch_group * group = &cold->groups[g];

            for (int t = 0; t < 4; ++t) {
                const int64_t i_chunk = (group->t0/4 + t)*n_chunk + c;

                monarch_codes_prefetch(codec->bits_v, group->next + cold->layout.v_codes, i_chunk);

                const __m512i codes = monarch_codes_load(codec->bits_v, group->block + cold->layout.v_codes, i_chunk);

                v_x[4*g + t] = monarch_lookup_get(&cold->v_x, codes);
                v_y[4*g + t] = monarch_lookup_get(&cold->v_y, codes);
            }
        }

        for (int64_t ir = 0; ir < work->n_rows; ++ir) {
            __m512i x = _mm512_setzero_si512();
            __m512i y = _mm512_setzero_si512();

            for (int i = 0; i < 4*G; ++i) {
                const __m512i w = _mm512_set1_epi32(monarch_load_i32(avx512->w + ir*MONARCH_TILE + 4*i));
                x = _mm512_dpbusd_epi32(x, w, v_x[i]);
                y = _mm512_dpbusd_epi32(y, w, v_y[i]);
            }

            const __m512 scale = _mm512_set1_ps(avx512->w_scale[ir]);

            float * dst_x = work->rows[ir].cold + c*MONARCH_LANES;
            float * dst_y = dst_x + head_dim/2;

            _mm512_storeu_ps(dst_x, _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), scale, _mm512_loadu_ps(dst_x)));
            _mm512_storeu_ps(dst_y, _mm512_fmadd_ps(_mm512_cvtepi32_ps(y), scale, _mm512_loadu_ps(dst_y)));
        }
    }
}

static void monarch_cold_attend_tile(const struct monarch_attend * attend, struct monarch_cold * cold, struct monarch_work * work, struct monarch_avx512_work * avx512) {
    for (int32_t ig = 0; ig < cold->n_groups; ++ig) {
        const struct monarch_group * group = &cold->groups[ig];

        cold->v_scales[ig] = monarch_v_scales_load(group->block + cold->layout.v_scales + 2*group->t0);

        monarch_cold_get_logits(attend, cold, work, avx512, ig);
    }

    monarch_cold_weigh_rows(attend, cold, work, avx512);

    if (cold->n_groups == MONARCH_GROUPS) {
        monarch_cold_add<MONARCH_GROUPS>(attend, cold, work, avx512);
    } else {
        monarch_cold_add<1>(attend, cold, work, avx512);
    }

    cold->n_groups = 0;
}

// of the ic-th chosen page, or of the last
static inline const uint8_t * monarch_cold_get_block(const struct monarch_attend * attend, int64_t head_kv, const struct monarch_work * work, int32_t ic) {
    const int32_t page = attend->table[work->chosen[MONARCH_MIN(ic, work->n_chosen - 1)]].page;

    return attend->pool + monarch_pool_offset(&attend->op.codec, attend->n_pages_max, head_kv, page);
}

// pages that are asked for ahead
#define MONARCH_PREFETCH 4

static void monarch_avx512_cold(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work) {
    const struct monarch_codec * codec = &attend->op.codec;

    if (work->n_chosen == 0) {
        return;
    }

    struct monarch_avx512_work avx512 = monarch_avx512_work_get(attend, work);

    const struct monarch_codec_points * points_k = monarch_codec_get_points(codec->bits_k);
    const struct monarch_codec_points * points_v = monarch_codec_get_points(codec->bits_v);

    struct monarch_cold cold;
    cold.k_x    = monarch_lookup_init(points_k->x, 128);
    cold.k_y    = monarch_lookup_init(points_k->y, 128);
    cold.v_x    = monarch_lookup_init(points_v->x, 0);
    cold.v_y    = monarch_lookup_init(points_v->y, 0);
    cold.layout = monarch_codec_get_layout(codec);

    cold.n_groups = 0;

    monarch_cold_quantize(attend, work, &avx512);
    monarch_sums_clear(work, &avx512);

    for (int32_t ic = 0; ic < work->n_chosen; ++ic) {
        const struct monarch_table_entry * entry = &attend->table[work->chosen[ic]];

        const uint8_t * block = monarch_cold_get_block(attend, head_kv, work, ic);
        const uint8_t * next  = monarch_cold_get_block(attend, head_kv, work, ic + MONARCH_PREFETCH);

        _mm_prefetch((const char *) next + cold.layout.k_scales, _MM_HINT_T1);

        for (int32_t t0 = 0; t0 < codec->page_size; t0 += MONARCH_LANES) {
            const __mmask16 mask = (__mmask16) (entry->mask >> t0);
            if (mask) {
                cold.groups[cold.n_groups++] = { block, next, ic, t0, mask };
            }
            if (cold.n_groups == MONARCH_GROUPS) {
                monarch_cold_attend_tile(attend, &cold, work, &avx512);
            }
        }
    }

    if (cold.n_groups > 0) {
        monarch_cold_attend_tile(attend, &cold, work, &avx512);
    }

    monarch_sums_add(work, &avx512);
}

//
// scores
//

// of the rows that are scored together
struct monarch_avx512_query {
    int8_t  * w;                            // [MONARCH_SCORE_ROWS][2*head_dim] weights of both halves
    uint8_t * tables;                       // [n_tables][R][MONARCH_TABLE_SIZE] of parts
    float     scale[MONARCH_SCORE_ROWS][2]; // of w, or of the tables
    float     sum  [MONARCH_SCORE_ROWS][2]; // of the weights
};

static inline int64_t monarch_group_size(int64_t head_dim) {
    return MONARCH_SUMMARY_GROUP*monarch_summary_size((int32_t) head_dim);
}

static inline void monarch_scales_prefetch(const uint8_t * scales, int64_t size) {
    for (int64_t i = 0; i < size; i += 64) {
        _mm_prefetch((const char *) scales + i, _MM_HINT_T1);
    }
}

// scores of 16 pages for R rows, each log_n greater; asks for the next 16
template <int R>
static void monarch_score_group(int64_t head_dim, const uint8_t * group, const struct monarch_avx512_query * query, float kq_scale, float log_n, float * dst, int64_t stride) {
    __m512 score[R];
    for (int r = 0; r < R; ++r) {
        score[r] = _mm512_setzero_ps();
    }

    const uint8_t * values     = group + monarch_summary_value_at(0, 0);
    const int64_t   group_size = monarch_group_size(head_dim);

    monarch_scales_prefetch(group + group_size, values - group);

    for (int half = 0; half < 2; ++half) {
        __m512i dot[R];
        for (int r = 0; r < R; ++r) {
            dot[r] = _mm512_setzero_si512();
        }
        for (int64_t j = 0; j < head_dim/4; ++j) {
            const uint8_t * src = values + (half*head_dim/4 + j)*64;

            _mm_prefetch((const char *) src + group_size, _MM_HINT_T0);

            const __m512i u = _mm512_loadu_si512(src);
            for (int r = 0; r < R; ++r) {
                dot[r] = _mm512_dpbusd_epi32(dot[r], u, _mm512_set1_epi32(monarch_load_i32(query->w + r*2*head_dim + half*head_dim + 4*j)));
            }
        }

        const __m512 offset = monarch_scales_load(group + monarch_summary_offset_at(half, 0));
        const __m512 step   = monarch_scales_load(group + monarch_summary_step_at  (half, 0));

        for (int r = 0; r < R; ++r) {
            const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[r]), _mm512_set1_ps(query->scale[r][half]));

            score[r] = _mm512_fmadd_ps(product, step,   score[r]);
            score[r] = _mm512_fmadd_ps(offset, _mm512_set1_ps(query->sum[r][half]), score[r]);
        }
    }

    for (int r = 0; r < R; ++r) {
        _mm512_storeu_ps(dst + r*stride, _mm512_fmadd_ps(score[r], _mm512_set1_ps(kq_scale), _mm512_set1_ps(log_n)));
    }
}

//
// scores of parts: what the 2-bit values of three dimensions add to a row's score is looked up in a table of 64
//

// n sums of tables, upper bytes of 16 bits, are halved until they fit there together
static inline int monarch_tables_get_shift(int64_t n) {
    int res = 0;
    while (n > 1 << res) {
        ++res;
    }
    return res;
}

// a row's weights in the order of the tables, three to each
static void monarch_tables_sort(int64_t head_dim, const float * w, float * sorted) {
    memset(sorted, 0, 3*monarch_tables_count(head_dim)*sizeof(float));

    for (int64_t i0 = 0; i0 < head_dim/4; i0 += MONARCH_TABLE_BYTES) {
        const int64_t i1 = MONARCH_MIN(i0 + MONARCH_TABLE_BYTES, head_dim/4);

        for (int64_t i = i0; i < i1; i += 3) {
            const int64_t n = MONARCH_MIN(3, i1 - i);

            for (int64_t j = 0; j < n; ++j) {
                memcpy(sorted + 3*j, w + 4*(i + j), 3*sizeof(float));
                sorted[3*n + j] = w[4*(i + j) + 3];
            }
            sorted += 3*(n + 1);
        }
    }
}

// w: of the three dimensions, in steps
static void monarch_table_fill(const float * w, uint8_t * table) {
    const __m512 u0 = _mm512_setr_ps(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    const __m512 u1 = _mm512_setr_ps(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);

    const __m512 middle = _mm512_set1_ps(-1.5f*(w[0] + w[1] + w[2]));

    const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(w[0]), u0, _mm512_fmadd_ps(_mm512_set1_ps(w[1]), u1, middle));

    for (int u2 = 0; u2 < 4; ++u2) {
        const __m512 value = _mm512_fmadd_ps(_mm512_set1_ps(w[2]), _mm512_set1_ps((float) u2), sum);

        _mm_storeu_si128((__m128i *) (table + 16*u2), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(value)));
    }
}

// a row's tables, with those of other rows between them; a score is scale times what they add up to
static void monarch_tables_init(const struct monarch_attend * attend, const struct monarch_row * row, int64_t n_rows, uint8_t * tables, float * scale) {
    const int32_t head_dim = attend->op.codec.head_dim;
    const int64_t n_tables = monarch_tables_count(head_dim);

    float w[2*MONARCH_MAX_HEAD_DIM];
    monarch_summary_query(attend->op.scorer, head_dim, row->q, w);

    float sorted[2*MONARCH_MAX_HEAD_DIM];
    monarch_tables_sort(head_dim, w, sorted);

    float max = 0.0f;
    for (int64_t t = 0; t < n_tables; t += MONARCH_TABLES) {
        float sum = 0.0f;
        for (int64_t i = 3*t; i < 3*MONARCH_MIN(t + MONARCH_TABLES, n_tables); ++i) {
            sum += 1.5f*fabsf(sorted[i]);
        }
        max = sum > max ? sum : max;
    }

    const float inverse = max > 0.0f ? MONARCH_TABLES_MAX/max : 0.0f;
    for (int64_t t = 0; t < n_tables; ++t) {
        for (int i = 0; i < 3; ++i) {
            sorted[3*t + i] *= inverse;
        }
        monarch_table_fill(sorted + 3*t, tables + t*n_rows*MONARCH_TABLE_SIZE);
    }

    *scale = max/MONARCH_TABLES_MAX;
}

// one table of each row; what is beyond a byte counts as its end
template <int R>
static inline void monarch_tables_look_up(__m512i index, const uint8_t * table, __m512i * sum) {
    for (int r = 0; r < R; ++r) {
        sum[r] = _mm512_adds_epi8(sum[r], _mm512_permutexvar_epi8(index, _mm512_loadu_si512(table + r*MONARCH_TABLE_SIZE)));
    }
}

// the fourth values of n times 64 bytes as one index; what else is in it weighs nothing
static inline __m512i monarch_codes_get_fourth(const uint8_t * codes, int64_t n) {
    __m512i res = _mm512_srli_epi16(_mm512_loadu_si512(codes), 6);

    if (n > 1) {
        res = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x03), res, _mm512_srli_epi16(_mm512_loadu_si512(codes + 64), 4), 0xca);
    }
    if (n > 2) {
        res = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x0f), res, _mm512_srli_epi16(_mm512_loadu_si512(codes + 128), 2), 0xca);
    }
    return res;
}

// what n times 64 bytes add up to; asks for those of a group to come
template <int R>
static inline void monarch_codes_look_up(const uint8_t * codes, int64_t n, int64_t group_size, const uint8_t * table, __m512i * sum) {
#pragma GCC unroll 1 // or sums go to memory and back
    for (int64_t j = 0; j < n; ++j) {
        _mm_prefetch((const char *) codes + j*64 + group_size, _MM_HINT_T0);

        monarch_tables_look_up<R>(_mm512_loadu_si512(codes + j*64), table + j*R*MONARCH_TABLE_SIZE, sum);
    }
    monarch_tables_look_up<R>(monarch_codes_get_fourth(codes, n), table + n*R*MONARCH_TABLE_SIZE, sum);
}

// what up to MONARCH_TABLE_BYTES of four parts of 16 pages add up to
template <int R>
static inline void monarch_tables_add(const uint8_t * codes, int64_t n, int64_t group_size, const uint8_t * table, __m512i * sum) {
    for (int r = 0; r < R; ++r) {
        sum[r] = _mm512_setzero_si512();
    }

    int64_t i = 0;
    for (; i + 3 <= n; i += 3, table += 4*R*MONARCH_TABLE_SIZE) {
        monarch_codes_look_up<R>(codes + i*64, 3, group_size, table, sum);
    }
    if (i < n) {
        monarch_codes_look_up<R>(codes + i*64, n - i, group_size, table, sum);
    }
}

// of signed bytes
static inline __m512i monarch_bytes_average(__m512i a, __m512i b) {
    const __m512i sign = _mm512_set1_epi8((int8_t) 0x80);

    return _mm512_xor_si512(_mm512_avg_epu8(_mm512_xor_si512(a, sign), _mm512_xor_si512(b, sign)), sign);
}

// half of what up to MONARCH_SUM_BYTES add up to
template <int R>
static inline void monarch_parts_add(const uint8_t * codes, int64_t n, int64_t group_size, const uint8_t * table, __m512i * dst) {
    const int64_t n_first = MONARCH_MIN(n, MONARCH_TABLE_BYTES);

    __m512i sum[R];
    monarch_tables_add<R>(codes, n_first, group_size, table, sum);

    for (int r = 0; r < R; ++r) {
        dst[r] = sum[r];
    }

    monarch_tables_add<R>(codes + n_first*64, n - n_first, group_size, table + MONARCH_TABLES*R*MONARCH_TABLE_SIZE, sum);

    for (int r = 0; r < R; ++r) {
        dst[r] = monarch_bytes_average(dst[r], sum[r]);
    }
}

// of a group: scales of its parts in the order of their sums, in units of 2^-14 of the greatest power of two in the page
struct monarch_parts_scales {
    __m512i   value[MONARCH_SUMMARY_PARTS/2];
    __mmask32 full [MONARCH_SUMMARY_PARTS/2]; // parts with tokens
    __m512    unit;                           // of each page
};

// 32 codes, of two parts of 16 pages
static inline __m512i monarch_scales_load_pair(const uint8_t * a, const uint8_t * b) {
    const __m128i x = _mm_loadu_si128((const __m128i *) a);
    const __m128i y = _mm_loadu_si128((const __m128i *) b);

    return _mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y)));
}

static inline void monarch_parts_get_scales(const uint8_t * codes, struct monarch_parts_scales * scales) {
    __m512i code[MONARCH_SUMMARY_PARTS/2];
    for (int i = 0; i < MONARCH_SUMMARY_PARTS/2; ++i) {
        const uint8_t * src = codes + (i/2*4 + i%2)*MONARCH_SUMMARY_GROUP;

        code[i] = monarch_scales_load_pair(src, src + 2*MONARCH_SUMMARY_GROUP);
    }

    // what other pages lie in the group changes nothing
    const __m512i pair     = _mm512_max_epi16(_mm512_max_epi16(code[0], code[1]), _mm512_max_epi16(code[2], code[3]));
    const __m512i greatest = _mm512_srli_epi16(_mm512_max_epi16(pair, _mm512_rol_epi32(pair, 16)), 3);

    for (int i = 0; i < MONARCH_SUMMARY_PARTS/2; ++i) {
        const __m512i fraction = _mm512_slli_epi16(_mm512_or_si512(_mm512_and_si512(code[i], _mm512_set1_epi16(7)), _mm512_set1_epi16(8)), 11);

        scales->value[i] = _mm512_srlv_epi16(fraction, _mm512_sub_epi16(greatest, _mm512_srli_epi16(code[i], 3)));
        scales->full [i] = _mm512_test_epi16_mask(code[i], code[i]);
    }

    // that power, twice: a sum's product with a value has lost 15 bits
    const __m512i exponent = _mm512_add_epi32(_mm512_srli_epi32(greatest, 16), _mm512_set1_epi32((MONARCH_SCALE_CODE_BIAS >> 3) + 1));

    scales->unit = _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

// a row's greatest part of each page; sums: n, of the first four parts, then of the others
static inline __m512 monarch_parts_find_best(const __m512i * sums, int64_t n, int64_t stride, const struct monarch_parts_scales * scales, int shift) {
    __m512i best = _mm512_set1_epi16(INT16_MIN); // of a page without tokens

    for (int half = 0; half < 2; ++half) {
        __m512i even = _mm512_slli_epi16(sums[half*n*stride], 8);
        __m512i odd  = _mm512_and_si512 (sums[half*n*stride], _mm512_set1_epi16((int16_t) 0xff00));

        if (n > 1) {
            even = _mm512_srai_epi16(even, shift);
            odd  = _mm512_srai_epi16(odd,  shift);
            for (int64_t i = 1; i < n; ++i) {
                const __m512i sum = sums[(half*n + i)*stride];

                even = _mm512_add_epi16(even, _mm512_srai_epi16(_mm512_slli_epi16(sum, 8), shift));
                odd  = _mm512_add_epi16(odd,  _mm512_srai_epi16(_mm512_and_si512(sum, _mm512_set1_epi16((int16_t) 0xff00)), shift));
            }
        }
        best = _mm512_mask_max_epi16(best, scales->full[2*half + 0], best, _mm512_mulhrs_epi16(even, scales->value[2*half + 0]));
        best = _mm512_mask_max_epi16(best, scales->full[2*half + 1], best, _mm512_mulhrs_epi16(odd,  scales->value[2*half + 1]));
    }

    const __m512i pair = _mm512_max_epi16(best, _mm512_rol_epi32(best, 16));

    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srai_epi32(pair, 16)), scales->unit);
}

// scores of 16 pages for R rows, each log_n greater; asks for the 16 after the next: the next would come too late from memory
template <int R>
static void monarch_score_parts(int64_t head_dim, const uint8_t * group, const struct monarch_avx512_query * query, float kq_scale, float log_n, float * dst, int64_t stride) {
    const int64_t n_bytes    = head_dim/4;
    const int64_t n_sums     = (n_bytes + MONARCH_SUM_BYTES - 1)/MONARCH_SUM_BYTES;
    const int64_t group_size = 2*monarch_group_size(head_dim);

    const uint8_t * scale_codes = group + monarch_summary_scale_at(0, 0);

    monarch_scales_prefetch(scale_codes + group_size, MONARCH_SUMMARY_PARTS*MONARCH_SUMMARY_GROUP);

    struct monarch_parts_scales scales;
    monarch_parts_get_scales(scale_codes, &scales);

    __m512i sums[2*MONARCH_SUMS_MAX][R];

    for (int half = 0; half < 2; ++half) {
        const uint8_t * codes = group + monarch_summary_code_at(head_dim, half*4, 0, 0);

        for (int64_t i = 0; i < n_sums; ++i) {
            const int64_t i_byte = i*MONARCH_SUM_BYTES;

            monarch_parts_add<R>(codes + i_byte*64, MONARCH_MIN(MONARCH_SUM_BYTES, n_bytes - i_byte), group_size,
                    query->tables + 2*i*MONARCH_TABLES*R*MONARCH_TABLE_SIZE, sums[half*n_sums + i]);
        }
    }

    const int   shift = monarch_tables_get_shift(n_sums);
    const float unit  = kq_scale/(float) (128 >> shift); // of what was halved

    for (int r = 0; r < R; ++r) {
        const __m512 best = monarch_parts_find_best(&sums[0][r], n_sums, R, &scales, shift);

        _mm512_storeu_ps(dst + r*stride, _mm512_fmadd_ps(best, _mm512_set1_ps(unit*query->scale[r][0]), _mm512_set1_ps(log_n)));
    }
}

// such pages are a group: their scores need no gather
static bool monarch_run_is_group(int32_t run) {
    return run >= 0 && run%MONARCH_SUMMARY_GROUP == 0;
}

// n table entries from i on: where they lie and how many tokens they hold
static void monarch_score_find_pages(const struct monarch_attend * attend, const float * log_table, int32_t i, int32_t n, struct monarch_avx512_work * avx512) {
    for (int32_t j = i; j < i + n; ++j) {
        avx512->used [attend->table[j].page/MONARCH_SUMMARY_GROUP] = 1;
        avx512->log_n[j] = log_table[monarch_mask_count(attend->table[j].mask)];
    }
    avx512->runs[i/MONARCH_LANES] = -1;
}

// The same for 16. Until pages are recycled they name consecutive physical ones, which need no gather, and most hold as many
// tokens as each other.
static void monarch_score_find_run(const struct monarch_attend * attend, const float * log_table, int32_t i, struct monarch_avx512_work * avx512) {
    const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i even = _mm512_slli_epi32(ramp, 1);

    const __m512i lo = _mm512_loadu_si512(attend->table + i);
    const __m512i hi = _mm512_loadu_si512(attend->table + i + 8);

    const int32_t  page = attend->table[i].page;
    const uint32_t mask = attend->table[i].mask;

    const __m512i pages = _mm512_permutex2var_epi32(lo, even, hi);
    const __m512i masks = _mm512_permutex2var_epi32(lo, _mm512_or_si512(even, _mm512_set1_epi32(1)), hi);

    const __mmask16 other = _mm512_cmpneq_epi32_mask(pages, _mm512_add_epi32(ramp, _mm512_set1_epi32(page))) |
                            _mm512_cmpneq_epi32_mask(masks, _mm512_set1_epi32((int32_t) mask));
    if (other) {
        monarch_score_find_pages(attend, log_table, i, MONARCH_LANES, avx512);
        return;
    }

    if (!monarch_run_is_group(page)) {
        avx512->used[page/MONARCH_SUMMARY_GROUP] = avx512->used[(page + MONARCH_LANES - 1)/MONARCH_SUMMARY_GROUP] = 1;
    }
    avx512->runs[i/MONARCH_LANES] = page;

    _mm512_storeu_ps(avx512->log_n + i, _mm512_set1_ps(log_table[monarch_mask_count(mask)]));
}

// of up to 16 table entries from i on: a row's scores from physical to table order, and the pages' token counts
static void monarch_score_gather(const struct monarch_attend * attend, const struct monarch_avx512_work * avx512, int32_t i, int32_t n, const float * scores, float * dst) {
    const int32_t run = avx512->runs[i/MONARCH_LANES];

    if (run >= 0) {
        _mm512_storeu_ps(dst + i, _mm512_add_ps(_mm512_loadu_ps(scores + run), _mm512_loadu_ps(avx512->log_n + i)));
        return;
    }
    for (int32_t j = i; j < i + n; ++j) {
        dst[j] = scores[attend->table[j].page] + avx512->log_n[j];
    }
}

typedef void (*monarch_score_kernel)(int64_t head_dim, const uint8_t * group, const struct monarch_avx512_query * query, float kq_scale, float log_n, float * dst, int64_t stride);

// of the kernel for at least n
static int64_t monarch_score_count_rows(int64_t n) {
    return n > 4 ? 8 : n > 1 ? 4 : 1;
}

static monarch_score_kernel monarch_score_find_kernel(int32_t scorer, int64_t n) {
    const bool has_parts = scorer == MONARCH_SCORER_PARTS;

    switch (monarch_score_count_rows(n)) {
        case 8:  return has_parts ? monarch_score_parts<8> : monarch_score_group<8>;
        case 4:  return has_parts ? monarch_score_parts<4> : monarch_score_group<4>;
        default: return has_parts ? monarch_score_parts<1> : monarch_score_group<1>;
    }
}

// of n rows; those that the kernel takes with them weigh nothing
static void monarch_score_query_init(const struct monarch_attend * attend, const struct monarch_row * rows, int64_t n, const struct monarch_avx512_work * avx512, struct monarch_avx512_query * query) {
    const int32_t head_dim  = attend->op.codec.head_dim;
    const int64_t n_tables  = monarch_tables_count(head_dim);
    const int64_t n_kernel  = monarch_score_count_rows(n);
    const bool    has_parts = attend->op.scorer == MONARCH_SCORER_PARTS;

    memset(query, 0, sizeof(*query));
    query->w      = avx512->q;
    query->tables = avx512->tables;

    if (has_parts && n < n_kernel) {
        memset(query->tables, 0, n_kernel*n_tables*MONARCH_TABLE_SIZE);
    }
    if (!has_parts) {
        memset(query->w + n*2*head_dim, 0, (n_kernel - n)*2*head_dim);
    }

    for (int64_t r = 0; r < n; ++r) {
        if (has_parts) {
            monarch_tables_init(attend, &rows[r], n_kernel, query->tables + r*MONARCH_TABLE_SIZE, query->scale[r]);
        } else {
            monarch_int8_quantize_weights(attend->op.scorer, head_dim, rows[r].q, query->w + r*2*head_dim, query->scale[r], query->sum[r]);
        }
    }
}

// n rows from ir on
static void monarch_score_rows(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work, int64_t ir, int64_t n, int32_t i0, int32_t i1, const struct monarch_avx512_work * avx512) {
    const int32_t head_dim = attend->op.codec.head_dim;
    const float   kq_scale = attend->op.kq_scale;
    const int64_t stride   = monarch_mass_stride(attend->n_pages_max);

    const auto score_group = monarch_score_find_kernel(attend->op.scorer, n);

    struct monarch_avx512_query query;
    monarch_score_query_init(attend, &work->rows[ir], n, avx512, &query);

    for (int32_t i = i0; i + MONARCH_LANES <= i1; i += MONARCH_LANES) {
        const int32_t run = avx512->runs[i/MONARCH_LANES];

        if (monarch_run_is_group(run)) {
            score_group(head_dim, monarch_attend_get_group(attend, head_kv, run), &query, kq_scale, avx512->log_n[i], work->rows[ir].mass + i, stride);
        }
    }

    for (int64_t g = 0; g < attend->n_pages_max/MONARCH_SUMMARY_GROUP; ++g) {
        if (avx512->used[g]) {
            const uint8_t * group = monarch_attend_get_group(attend, head_kv, g*MONARCH_SUMMARY_GROUP);

            score_group(head_dim, group, &query, kq_scale, 0.0f, avx512->scores + g*MONARCH_SUMMARY_GROUP, stride);
        }
    }

    // what was not scored in place
    for (int32_t i = i0; i < i1; i += MONARCH_LANES) {
        if (monarch_run_is_group(avx512->runs[i/MONARCH_LANES])) {
            continue;
        }
        for (int64_t r = 0; r < n; ++r) {
            monarch_score_gather(attend, avx512, i, MONARCH_MIN(MONARCH_LANES, i1 - i), avx512->scores + r*stride, work->rows[ir + r].mass);
        }
    }
}

static void monarch_avx512_score(const struct monarch_attend * attend, int64_t head_kv, struct monarch_work * work, int32_t i0, int32_t i1) {
    struct monarch_avx512_work avx512 = monarch_avx512_work_get(attend, work);

    float log_table[MONARCH_MAX_PAGE_SIZE + 1];
    monarch_score_fill_logs(attend->op.scorer, log_table);

    // groups that hold none of these pages are skipped
    memset(avx512.used, 0, attend->n_pages_max/MONARCH_SUMMARY_GROUP);

    int32_t i = i0;
    for (; i + MONARCH_LANES <= i1; i += MONARCH_LANES) {
        monarch_score_find_run(attend, log_table, i, &avx512);
    }
    if (i < i1) {
        monarch_score_find_pages(attend, log_table, i, i1 - i, &avx512);
    }

    for (int64_t ir = 0; ir < work->n_queries; ir += MONARCH_SCORE_ROWS) {
        monarch_score_rows(attend, head_kv, work, ir, MONARCH_MIN(MONARCH_SCORE_ROWS, work->n_queries - ir), i0, i1, &avx512);
    }
}

static float monarch_avx512_exp(int32_t n, float * x, float max) {
    __m512 sum = _mm512_setzero_ps();

    for (int32_t i = 0; i < n; i += MONARCH_LANES) {
        const __mmask16 valid = (__mmask16) ((1u << MONARCH_MIN(MONARCH_LANES, n - i)) - 1);
        const __m512    value = _mm512_maskz_mov_ps(valid, monarch_exp(_mm512_sub_ps(_mm512_maskz_loadu_ps(valid, x + i), _mm512_set1_ps(max))));

        _mm512_mask_storeu_ps(x + i, valid, value);
        sum = _mm512_add_ps(sum, value);
    }
    return _mm512_reduce_add_ps(sum);
}

const struct monarch_kernel monarch_kernel_avx512 = {
    /*.name          =*/ "avx512",
    /*.supports_hot  =*/ monarch_avx512_supports_hot,
    /*.supports_cold =*/ monarch_avx512_supports_cold,
    /*.work_size     =*/ monarch_avx512_work_size,
    /*.hot           =*/ monarch_avx512_hot,
    /*.cold          =*/ monarch_avx512_cold,
    /*.score         =*/ monarch_avx512_score,
    /*.exp           =*/ monarch_avx512_exp,
};

#else

const struct monarch_kernel monarch_kernel_avx512 = {};

#endif
