// States of a paged cache. One layout for every backend and every order of physical pages:
//
//   header      monarch_state_header
//   sequences   monarch_state_seq each, ascending, those that hold anything
//   pages       monarch_state_page each, of one sequence after the other, ascending
//   tokens      monarch_state_token each, the hot ones, likewise
//   crc         of all of the above
//   hot         per layer: K rows, V rows
//   crc         of the hot part
//   pages       each: blocks of every layer and KV head, then their crc; summaries follow from them
//   sticky      per layer and KV head: promotions, scored, importance of every page, count of every page
//   crc         of the sticky part
//
// What sequences share is there once: pages and hot tokens are numbered in the order in which they are first named.
//
// Reading stages everything, checks it, and only then replaces what the cache holds.

#include "monarch-kv-cache.h"

#include "monarch-crc.h"
#include "monarch-error.h"
#include "monarch-io.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

static const uint32_t MONARCH_STATE_MAGIC   = 0x4348434d; // "MCHC"; a stock state starts with its number of streams
static const uint32_t MONARCH_STATE_VERSION = 2;

// pages of a KV head that are written together at most
static const int32_t MONARCH_STATE_PAGES = 32;

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
    uint32_t n_seqs;
    uint32_t n_pages;
    uint32_t n_hot;
    uint64_t n_page_outs;
};

struct monarch_state_seq {
    int32_t  seq_id;
    uint32_t n_pages;
    uint32_t n_hot;
};

struct monarch_state_page {
    uint32_t index;
    int32_t  first_pos;
    uint32_t mask;
};

struct monarch_state_token {
    uint32_t  index;
    llama_pos pos;
};

struct monarch_state_counts {
    uint64_t n_promotions;
    uint64_t n_scored;
};

struct monarch_paged_state {
    monarch_state_header             header;
    std::vector<monarch_state_seq>   seqs;
    std::vector<monarch_state_page>  pages;
    std::vector<monarch_state_token> tokens;
    std::vector<int32_t>             phys;  // [n_pages] where they are in this cache
    std::vector<uint32_t>            slots; // [n_hot]
    std::vector<uint8_t>             hot;
    std::vector<uint8_t>             cold;
    std::vector<uint8_t>             sticky;

    uint32_t crc() const {
        uint32_t res = monarch_crc(0, &header, sizeof(header));
        res = monarch_crc(res, seqs.data(), seqs.size()*sizeof(seqs[0]));
        res = monarch_crc(res, pages.data(), pages.size()*sizeof(pages[0]));
        return monarch_crc(res, tokens.data(), tokens.size()*sizeof(tokens[0]));
    }
};

size_t monarch_kv_cache::paged_hot_size(uint32_t n) const {
    size_t res = 0;
    for (const auto & layer : layers) {
        res += n*(ggml_row_size(layer.k->type, layer.k->ne[0]) + ggml_row_size(layer.v->type, layer.v->ne[0]));
    }
    return res;
}

size_t monarch_kv_cache::paged_sticky_size(uint32_t n) const {
    return layers.size()*n_head_kv*(sizeof(monarch_state_counts) + n*(sizeof(float) + 1));
}

// the number of x in the list, to whose end it goes if it is new
template <typename T>
static uint32_t monarch_state_index(std::vector<T> & list, std::vector<int32_t> & numbers, T x) {
    if (numbers[x] < 0) {
        numbers[x] = list.size();
        list.push_back(x);
    }
    return numbers[x];
}

// without the numbers of what it holds
monarch_state_header monarch_kv_cache::paged_header() const {
    monarch_state_header res = {};

    res.magic       = MONARCH_STATE_MAGIC;
    res.version     = MONARCH_STATE_VERSION;
    res.fingerprint = fingerprint;
    res.n_layer     = layers.size();
    res.n_head_kv   = n_head_kv;
    res.head_dim    = head_dim;
    res.type_k      = type_k();
    res.type_v      = type_v();
    res.page_size   = knobs.page_size;
    res.bits_k      = knobs.cold_bits_k;
    res.bits_v      = knobs.cold_bits_v;
    res.residual_k  = knobs.residual_k;
    res.scorer      = knobs.scorer;
    res.sink_tokens = knobs.sink_tokens;
    res.hot_window  = knobs.hot_window;
    res.n_page_outs = n_page_outs;

    return res;
}

monarch_paged_state monarch_kv_cache::paged_describe(llama_seq_id seq_id) const {
    monarch_paged_state res = {};

    std::vector<int32_t> page_numbers(n_pages_max, -1);
    std::vector<int32_t> slot_numbers(get_size(),  -1);

    for (int32_t s = 0; s < (int32_t) n_seqs(); ++s) {
        if ((seq_id >= 0 && seq_id != s) || n_tokens(s) == 0) {
            continue;
        }
        for (const auto & page : tables[s].get_pages()) {
            res.pages.push_back({ monarch_state_index(res.phys, page_numbers, page.phys), page.first_pos, page.mask });
        }
        for (const auto & [pos, slot] : v_cells[0].seq_pos_get(s)) {
            res.tokens.push_back({ monarch_state_index(res.slots, slot_numbers, slot), pos });
        }
        res.seqs.push_back({ s, tables[s].n_pages(), (uint32_t) v_cells[0].seq_pos_get(s).size() });
    }

    res.header         = paged_header();
    res.header.n_seqs  = res.seqs.size();
    res.header.n_pages = res.phys.size();
    res.header.n_hot   = res.slots.size();

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

// states lie in host memory, those too that might stay on the device
void monarch_kv_cache::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    GGML_UNUSED(flags);

    const monarch_paged_state state = paged_describe(seq_id);

    const uint32_t crc = state.crc();

    monarch_state_put(io, &state.header, sizeof(state.header));
    monarch_state_put(io, state.seqs.data(), state.seqs.size()*sizeof(state.seqs[0]));
    monarch_state_put(io, state.pages.data(), state.pages.size()*sizeof(state.pages[0]));
    monarch_state_put(io, state.tokens.data(), state.tokens.size()*sizeof(state.tokens[0]));
    monarch_state_put(io, &crc, sizeof(crc));

    if (state.seqs.empty()) {
        return;
    }

    paged_write_hot   (io, state);
    paged_write_cold  (io, state);
    paged_write_sticky(io, state);
}

// slots of one tensor of the ring; returns the crc that goes on
static uint32_t monarch_state_write_rows(llama_io_write_i & io, ggml_tensor * ring, const std::vector<uint32_t> & slots, uint32_t crc) {
    const size_t size = ggml_row_size(ring->type, ring->ne[0]);

    auto rows = monarch_bytes::read(ring);

    for (const uint32_t slot : slots) {
        const uint8_t * row = rows.data() + slot*ring->nb[1];

        io.write(row, size);
        crc = monarch_crc(crc, row, size);
    }
    return crc;
}

void monarch_kv_cache::paged_write_hot(llama_io_write_i & io, const monarch_paged_state & state) const {
    uint32_t crc = 0;
    for (const auto & layer : layers) {
        crc = monarch_state_write_rows(io, layer.k, state.slots, crc);
        crc = monarch_state_write_rows(io, layer.v, state.slots, crc);
    }
    io.write(&crc, sizeof(crc));
}

// Page by page, as the file has them. Neighbours in the pool come together: a device gives few large pieces faster than many
// small ones.
void monarch_kv_cache::paged_write_cold(llama_io_write_i & io, const monarch_paged_state & state) const {
    const auto & phys = state.phys;

    size_t i0 = 0;
    while (i0 < phys.size()) {
        int32_t lo = phys[i0];
        int32_t hi = phys[i0];

        size_t i1 = i0 + 1;
        while (i1 < phys.size() && std::max(hi, phys[i1]) - std::min(lo, phys[i1]) < MONARCH_STATE_PAGES) {
            lo = std::min(lo, phys[i1]);
            hi = std::max(hi, phys[i1]);
            ++i1;
        }

        paged_write_pages(io, &phys[i0], i1 - i0, lo, hi);
        i0 = i1;
    }
}

// n pages, all of them in [lo, hi]
void monarch_kv_cache::paged_write_pages(llama_io_write_i & io, const int32_t * phys, size_t n, int32_t lo, int32_t hi) const {
    const size_t size = monarch_codec_block_size(&store.get_codec());

    auto blocks = store.read_blocks(lo, hi);

    for (size_t i = 0; i < n; ++i) {
        uint32_t crc = 0;

        for (auto & block : blocks) {
            const uint8_t * data = block.data() + (phys[i] - lo)*size;

            io.write(data, size);
            crc = monarch_crc(crc, data, size);
        }
        io.write(&crc, sizeof(crc));
    }
}

static void monarch_state_append(std::vector<uint8_t> & dst, const void * src, size_t size) {
    dst.insert(dst.end(), (const uint8_t *) src, (const uint8_t *) src + size);
}

static void monarch_state_append_head(std::vector<uint8_t> & dst, monarch_head_state * head, int64_t n_pages_max, const std::vector<int32_t> & pages) {
    const monarch_state_counts counts = { head->n_promotions, head->n_scored };

    monarch_state_append(dst, &counts, sizeof(counts));
    for (const int32_t phys : pages) {
        monarch_state_append(dst, monarch_head_state_importance(head, n_pages_max) + phys, sizeof(float));
    }
    for (const int32_t phys : pages) {
        monarch_state_append(dst, monarch_head_state_count(head, n_pages_max) + phys, 1);
    }
}

// as the next step will find it: the last step's promotions are counted
void monarch_kv_cache::paged_write_sticky(llama_io_write_i & io, const monarch_paged_state & state) const {
    const size_t         size   = monarch_head_state_size(n_pages_max);
    const monarch_policy policy = get_policy();

    std::vector<uint64_t> copy((size + 7)/8);
    std::vector<uint8_t>  data;

    for (const auto & cold : store.get_layers()) {
        auto bytes = monarch_bytes::read(cold.state);

        for (uint32_t h = 0; h < n_head_kv; ++h) {
            memcpy(copy.data(), store.get_head(bytes, h).state, size);

            monarch_head_state * head = (monarch_head_state *) copy.data();

            monarch_policy_apply_log (&policy, head, n_pages_max, committed);
            monarch_state_append_head(data, head, n_pages_max, state.phys);
        }
    }

    const uint32_t crc = monarch_crc(0, data.data(), data.size());

    io.write(data.data(), data.size());
    io.write(&crc, sizeof(crc));
}

//
// read
//

template <typename T>
static void monarch_state_fetch_list(llama_io_read_i & io, size_t n, std::vector<T> & dst) {
    dst.resize(n);
    if (n > 0) { // an empty vector has no data to copy to
        io.read(dst.data(), n*sizeof(T));
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

// numbers come in the order in which they are first named, and what sequences share lies at one place
template <typename T>
static void monarch_state_check_index(std::vector<T> & named, const T & entry) {
    monarch_state_check(entry.index <= named.size(), "damaged numbers");

    if (entry.index == named.size()) {
        named.push_back(entry);
    }
}

static void monarch_state_check_seq(const monarch_state_seq & seq, const monarch_state_page * pages, const monarch_state_token * tokens, const monarch_state_header & header, uint32_t n_ctx_seq) {
    const uint32_t mask_max    = UINT32_MAX >> (32 - header.page_size);
    const int64_t  sink_tokens = header.sink_tokens;

    std::vector<llama_pos> pos;

    llama_pos begin = -1;
    for (uint32_t i = 0; i < seq.n_pages; ++i) {
        const monarch_page_table::page page = { 0, pages[i].first_pos, pages[i].mask };

        monarch_state_check(page.mask != 0 && page.mask <= mask_max, "a damaged page table");
        monarch_state_check(page.first_pos >= sink_tokens && page.first_pos < MONARCH_MAX_POS && page.begin() > begin, "a damaged page table");

        begin = page.begin();

        for (int32_t j = 0; j < 32; ++j) {
            if (page.mask >> j & 1) {
                pos.push_back(page.first_pos + j);
            }
        }
    }

    for (uint32_t i = 0; i < seq.n_hot; ++i) {
        monarch_state_check(tokens[i].pos >= 0 && tokens[i].pos < MONARCH_MAX_POS && (i == 0 || tokens[i].pos > tokens[i - 1].pos), "damaged positions");
        pos.push_back(tokens[i].pos);
    }

    std::sort(pos.begin(), pos.end());

    monarch_state_check(std::adjacent_find(pos.begin(), pos.end()) == pos.end(), "damaged positions");
    monarch_state_check(pos.size() <= n_ctx_seq, "it holds more tokens than n_ctx");
}

static void monarch_state_check_seqs(const monarch_paged_state & state, uint32_t n_ctx_seq) {
    std::vector<monarch_state_page>  pages;
    std::vector<monarch_state_token> tokens;
    std::vector<llama_seq_id>        named_by; // the last sequence that named a page

    const monarch_state_page  * page  = state.pages .data();
    const monarch_state_token * token = state.tokens.data();

    for (const auto & seq : state.seqs) {
        monarch_state_check_seq(seq, page, token, state.header, n_ctx_seq);

        for (uint32_t i = 0; i < seq.n_pages; ++i, ++page) {
            monarch_state_check_index(pages, *page);
            monarch_state_check(page->first_pos == pages[page->index].first_pos, "a damaged page table");

            // a table lists a page once, and so no more of them than there are
            named_by.resize(pages.size(), -1);
            monarch_state_check(named_by[page->index] != seq.seq_id, "a damaged page table");
            named_by[page->index] = seq.seq_id;
        }
        for (uint32_t i = 0; i < seq.n_hot; ++i, ++token) {
            monarch_state_check_index(tokens, *token);
            monarch_state_check(token->pos == tokens[token->index].pos, "damaged positions");
        }
    }

    monarch_state_check(pages.size() == state.header.n_pages && tokens.size() == state.header.n_hot, "damaged numbers");
}

// sequences ascend and hold something; one sequence may go to another number
static void monarch_state_check_ids(const monarch_paged_state & state, llama_seq_id seq_id, uint32_t n_seqs) {
    monarch_state_check(seq_id < 0 || state.seqs.size() <= 1, "it holds several sequences");

    for (size_t i = 0; i < state.seqs.size(); ++i) {
        monarch_state_check(i == 0 || state.seqs[i].seq_id > state.seqs[i - 1].seq_id, "damaged sequences");
        monarch_state_check(state.seqs[i].seq_id >= 0 && state.seqs[i].n_pages + state.seqs[i].n_hot > 0, "damaged sequences");
        monarch_state_check(seq_id >= 0 || (uint32_t) state.seqs[i].seq_id < n_seqs, "it holds a sequence that this context has no place for: raise n_seq_max");
    }
}

// header, sequences, pages and tokens: all that says how much follows
monarch_paged_state monarch_kv_cache::paged_read_lists(llama_io_read_i & io, llama_seq_id seq_id) const {
    monarch_paged_state res = {};

    auto & header = res.header;

    header.magic = MONARCH_STATE_MAGIC;
    io.read((char *) &header + sizeof(uint32_t), sizeof(header) - sizeof(uint32_t));

    monarch_state_check_header(header, paged_header());
    monarch_state_check(header.n_seqs <= LLAMA_MAX_SEQ && header.n_pages <= n_pages_max && header.n_hot <= get_size(), "it holds more than this context can");

    monarch_state_fetch_list(io, header.n_seqs, res.seqs);

    size_t n_pages = 0;
    size_t n_hot   = 0;
    for (const auto & seq : res.seqs) {
        monarch_state_check(seq.n_pages <= header.n_pages && seq.n_hot <= header.n_hot, "a damaged header");
        n_pages += seq.n_pages;
        n_hot   += seq.n_hot;
    }

    monarch_state_fetch_list(io, n_pages, res.pages);
    monarch_state_fetch_list(io, n_hot,   res.tokens);

    monarch_state_check(monarch_state_get<uint32_t>(io) == res.crc(), "a damaged header");
    monarch_state_check_ids (res, seq_id, n_seqs());
    monarch_state_check_seqs(res, n_ctx_seq);

    return res;
}

void monarch_kv_cache::paged_read(llama_io_read_i & io, llama_seq_id seq_id) {
    monarch_paged_state state = paged_read_lists(io, seq_id);

    if (!state.seqs.empty()) {
        monarch_state_read_part(io, paged_hot_size(state.header.n_hot), state.hot, "a damaged hot window");
        for (size_t i = 0; i < state.header.n_pages; ++i) {
            monarch_state_read_part(io, store.page_bytes(), state.cold, "a damaged page");
        }
        monarch_state_read_part(io, paged_sticky_size(state.header.n_pages), state.sticky, "a damaged sticky state");
    }

    bool is_alone = false;

    replace(seq_id, [&]() {
        is_alone = n_tokens() == 0;
        paged_place(state, seq_id);
    });

    const auto restore = [&]() { paged_restore(state, is_alone); };

    fill(seq_id, std::cref(restore));
}

// page tables and cells
void monarch_kv_cache::paged_place(monarch_paged_state & state, llama_seq_id seq_id) {
    monarch_state_check(pool.n_free() >= state.header.n_pages && n_hot() + state.header.n_hot <= get_size(), "it holds more than there is room for");

    const monarch_state_page  * page  = state.pages .data();
    const monarch_state_token * token = state.tokens.data();

    std::vector<bool> is_taken(get_size());

    for (const auto & seq : state.seqs) {
        const llama_seq_id dst = seq_id < 0 ? seq.seq_id : seq_id;

        for (uint32_t i = 0; i < seq.n_pages; ++i, ++page) {
            if (page->index == state.phys.size()) {
                state.phys.push_back(pool.take(page->mask));
            } else {
                pool.share(state.phys[page->index]);
            }

            const int32_t phys = state.phys[page->index];

            pool.set_mask(phys, pool.get_mask(phys) | page->mask);
            tables[dst].push(phys, page->first_pos, page->mask);
        }
        for (uint32_t i = 0; i < seq.n_hot; ++i, ++token) {
            if (token->index == state.slots.size()) {
                state.slots.push_back(find_cell(dst, is_taken));
                v_cells[0].pos_set(state.slots.back(), token->pos);
                cold_bits[state.slots.back()] = {};
            }
            v_cells[0].seq_add(state.slots[token->index], dst);
        }
    }

    monarch_state_check(n_tokens() <= n_ctx, "it holds more than there is room for");
}

static void monarch_state_take(const uint8_t ** src, void * dst, size_t size) {
    memcpy(dst, *src, size);
    *src += size;
}

// sticky state of one KV head; returns what follows
static const uint8_t * monarch_state_take_head(const uint8_t * src, const monarch_cold_head & head, const std::vector<int32_t> & pages, bool with_counts) {
    monarch_state_counts counts;

    monarch_state_take(&src, &counts, sizeof(counts));

    if (with_counts) {
        head.state->n_promotions = counts.n_promotions;
        head.state->n_scored     = counts.n_scored;
    }

    for (const int32_t phys : pages) {
        monarch_state_take(&src, head.importance + phys, sizeof(float));
    }
    for (const int32_t phys : pages) {
        monarch_state_take(&src, head.count + phys, 1);
    }
    return src;
}

// slots of one tensor of the ring; returns what follows
static const uint8_t * monarch_state_take_rows(const uint8_t * src, ggml_tensor * ring, const std::vector<uint32_t> & slots) {
    auto rows = monarch_bytes::change(ring);

    for (const uint32_t slot : slots) {
        monarch_state_take(&src, rows.data() + slot*ring->nb[1], ggml_row_size(ring->type, ring->ne[0]));
    }
    return src;
}

// blocks of one layer's pages, the summaries that follow from them, and sticky state
void monarch_kv_cache::paged_restore_layer(const monarch_paged_state & state, size_t i_layer, bool is_alone) {
    const size_t size = monarch_codec_block_size(&store.get_codec());

    monarch_cold_writer writer(store, i_layer);

    const auto restore_page = [&](size_t i) {
        const uint8_t * blocks = state.cold.data() + (i*layers.size() + i_layer)*n_head_kv*size;

        for (uint32_t h = 0; h < n_head_kv; ++h) {
            writer.put_block(h, state.phys[i], pool.get_mask(state.phys[i]), blocks + h*size);
        }
    };

    run_jobs(state.phys.size(), std::cref(restore_page));

    const uint8_t * src = state.sticky.data() + i_layer*(state.sticky.size()/layers.size());
    for (uint32_t h = 0; h < n_head_kv; ++h) {
        src = monarch_state_take_head(src, writer.get_head(h), state.phys, is_alone);
    }
}

// all of it is here, checked and has its place. Counters go on if the context holds nothing else.
void monarch_kv_cache::paged_restore(const monarch_paged_state & state, bool is_alone) {
    if (state.seqs.empty()) {
        return;
    }
    if (is_alone) {
        n_page_outs = state.header.n_page_outs;
    }

    const uint8_t * src = state.hot.data();
    for (const auto & layer : layers) {
        src = monarch_state_take_rows(src, layer.k, state.slots);
        src = monarch_state_take_rows(src, layer.v, state.slots);
    }

    for (size_t i = 0; i < layers.size(); ++i) {
        paged_restore_layer(state, i, is_alone);
    }
}

// glibc keeps what was staged, as much as a whole stock state, for itself
struct monarch_state_trim {
    ~monarch_state_trim() {
#if defined(__GLIBC__)
        malloc_trim(0);
#endif
    }
};

void monarch_kv_cache::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const monarch_state_trim trim;

    monarch_state_check(seq_id < (llama_seq_id) n_seqs(), "this context has no such sequence: raise n_seq_max");
    GGML_UNUSED(flags);

    const uint32_t first = monarch_state_get<uint32_t>(io);

    if (first == MONARCH_STATE_MAGIC) {
        paged_read(io, seq_id);
        return;
    }

    monarch_state_check(first > 0 && first <= LLAMA_MAX_SEQ, "it is neither a paged nor a stock state");

    stock_read(io, first, seq_id);
}
