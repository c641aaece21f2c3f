// AArch64 with dot products of bytes (ARMv8.2-A with dotprod): most processors since 2018. Compiled with the flags for these
// instructions whatever the rest is compiled for, and used where the CPU has them.

#include "monarch-attend.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>
#include <stdint.h>

#ifdef __linux__
#include <sys/auxv.h>
#endif

#define MONARCH_LANES 4

typedef float32x4_t monarch_f32;
typedef int32x4_t   monarch_i32;
typedef int8x16_t   monarch_i8;
typedef uint16x8_t  monarch_i16;

static inline monarch_f32 monarch_f32_load    (const float * src)                           { return vld1q_f32(src); }
static inline monarch_f32 monarch_f32_load_f16(const void * src)                            { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8((const uint8_t *) src))); }
static inline void        monarch_f32_store   (float * dst, monarch_f32 a)                  { vst1q_f32(dst, a); }
static inline monarch_f32 monarch_f32_set1    (float a)                                     { return vdupq_n_f32(a); }
static inline monarch_f32 monarch_f32_add     (monarch_f32 a, monarch_f32 b)                { return vaddq_f32(a, b); }
static inline monarch_f32 monarch_f32_sub     (monarch_f32 a, monarch_f32 b)                { return vsubq_f32(a, b); }
static inline monarch_f32 monarch_f32_mul     (monarch_f32 a, monarch_f32 b)                { return vmulq_f32(a, b); }
static inline monarch_f32 monarch_f32_fma     (monarch_f32 a, monarch_f32 b, monarch_f32 c) { return vfmaq_f32(c, a, b); }
static inline monarch_f32 monarch_f32_max     (monarch_f32 a, monarch_f32 b)                { return vmaxq_f32(a, b); }
static inline monarch_f32 monarch_f32_floor   (monarch_f32 a)                               { return vrndmq_f32(a); }
static inline float       monarch_f32_sum     (monarch_f32 a)                               { return vaddvq_f32(a); }
static inline float       monarch_f32_top     (monarch_f32 a)                               { return vmaxvq_f32(a); }

static inline monarch_f32 monarch_f32_scale(monarch_f32 a, monarch_f32 b) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), vshlq_n_s32(vcvtq_s32_f32(b), 23)));
}

static inline void monarch_f32_transpose(monarch_f32 * x) {
    const float32x4_t a = vtrn1q_f32(x[0], x[1]);
    const float32x4_t b = vtrn2q_f32(x[0], x[1]);
    const float32x4_t c = vtrn1q_f32(x[2], x[3]);
    const float32x4_t d = vtrn2q_f32(x[2], x[3]);

    x[0] = vcombine_f32(vget_low_f32 (a), vget_low_f32 (c));
    x[1] = vcombine_f32(vget_low_f32 (b), vget_low_f32 (d));
    x[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    x[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
}

static inline monarch_i32 monarch_i32_set1  (int32_t a)     { return vdupq_n_s32(a); }
static inline monarch_f32 monarch_i32_to_f32(monarch_i32 a) { return vcvtq_f32_s32(a); }

static inline monarch_i8 monarch_i8_load  (const void * src)                   { return vld1q_s8((const int8_t *) src); }
static inline monarch_i8 monarch_i8_set1  (int8_t a)                           { return vdupq_n_s8(a); }
static inline monarch_i8 monarch_i8_set4  (int32_t a)                          { return vreinterpretq_s8_s32(vdupq_n_s32(a)); }
static inline monarch_i8 monarch_i8_or    (monarch_i8 a, monarch_i8 b)         { return vorrq_s8(a, b); }
static inline monarch_i8 monarch_i8_xor   (monarch_i8 a, monarch_i8 b)         { return veorq_s8(a, b); }
static inline monarch_i8 monarch_i8_low   (monarch_i8 a)                       { return vandq_s8(a, vdupq_n_s8(15)); }
static inline monarch_i8 monarch_i8_high  (monarch_i8 a)                       { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(a), 4)); }
static inline monarch_i8 monarch_i8_table (const int8_t * src)                 { return vld1q_s8(src); }
static inline monarch_i8 monarch_i8_lookup(monarch_i8 table, monarch_i8 index) { return vqtbl1q_s8(table, vreinterpretq_u8_s8(index)); }
static inline monarch_i8 monarch_i8_add   (monarch_i8 a, monarch_i8 b)         { return vaddq_s8(a, b); }

static inline monarch_i16 monarch_i16_set1(uint16_t a)                   { return vdupq_n_u16(a); }
static inline monarch_i16 monarch_i16_add (monarch_i16 a, monarch_i16 b) { return vaddq_u16(a, b); }
static inline monarch_i16 monarch_i16_even(monarch_i8 a)                 { return vandq_u16(vreinterpretq_u16_s8(a), vdupq_n_u16(0xff)); }
static inline monarch_i16 monarch_i16_odd (monarch_i8 a)                 { return vshrq_n_u16(vreinterpretq_u16_s8(a), 8); }

static inline monarch_f32 monarch_i16_to_f32(monarch_i16 a, int i) {
    const uint32x4_t pairs = vreinterpretq_u32_u16(a);

    return vcvtq_f32_u32(i == 0 ? vandq_u32(pairs, vdupq_n_u32(0xffff)) : vshrq_n_u32(pairs, 16));
}

static inline monarch_i8 monarch_i8_bits(const uint8_t * src, int i_quarter) {
    const uint8x16_t bits = vshlq_u8(vld1q_u8(src), vdupq_n_s8((int8_t) (-2*i_quarter)));

    return vreinterpretq_s8_u8(vshlq_n_u8(vandq_u8(bits, vdupq_n_u8(3)), 4));
}

static inline monarch_i8 monarch_i8_select(monarch_i8 codes, int i_bit, monarch_i8 a, monarch_i8 b) {
    return vbslq_s8(vtstq_s8(codes, vdupq_n_s8((int8_t) (1 << i_bit))), a, b);
}

static inline monarch_i8 monarch_i8_negate(monarch_i8 codes, int i_bit, monarch_i8 a) {
    return monarch_i8_select(codes, i_bit, vnegq_s8(a), a);
}

static inline monarch_i32 monarch_dot   (monarch_i32 c, monarch_i8 a, monarch_i8 b) { return vdotq_s32(c, a, b); }
static inline monarch_i32 monarch_dot_u7(monarch_i32 c, monarch_i8 a, monarch_i8 b) { return vdotq_s32(c, a, b); }

static inline void monarch_round(const monarch_f32 * src, int8_t * dst) {
    const int16x8_t lo = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(src[0])), vmovn_s32(vcvtnq_s32_f32(src[1])));
    const int16x8_t hi = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(src[2])), vmovn_s32(vcvtnq_s32_f32(src[3])));

    vst1q_s8(dst, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}

#include "monarch-attend-simd.h"

static bool monarch_neon_has_cpu() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__APPLE__)
    return true; // since M1
#else
    return false;
#endif
}

static bool monarch_neon_is_there() {
    static const bool res = monarch_neon_has_cpu();

    return res;
}

static bool monarch_neon_supports_hot(const struct monarch_op_params * op, enum ggml_type type_k, enum ggml_type type_v) {
    GGML_UNUSED(op);
    GGML_UNUSED(type_k);
    GGML_UNUSED(type_v);

    return monarch_neon_is_there();
}

static bool monarch_neon_supports_cold(const struct monarch_op_params * op) {
    return monarch_neon_is_there() && monarch_simd_supports_cold(op);
}

const struct monarch_kernel monarch_kernel_neon = {
    /*.name          =*/ "neon",
    /*.supports_hot  =*/ monarch_neon_supports_hot,
    /*.supports_cold =*/ monarch_neon_supports_cold,
    /*.work_size     =*/ monarch_simd_work_size,
    /*.hot           =*/ monarch_simd_hot,
    /*.cold          =*/ monarch_simd_cold,
    /*.score         =*/ monarch_simd_score,
    /*.exp           =*/ monarch_simd_exp,
};

#else

const struct monarch_kernel monarch_kernel_neon = {};

#endif
