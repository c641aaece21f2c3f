#include "monarch-codec.h"

#include "monarch-codec-tables.h"
#include "monarch-f16.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

// The numpy reference in monarch_llamacpp/codec.py gives the same bytes: every sum has a fixed order, ties go to the lower
// index, and this file is compiled with -ffp-contract=off and without -ffast-math.

#define MAX_PAIRS  (MONARCH_MAX_HEAD_DIM/2)
#define MAX_CODES  (MONARCH_MAX_PAGE_SIZE*MAX_PAIRS)
#define CHUNK_SIZE 64 // codes that are packed together
#define N_LANES    8

static const float scale_factors[] = { MONARCH_SCALE_FACTORS };

#define N_FACTORS ((int) (sizeof(scale_factors)/sizeof(scale_factors[0])))

template <int bits> struct polar;

template <> struct polar<2> {
    static constexpr float unit = MONARCH_UNIT_2;
    static constexpr float radius[ 4] = { MONARCH_RADIUS_2 };
    static constexpr float cosine[ 8] = { MONARCH_COSINE_2 };
    static constexpr float sine  [ 8] = { MONARCH_SINE_2   };
};

template <> struct polar<3> {
    static constexpr float unit = MONARCH_UNIT_3;
    static constexpr float radius[ 8] = { MONARCH_RADIUS_3 };
    static constexpr float cosine[16] = { MONARCH_COSINE_3 };
    static constexpr float sine  [16] = { MONARCH_SINE_3   };
};

template <> struct polar<4> {
    static constexpr float unit = MONARCH_UNIT_4;
    static constexpr float radius[16] = { MONARCH_RADIUS_4 };
    static constexpr float cosine[32] = { MONARCH_COSINE_4 };
    static constexpr float sine  [32] = { MONARCH_SINE_4   };
};

struct record {
    uint8_t  codes   [MAX_PAIRS];
    uint8_t  negative[MONARCH_MAX_HEAD_DIM]; // sign of the residual
    uint16_t scale;
    uint16_t step;
};

// the best angle of a pair on even and on odd rings, and the dot product of the pair with its direction
struct angles {
    float   dot  [2][MAX_PAIRS];
    int32_t index[2][MAX_PAIRS];
};

//
// rotation
//

// the greatest power of two that fits; the rest is covered by a second block, which overlaps the first
static int32_t rotation_size(int32_t head_dim) {
    int32_t n = 1;
    while (2*n <= head_dim) {
        n *= 2;
    }
    return n;
}

static void flip_signs(uint32_t first, int32_t n, float * x) {
    for (int32_t i = 0; i < n; ++i) {
        uint32_t h = (first + (uint32_t) i)*0x9E3779B1u;
        h ^= h >> 15;
        h *= 0x85EBCA77u;
        h ^= h >> 13;
        x[i] = h & 1 ? -x[i] : x[i];
    }
}

// transforms the lowest bit of the index and makes it the highest
static void walsh_hadamard_stage(int32_t half, const float * __restrict src, float * __restrict dst) {
    for (int32_t i = 0; i < half; ++i) {
        const float a = src[2*i + 0];
        const float b = src[2*i + 1];
        dst[i]        = a + b;
        dst[i + half] = a - b;
    }
}

// one stage for every bit of the index, after which the bits are in order again
static void walsh_hadamard(int32_t n, float * x) {
    float buffer[MONARCH_MAX_HEAD_DIM];

    float * src = x;
    float * dst = buffer;
    for (int32_t size = 1; size < n; size *= 2) {
        walsh_hadamard_stage(n/2, src, dst);
        std::swap(src, dst);
    }
    const float scale = 1.0f/sqrtf((float) n);
    for (int32_t i = 0; i < n; ++i) {
        x[i] = src[i]*scale;
    }
}

void monarch_codec_rotate(int32_t head_dim, float * x) {
    const int32_t n = rotation_size(head_dim);

    flip_signs(0, n, x);
    walsh_hadamard(n, x);
    if (n < head_dim) {
        flip_signs(n, n, x + head_dim - n);
        walsh_hadamard(n, x + head_dim - n);
    }
}

void monarch_codec_unrotate(int32_t head_dim, float * x) {
    const int32_t n = rotation_size(head_dim);

    if (n < head_dim) {
        walsh_hadamard(n, x + head_dim - n);
        flip_signs(n, n, x + head_dim - n);
    }
    walsh_hadamard(n, x);
    flip_signs(0, n, x);
}

//
// points
//

template <int bits>
static monarch_codec_points make_points() {
    typedef polar<bits> P;

    monarch_codec_points points = {};
    for (int32_t code = 0; code < 1 << 2*bits; ++code) {
        const int32_t direction = code & ((2 << bits) - 1);
        const float   radius    = P::radius[code >> bits];
        points.x[code] = (int8_t) rintf(radius*P::cosine[direction]*P::unit);
        points.y[code] = (int8_t) rintf(radius*P::sine  [direction]*P::unit);
    }
    return points;
}

template <int bits>
static const monarch_codec_points & points_of_bits() {
    static const monarch_codec_points points = make_points<bits>();
    return points;
}

const monarch_codec_points * monarch_codec_get_points(int32_t bits) {
    switch (bits) {
        case 2: return &points_of_bits<2>();
        case 3: return &points_of_bits<3>();
        case 4: return &points_of_bits<4>();
    }
    return nullptr;
}

//
// pairs
//

// the directions of one parity with the greatest dot products: |x| and |y| choose among those of a quadrant, which has both
// axes (even) or none (odd); signs turn the angle back
template <int bits, int parity>
static void find_angles(int32_t n_pairs, const float * x, const float * y, float * dots, int32_t * indices) {
    typedef polar<bits> P;
    constexpr int n          = 1 << bits;
    constexpr int n_quadrant = n/4 + 1 - parity;

    for (int32_t p = 0; p < n_pairs; ++p) {
        const float ax = fabsf(x[p]);
        const float ay = fabsf(y[p]);

        float   best  = ax*P::cosine[parity*n] + ay*P::sine[parity*n];
        int32_t index = 0;
#pragma GCC unroll 8
        for (int32_t i = 1; i < n_quadrant; ++i) {
            const float dot = ax*P::cosine[parity*n + i] + ay*P::sine[parity*n + i];
            index = dot > best ? i   : index;
            best  = dot > best ? dot : best;
        }
        index = x[p] < 0.0f ? n/2 - parity - index : index;
        index = y[p] < 0.0f ? n   - parity - index : index;

        dots   [p] = best;
        indices[p] = index & (n - 1);
    }
}

// the ring of one parity nearest to a distance
template <int bits, int parity>
static inline void pair_find_ring(float distance, float & radius, int32_t & ring) {
    typedef polar<bits> P;
    constexpr int n = 1 << bits;

    radius = P::radius[parity];
    ring   = parity;
#pragma GCC unroll 16
    for (int32_t i = parity + 2; i < n; i += 2) {
        const bool farther = distance > 0.5f*(P::radius[i - 2] + P::radius[i]);
        radius = farther ? P::radius[i] : radius;
        ring  += 2*farther; // not a second choice: compilers make branches of those
    }
}

// the error is the squared length of the pair less this
static inline float pair_gain(float distance, float radius) {
    return radius*(distance + distance - radius);
}

//
// records
//

static float sum_of_lanes(const float * x, int32_t n) {
    float lanes[N_LANES] = { 0 };
    for (int32_t i = 0; i < n; i += N_LANES) {
        for (int32_t j = 0; j < N_LANES; ++j) {
            lanes[j] += x[i + j];
        }
    }
    float sum = 0.0f;
    for (int32_t j = 0; j < N_LANES; ++j) {
        sum += lanes[j];
    }
    return sum;
}

static float root_mean_square(const float * x, int32_t n) {
    float squares[MONARCH_MAX_HEAD_DIM];
    for (int32_t i = 0; i < n; ++i) {
        squares[i] = x[i]*x[i];
    }
    return sqrtf(sum_of_lanes(squares, n)/(float) n);
}

// every factor assigns rings at rms*factor and refits the scale by least squares; the least error wins
template <int bits>
static float find_scale(int32_t n_pairs, const angles & a, float rms) {
    float inverse[N_FACTORS];
    float dots   [N_FACTORS];
    float norms  [N_FACTORS];
    for (int32_t i = 0; i < N_FACTORS; ++i) {
        inverse[i] = 1.0f/(rms*scale_factors[i]);
        dots   [i] = 0.0f;
        norms  [i] = 0.0f;
    }
    for (int32_t p = 0; p < n_pairs; ++p) {
        const float even = a.dot[0][p];
        const float odd  = a.dot[1][p];
        for (int32_t i = 0; i < N_FACTORS; ++i) {
            float   radius_even;
            float   radius_odd;
            int32_t ring;
            pair_find_ring<bits, 0>(even*inverse[i], radius_even, ring);
            pair_find_ring<bits, 1>(odd *inverse[i], radius_odd,  ring);

            const bool  is_odd = pair_gain(odd*inverse[i], radius_odd) > pair_gain(even*inverse[i], radius_even);
            const float radius = is_odd ? radius_odd : radius_even;
            dots [i] += radius*(is_odd ? odd : even);
            norms[i] += radius*radius;
        }
    }
    int32_t best = 0;
    float   gain = dots[0]*dots[0]/norms[0];
    for (int32_t i = 1; i < N_FACTORS; ++i) {
        const float g = dots[i]*dots[i]/norms[i];
        best = g > gain ? i : best;
        gain = g > gain ? g : gain;
    }
    return dots[best]/norms[best];
}

template <int bits, int parity>
static void find_rings(int32_t n_pairs, const float * dots, float inverse, float * radii, int32_t * rings) {
    for (int32_t p = 0; p < n_pairs; ++p) {
        float   radius;
        int32_t ring;
        pair_find_ring<bits, parity>(dots[p]*inverse, radius, ring);
        radii[p] = radius;
        rings[p] = ring;
    }
}

template <int bits>
static void find_codes(int32_t n_pairs, const angles & a, float scale, uint8_t * codes) {
    const float inverse = 1.0f/scale;

    float   radii[2][MAX_PAIRS];
    int32_t rings[2][MAX_PAIRS];
    find_rings<bits, 0>(n_pairs, a.dot[0], inverse, radii[0], rings[0]);
    find_rings<bits, 1>(n_pairs, a.dot[1], inverse, radii[1], rings[1]);

    for (int32_t p = 0; p < n_pairs; ++p) {
        const int32_t even = rings[0][p] << bits | a.index[0][p];
        const int32_t odd  = rings[1][p] << bits | a.index[1][p];

        const float gain_even = pair_gain(a.dot[0][p]*inverse, radii[0][p]);
        const float gain_odd  = pair_gain(a.dot[1][p]*inverse, radii[1][p]);
        codes[p] = (uint8_t) (gain_odd > gain_even ? odd : even);
    }
}

// the integer points are not quite the polar ones, so their scale is fitted by itself
template <int bits>
static float fit_scale(int32_t n_pairs, const float * x, const uint8_t * codes) {
    const monarch_codec_points & points = points_of_bits<bits>();

    float   dots[MAX_PAIRS];
    int32_t norm = 0;
    for (int32_t p = 0; p < n_pairs; ++p) {
        const int32_t px = points.x[codes[p]];
        const int32_t py = points.y[codes[p]];

        dots[p] = x[p]*(float) px + x[p + n_pairs]*(float) py;
        norm   += px*px + py*py;
    }
    return sum_of_lanes(dots, n_pairs)/(float) norm;
}

template <int bits>
static void record_encode_codes(int32_t head_dim, const float * x, record & r) {
    const int32_t n_pairs = head_dim/2;

    const float rms = root_mean_square(x, head_dim);

    r.scale = 0;
    if (rms >= MONARCH_LEAST_RMS) {
        angles a;
        find_angles<bits, 0>(n_pairs, x, x + n_pairs, a.dot[0], a.index[0]);
        find_angles<bits, 1>(n_pairs, x, x + n_pairs, a.dot[1], a.index[1]);

        find_codes<bits>(n_pairs, a, find_scale<bits>(n_pairs, a, rms), r.codes);
        r.scale = monarch_f32_to_f16(fit_scale<bits>(n_pairs, x, r.codes));
        find_codes<bits>(n_pairs, a, monarch_f16_to_f32(r.scale)*polar<bits>::unit, r.codes);
    }
    if (r.scale == 0) {
        memset(r.codes, 0, n_pairs);
    }
}

template <int bits>
static void record_decode_codes(int32_t head_dim, const record & r, float * x) {
    const monarch_codec_points & points = points_of_bits<bits>();

    const int32_t n_pairs = head_dim/2;
    const float   scale   = monarch_f16_to_f32(r.scale);
    for (int32_t p = 0; p < n_pairs; ++p) {
        x[p]           = scale*(float) points.x[r.codes[p]];
        x[p + n_pairs] = scale*(float) points.y[r.codes[p]];
    }
}

static void record_decode(int32_t head_dim, int32_t bits, const record & r, float * x) {
    switch (bits) {
        case 2: record_decode_codes<2>(head_dim, r, x); break;
        case 3: record_decode_codes<3>(head_dim, r, x); break;
        case 4: record_decode_codes<4>(head_dim, r, x); break;
    }
}

static void record_add_residual(int32_t head_dim, const record & r, float * x) {
    const float step = monarch_f16_to_f32(r.step);
    for (int32_t i = 0; i < head_dim; ++i) {
        x[i] += r.negative[i] ? -step : step;
    }
}

static void record_encode_residual(int32_t head_dim, int32_t bits, const float * x, record & r) {
    float rest     [MONARCH_MAX_HEAD_DIM];
    float magnitude[MONARCH_MAX_HEAD_DIM];

    if (r.scale == 0) {
        memset(r.negative, 0, head_dim);
        r.step = 0;
        return;
    }
    record_decode(head_dim, bits, r, rest);
    for (int32_t i = 0; i < head_dim; ++i) {
        rest[i]       = x[i] - rest[i];
        magnitude[i]  = fabsf(rest[i]);
        r.negative[i] = rest[i] < 0.0f;
    }
    r.step = monarch_f32_to_f16(sum_of_lanes(magnitude, head_dim)/(float) head_dim);
}

static void record_encode(int32_t head_dim, int32_t bits, bool residual, const float * x, record & r) {
    float rotated[MONARCH_MAX_HEAD_DIM];
    for (int32_t i = 0; i < head_dim; ++i) {
        rotated[i] = monarch_f16_clamp(x[i]);
    }
    monarch_codec_rotate(head_dim, rotated);

    switch (bits) {
        case 2: record_encode_codes<2>(head_dim, rotated, r); break;
        case 3: record_encode_codes<3>(head_dim, rotated, r); break;
        case 4: record_encode_codes<4>(head_dim, rotated, r); break;
    }
    if (residual) {
        record_encode_residual(head_dim, bits, rotated, r);
    }
}

//
// pages
//

// where the code of pair p of token t lies
static inline int32_t k_index(int32_t page_size, int32_t t, int32_t p) {
    return p/4*page_size*4 + t*4 + p%4;
}

static inline int32_t v_index(int32_t n_pairs, int32_t t, int32_t p) {
    return t/4*n_pairs*4 + p*4 + t%4;
}

static void chunk_pack(int32_t bits, const uint8_t * codes, uint8_t * dst) {
    if (bits == 4) {
        memcpy(dst, codes, CHUNK_SIZE);
        return;
    }
    for (int32_t j = 0; j < 32; ++j) {
        dst[j] = (codes[j] & 15) | (codes[j + 32] & 15) << 4;
    }
    if (bits == 3) {
        for (int32_t j = 0; j < 16; ++j) {
            dst[j + 32] = codes[j] >> 4 | codes[j + 16] >> 4 << 2 | codes[j + 32] >> 4 << 4 | codes[j + 48] >> 4 << 6;
        }
    }
}

static void chunk_unpack(int32_t bits, const uint8_t * src, uint8_t * codes) {
    if (bits == 4) {
        memcpy(codes, src, CHUNK_SIZE);
        return;
    }
    for (int32_t j = 0; j < 32; ++j) {
        codes[j]      = src[j] & 15;
        codes[j + 32] = src[j] >> 4;
    }
    if (bits == 3) {
        for (int32_t j = 0; j < CHUNK_SIZE; ++j) {
            codes[j] |= (src[j%16 + 32] >> j/16*2 & 3) << 4;
        }
    }
}

static void codes_pack(int32_t bits, int32_t n, const uint8_t * codes, uint8_t * dst) {
    for (int32_t i = 0; i < n; i += CHUNK_SIZE) {
        chunk_pack(bits, codes + i, dst + i*bits/4);
    }
}

static void codes_unpack(int32_t bits, int32_t n, const uint8_t * src, uint8_t * codes) {
    for (int32_t i = 0; i < n; i += CHUNK_SIZE) {
        chunk_unpack(bits, src + i*bits/4, codes + i);
    }
}

static void encode_f16(int32_t n, const float * x, uint8_t * dst) {
    for (int32_t i = 0; i < n; ++i) {
        const uint16_t h = monarch_f32_to_f16(monarch_f16_clamp(x[i]));
        memcpy(dst + 2*i, &h, sizeof(h));
    }
}

static void decode_f16(int32_t n, const uint8_t * src, float * x) {
    for (int32_t i = 0; i < n; ++i) {
        uint16_t h;
        memcpy(&h, src + 2*i, sizeof(h));
        x[i] = monarch_f16_to_f32(h);
    }
}

static void encode_page_k(const monarch_codec * codec, const monarch_codec_layout & layout, const float * k, uint8_t * dst) {
    const int32_t head_dim  = codec->head_dim;
    const int32_t page_size = codec->page_size;
    const int32_t n_pairs   = head_dim/2;
    const int32_t mask_size = page_size/8;
    const bool    residual  = codec->residual_k;

    if (codec->bits_k == 16) {
        encode_f16(page_size*head_dim, k, dst + layout.k_codes);
        return;
    }
    uint8_t codes[MAX_CODES];
    for (int32_t t = 0; t < page_size; ++t) {
        record r;
        record_encode(head_dim, codec->bits_k, residual, k + t*head_dim, r);

        for (int32_t p = 0; p < n_pairs; ++p) {
            codes[k_index(page_size, t, p)] = r.codes[p];
        }
        memcpy(dst + layout.k_scales + 2*t, &r.scale, sizeof(r.scale));

        if (residual) {
            for (int32_t i = 0; i < head_dim; ++i) {
                dst[layout.k_residual + i*mask_size + t/8] |= r.negative[i] << t % 8;
            }
            memcpy(dst + layout.k_steps + 2*t, &r.step, sizeof(r.step));
        }
    }
    codes_pack(codec->bits_k, page_size*n_pairs, codes, dst + layout.k_codes);
}

static void encode_page_v(const monarch_codec * codec, const monarch_codec_layout & layout, const float * v, uint8_t * dst) {
    const int32_t head_dim  = codec->head_dim;
    const int32_t page_size = codec->page_size;
    const int32_t n_pairs   = head_dim/2;

    if (codec->bits_v == 16) {
        encode_f16(page_size*head_dim, v, dst + layout.v_codes);
        return;
    }
    uint8_t codes[MAX_CODES];
    for (int32_t t = 0; t < page_size; ++t) {
        record r;
        record_encode(head_dim, codec->bits_v, false, v + t*head_dim, r);

        for (int32_t p = 0; p < n_pairs; ++p) {
            codes[v_index(n_pairs, t, p)] = r.codes[p];
        }
        memcpy(dst + layout.v_scales + 2*t, &r.scale, sizeof(r.scale));
    }
    codes_pack(codec->bits_v, page_size*n_pairs, codes, dst + layout.v_codes);
}

void monarch_codec_encode_page(const monarch_codec * codec, const float * k, const float * v, uint8_t * dst) {
    const monarch_codec_layout layout = monarch_codec_get_layout(codec);

    memset(dst, 0, monarch_codec_block_size(codec));
    encode_page_k(codec, layout, k, dst);
    encode_page_v(codec, layout, v, dst);
}

void monarch_codec_decode_page_k(const monarch_codec * codec, const uint8_t * src, float * k) {
    const monarch_codec_layout layout = monarch_codec_get_layout(codec);

    const int32_t head_dim  = codec->head_dim;
    const int32_t page_size = codec->page_size;
    const int32_t n_pairs   = head_dim/2;
    const int32_t mask_size = page_size/8;
    const bool    residual  = codec->residual_k;

    if (codec->bits_k == 16) {
        decode_f16(page_size*head_dim, src + layout.k_codes, k);
        return;
    }
    uint8_t codes[MAX_CODES];
    codes_unpack(codec->bits_k, page_size*n_pairs, src + layout.k_codes, codes);
    for (int32_t t = 0; t < page_size; ++t) {
        record r;
        memcpy(&r.scale, src + layout.k_scales + 2*t, sizeof(r.scale));
        for (int32_t p = 0; p < n_pairs; ++p) {
            r.codes[p] = codes[k_index(page_size, t, p)];
        }
        record_decode(head_dim, codec->bits_k, r, k + t*head_dim);

        if (residual) {
            memcpy(&r.step, src + layout.k_steps + 2*t, sizeof(r.step));
            for (int32_t i = 0; i < head_dim; ++i) {
                r.negative[i] = src[layout.k_residual + i*mask_size + t/8] >> t % 8 & 1;
            }
            record_add_residual(head_dim, r, k + t*head_dim);
        }
    }
}

void monarch_codec_decode_page_v(const monarch_codec * codec, const uint8_t * src, float * v) {
    const monarch_codec_layout layout = monarch_codec_get_layout(codec);

    const int32_t head_dim  = codec->head_dim;
    const int32_t page_size = codec->page_size;
    const int32_t n_pairs   = head_dim/2;

    if (codec->bits_v == 16) {
        decode_f16(page_size*head_dim, src + layout.v_codes, v);
        return;
    }
    uint8_t codes[MAX_CODES];
    codes_unpack(codec->bits_v, page_size*n_pairs, src + layout.v_codes, codes);
    for (int32_t t = 0; t < page_size; ++t) {
        record r;
        memcpy(&r.scale, src + layout.v_scales + 2*t, sizeof(r.scale));
        for (int32_t p = 0; p < n_pairs; ++p) {
            r.codes[p] = codes[v_index(n_pairs, t, p)];
        }
        record_decode(head_dim, codec->bits_v, r, v + t*head_dim);
    }
}
