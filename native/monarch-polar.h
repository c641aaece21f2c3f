#pragma once

// Arithmetic of the cold records (monarch-codec.h) as the CPU and CUDA share it: a value, a pair or a quad at a time.
// Sums are the caller's, in the order that monarch-codec.cpp keeps.

#include "monarch-codec-tables.h"
#include "monarch-codec.h"
#include "monarch-f16.h"
#include "monarch-hd.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MONARCH_N_FACTORS 16 // scales tried
#define MONARCH_N_LANES   8  // partial sums of a sum over a record
#define MONARCH_CHUNK     64 // codes that are packed together

// a table by its index, where constants fold
#define MONARCH_POLAR_TABLE(name, ...)               \
    MONARCH_HD static inline float name(int32_t i) { \
        static constexpr float table[] = { __VA_ARGS__ }; \
        return table[i];                             \
    }

template <int bits> struct monarch_polar;

template <> struct monarch_polar<2> {
    static constexpr float unit = MONARCH_UNIT_2;
    MONARCH_POLAR_TABLE(radius, MONARCH_RADIUS_2)
    MONARCH_POLAR_TABLE(cosine, MONARCH_COSINE_2)
    MONARCH_POLAR_TABLE(sine,   MONARCH_SINE_2)
};

template <> struct monarch_polar<3> {
    static constexpr float unit = MONARCH_UNIT_3;
    MONARCH_POLAR_TABLE(radius, MONARCH_RADIUS_3)
    MONARCH_POLAR_TABLE(cosine, MONARCH_COSINE_3)
    MONARCH_POLAR_TABLE(sine,   MONARCH_SINE_3)
};

template <> struct monarch_polar<4> {
    static constexpr float unit = MONARCH_UNIT_4;
    MONARCH_POLAR_TABLE(radius, MONARCH_RADIUS_4)
    MONARCH_POLAR_TABLE(cosine, MONARCH_COSINE_4)
    MONARCH_POLAR_TABLE(sine,   MONARCH_SINE_4)
};

MONARCH_POLAR_TABLE(monarch_scale_factor, MONARCH_SCALE_FACTORS)

//
// rotation
//

// the greatest power of two that fits; the rest is covered by a second block, which overlaps the first
MONARCH_HD static inline int32_t monarch_rotation_size(int32_t head_dim) {
    int32_t n = 1;
    while (2*n <= head_dim) {
        n *= 2;
    }
    return n;
}

// value number i of all that are flipped
MONARCH_HD static inline float monarch_rotation_flip(uint32_t i, float x) {
    uint32_t h = i*0x9E3779B1u;
    h ^= h >> 15;
    h *= 0x85EBCA77u;
    h ^= h >> 13;
    return h & 1 ? -x : x;
}

// transforms the lowest bit of the index and makes it the highest: pair i of a stage
MONARCH_HD static inline void monarch_rotation_stage(int32_t half, int32_t i, const float * src, float * dst) {
    const float a = src[2*i + 0];
    const float b = src[2*i + 1];
    dst[i]        = a + b;
    dst[i + half] = a - b;
}

MONARCH_HD static inline float monarch_rotation_scale(int32_t n) {
    return 1.0f/sqrtf((float) n);
}

//
// points
//

// the point of a code, both coordinates
template <int bits>
MONARCH_HD static inline void monarch_polar_point(int32_t code, float & x, float & y) {
    typedef monarch_polar<bits> P;

    const int32_t direction = code & ((2 << bits) - 1);
    const float   radius    = P::radius(code >> bits);

    x = rintf(radius*P::cosine(direction)*P::unit);
    y = rintf(radius*P::sine  (direction)*P::unit);
}

//
// pairs
//

// the direction of one parity with the greatest dot product: |x| and |y| choose among those of a quadrant, which has both
// axes (even) or none (odd); signs turn the angle back
template <int bits, int parity>
MONARCH_HD static inline void monarch_polar_find_angle(float x, float y, float & dot, int32_t & index) {
    typedef monarch_polar<bits> P;
    constexpr int n          = 1 << bits;
    constexpr int n_quadrant = n/4 + 1 - parity;

    const float ax = fabsf(x);
    const float ay = fabsf(y);

    float   best   = ax*P::cosine(parity*n) + ay*P::sine(parity*n);
    int32_t i_best = 0;
MONARCH_UNROLL
    for (int32_t i = 1; i < n_quadrant; ++i) {
        const float other = ax*P::cosine(parity*n + i) + ay*P::sine(parity*n + i);
        i_best = other > best ? i     : i_best;
        best   = other > best ? other : best;
    }
    i_best = x < 0.0f ? n/2 - parity - i_best : i_best;
    i_best = y < 0.0f ? n   - parity - i_best : i_best;

    dot   = best;
    index = i_best & (n - 1);
}

// the ring of one parity nearest to a distance
template <int bits, int parity>
MONARCH_HD static inline void monarch_polar_find_ring(float distance, float & radius, int32_t & ring) {
    typedef monarch_polar<bits> P;
    constexpr int n = 1 << bits;

    radius = P::radius(parity);
    ring   = parity;
MONARCH_UNROLL
    for (int32_t i = parity + 2; i < n; i += 2) {
        const bool farther = distance > 0.5f*(P::radius(i - 2) + P::radius(i));
        radius = farther ? P::radius(i) : radius;
        ring  += 2*farther; // not a second choice: compilers make branches of those
    }
}

// the error is the squared length of the pair less this
MONARCH_HD static inline float monarch_polar_gain(float distance, float radius) {
    return radius*(distance + distance - radius);
}

// a pair's part in the least-squares fit of a scale; even, odd: its dot products with the best direction of either parity
template <int bits>
MONARCH_HD static inline void monarch_polar_add_fit(float even, float odd, float inverse, float & dots, float & norms) {
    float   radius_even;
    float   radius_odd;
    int32_t ring;
    monarch_polar_find_ring<bits, 0>(even*inverse, radius_even, ring);
    monarch_polar_find_ring<bits, 1>(odd *inverse, radius_odd,  ring);

    const bool  is_odd = monarch_polar_gain(odd*inverse, radius_odd) > monarch_polar_gain(even*inverse, radius_even);
    const float radius = is_odd ? radius_odd : radius_even;

    dots  += radius*(is_odd ? odd : even);
    norms += radius*radius;
}

// which of the fits of all factors has the least error
MONARCH_HD static inline float monarch_polar_best_fit(const float * dots, const float * norms) {
    int32_t best = 0;
    float   gain = dots[0]*dots[0]/norms[0];
    for (int32_t i = 1; i < MONARCH_N_FACTORS; ++i) {
        const float g = dots[i]*dots[i]/norms[i];
        best = g > gain ? i : best;
        gain = g > gain ? g : gain;
    }
    return dots[best]/norms[best];
}

// the code of a pair, from the nearest ring of either parity; even, odd: distances
template <int bits>
MONARCH_HD static inline uint8_t monarch_polar_choose_code(
        float even, float radius_even, int32_t ring_even, int32_t angle_even,
        float odd,  float radius_odd,  int32_t ring_odd,  int32_t angle_odd) {
    const int32_t code_even = ring_even << bits | angle_even;
    const int32_t code_odd  = ring_odd  << bits | angle_odd;

    return (uint8_t) (monarch_polar_gain(odd, radius_odd) > monarch_polar_gain(even, radius_even) ? code_odd : code_even);
}

MONARCH_HD static inline float monarch_sum_lanes(const float * lanes) {
    float sum = 0.0f;
    for (int32_t j = 0; j < MONARCH_N_LANES; ++j) {
        sum += lanes[j];
    }
    return sum;
}

//
// where codes lie
//

// quads: four codes side by side, of four pairs of a token in K and of four tokens of a pair in V
MONARCH_HD static inline int32_t monarch_quad_k(int32_t page_size, int32_t t, int32_t p) {
    return p/4*page_size + t;
}

MONARCH_HD static inline int32_t monarch_quad_v(int32_t n_pairs, int32_t t, int32_t p) {
    return t/4*n_pairs + p;
}

// all parts of a block and of a group are aligned for these, and a device loads byte by byte what it does not know to be
MONARCH_HD static inline uint32_t monarch_load_u32(const uint8_t * src) {
    uint32_t x;
#ifdef MONARCH_ALIGNED_LOADS
    x = *(const uint32_t *) src;
#else
    memcpy(&x, src, sizeof(x));
#endif
    return x;
}

MONARCH_HD static inline uint16_t monarch_load_u16(const uint8_t * src) {
    uint16_t x;
#ifdef MONARCH_ALIGNED_LOADS
    x = *(const uint16_t *) src;
#else
    memcpy(&x, src, sizeof(x));
#endif
    return x;
}

// a quad's four codes as the bytes of a word, the first lowest
MONARCH_HD static inline uint32_t monarch_quad_load(int32_t bits, const uint8_t * codes, int32_t i_quad) {
    const uint8_t * chunk = codes + i_quad/16*(MONARCH_CHUNK/4*bits);
    const int32_t   j     = i_quad%16*4;

    if (bits == 4) {
        return monarch_load_u32(chunk + j);
    }
    uint32_t quad = monarch_load_u32(chunk + j%32) >> j/32*4 & 0x0f0f0f0fu;
    if (bits == 3) {
        quad |= (monarch_load_u32(chunk + 32 + j%16) >> j/16*2 & 0x03030303u) << 4;
    }
    return quad;
}

// byte j of a packed chunk; it has MONARCH_CHUNK*bits/4
MONARCH_HD static inline uint8_t monarch_chunk_byte(int32_t bits, const uint8_t * codes, int32_t j) {
    if (bits == 4) {
        return codes[j];
    }
    if (j < 32) {
        return (codes[j] & 15) | (codes[j + 32] & 15) << 4;
    }
    j -= 32;
    return codes[j] >> 4 | codes[j + 16] >> 4 << 2 | codes[j + 32] >> 4 << 4 | codes[j + 48] >> 4 << 6;
}
