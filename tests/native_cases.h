#pragma once

// What the tests of the op alone share: the few functions of ggml that native/'s CPU files call, and made-up pages.

#include "monarch-cpu.h"
#include "monarch-enums.h"
#include "monarch-op.h"
#include "monarch-state.h"
#include "monarch-table.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <pthread.h>

//
// of ggml
//

// of upstream's, all that the op needs
struct ggml_threadpool {
    pthread_barrier_t barrier;
};

extern "C" {

void ggml_vec_dot_f32(int n, float * s, size_t, const float * x, size_t, const float * y, size_t, int) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) {
        sum += (double) x[i]*y[i];
    }
    *s = (float) sum;
}

static void f16_to_float(const void * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] = GGML_FP16_TO_FP32(((const ggml_fp16_t *) x)[i]);
    }
}

static void bf16_to_float(const void * x, float * y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        y[i] = GGML_BF16_TO_FP32(((const ggml_bf16_t *) x)[i]);
    }
}

const struct ggml_type_traits * ggml_get_type_traits(enum ggml_type type) {
    static struct ggml_type_traits res;
    res.to_float = type == GGML_TYPE_F16 ? f16_to_float : bf16_to_float;
    return &res;
}

int64_t ggml_time_us(void) {
    return std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void ggml_log_internal(enum ggml_log_level, const char * format, ...) {
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
}

void ggml_barrier(struct ggml_threadpool * threadpool) {
    if (threadpool) {
        pthread_barrier_wait(&threadpool->barrier);
    }
}

// one op at a time
static std::atomic<int> chunk;

void ggml_threadpool_chunk_set(struct ggml_threadpool *, int value) {
    chunk = value;
}

int ggml_threadpool_chunk_add(struct ggml_threadpool *, int value) {
    return chunk.fetch_add(value);
}

void ggml_abort(const char * file, int line, const char * fmt, ...) {
    fprintf(stderr, "%s:%d: %s\n", file, line, fmt);
    abort();
}

}

//
// cases
//

static const int64_t n_head_kv = 2;

struct test_case {
    int32_t head_dim, n_gqa, n_tokens, page_size, bits_k, bits_v, scorer, mode, n_pages, n_promote, n_kv, hot_bf16, mask_f32, n_runs;
};

static uint32_t seed;

static uint32_t random_bits() {
    seed = seed*1664525u + 1013904223u;
    return seed >> 8;
}

// nearly Gaussian, of unit variance
static float random_value() {
    float sum = 0.0f;
    for (int i = 0; i < 12; ++i) {
        sum += (float) random_bits()/(1 << 24);
    }
    return sum - 6.0f;
}

struct test_tensor {
    ggml_tensor       tensor = {};
    std::vector<char> data;

    test_tensor(ggml_type type, size_t type_size, int64_t ne0, int64_t ne1, int64_t ne2) : data(type_size*ne0*ne1*ne2) {
        const int64_t ne[4] = { ne0, ne1, ne2, 1 };

        tensor.type  = type;
        tensor.data  = data.data();
        tensor.nb[0] = type_size;
        for (int i = 0; i < 4; ++i) {
            tensor.ne[i] = ne[i];
            if (i > 0) {
                tensor.nb[i] = tensor.nb[i - 1]*ne[i - 1];
            }
        }
    }

    void set(int64_t i, float x) {
        switch (tensor.type) {
            case GGML_TYPE_F16:  ((ggml_fp16_t *) tensor.data)[i] = GGML_FP32_TO_FP16(x); break;
            case GGML_TYPE_BF16: ((ggml_bf16_t *) tensor.data)[i] = GGML_FP32_TO_BF16(x); break;
            default:             ((float       *) tensor.data)[i] = x;
        }
    }

    float get(int64_t i) const {
        switch (tensor.type) {
            case GGML_TYPE_F16:  return GGML_FP16_TO_FP32(((const ggml_fp16_t *) tensor.data)[i]);
            case GGML_TYPE_BF16: return GGML_BF16_TO_FP32(((const ggml_bf16_t *) tensor.data)[i]);
            default:             return ((const float *) tensor.data)[i];
        }
    }
};

// physical pages in an order of their own; some pages were cut
static void table_fill(const test_case & c, int64_t n_pages_max, int32_t * table) {
    table[MONARCH_TABLE_N_RUNS]         = 1;
    table[MONARCH_TABLE_N_RUNS_MAX]     = 1;
    table[MONARCH_TABLE_PROMOTE_PAGES]  = c.n_promote;
    table[MONARCH_TABLE_DENSE_PAGES]    = c.n_promote;
    table[MONARCH_TABLE_STEP]           = 1;

    *monarch_table_get_runs(table) = { 0, 0, c.n_tokens, 1, c.mode, 0, c.n_pages, 0 };

    monarch_table_entry * entries = monarch_table_get_pages(table);

    const uint32_t all = c.page_size == 32 ? 0xffffffff : (1u << c.page_size) - 1;

    for (int32_t i = 0; i < c.n_pages; ++i) {
        // long runs of neighbours, as there are until pages are recycled, then none; 16 whole ones first, of one group or of two
        entries[i].page = i < c.n_pages/2 ? i + c.n_pages%2 : (int32_t) (n_pages_max - 1 - (i - c.n_pages/2));
        entries[i].mask = i % 5 == 3 && i >= 16 ? (random_bits() & all) | 1u << random_bits() % c.page_size : all;
    }
}

static void mask_fill(const test_case & c, test_tensor * mask) {
    for (int64_t it = 0; it < c.n_tokens; ++it) {
        for (int64_t i = 0; i < c.n_kv; ++i) {
            const bool visible = i <= c.n_kv - c.n_tokens + it && (i == 0 || random_bits() % 8);

            mask->set(it*c.n_kv + i, visible ? 0.0f : -INFINITY);
        }
    }
}

// What no token sees may be no number, for example of a token that was removed.
static void hidden_fill(const test_case & c, const test_tensor & mask, test_tensor * k, test_tensor * v) {
    const int64_t n_row = n_head_kv*c.head_dim;

    for (int64_t i = 0; i < c.n_kv; ++i) {
        bool visible = false;
        for (int64_t it = 0; it < c.n_tokens; ++it) {
            visible |= mask.get(it*c.n_kv + i) > -INFINITY;
        }
        for (int64_t j = i*n_row; j < (i + 1)*n_row && !visible; ++j) {
            k->set(j, NAN);
            v->set(j, j % 2 ? NAN : INFINITY);
        }
    }
}

// faint: every other token gets most of the attention and has little V
static void pages_fill(const test_case & c, const monarch_op_params & op, int64_t n_pages_max, test_tensor * pool, test_tensor * summary, bool faint = false) {
    std::vector<float> k(c.page_size*c.head_dim);
    std::vector<float> v(c.page_size*c.head_dim);

    for (int64_t h = 0; h < n_head_kv; ++h) {
        for (int64_t page = 0; page < n_pages_max; ++page) {
            for (size_t i = 0; i < k.size(); ++i) {
                const bool is_faint = faint && i/c.head_dim % 2;

                k[i] = random_value()*(is_faint ? 4.0f  : 1.0f);
                v[i] = random_value()*(is_faint ? 0.02f : 1.0f);
            }
            monarch_codec_encode_page(&op.codec, k.data(), v.data(), (uint8_t *) pool->tensor.data + monarch_pool_offset(&op.codec, n_pages_max, h, page));
            monarch_summary_encode(op.scorer, c.head_dim, c.page_size, k.data(),
                    (uint8_t *) summary->tensor.data + monarch_summary_offset(c.head_dim, n_pages_max, h, page), page % MONARCH_SUMMARY_GROUP);
        }
    }
}

