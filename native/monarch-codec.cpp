#include "monarch-codec.h"

#include "monarch-codec-tables.h"
#include "monarch-f16.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

// The numpy reference in monarch_llamacpp/codec.py gives the same bytes: every sum has a fixed order, ties go to the lower
// index, and this file is compiled with -ffp-contract=off and without -ffast-math.

#define MAX_PAIRS (MONARCH_MAX_HEAD_DIM/2)
#define N_LANES   8

static const float scale_factors[] = { MONARCH_SCALE_FACTORS };

#define N_FACTORS ((int) (sizeof(scale_factors)/sizeof(scale_factors[0])))

template <int bits> struct polar;

template <> struct polar<2> {
    static constexpr float radius[ 4] = { MONARCH_RADIUS_2 };
    static constexpr float cosine[ 8] = { MONARCH_COSINE_2 };
    static constexpr float sine  [ 8] = { MONARCH_SINE_2   };
};

template <> struct polar<3> {
    static constexpr float radius[ 8] = { MONARCH_RADIUS_3 };
    static constexpr float cosine[16] = { MONARCH_COSINE_3 };
    static constexpr float sine  [16] = { MONARCH_SINE_3   };
};

template <> struct polar<4> {
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

static void walsh_hadamard(int32_t n, float * x) {
    for (int32_t half = 1; half < n; half *= 2) {
        for (int32_t i = 0; i < n; i += 2*half) {
            for (int32_t j = i; j < i + half; ++j) {
                const float a = x[j];
                const float b = x[j + half];
                x[j]        = a + b;
                x[j + half] = a - b;
            }
        }
    }
    const float scale = 1.0f/sqrtf((float) n);
    for (int32_t i = 0; i < n; ++i) {
        x[i] *= scale;
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
// pairs
//

// the direction of one parity with the greatest dot product
template <int bits, int parity>
static inline void pair_find_angle(float x, float y, float & best, int32_t & index) {
    typedef polar<bits> P;
    constexpr int n = 1 << bits;

    best  = x*P::cosine[parity*n] + y*P::sine[parity*n];
    index = 0;
#pragma GCC unroll 16
    for (int32_t i = 1; i < n; ++i) {
        const float dot = x*P::cosine[parity*n + i] + y*P::sine[parity*n + i];
        index = dot > best ? i   : index;
        best  = dot > best ? dot : best;
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
        ring   = farther ? i            : ring;
    }
}

// the ring with the least error, given the pair's dot products divided by the scale
template <int bits>
static inline bool pair_find_code(float even, float odd, float & radius, int32_t & ring) {
    float   radius_odd;
    int32_t ring_odd;
    pair_find_ring<bits, 0>(even, radius,     ring);
    pair_find_ring<bits, 1>(odd,  radius_odd, ring_odd);

    // error = distance^2 - gain
    const float gain_even = radius    *(even + even - radius);
    const float gain_odd  = radius_odd*(odd  + odd  - radius_odd);

    const bool is_odd = gain_odd > gain_even;
    radius = is_odd ? radius_odd : radius;
    ring   = is_odd ? ring_odd   : ring;
    return is_odd;
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

template <int bits>
static void find_angles(int32_t n_pairs, const float * x, angles & a) {
    float even[MAX_PAIRS];
    float odd [MAX_PAIRS];
    for (int32_t p = 0; p < n_pairs; ++p) {
        even[p] = x[2*p + 0];
        odd [p] = x[2*p + 1];
    }
    for (int32_t p = 0; p < n_pairs; ++p) {
        pair_find_angle<bits, 0>(even[p], odd[p], a.dot[0][p], a.index[0][p]);
    }
    for (int32_t p = 0; p < n_pairs; ++p) {
        pair_find_angle<bits, 1>(even[p], odd[p], a.dot[1][p], a.index[1][p]);
    }
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
            float   radius;
            int32_t ring;
            const bool is_odd = pair_find_code<bits>(even*inverse[i], odd*inverse[i], radius, ring);
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

template <int bits>
static void find_codes(int32_t n_pairs, const angles & a, float scale, uint8_t * codes) {
    const float inverse = 1.0f/scale;
    for (int32_t p = 0; p < n_pairs; ++p) {
        float   radius;
        int32_t ring;
        const bool is_odd = pair_find_code<bits>(a.dot[0][p]*inverse, a.dot[1][p]*inverse, radius, ring);
        codes[p] = (uint8_t) (ring << bits | (is_odd ? a.index[1][p] : a.index[0][p]));
    }
}

template <int bits>
static void record_encode_codes(int32_t head_dim, const float * x, record & r) {
    const int32_t n_pairs = head_dim/2;

    // below the least f16 the scale becomes zero anyway
    const float rms = fmaxf(root_mean_square(x, head_dim), MONARCH_LEAST_RMS);

    angles a;
    find_angles<bits>(n_pairs, x, a);
    r.scale = monarch_f32_to_f16(monarch_f16_clamp(find_scale<bits>(n_pairs, a, rms)));

    if (r.scale == 0) {
        memset(r.codes, 0, n_pairs);
        return;
    }
    find_codes<bits>(n_pairs, a, monarch_f16_to_f32(r.scale), r.codes);
}

template <int bits>
static void record_decode_codes(int32_t head_dim, const record & r, float * x) {
    typedef polar<bits> P;

    const float scale = monarch_f16_to_f32(r.scale);
    for (int32_t p = 0; p < head_dim/2; ++p) {
        const int32_t direction = r.codes[p] & ((2 << bits) - 1);
        const float   radius    = scale*P::radius[r.codes[p] >> bits];
        x[2*p + 0] = radius*P::cosine[direction];
        x[2*p + 1] = radius*P::sine  [direction];
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
    r.step = monarch_f32_to_f16(monarch_f16_clamp(sum_of_lanes(magnitude, head_dim)/(float) head_dim));
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

// a zeroed run of n codes
static inline void run_set(int32_t bits, uint8_t * run, int32_t n, int32_t i, uint8_t code) {
    if (bits == 4) {
        run[i] = code;
        return;
    }
    run[i/2] |= (code & 15) << 4*(i % 2);
    if (bits == 3) {
        run[n/2 + i/4] |= (code >> 4) << 2*(i % 4);
    }
}

static inline uint8_t run_get(int32_t bits, const uint8_t * run, int32_t n, int32_t i) {
    if (bits == 4) {
        return run[i];
    }
    uint8_t code = run[i/2] >> 4*(i % 2) & 15;
    if (bits == 3) {
        code |= (run[n/2 + i/4] >> 2*(i % 4) & 3) << 4;
    }
    return code;
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
    const int32_t run_size  = page_size*codec->bits_k/4;
    const int32_t mask_size = page_size/8;
    const bool    residual  = codec->residual_k;

    if (codec->bits_k == 16) {
        encode_f16(page_size*head_dim, k, dst + layout.k_codes);
        return;
    }
    for (int32_t t = 0; t < page_size; ++t) {
        record r;
        record_encode(head_dim, codec->bits_k, residual, k + t*head_dim, r);

        for (int32_t p = 0; p < head_dim/2; ++p) {
            run_set(codec->bits_k, dst + layout.k_codes + p*run_size, page_size, t, r.codes[p]);
        }
        memcpy(dst + layout.k_scales + 2*t, &r.scale, sizeof(r.scale));

        if (residual) {
            for (int32_t i = 0; i < head_dim; ++i) {
                dst[layout.k_residual + i*mask_size + t/8] |= r.negative[i] << t % 8;
            }
            memcpy(dst + layout.k_steps + 2*t, &r.step, sizeof(r.step));
        }
    }
}

static void encode_page_v(const monarch_codec * codec, const monarch_codec_layout & layout, const float * v, uint8_t * dst) {
    const int32_t head_dim  = codec->head_dim;
    const int32_t page_size = codec->page_size;
    const int32_t run_size  = head_dim*codec->bits_v/8;

    if (codec->bits_v == 16) {
        encode_f16(page_size*head_dim, v, dst + layout.v_codes);
        return;
    }
    for (int32_t t = 0; t < page_size; ++t) {
        record r;
        record_encode(head_dim, codec->bits_v, false, v + t*head_dim, r);

        for (int32_t p = 0; p < head_dim/2; ++p) {
            run_set(codec->bits_v, dst + layout.v_codes + t*run_size, head_dim/2, p, r.codes[p]);
        }
        memcpy(dst + layout.v_scales + 2*t, &r.scale, sizeof(r.scale));
    }
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
    const int32_t run_size  = page_size*codec->bits_k/4;
    const int32_t mask_size = page_size/8;
    const bool    residual  = codec->residual_k;

    if (codec->bits_k == 16) {
        decode_f16(page_size*head_dim, src + layout.k_codes, k);
        return;
    }
    for (int32_t t = 0; t < page_size; ++t) {
        record r;
        memcpy(&r.scale, src + layout.k_scales + 2*t, sizeof(r.scale));
        for (int32_t p = 0; p < head_dim/2; ++p) {
            r.codes[p] = run_get(codec->bits_k, src + layout.k_codes + p*run_size, page_size, t);
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
    const int32_t run_size  = head_dim*codec->bits_v/8;

    if (codec->bits_v == 16) {
        decode_f16(page_size*head_dim, src + layout.v_codes, v);
        return;
    }
    for (int32_t t = 0; t < page_size; ++t) {
        record r;
        memcpy(&r.scale, src + layout.v_scales + 2*t, sizeof(r.scale));
        for (int32_t p = 0; p < head_dim/2; ++p) {
            r.codes[p] = run_get(codec->bits_v, src + layout.v_codes + t*run_size, head_dim/2, p);
        }
        record_decode(head_dim, codec->bits_v, r, v + t*head_dim);
    }
}
