#pragma once

// Cold records: K and V of one page and one KV head as staggered polar codes.
//
// A record is one head vector: rotated (sign flips, then a Walsh-Hadamard transform over the largest power of two that
// fits, then both again over the last values where some are left), cut into pairs (value p, value p + head_dim/2), each
// pair coded as (radius ring, angle bin) with the angle grid of odd rings turned by half a step, and one f16 scale. `bits`
// per value: 2, 3 or 4; 16 stores plain f16, unrotated, for tests.
// A code has 2*bits bits, ring << bits | angle; its bits + 1 low bits index the tables of cosines and sines. It stands for
// scale times an integer point, radius*(cosine, sine)*unit rounded to 8 bits: integer kernels that read the points are
// exact. docs/codec.md has the errors and what odd input does.
//
// A page block holds the page_size records of K and of V, in the order that the kernels read:
//
//   K codes     quads of pairs:  four pairs of a token side by side, then the next token; then the next four pairs
//   K residual  value-major:     page_size bits per value, token 0 lowest, set: subtract the step (only with residual_k)
//   V codes     quads of tokens: a pair of four tokens side by side, then the next pair; then the next four tokens
//   K scales    f16 [page_size]
//   K steps     f16 [page_size] (only with residual_k)
//   V scales    f16 [page_size]
//
// The code of token t, pair p is number
//   p/4*page_size*4  + t*4 + p%4  of K
//   t/4*head_dim/2*4 + p*4 + t%4  of V
// and 64 codes c in that order take
//   4 bits: 64 bytes       c[j]
//   2 bits: 32 bytes       c[j] | c[j + 32] << 4
//   3 bits: 32 + 16 bytes  the four low bits as with 2 bits, then the two high bits:
//                          c[j] >> 4 | c[j + 16] >> 4 << 2 | c[j + 32] >> 4 << 4 | c[j + 48] >> 4 << 6
//  16 bits: both K and V are f16 [page_size][head_dim] in place of their codes; no residual, no scales
// Decoding gives rotated values: attention rotates q once and turns the result back once.

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "monarch-export.h"
#include "monarch-hd.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MONARCH_MAX_HEAD_DIM  256
#define MONARCH_MAX_PAGE_SIZE 32

struct monarch_codec {
    int32_t head_dim;
    int32_t page_size;  // tokens
    int32_t bits_k;
    int32_t bits_v;
    int32_t residual_k; // 0 or 1
};

MONARCH_HD static inline bool monarch_head_dim_is_valid(int32_t head_dim) {
    return head_dim > 0 && head_dim <= MONARCH_MAX_HEAD_DIM && head_dim%16 == 0;
}

MONARCH_HD static inline bool monarch_page_size_is_valid(int32_t page_size) {
    return page_size == 8 || page_size == 16 || page_size == MONARCH_MAX_PAGE_SIZE;
}

MONARCH_HD static inline bool monarch_bits_are_valid(int32_t bits) {
    return (bits >= 2 && bits <= 4) || bits == 16;
}

MONARCH_HD static inline bool monarch_codec_is_valid(const struct monarch_codec * codec) {
    return monarch_head_dim_is_valid(codec->head_dim) && monarch_page_size_is_valid(codec->page_size) &&
        monarch_bits_are_valid(codec->bits_k) && monarch_bits_are_valid(codec->bits_v);
}

MONARCH_HD static inline size_t monarch_record_size(int32_t head_dim, int32_t bits, int32_t residual) {
    if (bits == 16) {
        return (size_t) head_dim*2;
    }
    return (size_t) head_dim*bits/8 + 2 + (residual ? head_dim/8 + 2 : 0);
}

// bytes of one page of one KV head, K and V
MONARCH_HD static inline size_t monarch_codec_block_size(const struct monarch_codec * codec) {
    return codec->page_size*(
        monarch_record_size(codec->head_dim, codec->bits_k, codec->residual_k) +
        monarch_record_size(codec->head_dim, codec->bits_v, 0));
}

// where the parts of a block start, in bytes; absent parts are empty
struct monarch_codec_layout {
    size_t k_codes;
    size_t k_residual;
    size_t v_codes;
    size_t k_scales;
    size_t k_steps;
    size_t v_scales;
};

MONARCH_HD static inline struct monarch_codec_layout monarch_codec_get_layout(const struct monarch_codec * codec) {
    const size_t  n_values = (size_t) codec->page_size*codec->head_dim;
    const size_t  n_scales = (size_t) codec->page_size*2;
    const int32_t residual = codec->residual_k && codec->bits_k != 16;

    struct monarch_codec_layout layout;
    layout.k_codes    = 0;
    layout.k_residual = layout.k_codes    + n_values*codec->bits_k/8;
    layout.v_codes    = layout.k_residual + (residual ? n_values/8 : 0);
    layout.k_scales   = layout.v_codes    + n_values*codec->bits_v/8;
    layout.k_steps    = layout.k_scales   + (codec->bits_k != 16 ? n_scales : 0);
    layout.v_scales   = layout.k_steps    + (residual ? n_scales : 0);
    return layout;
}

// the points of every code; entries past the number of codes are 0
struct monarch_codec_points {
#ifdef __cplusplus
    alignas(64) int8_t x[256];
#else
    _Alignas(64) int8_t x[256];
#endif
    int8_t y[256];
};

// bits: 2, 3 or 4; the same pointer at every call, from any thread
MONARCH_API const struct monarch_codec_points * monarch_codec_get_points(int32_t bits);

// x: [head_dim], in place; nothing to do for 16 bits
MONARCH_API void monarch_codec_rotate  (int32_t head_dim, float * x);
MONARCH_API void monarch_codec_unrotate(int32_t head_dim, float * x);

// k, v: [page_size][head_dim], unrotated; dst: one block
MONARCH_API void monarch_codec_encode_page(const struct monarch_codec * codec, const float * k, const float * v, uint8_t * dst);

// k, v: [page_size][head_dim], rotated (unless 16 bits)
MONARCH_API void monarch_codec_decode_page_k(const struct monarch_codec * codec, const uint8_t * src, float * k);
MONARCH_API void monarch_codec_decode_page_v(const struct monarch_codec * codec, const uint8_t * src, float * v);

#ifdef __cplusplus
}
#endif
