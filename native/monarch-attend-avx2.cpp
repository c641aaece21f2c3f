// AVX2 with FMA and F16C, which every processor with AVX2 has. Compiled with the flags for these instructions whatever the
// rest is compiled for, and used where the CPU has them.

#include "monarch-attend.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#include <stdint.h>

#define MONARCH_LANES 8

typedef __m256  monarch_f32;
typedef __m256i monarch_i32;
typedef __m256i monarch_i8;
typedef __m256i monarch_i16;

static inline monarch_f32 monarch_f32_load    (const float * src)                            { return _mm256_loadu_ps(src); }
static inline monarch_f32 monarch_f32_load_f16(const void * src)                             { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) src)); }
static inline void        monarch_f32_store   (float * dst, monarch_f32 a)                   { _mm256_storeu_ps(dst, a); }
static inline monarch_f32 monarch_f32_set1    (float a)                                      { return _mm256_set1_ps(a); }
static inline monarch_f32 monarch_f32_add     (monarch_f32 a, monarch_f32 b)                 { return _mm256_add_ps(a, b); }
static inline monarch_f32 monarch_f32_sub     (monarch_f32 a, monarch_f32 b)                 { return _mm256_sub_ps(a, b); }
static inline monarch_f32 monarch_f32_mul     (monarch_f32 a, monarch_f32 b)                 { return _mm256_mul_ps(a, b); }
static inline monarch_f32 monarch_f32_fma     (monarch_f32 a, monarch_f32 b, monarch_f32 c)  { return _mm256_fmadd_ps(a, b, c); }
static inline monarch_f32 monarch_f32_max     (monarch_f32 a, monarch_f32 b)                 { return _mm256_max_ps(a, b); }
static inline monarch_f32 monarch_f32_floor   (monarch_f32 a)                                { return _mm256_floor_ps(a); }

static inline monarch_f32 monarch_f32_scale(monarch_f32 a, monarch_f32 b) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(b), 23)));
}

static inline float monarch_f32_sum(monarch_f32 a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    x = _mm_add_ss(x, _mm_movehdup_ps(x));
    return _mm_cvtss_f32(x);
}

static inline float monarch_f32_top(monarch_f32 a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    x = _mm_max_ss(x, _mm_movehdup_ps(x));
    return _mm_cvtss_f32(x);
}

static inline void monarch_f32_transpose(monarch_f32 * x) {
    monarch_f32 y[8];

    for (int i = 0; i < 8; i += 4) {
        const __m256 a = _mm256_unpacklo_ps(x[i + 0], x[i + 1]);
        const __m256 b = _mm256_unpackhi_ps(x[i + 0], x[i + 1]);
        const __m256 c = _mm256_unpacklo_ps(x[i + 2], x[i + 3]);
        const __m256 d = _mm256_unpackhi_ps(x[i + 2], x[i + 3]);

        y[i + 0] = _mm256_shuffle_ps(a, c, 0x44);
        y[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
        y[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
        y[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
    }

    // 128-bit lane l of y[4*r + c] holds column 4*l + c of rows 4*r to 4*r + 3
    for (int c = 0; c < 4; ++c) {
        x[c + 0] = _mm256_permute2f128_ps(y[c], y[c + 4], 0x20);
        x[c + 4] = _mm256_permute2f128_ps(y[c], y[c + 4], 0x31);
    }
}

static inline monarch_i32 monarch_i32_set1  (int32_t a)     { return _mm256_set1_epi32(a); }
static inline monarch_f32 monarch_i32_to_f32(monarch_i32 a) { return _mm256_cvtepi32_ps(a); }

static inline monarch_i8 monarch_i8_load  (const void * src)                       { return _mm256_loadu_si256((const __m256i *) src); }
static inline monarch_i8 monarch_i8_set1  (int8_t a)                               { return _mm256_set1_epi8(a); }
static inline monarch_i8 monarch_i8_set4  (int32_t a)                              { return _mm256_set1_epi32(a); }
static inline monarch_i8 monarch_i8_or    (monarch_i8 a, monarch_i8 b)             { return _mm256_or_si256(a, b); }
static inline monarch_i8 monarch_i8_xor   (monarch_i8 a, monarch_i8 b)             { return _mm256_xor_si256(a, b); }
static inline monarch_i8 monarch_i8_low   (monarch_i8 a)                           { return _mm256_and_si256(a, _mm256_set1_epi8(15)); }
static inline monarch_i8 monarch_i8_high  (monarch_i8 a)                           { return monarch_i8_low(_mm256_srli_epi16(a, 4)); }
static inline monarch_i8 monarch_i8_table (const int8_t * src)                     { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) src)); }
static inline monarch_i8 monarch_i8_lookup(monarch_i8 table, monarch_i8 index)     { return _mm256_shuffle_epi8(table, index); }
static inline monarch_i8 monarch_i8_add   (monarch_i8 a, monarch_i8 b)             { return _mm256_add_epi8(a, b); }

static inline monarch_i16 monarch_i16_set1(int16_t a)                    { return _mm256_set1_epi16(a); }
static inline monarch_i16 monarch_i16_add (monarch_i16 a, monarch_i16 b) { return _mm256_add_epi16(a, b); }
static inline monarch_i16 monarch_i16_even(monarch_i8 a)                 { return _mm256_and_si256(a, _mm256_set1_epi16(0xff)); }
static inline monarch_i16 monarch_i16_odd (monarch_i8 a)                 { return _mm256_srli_epi16(a, 8); }

static inline monarch_f32 monarch_i16_to_f32(monarch_i16 a, int i) {
    return _mm256_cvtepi32_ps(i == 0 ? _mm256_and_si256(a, _mm256_set1_epi32(0xffff)) : _mm256_srli_epi32(a, 16));
}

static inline monarch_i8 monarch_i8_bits(const uint8_t * src, int i_quarter) {
    const __m256i shifts = _mm256_set_epi64x(2*i_quarter + 2, 2*i_quarter + 2, 2*i_quarter, 2*i_quarter);
    const __m256i bits   = _mm256_srlv_epi64(monarch_i8_table((const int8_t *) src), shifts);

    return _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi8(3)), 4);
}

static inline monarch_i8 monarch_i8_select(monarch_i8 codes, int i_bit, monarch_i8 a, monarch_i8 b) {
    return _mm256_blendv_epi8(b, a, _mm256_slli_epi16(codes, 7 - i_bit));
}

static inline monarch_i8 monarch_i8_negate(monarch_i8 codes, int i_bit, monarch_i8 a) {
    return _mm256_sign_epi8(a, _mm256_or_si256(_mm256_slli_epi16(codes, 7 - i_bit), _mm256_set1_epi8(1)));
}

// sums of two products fit into 16 bits: 2*128*127 < 32768
static inline monarch_i32 monarch_dot_u8(monarch_i32 c, monarch_i8 a, monarch_i8 b) {
    return _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
}

static inline monarch_i32 monarch_dot(monarch_i32 c, monarch_i8 a, monarch_i8 b) {
    return monarch_dot_u8(c, _mm256_abs_epi8(a), _mm256_sign_epi8(b, a));
}

static inline monarch_i32 monarch_dot_u7(monarch_i32 c, monarch_i8 a, monarch_i8 b) {
    return monarch_dot_u8(c, a, b);
}

static inline void monarch_round(const monarch_f32 * src, int8_t * dst) {
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(src[0]), _mm256_cvtps_epi32(src[1])); // 0-3 8-11 4-7 12-15
    const __m256i order = _mm256_permute4x64_epi64(words, 0xd8);

    _mm_storeu_si128((__m128i *) dst, _mm_packs_epi16(_mm256_castsi256_si128(order), _mm256_extracti128_si256(order, 1)));
}

#include "monarch-attend-simd.h"

static bool monarch_avx2_is_there() {
    static const bool res = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");

    return res;
}

static bool monarch_avx2_supports_hot(const struct monarch_op_params * op, enum ggml_type type_k, enum ggml_type type_v) {
    GGML_UNUSED(op);
    GGML_UNUSED(type_k);
    GGML_UNUSED(type_v);

    return monarch_avx2_is_there();
}

static bool monarch_avx2_supports_cold(const struct monarch_op_params * op) {
    return monarch_avx2_is_there() && monarch_simd_supports_cold(op);
}

const struct monarch_kernel monarch_kernel_avx2 = {
    /*.name          =*/ "avx2",
    /*.supports_hot  =*/ monarch_avx2_supports_hot,
    /*.supports_cold =*/ monarch_avx2_supports_cold,
    /*.work_size     =*/ monarch_simd_work_size,
    /*.hot           =*/ monarch_simd_hot,
    /*.cold          =*/ monarch_simd_cold,
    /*.score         =*/ monarch_simd_score,
    /*.exp           =*/ monarch_simd_exp,
};

#else

const struct monarch_kernel monarch_kernel_avx2 = {};

#endif
