#include "monarch-codec.h"

#include "monarch-polar.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <utility>

// The numpy reference in monarch_llamacpp/codec.py gives the same bytes: every sum has a fixed order, ties go to the lower
// index, and this file is compiled with -ffp-contract=off and without -ffast-math.

#define MONARCH_MAX_PAIRS  (MONARCH_MAX_HEAD_DIM/2)
#define MONARCH_MAX_CODES  (MONARCH_MAX_PAGE_SIZE*MONARCH_MAX_PAIRS)

struct monarch_codec_record {
    uint8_t  codes   [MONARCH_MAX_PAIRS];
    uint8_t  negative[MONARCH_MAX_HEAD_DIM]; // sign of the residual
    uint16_t scale;
    uint16_t step;
};

// the best angle of a pair on even and on odd rings, and the dot product of the pair with its direction
struct monarch_codec_angles {
    float   dot  [2][MONARCH_MAX_PAIRS];
    int32_t index[2][MONARCH_MAX_PAIRS];
};

//
// rotation
//

static void flip_signs(uint32_t first, int32_t n, float * x) {
    for (int32_t i = 0; i < n; ++i) {
        x[i] = monarch_rotation_flip(first + (uint32_t) i, x[i]);
    }
}

static void walsh_hadamard_stage(int32_t half, const float * __restrict src, float * __restrict dst) {
    for (int32_t i = 0; i < half; ++i) {
        monarch_rotation_stage(half, i, src, dst);
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
    const float scale = monarch_rotation_scale(n);
    for (int32_t i = 0; i < n; ++i) {
        x[i] = src[i]*scale;
    }
}

void monarch_codec_rotate(int32_t head_dim, float * x) {
    const int32_t n = monarch_rotation_size(head_dim);

    flip_signs(0, n, x);
    walsh_hadamard(n, x);
    if (n < head_dim) {
        flip_signs(n, n, x + head_dim - n);
        walsh_hadamard(n, x + head_dim - n);
    }
}

void monarch_codec_unrotate(int32_t head_dim, float * x) {
    const int32_t n = monarch_rotation_size(head_dim);

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
    monarch_codec_points points = {};
    for (int32_t code = 0; code < 1 << 2*bits; ++code) {
        float x;
        float y;
        monarch_polar_point<bits>(code, x, y);
        points.x[code] = (int8_t) x;
        points.y[code] = (int8_t) y;
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
// records
//

template <int bits, int parity>
static void find_angles(int32_t n_pairs, const float * x, const float * y, float * dots, int32_t * indices) {
    for (int32_t p = 0; p < n_pairs; ++p) {
        monarch_polar_find_angle<bits, parity>(x[p], y[p], dots[p], indices[p]);
    }
}

static float sum_of_lanes(const float * x, int32_t n) {
    float lanes[MONARCH_N_LANES] = { 0 };
    for (int32_t i = 0; i < n; i += MONARCH_N_LANES) {
        for (int32_t j = 0; j < MONARCH_N_LANES; ++j) {
            lanes[j] += x[i + j];
        }
    }
    return monarch_sum_lanes(lanes);
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
static float find_scale(int32_t n_pairs, const monarch_codec_angles & a, float rms) {
    float inverse[MONARCH_N_FACTORS];
    float dots   [MONARCH_N_FACTORS];
    float norms  [MONARCH_N_FACTORS];
    for (int32_t i = 0; i < MONARCH_N_FACTORS; ++i) {
        inverse[i] = 1.0f/(rms*monarch_scale_factor(i));
        dots   [i] = 0.0f; // in this loop: gcc does not vectorize the next one after an initializer
        norms  [i] = 0.0f;
    }
    for (int32_t p = 0; p < n_pairs; ++p) {
        const float even = a.dot[0][p];
        const float odd  = a.dot[1][p];
        for (int32_t i = 0; i < MONARCH_N_FACTORS; ++i) {
            monarch_polar_add_fit<bits>(even, odd, inverse[i], dots[i], norms[i]);
        }
    }
    return monarch_polar_best_fit(dots, norms);
}

template <int bits, int parity>
static void find_rings(int32_t n_pairs, const float * dots, float inverse, float * radii, int32_t * rings) {
    for (int32_t p = 0; p < n_pairs; ++p) {
        monarch_polar_find_ring<bits, parity>(dots[p]*inverse, radii[p], rings[p]);
    }
}

template <int bits>
static void find_codes(int32_t n_pairs, const monarch_codec_angles & a, float scale, uint8_t * codes) {
    const float inverse = 1.0f/scale;

    float   radii[2][MONARCH_MAX_PAIRS];
    int32_t rings[2][MONARCH_MAX_PAIRS];
    find_rings<bits, 0>(n_pairs, a.dot[0], inverse, radii[0], rings[0]);
    find_rings<bits, 1>(n_pairs, a.dot[1], inverse, radii[1], rings[1]);

    for (int32_t p = 0; p < n_pairs; ++p) {
        codes[p] = monarch_polar_choose_code<bits>(
                a.dot[0][p]*inverse, radii[0][p], rings[0][p], a.index[0][p],
                a.dot[1][p]*inverse, radii[1][p], rings[1][p], a.index[1][p]);
    }
}

// the integer points are not quite the polar ones, so their scale is fitted by itself
template <int bits>
static float fit_scale(int32_t n_pairs, const float * x, const uint8_t * codes) {
    const monarch_codec_points & points = points_of_bits<bits>();

    float   dots[MONARCH_MAX_PAIRS];
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
static void record_encode_codes(int32_t head_dim, const float * x, monarch_codec_record & r) {
    const int32_t n_pairs = head_dim/2;

    const float rms = root_mean_square(x, head_dim);

    r.scale = 0;
    if (rms >= MONARCH_LEAST_RMS) {
        monarch_codec_angles a;
        find_angles<bits, 0>(n_pairs, x, x + n_pairs, a.dot[0], a.index[0]);
        find_angles<bits, 1>(n_pairs, x, x + n_pairs, a.dot[1], a.index[1]);

        find_codes<bits>(n_pairs, a, find_scale<bits>(n_pairs, a, rms), r.codes);
        r.scale = monarch_f32_to_f16(fit_scale<bits>(n_pairs, x, r.codes));
        find_codes<bits>(n_pairs, a, monarch_f16_to_f32(r.scale)*monarch_polar<bits>::unit, r.codes);
    }
    if (r.scale == 0) {
        memset(r.codes, 0, n_pairs);
    }
}

template <int bits>
static void record_decode_codes(int32_t head_dim, const monarch_codec_record & r, float * x) {
    const monarch_codec_points & points = points_of_bits<bits>();

    const int32_t n_pairs = head_dim/2;
    const float   scale   = monarch_f16_to_f32(r.scale);
    for (int32_t p = 0; p < n_pairs; ++p) {
        x[p]           = scale*(float) points.x[r.codes[p]];
        x[p + n_pairs] = scale*(float) points.y[r.codes[p]];
    }
}

static void record_decode(int32_t head_dim, int32_t bits, const monarch_codec_record & r, float * x) {
    switch (bits) {
        case 2: record_decode_codes<2>(head_dim, r, x); break;
        case 3: record_decode_codes<3>(head_dim, r, x); break;
        case 4: record_decode_codes<4>(head_dim, r, x); break;
    }
}

static void record_add_residual(int32_t head_dim, const monarch_codec_record & r, float * x) {
    const float step = monarch_f16_to_f32(r.step);
    for (int32_t i = 0; i < head_dim; ++i) {
        x[i] += r.negative[i] ? -step : step;
    }
}

static void record_encode_residual(int32_t head_dim, int32_t bits, const float * x, monarch_codec_record & r) {
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

static void record_encode(int32_t head_dim, int32_t bits, bool residual, const float * x, monarch_codec_record & r) {
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
    return monarch_quad_k(page_size, t, p)*4 + p%4;
}

static inline int32_t v_index(int32_t n_pairs, int32_t t, int32_t p) {
    return monarch_quad_v(n_pairs, t, p)*4 + t%4;
}

static void codes_pack(int32_t bits, int32_t n, const uint8_t * codes, uint8_t * dst) {
    const int32_t size = MONARCH_CHUNK*bits/4;

    for (int32_t i = 0; i < n/MONARCH_CHUNK; ++i) {
        for (int32_t j = 0; j < size; ++j) {
            dst[i*size + j] = monarch_chunk_byte(bits, codes + i*MONARCH_CHUNK, j);
        }
    }
}

static void codes_unpack(int32_t bits, int32_t n, const uint8_t * src, uint8_t * codes) {
    for (int32_t i = 0; i < n/4; ++i) {
        const uint32_t quad = monarch_quad_load(bits, src, i);

        for (int32_t j = 0; j < 4; ++j) {
            codes[4*i + j] = (uint8_t) (quad >> 8*j);
        }
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
    uint8_t codes[MONARCH_MAX_CODES];
    for (int32_t t = 0; t < page_size; ++t) {
        monarch_codec_record r;
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
    uint8_t codes[MONARCH_MAX_CODES];
    for (int32_t t = 0; t < page_size; ++t) {
        monarch_codec_record r;
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
    uint8_t codes[MONARCH_MAX_CODES];
    codes_unpack(codec->bits_k, page_size*n_pairs, src + layout.k_codes, codes);
    for (int32_t t = 0; t < page_size; ++t) {
        monarch_codec_record r;
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
    uint8_t codes[MONARCH_MAX_CODES];
    codes_unpack(codec->bits_v, page_size*n_pairs, src + layout.v_codes, codes);
    for (int32_t t = 0; t < page_size; ++t) {
        monarch_codec_record r;
        memcpy(&r.scale, src + layout.v_scales + 2*t, sizeof(r.scale));
        for (int32_t p = 0; p < n_pairs; ++p) {
            r.codes[p] = codes[v_index(n_pairs, t, p)];
        }
        record_decode(head_dim, codec->bits_v, r, v + t*head_dim);
    }
}
