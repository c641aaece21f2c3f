// Restoring a stock state into a paged cache: everything is read and checked first, then paged out on the way in.

#include "monarch-kv-cache.h"

#include "monarch-convert.h"
#include "monarch-io.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-io.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

// rows of one layer, in the order of the state's cells
struct monarch_state_rows {
    std::vector<uint8_t> data;
    size_t               row_size;
};

// a stock state of one sequence
struct monarch_stock_state {
    std::vector<llama_pos>          pos;
    std::vector<uint32_t>           order; // cells by ascending position
    std::vector<int32_t>            phys;  // pages that [first_cold, first_cold + phys.size()*page_size) of the order go to
    size_t                          first_cold;
    std::vector<size_t>             hot;   // the others, and the slots that they go to
    std::vector<uint32_t>           slots;
    std::vector<monarch_state_rows> k;
    std::vector<monarch_state_rows> v;
};

static void monarch_state_read_cells(llama_io_read_i & io, uint32_t n, uint32_t n_max, bool is_whole, monarch_stock_state & state) {
    monarch_state_check(n <= n_max, "it holds more tokens than n_ctx");
    monarch_state_check(state.pos.empty(), "it holds several sequences: restore them one by one");

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

        monarch_state_check(pos >= 0 && pos < MONARCH_MAX_POS, "damaged positions");
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

// the number of streams is read already; a whole state is of sequence 0
void monarch_kv_cache::stock_read(llama_io_read_i & io, uint32_t n_streams, llama_seq_id seq_id) {
    // stock keeps quantised K and V rotated
    monarch_state_check(!ggml_is_quantized(type_k()) && !ggml_is_quantized(type_v()), "quantised K or V states are not supported");

    monarch_stock_state state = {};

    for (uint32_t i = 0; i < n_streams; ++i) {
        const uint32_t n = monarch_state_get<uint32_t>(io);
        if (n == 0) {
            continue;
        }

        monarch_state_read_cells(io, n, n_ctx_seq, seq_id < 0, state);

        const bool is_transposed = monarch_state_get<uint32_t>(io) != 0;

        monarch_state_check(monarch_state_get<uint32_t>(io) == layers.size(), "another number of layers");

        for (const auto & layer : layers) {
            state.k.push_back(monarch_state_read_rows(io, layer.k, state.pos.size()));
        }
        for (const auto & layer : layers) {
            state.v.push_back(is_transposed ? monarch_state_read_columns(io, layer.v, state.pos.size()) : monarch_state_read_rows(io, layer.v, state.pos.size()));
        }
    }

    replace(seq_id, [&]() {
        stock_place(state, std::max(seq_id, 0));
    });

    const auto restore = [&]() { stock_restore(state); };

    fill(seq_id, std::cref(restore));
}

// cells [i0, i0 + n) in order of position as f32, one KV head
static void monarch_state_convert(const monarch_stock_state & state, const monarch_state_rows & rows, ggml_type type, size_t i0, int32_t n, uint32_t head_kv, int32_t head_dim, float * dst) {
    for (int32_t i = 0; i < n; ++i, dst += head_dim) {
        const uint8_t * src = rows.data.data() + state.order[i0 + i]*rows.row_size + head_kv*ggml_row_size(type, head_dim);

        monarch_convert_to_f32(type, src, dst, head_dim);
    }
}

void monarch_kv_cache::stock_restore_layer(const monarch_stock_state & state, size_t i_layer) {
    monarch_cold_writer writer(store, i_layer);

    const auto restore_page = [&](size_t i_page) {
        float k[MONARCH_MAX_PAGE_SIZE*MONARCH_MAX_HEAD_DIM];
        float v[MONARCH_MAX_PAGE_SIZE*MONARCH_MAX_HEAD_DIM];

        const int32_t phys = state.phys[i_page];
        const size_t  i0   = state.first_cold + i_page*knobs.page_size;

        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_state_convert(state, state.k[i_layer], layers[i_layer].k->type, i0, knobs.page_size, h, head_dim, k);
            monarch_state_convert(state, state.v[i_layer], layers[i_layer].v->type, i0, knobs.page_size, h, head_dim, v);

            writer.put_tokens(h, phys, pool.get_mask(phys), k, v);
        }
    };

    run_jobs(state.phys.size(), std::cref(restore_page));
}

// rows of the state into the slots of one ring
static void monarch_stock_restore_ring(const monarch_stock_state & state, const monarch_state_rows & rows, ggml_tensor * ring) {
    auto bytes = monarch_bytes::change(ring);

    for (size_t i = 0; i < state.hot.size(); ++i) {
        memcpy(bytes.data() + state.slots[i]*ring->nb[1], rows.data.data() + state.order[state.hot[i]]*rows.row_size, rows.row_size);
    }
}

// sink tokens and the hot window into the ring, what lies between into pages, as if it had been decoded
void monarch_kv_cache::stock_place(monarch_stock_state & state, llama_seq_id seq_id) {
    const size_t n = state.pos.size();

    state.first_cold = 0;
    while (state.first_cold < n && state.pos[state.order[state.first_cold]] < knobs.sink_tokens) {
        ++state.first_cold;
    }

    const size_t n_rest  = n - state.first_cold + 1;
    const size_t n_pages = n_rest > (size_t) knobs.hot_window ? (n_rest - knobs.hot_window)/knobs.page_size : 0;
    const size_t n_cold  = n_pages*knobs.page_size;

    monarch_state_check(n_tokens() + n <= n_ctx && pool.n_free() >= n_pages && n_hot() + n - n_cold <= get_size(), "it holds more than there is room for");

    const uint32_t mask = UINT32_MAX >> (32 - knobs.page_size);

    for (size_t i = 0; i < n_pages; ++i) {
        state.phys.push_back(pool.take(mask));
        tables[seq_id].push(state.phys[i], state.pos[state.order[state.first_cold + i*knobs.page_size]], mask);
    }

    std::vector<bool> is_taken(get_size());

    for (size_t i = 0; i < n; ++i) {
        if (i < state.first_cold || i >= state.first_cold + n_cold) {
            state.hot  .push_back(i);
            state.slots.push_back(find_cell(seq_id, is_taken));

            v_cells[0].pos_set(state.slots.back(), state.pos[state.order[i]]);
            cold_bits[state.slots.back()] = {};
            v_cells[0].seq_add(state.slots.back(), seq_id);
        }
    }
}

void monarch_kv_cache::stock_restore(const monarch_stock_state & state) {
    for (size_t il = 0; il < layers.size() && !state.pos.empty(); ++il) {
        stock_restore_layer(state, il);
        monarch_stock_restore_ring(state, state.k[il], layers[il].k);
        monarch_stock_restore_ring(state, state.v[il], layers[il].v);
    }
}
