// Restoring a stock state into a paged cache: everything is read and checked first, then paged out on the way in.

#include "monarch-kv-cache.h"

#include "monarch-convert.h"
#include "monarch-io.h"
#include "monarch-summary.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <thread>

// rows of one layer, in the order of the state's cells
struct monarch_state_rows {
    std::vector<uint8_t> data;
    size_t               row_size;
};

// a stock state of one sequence
struct monarch_stock_state {
    std::vector<llama_pos>          pos;
    std::vector<uint32_t>           order; // cells by ascending position
    std::vector<monarch_state_rows> k;
    std::vector<monarch_state_rows> v;
};

static void monarch_state_read_cells(llama_io_read_i & io, uint32_t n_max, bool is_whole, monarch_stock_state & state) {
    const uint32_t n = monarch_state_get<uint32_t>(io);
    monarch_state_check(n <= n_max, "it holds more tokens than n_ctx");

    state.pos.resize(n);
    for (uint32_t i = 0; i < n; ++i) {
        state.pos[i] = monarch_state_get<llama_pos>(io);

        monarch_state_check(monarch_state_get<uint32_t>(io) == 1, "a cell belongs to several sequences");

        // restoring one sequence gives it a new number, restoring a whole context does not
        const llama_seq_id seq_id = monarch_state_get<llama_seq_id>(io);
        monarch_state_check(!is_whole || seq_id == 0, "it holds a sequence other than 0");
    }

    state.order.resize(n);
    std::iota(state.order.begin(), state.order.end(), 0);
    std::sort(state.order.begin(), state.order.end(), [&](uint32_t a, uint32_t b) { return state.pos[a] < state.pos[b]; });

    for (uint32_t i = 0; i < n; ++i) {
        const llama_pos pos = state.pos[state.order[i]];

        monarch_state_check(pos >= 0 && pos < MONARCH_STATE_MAX_POS, "damaged positions");
        monarch_state_check(i == 0 || pos == state.pos[state.order[i - 1]] + 1, "its positions are not consecutive");
    }
}

static monarch_state_rows monarch_state_read_rows(llama_io_read_i & io, const ggml_tensor * ring, size_t n) {
    const size_t row_size = ggml_row_size(ring->type, ring->ne[0]);

    monarch_state_check(monarch_state_get<int32_t> (io) == (int32_t) ring->type, "another type of K or V");
    monarch_state_check(monarch_state_get<uint64_t>(io) == row_size,             "another size of K or V");

    monarch_state_rows res = { std::vector<uint8_t>(n*row_size), row_size };
    io.read(res.data.data(), res.data.size());
    return res;
}

// V of a context without flash attention: one row per value
static monarch_state_rows monarch_state_read_columns(llama_io_read_i & io, const ggml_tensor * ring, size_t n) {
    const size_t   type_size = ggml_type_size(ring->type);
    const uint32_t n_values  = ring->ne[0];

    monarch_state_check(monarch_state_get<int32_t> (io) == (int32_t) ring->type, "another type of V");
    monarch_state_check(monarch_state_get<uint32_t>(io) == type_size && ggml_blck_size(ring->type) == 1, "another size of V");
    monarch_state_check(monarch_state_get<uint32_t>(io) == n_values, "another size of V");

    std::vector<uint8_t> column(n*type_size);
    monarch_state_rows   res = { std::vector<uint8_t>(n*n_values*type_size), n_values*type_size };

    for (uint32_t j = 0; j < n_values; ++j) {
        io.read(column.data(), column.size());
        for (size_t i = 0; i < n; ++i) {
            memcpy(res.data.data() + i*res.row_size + j*type_size, column.data() + i*type_size, type_size);
        }
    }
    return res;
}

// the number of streams is read already
void monarch_kv_cache::stock_read(llama_io_read_i & io, bool is_whole) {
    // stock keeps quantised K and V rotated
    monarch_state_check(!ggml_is_quantized(type_k()) && !ggml_is_quantized(type_v()), "quantised K or V states are not supported");

    monarch_stock_state state;
    monarch_state_read_cells(io, n_ctx, is_whole, state);

    if (!state.pos.empty()) {
        const bool is_transposed = monarch_state_get<uint32_t>(io) != 0;

        monarch_state_check(monarch_state_get<uint32_t>(io) == layers.size(), "another number of layers");

        for (const auto & layer : layers) {
            state.k.push_back(monarch_state_read_rows(io, layer.k, state.pos.size()));
        }
        for (const auto & layer : layers) {
            state.v.push_back(is_transposed ? monarch_state_read_columns(io, layer.v, state.pos.size()) : monarch_state_read_rows(io, layer.v, state.pos.size()));
        }
    }

    stock_restore(state);
}

// cells [i0, i0 + n) in order of position as f32, one KV head
static void monarch_state_convert(const monarch_stock_state & state, const monarch_state_rows & rows, ggml_type type, size_t i0, int32_t n, uint32_t head_kv, int32_t head_dim, float * dst) {
    for (int32_t i = 0; i < n; ++i, dst += head_dim) {
        const uint8_t * src = rows.data.data() + state.order[i0 + i]*rows.row_size + head_kv*ggml_row_size(type, head_dim);

        monarch_convert_to_f32(type, src, dst, head_dim);
    }
}

void monarch_kv_cache::stock_restore_page(const monarch_stock_state & state, size_t i_layer, uint32_t i_page, size_t i0) {
    const monarch_op_params op   = get_op_params(0, 0.0f);
    const cold_layer      & cold = cold_layers[i_layer];

    float k[MONARCH_MAX_PAGE_SIZE*MONARCH_MAX_HEAD_DIM];
    float v[MONARCH_MAX_PAGE_SIZE*MONARCH_MAX_HEAD_DIM];

    const int32_t phys = table.get_pages()[i_page].phys;

    for (uint32_t h = 0; h < n_head_kv; ++h) {
        monarch_state_convert(state, state.k[i_layer], layers[i_layer].k->type, i0, knobs.page_size, h, head_dim, k);
        monarch_state_convert(state, state.v[i_layer], layers[i_layer].v->type, i0, knobs.page_size, h, head_dim, v);

        monarch_codec_encode_page(&op.codec, k, v, (uint8_t *) cold.pool->data + monarch_pool_offset(&op.codec, n_pages_max, h, phys));
        monarch_summary_encode(op.scorer, head_dim, knobs.page_size, k,
                (uint8_t *) cold.summary->data + monarch_summary_offset(head_dim, n_pages_max, h, phys), phys%MONARCH_SUMMARY_GROUP);

        monarch_head_state_count     (get_head_state(i_layer, h), n_pages_max)[phys] = 0;
        monarch_head_state_importance(get_head_state(i_layer, h), n_pages_max)[phys] = 0.0f;
    }
}

// one row of the state into a ring slot, all layers
void monarch_kv_cache::stock_restore_slot(const monarch_stock_state & state, size_t i, uint32_t slot) {
    for (size_t il = 0; il < layers.size(); ++il) {
        memcpy((char *) layers[il].k->data + slot*layers[il].k->nb[1], state.k[il].data.data() + state.order[i]*state.k[il].row_size, state.k[il].row_size);
        memcpy((char *) layers[il].v->data + slot*layers[il].v->nb[1], state.v[il].data.data() + state.order[i]*state.v[il].row_size, state.v[il].row_size);
    }
}

// sink tokens and the hot window into the ring, what lies between into pages, as if it had been decoded
void monarch_kv_cache::stock_restore(const monarch_stock_state & state) {
    const size_t n = state.pos.size();

    size_t i_first = 0; // the first token that may be paged out
    while (i_first < n && state.pos[state.order[i_first]] < knobs.sink_tokens) {
        ++i_first;
    }

    const size_t n_past  = n - i_first + 1 > (size_t) knobs.hot_window ? n - i_first + 1 - knobs.hot_window : 0;
    const size_t n_pages = n_past/knobs.page_size;

    std::vector<size_t>    hot;
    std::vector<llama_pos> pos;
    for (size_t i = 0; i < n; ++i) {
        if (i < i_first || i >= i_first + n_pages*knobs.page_size) {
            hot.push_back(i);
            pos.push_back(state.pos[state.order[i]]);
        }
    }

    llama_kv_cells cells = stage_cells(pos);

    std::vector<std::thread> threads;
    threads.reserve(n_threads);

    // from here on nothing fails
    clear(false);

    v_cells[0] = std::move(cells);

    for (size_t i = 0; i < n_pages; ++i) {
        table.push(state.pos[state.order[i_first + i*knobs.page_size]], UINT32_MAX >> (32 - knobs.page_size));
    }

    std::atomic<size_t> next { 0 };

    const auto worker = [&]() {
        for (size_t i = next++; i < layers.size()*n_pages; i = next++) {
            stock_restore_page(state, i/n_pages, i%n_pages, i_first + (i%n_pages)*knobs.page_size);
        }
    };

    try {
        for (uint32_t i = 1; i < n_threads; ++i) {
            threads.emplace_back(worker);
        }
    } catch (const std::exception &) { // no more threads, or no memory for them
        LLAMA_LOG_WARN("%s: only %zu threads could be started\n", __func__, threads.size() + 1);
    }
    worker();
    for (auto & thread : threads) {
        thread.join();
    }

    for (size_t slot = 0; slot < hot.size(); ++slot) {
        stock_restore_slot(state, hot[slot], slot);
    }
}
