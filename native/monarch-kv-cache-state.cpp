// States of a paged cache. One layout for every backend and every order of physical pages:
//
//   header      monarch_state_header
//   pages       (first position, token mask) each, ascending
//   positions   of the hot tokens, ascending
//   crc         of all of the above
//   hot         per layer: K rows, V rows in the order of the positions
//   crc         of the hot part
//   pages       each: blocks of every layer and KV head, then their summaries, then the crc of both
//   sticky      per layer and KV head: promotions, scored, importance of every page, count of every page
//   crc         of the sticky part
//
// Reading stages everything, checks it, and only then replaces what the cache holds.

#include "monarch-kv-cache.h"

#include "monarch-crc.h"
#include "monarch-error.h"
#include "monarch-io.h"
#include "monarch-policy.h"
#include "monarch-summary.h"

#include <algorithm>
#include <cstring>

static const uint32_t MONARCH_STATE_MAGIC   = 0x4348434d; // "MCHC"; a stock state starts with its number of streams
static const uint32_t MONARCH_STATE_VERSION = 1;

struct monarch_state_header {
    uint32_t magic;
    uint32_t version;
    uint32_t fingerprint;
    uint32_t n_layer;
    uint32_t n_head_kv;
    uint32_t head_dim;
    uint32_t type_k;
    uint32_t type_v;
    uint32_t page_size;
    uint32_t bits_k;
    uint32_t bits_v;
    uint32_t residual_k;
    uint32_t scorer;
    uint32_t sink_tokens;
    uint32_t hot_window;
    uint32_t n_pages;
    uint32_t n_hot;
    uint32_t reserved;
    uint64_t n_page_outs;
};

struct monarch_state_page {
    int32_t  first_pos;
    uint32_t mask;
};

struct monarch_state_counts {
    uint64_t n_promotions;
    uint64_t n_scored;
};

struct monarch_paged_state {
    monarch_state_header            header;
    std::vector<monarch_state_page> pages;
    std::vector<llama_pos>          pos;
    std::vector<int32_t>            slots; // of pos in the ring
    std::vector<uint8_t>            hot;
    std::vector<uint8_t>            cold;
    std::vector<uint8_t>            sticky;

    uint32_t crc() const {
        uint32_t res = monarch_crc(0, &header, sizeof(header));
        res = monarch_crc(res, pages.data(), pages.size()*sizeof(pages[0]));
        return monarch_crc(res, pos.data(), pos.size()*sizeof(pos[0]));
    }
};

size_t monarch_kv_cache::paged_hot_size(uint32_t n) const {
    size_t res = 0;
    for (const auto & layer : layers) {
        res += n*(ggml_row_size(layer.k->type, layer.k->ne[0]) + ggml_row_size(layer.v->type, layer.v->ne[0]));
    }
    return res;
}

size_t monarch_kv_cache::paged_page_size() const {
    return layers.size()*n_head_kv*(cold_layers[0].pool->nb[1] + monarch_summary_size(head_dim));
}

size_t monarch_kv_cache::paged_sticky_size(uint32_t n) const {
    return layers.size()*n_head_kv*(sizeof(monarch_state_counts) + n*(sizeof(float) + 1));
}

monarch_paged_state monarch_kv_cache::paged_describe() const {
    monarch_paged_state res = {};

    for (const auto & page : table.get_pages()) {
        res.pages.push_back({ page.first_pos, page.mask });
    }
    for (const auto & [pos, slot] : v_cells[0].seq_pos_get(0)) {
        res.pos  .push_back(pos);
        res.slots.push_back(slot);
    }

    res.header.magic       = MONARCH_STATE_MAGIC;
    res.header.version     = MONARCH_STATE_VERSION;
    res.header.fingerprint = fingerprint;
    res.header.n_layer     = layers.size();
    res.header.n_head_kv   = n_head_kv;
    res.header.head_dim    = head_dim;
    res.header.type_k      = type_k();
    res.header.type_v      = type_v();
    res.header.page_size   = knobs.page_size;
    res.header.bits_k      = knobs.cold_bits_k;
    res.header.bits_v      = knobs.cold_bits_v;
    res.header.residual_k  = knobs.residual_k;
    res.header.scorer      = knobs.scorer;
    res.header.sink_tokens = knobs.sink_tokens;
    res.header.hot_window  = knobs.hot_window;
    res.header.n_pages     = res.pages.size();
    res.header.n_hot       = res.pos.size();
    res.header.n_page_outs = n_page_outs;

    return res;
}

//
// write
//

static void monarch_state_put(llama_io_write_i & io, const void * data, size_t size) {
    if (size > 0) {
        io.write(data, size);
    }
}

void monarch_kv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    monarch_state_check(!(flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE), "states on a device are not supported");

    monarch_paged_state state = paged_describe();

    if (seq_id > 0) {
        state.pages.clear();
        state.pos  .clear();
        state.header.n_pages = 0;
        state.header.n_hot   = 0;
    }

    const uint32_t crc = state.crc();

    monarch_state_put(io, &state.header, sizeof(state.header));
    monarch_state_put(io, state.pages.data(), state.pages.size()*sizeof(state.pages[0]));
    monarch_state_put(io, state.pos.data(), state.pos.size()*sizeof(state.pos[0]));
    monarch_state_put(io, &crc, sizeof(crc));

    if (seq_id > 0) {
        return;
    }

    paged_write_hot(io);
    for (const auto & page : table.get_pages()) {
        paged_write_page(io, page);
    }
    paged_write_sticky(io);
}

// one tensor of the ring, in order of position; returns the crc that goes on
static uint32_t monarch_state_write_rows(llama_io_write_i & io, ggml_tensor * ring, const std::set<std::pair<llama_pos, uint32_t>> & order, uint32_t crc) {
    const size_t size = ggml_row_size(ring->type, ring->ne[0]);

    for (const auto & [pos, slot] : order) {
        io.write_tensor(ring, slot*ring->nb[1], size);
        crc = monarch_crc(crc, (const char *) ring->data + slot*ring->nb[1], size);
    }
    return crc;
}

void monarch_kv_cache::paged_write_hot(llama_io_write_i & io) const {
    uint32_t crc = 0;
    for (const auto & layer : layers) {
        crc = monarch_state_write_rows(io, layer.k, v_cells[0].seq_pos_get(0), crc);
        crc = monarch_state_write_rows(io, layer.v, v_cells[0].seq_pos_get(0), crc);
    }
    io.write(&crc, sizeof(crc));
}

void monarch_kv_cache::paged_write_page(llama_io_write_i & io, const monarch_page_table::page & page) const {
    const monarch_codec codec = get_op_params(0, 0.0f).codec;
    const size_t        size  = monarch_codec_block_size(&codec);

    std::vector<uint8_t> summary(monarch_summary_size(head_dim));

    uint32_t crc = 0;

    for (const auto & cold : cold_layers) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            const size_t offset = monarch_pool_offset(&codec, n_pages_max, h, page.phys);

            io.write_tensor(cold.pool, offset, size);
            crc = monarch_crc(crc, (const char *) cold.pool->data + offset, size);
        }
    }
    for (const auto & cold : cold_layers) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_summary_get(head_dim, (const uint8_t *) cold.summary->data + monarch_summary_offset(head_dim, n_pages_max, h, page.phys),
                    page.phys%MONARCH_SUMMARY_GROUP, summary.data());

            io.write(summary.data(), summary.size());
            crc = monarch_crc(crc, summary.data(), summary.size());
        }
    }

    io.write(&crc, sizeof(crc));
}

// as the next step will find it: the last step's promotions are counted
void monarch_kv_cache::paged_write_sticky(llama_io_write_i & io) const {
    const size_t size = monarch_head_state_size(n_pages_max);

    monarch_policy policy = {};
    policy.sticky_threshold = knobs.sticky_threshold;
    policy.importance_decay = knobs.importance_decay;

    std::vector<uint64_t> copy((size + 7)/8);
    std::vector<uint8_t>  data;

    for (size_t i = 0; i < cold_layers.size(); ++i) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            memcpy(copy.data(), get_head_state(i, h), size);

            monarch_head_state * head = (monarch_head_state *) copy.data();
            monarch_policy_apply_log(&policy, head, n_pages_max, committed);

            const monarch_state_counts counts = { head->n_promotions, head->n_scored };

            data.insert(data.end(), (const uint8_t *) &counts, (const uint8_t *) (&counts + 1));
            for (const auto & page : table.get_pages()) {
                const uint8_t * importance = (const uint8_t *) (monarch_head_state_importance(head, n_pages_max) + page.phys);
                data.insert(data.end(), importance, importance + sizeof(float));
            }
            for (const auto & page : table.get_pages()) {
                data.push_back(monarch_head_state_count(head, n_pages_max)[page.phys]);
            }
        }
    }

    const uint32_t crc = monarch_crc(0, data.data(), data.size());

    io.write(data.data(), data.size());
    io.write(&crc, sizeof(crc));
}

//
// read
//

static void monarch_state_fetch(llama_io_read_i & io, void * dst, size_t size) {
    if (size > 0) { // an empty vector has no data to copy to
        io.read(dst, size);
    }
}

// a part and its crc, as many bytes at a time as surely came
static void monarch_state_read_part(llama_io_read_i & io, size_t size, std::vector<uint8_t> & dst, const char * what) {
    const size_t start = dst.size();
    const size_t chunk = 1 << 20;

    for (size_t n = 0; n < size; n += chunk) {
        const size_t part = std::min(chunk, size - n);
        dst.resize(start + n + part);
        io.read(dst.data() + start + n, part);
    }
    monarch_state_check(monarch_state_get<uint32_t>(io) == monarch_crc(0, dst.data() + start, size), what);
}

static void monarch_state_check_header(const monarch_state_header & got, const monarch_state_header & want) {
    monarch_state_check(got.version == want.version, "another version of the format");
    monarch_state_check(got.n_layer == want.n_layer && got.n_head_kv == want.n_head_kv && got.head_dim == want.head_dim, "another shape of model");
    monarch_state_check(got.fingerprint == want.fingerprint, "another model");
    monarch_state_check(got.type_k == want.type_k && got.type_v == want.type_v, "another type of K or V");
    monarch_state_check(got.page_size == want.page_size, "another page_size");
    monarch_state_check(got.bits_k == want.bits_k && got.bits_v == want.bits_v && got.residual_k == want.residual_k, "other cold_bits_k, cold_bits_v or residual_k");
    monarch_state_check(got.scorer == want.scorer, "another scorer");
    monarch_state_check(got.sink_tokens == want.sink_tokens && got.hot_window == want.hot_window, "other sink_tokens or hot_window");
}

// positions ascend: sink tokens, pages, the hot window
static void monarch_state_check_positions(const monarch_paged_state & state, uint32_t n_ctx) {
    const uint32_t mask_max    = UINT32_MAX >> (32 - state.header.page_size);
    const int64_t  sink_tokens = state.header.sink_tokens;

    size_t  n_tokens = state.pos.size();
    int64_t end      = 0;
    for (const auto & page : state.pages) {
        const monarch_page_table::page entry = { 0, page.first_pos, page.mask };

        monarch_state_check(page.mask != 0 && page.mask <= mask_max, "a damaged page table");
        monarch_state_check(page.first_pos >= sink_tokens && page.first_pos < MONARCH_STATE_MAX_POS && entry.begin() >= end, "a damaged page table");

        n_tokens += entry.n_tokens();
        end       = entry.end();
    }
    monarch_state_check(n_tokens <= n_ctx, "it holds more tokens than n_ctx");

    int64_t last = -1;
    for (const llama_pos pos : state.pos) {
        monarch_state_check(pos > last && pos < MONARCH_STATE_MAX_POS && (pos < sink_tokens || pos >= end), "damaged positions");
        last = pos;
    }
}

void monarch_kv_cache::paged_read(llama_io_read_i & io) {
    const monarch_state_header want = paged_describe().header;

    monarch_paged_state state = {};

    state.header.magic = MONARCH_STATE_MAGIC;
    io.read((char *) &state.header + sizeof(uint32_t), sizeof(state.header) - sizeof(uint32_t));

    monarch_state_check_header(state.header, want);
    monarch_state_check(state.header.n_pages <= n_pages_max && state.header.n_hot <= get_size(), "it holds more than this context can");

    state.pages.resize(state.header.n_pages);
    state.pos  .resize(state.header.n_hot);

    monarch_state_fetch(io, state.pages.data(), state.pages.size()*sizeof(state.pages[0]));
    monarch_state_fetch(io, state.pos.data(), state.pos.size()*sizeof(state.pos[0]));

    monarch_state_check(monarch_state_get<uint32_t>(io) == state.crc(), "a damaged header");
    monarch_state_check_positions(state, n_ctx);

    if (state.pages.empty() && state.pos.empty()) {
        clear(false);
        return;
    }

    monarch_state_read_part(io, paged_hot_size(state.pos.size()), state.hot, "a damaged hot window");
    for (size_t i = 0; i < state.pages.size(); ++i) {
        monarch_state_read_part(io, paged_page_size(), state.cold, "a damaged page");
    }
    monarch_state_read_part(io, paged_sticky_size(state.pages.size()), state.sticky, "a damaged sticky state");

    paged_restore(state);
}

static void monarch_state_take(const uint8_t ** src, void * dst, size_t size) {
    memcpy(dst, *src, size);
    *src += size;
}

llama_kv_cells monarch_kv_cache::stage_cells(const std::vector<llama_pos> & pos) const {
    llama_kv_cells res;
    res.resize(get_size());

    for (size_t i = 0; i < pos.size(); ++i) {
        res.pos_set(i, pos[i]);
        res.seq_add(i, 0);
    }
    return res;
}

void monarch_kv_cache::paged_restore(const monarch_paged_state & state) {
    const monarch_codec codec = get_op_params(0, 0.0f).codec;

    llama_kv_cells cells = stage_cells(state.pos);

    // from here on nothing fails: all of it is here and checked
    clear(false);

    v_cells[0]  = std::move(cells);
    n_page_outs = state.header.n_page_outs;

    for (const auto & page : state.pages) {
        table.push(page.first_pos, page.mask);
    }

    const uint8_t * src = state.hot.data();
    for (const auto & layer : layers) {
        for (ggml_tensor * ring : { layer.k, layer.v }) {
            for (size_t i = 0; i < state.pos.size(); ++i) {
                monarch_state_take(&src, (char *) ring->data + i*ring->nb[1], ggml_row_size(ring->type, ring->ne[0]));
            }
        }
    }

    src = state.cold.data();
    for (const auto & page : table.get_pages()) {
        for (const auto & cold : cold_layers) {
            for (uint32_t h = 0; h < n_head_kv; ++h) {
                monarch_state_take(&src, (char *) cold.pool->data + monarch_pool_offset(&codec, n_pages_max, h, page.phys), monarch_codec_block_size(&codec));
            }
        }
        for (const auto & cold : cold_layers) {
            for (uint32_t h = 0; h < n_head_kv; ++h) {
                monarch_summary_set(head_dim, (uint8_t *) cold.summary->data + monarch_summary_offset(head_dim, n_pages_max, h, page.phys),
                        page.phys%MONARCH_SUMMARY_GROUP, src);
                src += monarch_summary_size(head_dim);
            }
        }
    }

    src = state.sticky.data();
    for (size_t i = 0; i < cold_layers.size(); ++i) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_head_state   * head = get_head_state(i, h);
            monarch_state_counts   counts;

            monarch_state_take(&src, &counts, sizeof(counts));

            head->n_promotions = counts.n_promotions;
            head->n_scored     = counts.n_scored;

            for (const auto & page : table.get_pages()) {
                monarch_state_take(&src, monarch_head_state_importance(head, n_pages_max) + page.phys, sizeof(float));
            }
            for (const auto & page : table.get_pages()) {
                monarch_state_take(&src, monarch_head_state_count(head, n_pages_max) + page.phys, 1);
            }
        }
    }
}

void monarch_kv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    monarch_state_check(seq_id <= 0, "a paged context holds sequence 0 alone so far");
    monarch_state_check(!(flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE), "states on a device are not supported");

    const uint32_t first = monarch_state_get<uint32_t>(io);

    if (first == MONARCH_STATE_MAGIC) {
        paged_read(io);
        return;
    }

    monarch_state_check(first == 1, "it is neither a paged state nor a stock state of one stream");

    stock_read(io, seq_id == -1);
}
