#pragma once

// Page-outs on CUDA: the bytes that the CPU writes.

#include "monarch-cuda-attend.cuh"

struct monarch_cuda_page_out {
    monarch_op_params   op;
    monarch_cuda_matrix k;
    monarch_cuda_matrix v;
    uint8_t           * pool;
    uint8_t           * summary;
    char              * state;
    char              * frames; // null: none
    const int32_t     * page_outs;
    int32_t             n_head_kv;
    int32_t             n_pages_max;
    int32_t             n_outs_max;
};

// a warp's scratch in shared memory
struct monarch_record {
    float   * x;      // [head_dim] rotated
    float   * buffer; // [head_dim]
    float   * dot;    // [2][n_pairs] with the best direction of either parity
    int32_t * angle;  // [2][n_pairs] which that is
    float   * dots;   // [MONARCH_N_FACTORS]
    float   * norms;  // [MONARCH_N_FACTORS]
    float   * lanes;  // [MONARCH_N_LANES]
    int32_t * code;   // [n_pairs]
};

MONARCH_HD static inline int32_t monarch_record_floats(int32_t head_dim) {
    return 4*head_dim + 2*MONARCH_N_FACTORS + MONARCH_N_LANES + head_dim/2;
}

MONARCH_DEVICE monarch_record monarch_record_get(float * shared, int32_t head_dim) {
    monarch_record res;

    res.x      = shared;
    res.buffer = res.x + head_dim;
    res.dot    = res.buffer + head_dim;
    res.angle  = (int32_t *) (res.dot + head_dim);
    res.dots   = (float *) (res.angle + head_dim);
    res.norms  = res.dots  + MONARCH_N_FACTORS;
    res.lanes  = res.norms + MONARCH_N_FACTORS;
    res.code   = (int32_t *) (res.lanes + MONARCH_N_LANES);

    return res;
}

// the sum of n values of the buffer in the codec's order
MONARCH_DEVICE float monarch_record_sum(const monarch_team & team, const monarch_record & r, int32_t n) {
    __syncwarp();
    if (team.i < MONARCH_N_LANES) {
        float sum = 0.0f;
        for (int32_t i = team.i; i < n; i += MONARCH_N_LANES) {
            sum += r.buffer[i];
        }
        r.lanes[team.i] = sum;
    }
    __syncwarp();

    const float res = monarch_sum_lanes(r.lanes);

    __syncwarp();
    return res;
}

template <int bits>
MONARCH_DEVICE void monarch_record_find_codes(const monarch_team & team, const monarch_record & r, int32_t n_pairs, float scale) {
    const float inverse = 1.0f/scale;

    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        const float even = r.dot[p]          *inverse;
        const float odd  = r.dot[p + n_pairs]*inverse;

        float   radius_even;
        float   radius_odd;
        int32_t ring_even;
        int32_t ring_odd;
        monarch_polar_find_ring<bits, 0>(even, radius_even, ring_even);
        monarch_polar_find_ring<bits, 1>(odd,  radius_odd,  ring_odd);

        r.code[p] = monarch_polar_choose_code<bits>(
                even, radius_even, ring_even, r.angle[p],
                odd,  radius_odd,  ring_odd,  r.angle[p + n_pairs]);
    }
    __syncwarp();
}

template <int bits>
MONARCH_DEVICE float monarch_record_fit_scale(const monarch_team & team, const monarch_record & r, int32_t n_pairs) {
    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        float px;
        float py;
        monarch_polar_point<bits>(r.code[p], px, py);
        r.buffer[p] = r.x[p]*px + r.x[p + n_pairs]*py;
    }
    const float dots = monarch_record_sum(team, r, n_pairs);

    // whole numbers below 2^24: the order does not matter
    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        float px;
        float py;
        monarch_polar_point<bits>(r.code[p], px, py);
        r.buffer[p] = px*px + py*py;
    }
    return dots/monarch_record_sum(team, r, n_pairs);
}

// codes and scale of the rotated vector r.x
template <int bits>
MONARCH_DEVICE uint16_t monarch_record_encode_codes(const monarch_team & team, const monarch_record & r, int32_t head_dim) {
    const int32_t n_pairs = head_dim/2;

    for (int32_t i = team.i; i < head_dim; i += team.n) {
        r.buffer[i] = r.x[i]*r.x[i];
    }
    const float rms = sqrtf(monarch_record_sum(team, r, head_dim)/(float) head_dim);

    uint16_t scale = 0;
    if (rms >= MONARCH_LEAST_RMS) {
        for (int32_t p = team.i; p < n_pairs; p += team.n) {
            monarch_polar_find_angle<bits, 0>(r.x[p], r.x[p + n_pairs], r.dot[p],           r.angle[p]);
            monarch_polar_find_angle<bits, 1>(r.x[p], r.x[p + n_pairs], r.dot[p + n_pairs], r.angle[p + n_pairs]);
        }
        __syncwarp();

        if (team.i < MONARCH_N_FACTORS) {
            const float inverse = 1.0f/(rms*monarch_scale_factor(team.i));

            float dots  = 0.0f;
            float norms = 0.0f;
            for (int32_t p = 0; p < n_pairs; ++p) {
                monarch_polar_add_fit<bits>(r.dot[p], r.dot[p + n_pairs], inverse, dots, norms);
            }
            r.dots [team.i] = dots;
            r.norms[team.i] = norms;
        }
        __syncwarp();

        monarch_record_find_codes<bits>(team, r, n_pairs, monarch_polar_best_fit(r.dots, r.norms));
        scale = monarch_f32_to_f16(monarch_record_fit_scale<bits>(team, r, n_pairs));
        monarch_record_find_codes<bits>(team, r, n_pairs, monarch_f16_to_f32(scale)*monarch_polar<bits>::unit);
    }
    if (scale == 0) {
        for (int32_t p = team.i; p < n_pairs; p += team.n) {
            r.code[p] = 0;
        }
        __syncwarp();
    }
    return scale;
}

// signs of what the codes leave, and the step
template <int bits>
MONARCH_DEVICE uint16_t monarch_record_encode_residual(const monarch_team & team, const monarch_record & r, int32_t head_dim, uint16_t scale, uint8_t * negative) {
    const int32_t n_pairs = head_dim/2;

    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        float px;
        float py;
        monarch_polar_point<bits>(r.code[p], px, py);

        const float rest_x = r.x[p]           - monarch_f16_to_f32(scale)*px;
        const float rest_y = r.x[p + n_pairs] - monarch_f16_to_f32(scale)*py;

        r.buffer[p]           = fabsf(rest_x);
        r.buffer[p + n_pairs] = fabsf(rest_y);
        negative[p]           = scale != 0 && rest_x < 0.0f;
        negative[p + n_pairs] = scale != 0 && rest_y < 0.0f;
    }
    const float sum = monarch_record_sum(team, r, head_dim);

    return scale == 0 ? 0 : monarch_f32_to_f16(sum/(float) head_dim);
}

// K or V of a page; codes, negative: in shared memory
struct monarch_page_half {
    const char * ring; // this head's
    size_t       nb2;
    int32_t      type;
    int32_t      bits;
    bool         is_k;
    bool         residual;
    uint8_t    * codes;    // [page_size*n_pairs] in the order of the block
    uint8_t    * negative; // [page_size][head_dim]
    uint8_t    * scales;   // in the block
    uint8_t    * steps;
};

template <int bits>
MONARCH_DEVICE void monarch_record_encode(const monarch_codec & codec, const monarch_page_half & half, const monarch_team & team, const monarch_record & r, int32_t t, const int32_t * slots) {
    const int32_t head_dim = codec.head_dim;
    const int32_t n_pairs  = head_dim/2;

    for (int32_t i = team.i; i < head_dim; i += team.n) {
        r.x[i] = monarch_f16_clamp(monarch_ring_get(half.type, half.ring + slots[t]*half.nb2, i));
    }
    __syncwarp();
    monarch_team_rotate(team, head_dim, r.x, r.buffer);

    const uint16_t scale = monarch_record_encode_codes<bits>(team, r, head_dim);
    const uint16_t step  = half.residual ? monarch_record_encode_residual<bits>(team, r, head_dim, scale, half.negative + t*head_dim) : 0;

    for (int32_t p = team.i; p < n_pairs; p += team.n) {
        const int32_t i = half.is_k ? monarch_quad_k(codec.page_size, t, p)*4 + p%4 : monarch_quad_v(n_pairs, t, p)*4 + t%4;

        half.codes[i] = (uint8_t) r.code[p];
    }
    if (team.i == 0) {
        memcpy(half.scales + 2*t, &scale, sizeof(scale));
        if (half.residual) {
            memcpy(half.steps + 2*t, &step, sizeof(step));
        }
    }
    __syncwarp();
}

MONARCH_DEVICE void monarch_half_encode(const monarch_codec & codec, const monarch_page_half & half, float * records, const int32_t * slots, uint8_t * dst_codes, uint8_t * dst_residual) {
    const monarch_team team = { (int32_t) threadIdx.x%MONARCH_WARP, MONARCH_WARP, true };

    const int32_t head_dim  = codec.head_dim;
    const int32_t page_size = codec.page_size;
    const int32_t mask_size = page_size/8;

    if (half.bits == 16) {
        for (int32_t i = threadIdx.x; i < page_size*head_dim; i += blockDim.x) {
            const uint16_t h = monarch_f32_to_f16(monarch_f16_clamp(monarch_ring_get(half.type, half.ring + slots[i/head_dim]*half.nb2, i%head_dim)));
            memcpy(dst_codes + 2*i, &h, sizeof(h));
        }
        return;
    }

    const int32_t        warp = threadIdx.x/MONARCH_WARP;
    const monarch_record r    = monarch_record_get(records + warp*monarch_record_floats(head_dim), head_dim);

    for (int32_t t = warp; t < page_size; t += blockDim.x/MONARCH_WARP) {
        switch (half.bits) {
            case 2: monarch_record_encode<2>(codec, half, team, r, t, slots); break;
            case 3: monarch_record_encode<3>(codec, half, team, r, t, slots); break;
            case 4: monarch_record_encode<4>(codec, half, team, r, t, slots); break;
        }
    }
    __syncthreads();

    const int32_t n_chunk = MONARCH_CHUNK*half.bits/4;
    for (int32_t i = threadIdx.x; i < page_size*head_dim*half.bits/8; i += blockDim.x) {
        dst_codes[i] = monarch_chunk_byte(half.bits, half.codes + i/n_chunk*MONARCH_CHUNK, i%n_chunk);
    }
    if (half.residual) {
        for (int32_t i = threadIdx.x; i < head_dim*mask_size; i += blockDim.x) {
            uint8_t byte = 0;
            for (int32_t j = 0; j < 8; ++j) {
                byte |= half.negative[(i%mask_size*8 + j)*head_dim + i/mask_size] << j;
            }
            dst_residual[i] = byte;
        }
    }
    __syncthreads();
}

// token t of K as the block holds it, rotated back; x, buffer: [head_dim] in shared memory
MONARCH_DEVICE void monarch_token_decode(const monarch_codec & codec, const monarch_codec_layout & layout, const uint8_t * block, int32_t t, float * x, float * buffer) {
    const int32_t head_dim  = codec.head_dim;
    const int32_t n_pairs   = head_dim/2;
    const int32_t mask_size = codec.page_size/8;

    if (codec.bits_k == 16) {
        for (int32_t i = threadIdx.x; i < head_dim; i += blockDim.x) {
            x[i] = monarch_f16_to_f32(monarch_load_u16(block + layout.k_codes + 2*(t*head_dim + i)));
        }
        __syncthreads();
        return;
    }

    const float scale = monarch_f16_to_f32(monarch_load_u16(block + layout.k_scales + 2*t));
    const float step  = codec.residual_k ? monarch_f16_to_f32(monarch_load_u16(block + layout.k_steps + 2*t)) : 0.0f;

    for (int32_t p = threadIdx.x; p < n_pairs; p += blockDim.x) {
        const int32_t code = monarch_quad_load(codec.bits_k, block + layout.k_codes, monarch_quad_k(codec.page_size, t, p)) >> p%4*8 & 255;

        float px = 0.0f;
        float py = 0.0f;
        switch (codec.bits_k) {
            case 2: monarch_polar_point<2>(code, px, py); break;
            case 3: monarch_polar_point<3>(code, px, py); break;
            case 4: monarch_polar_point<4>(code, px, py); break;
        }
        x[p]           = scale*px;
        x[p + n_pairs] = scale*py;
        if (codec.residual_k) {
            x[p]           += block[layout.k_residual +  p           *mask_size + t/8] >> t%8 & 1 ? -step : step;
            x[p + n_pairs] += block[layout.k_residual + (p + n_pairs)*mask_size + t/8] >> t%8 & 1 ? -step : step;
        }
    }
    __syncthreads();

    monarch_team_unrotate(monarch_team_block(), head_dim, x, buffer);
}

// mean: [head_dim] in shared memory; the rest as below
MONARCH_DEVICE void monarch_page_summarize_parts(
        const monarch_op_params & op, const monarch_codec_layout & layout, uint32_t mask, const uint8_t * block, float * mean, float * x, float * buffer,
        uint8_t * group, int32_t i_page) {
    const int32_t head_dim = op.codec.head_dim;
    const int32_t n_tokens = monarch_mask_count(mask);

    int32_t t = 0;

    for (int32_t i_part = 0; i_part < MONARCH_SUMMARY_PARTS; ++i_part) {
        const int32_t n = monarch_summary_part_begin(n_tokens, i_part + 1) - monarch_summary_part_begin(n_tokens, i_part);

        for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
            mean[d] = 0.0f;
        }
        for (int32_t i = 0; i < n; ++i, ++t) {
            while (!(mask >> t & 1)) {
                ++t;
            }
            monarch_token_decode(op.codec, layout, block, t, x, buffer);

            for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
                mean[d] += monarch_f16_clamp(x[d]);
            }
            __syncthreads();
        }
        for (int32_t d = threadIdx.x; n > 0 && d < head_dim; d += blockDim.x) {
            mean[d] /= (float) n;
        }
        __syncthreads();

        monarch_team_rotate(monarch_team_block(), head_dim, mean, buffer);

        // every thread finds the same sums
        const float sum  = monarch_summary_sum_products(head_dim, mean, mean);
        const float step = monarch_summary_get_step(head_dim, sum);

        for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
            x[d] = (float) monarch_summary_encode_code(mean[d], step) - 1.5f;
        }
        __syncthreads();

        const float product = monarch_summary_sum_products(head_dim, mean, x);

        for (int32_t d = 4*threadIdx.x; d < head_dim; d += 4*blockDim.x) {
            uint8_t codes = 0;
            for (int32_t i = 0; i < 4; ++i) {
                codes |= (int32_t) (x[d + i] + 1.5f) << monarch_summary_code_shift(d + i);
            }
            group[monarch_summary_code_at(head_dim, i_part, d, i_page)] = codes;
        }
        if (threadIdx.x == 0) {
            group[monarch_summary_scale_at(i_part, i_page)] = n == 0 ? 0 : monarch_summary_encode_part_scale(sum, product);
        }
        __syncthreads();
    }
}

// from what the block decodes to, token by token; mask: those that are there
// stats: [2][head_dim] in shared memory, x and buffer as above
MONARCH_DEVICE void monarch_page_summarize(
        const monarch_op_params & op, const monarch_codec_layout & layout, uint32_t mask, const uint8_t * block, float * stats, float * x, float * buffer,
        uint8_t * group, int32_t i_page) {
    const int32_t head_dim  = op.codec.head_dim;
    const float   n_tokens  = (float) monarch_mask_count(mask);
    const bool    is_minmax = op.scorer == MONARCH_SCORER_MINMAX;

    // minima and maxima, or sums and then sums of squares
    for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
        stats[d]            = is_minmax ?  INFINITY : 0.0f;
        stats[d + head_dim] = is_minmax ? -INFINITY : 0.0f;
    }
    for (int32_t pass = 0; pass < (is_minmax ? 1 : 2); ++pass) {
        for (int32_t t = 0; t < op.codec.page_size; ++t) {
            if (!(mask >> t & 1)) {
                continue;
            }
            monarch_token_decode(op.codec, layout, block, t, x, buffer);

            for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
                const float value = monarch_f16_clamp(x[d]);

                if (is_minmax) {
                    stats[d]            = value < stats[d]            ? value : stats[d];
                    stats[d + head_dim] = value > stats[d + head_dim] ? value : stats[d + head_dim];
                } else if (pass == 0) {
                    stats[d] += value;
                } else {
                    const float diff = value - stats[d];
                    stats[d + head_dim] += diff*diff;
                }
            }
            __syncthreads();
        }
        for (int32_t d = threadIdx.x; !is_minmax && d < head_dim; d += blockDim.x) {
            if (pass == 0) {
                stats[d] /= n_tokens;
            } else {
                stats[d + head_dim] = sqrtf(stats[d + head_dim]/n_tokens);
            }
        }
    }
    __syncthreads();

    for (int32_t i_half = 0; i_half < 2; ++i_half) {
        // every thread finds the same range
        const monarch_summary_range range = monarch_summary_get_range(head_dim, stats + i_half*head_dim);

        const float offset = monarch_f16_to_f32(range.offset);
        const float step   = monarch_f16_to_f32(range.step);

        if (threadIdx.x == 0) {
            memcpy(group + monarch_summary_offset_at(i_half, i_page), &range.offset, sizeof(range.offset));
            memcpy(group + monarch_summary_step_at  (i_half, i_page), &range.step,   sizeof(range.step));
        }
        for (int32_t d = threadIdx.x; d < head_dim; d += blockDim.x) {
            group[monarch_summary_value_at(i_half*head_dim + d, i_page)] =
                monarch_summary_quantize(stats[i_half*head_dim + d], offset, step, monarch_summary_get_rounding(op.scorer, i_half));
        }
    }
}

// grid: pages to encode, KV heads; shared: monarch_page_out_shared()
MONARCH_KERNEL monarch_encode_pages(const monarch_cuda_page_out a) {
    MONARCH_SHARED(shared);

    const monarch_codec        codec  = a.op.codec;
    const monarch_codec_layout layout = monarch_codec_get_layout(&codec);

    const int32_t head_kv = blockIdx.y;

    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        ((monarch_layer_state *) a.state)->encoded = a.page_outs[MONARCH_PAGE_OUTS_STEP];
    }
    if ((int32_t) blockIdx.x >= a.page_outs[MONARCH_PAGE_OUTS_N]) {
        return;
    }

    const int32_t * out   = monarch_page_outs_get(a.page_outs, blockIdx.x, codec.page_size);
    const int32_t   page  = out[0];
    const int32_t * slots = out + 2;

    uint8_t * block = a.pool + monarch_pool_offset(&codec, a.n_pages_max, head_kv, page);

    float   * stats    = shared;
    float   * records  = stats + 2*codec.head_dim;
    uint8_t * codes    = (uint8_t *) (records + blockDim.x/MONARCH_WARP*monarch_record_floats(codec.head_dim));
    uint8_t * negative = codes + codec.page_size*codec.head_dim/2;

    const monarch_page_half k = {
        a.k.data + head_kv*a.k.nb1, a.k.nb2, a.k.type, codec.bits_k, true, codec.residual_k && codec.bits_k != 16,
        codes, negative, block + layout.k_scales, block + layout.k_steps,
    };
    const monarch_page_half v = {
        a.v.data + head_kv*a.v.nb1, a.v.nb2, a.v.type, codec.bits_v, false, false,
        codes, negative, block + layout.v_scales, nullptr,
    };

    monarch_half_encode(codec, k, records, slots, block + layout.k_codes, block + layout.k_residual);
    __syncthreads();
    uint8_t * group = a.summary + monarch_summary_offset(codec.head_dim, a.n_pages_max, head_kv, page);

    if (a.op.scorer == MONARCH_SCORER_PARTS) {
        monarch_page_summarize_parts(a.op, layout, (uint32_t) out[1], block, stats, records, records + codec.head_dim, group, page%MONARCH_SUMMARY_GROUP);
    } else {
        monarch_page_summarize(a.op, layout, (uint32_t) out[1], block, stats, records, records + codec.head_dim, group, page%MONARCH_SUMMARY_GROUP);
    }
    __syncthreads();
    monarch_half_encode(codec, v, records, slots, block + layout.v_codes, nullptr);

    if (threadIdx.x == 0) {
        monarch_head_state_forget(monarch_state_head(a.state, a.n_pages_max, head_kv), a.n_pages_max, page);
    }

    // a copy of what it held is no good any more
    if (threadIdx.x == 0 && a.frames) {
        monarch_frame_head * head = monarch_frames_head(a.frames, a.n_pages_max, a.op.n_frames, head_kv);

        const int32_t frame = monarch_frame_find(head, a.op.n_frames, page);
        if (frame >= 0) {
            monarch_frame_head_page(head)[frame] = -1;
        }
    }
}

static size_t monarch_page_out_shared(const monarch_codec & codec) {
    const size_t n_floats = 2*codec.head_dim + MONARCH_THREADS/MONARCH_WARP*monarch_record_floats(codec.head_dim);
    const size_t n_values = codec.page_size*codec.head_dim;

    return n_floats*sizeof(float) + n_values/2 + (codec.residual_k ? n_values : 0);
}
