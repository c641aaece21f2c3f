#pragma once

// f32 <-> f16, round to nearest even, the same bits with and without F16C and on CUDA. No ggml, no tables.

#include "monarch-hd.h"

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#elif defined(__F16C__)
#define MONARCH_F16C
#include <immintrin.h>
#endif

#define MONARCH_F16_MAX 65504.0f

// NaN becomes zero and everything else fits into f16: one bad value must not poison a page
MONARCH_HD static inline float monarch_f16_clamp(float x) {
    x = x == x ? x : 0.0f;
    x = x < MONARCH_F16_MAX ? x : MONARCH_F16_MAX;
    return x > -MONARCH_F16_MAX ? x : -MONARCH_F16_MAX;
}

// x: at most MONARCH_F16_MAX in magnitude
MONARCH_HD static inline uint16_t monarch_f32_to_f16(float x) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(x));
#elif defined(MONARCH_F16C)
    return (uint16_t) _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));

    const uint32_t sign     = bits >> 16 & 0x8000;
    const uint32_t exponent = bits >> 23 & 0xff;
    const uint32_t mantissa = (bits & 0x7fffff) | 0x800000;

    if (exponent < 102) {
        return (uint16_t) sign; // less than half of the least subnormal
    }

    const uint32_t drop  = exponent < 113 ? 126 - exponent : 13; // subnormals lose more bits
    const uint32_t kept  = mantissa >> drop;
    const uint32_t rest  = mantissa & ((1u << drop) - 1);
    const uint32_t half  = 1u << (drop - 1);
    const uint32_t round = rest > half || (rest == half && (kept & 1));

    // kept holds the implicit bit, which adds one to the exponent; so does a carry out of the mantissa
    const uint32_t base = exponent < 113 ? 0 : (exponent - 113) << 10;
    return (uint16_t) (sign | (base + kept + round));
#endif
}

MONARCH_HD static inline float monarch_f16_to_f32(uint16_t h) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(h));
#elif defined(MONARCH_F16C)
    return _cvtsh_ss(h);
#else
    const uint32_t sign      = (uint32_t) (h & 0x8000) << 16;
    const uint32_t magnitude = (uint32_t) (h & 0x7fff) << 13;

    // as an f32 the same bits are 2^112 times too small, subnormals included
    float x;
    memcpy(&x, &magnitude, sizeof(x));
    x *= 5192296858534827628530496329220096.0f; // 2^112

    uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    bits |= sign | (magnitude >= 0x7c00 << 13 ? 0x7f800000 : 0); // infinity and NaN stay what they are
    memcpy(&x, &bits, sizeof(x));
    return x;
#endif
}
