#include "monarch-kv-cache.h"

#include "monarch-crc.h"
#include "monarch-error.h"
#include "monarch-knobs.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <thread>

// auto mode attends every cold page up to this many cold tokens, then promotes
static const uint32_t MONARCH_AUTO_EXACT_TOKENS = 8192;

// frames for each page that a step may promote, unless a knob says how many
static const int32_t MONARCH_FRAMES_PER_PROMOTED = 4;

//
// what can be paged
//

static bool monarch_arch_is_supported(llm_arch arch) {
    switch (arch) {
#define MONARCH_ARCH(name) case LLM_ARCH_##name:
#include "monarch-archs.def"
#undef MONARCH_ARCH
            return true;
        default:
            return false;
    }
}

static std::string monarch_check_head_dim(const llama_hparams & hparams) {
    for (uint32_t il = 0; il < hparams.n_layer_all; ++il) {
        if (!hparams.has_kv(il) || hparams.n_head_kv(il) != hparams.n_head_kv(0)) {
            return "layers with different numbers of KV heads are not supported";
        }
        if (hparams.n_embd_head_k(il) != hparams.n_embd_head_k(0) || hparams.n_embd_head_v(il) != hparams.n_embd_head_k(0)) {
            return "K and V heads of different sizes are not supported";
        }
    }

    const uint32_t head_dim = hparams.n_embd_head_k(0);

    if (!monarch_head_dim_is_valid(head_dim)) {
        return "head size " + std::to_string(head_dim) + " is not supported: must be a multiple of 16, at most " + std::to_string(MONARCH_MAX_HEAD_DIM);
    }

    return "";
}

// empty, or why this model or context cannot be paged
static std::string monarch_check_model(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const auto & hparams = model.hparams;

    if (!monarch_arch_is_supported(model.arch)) {
        return std::string("architecture ") + llm_arch_name(model.arch) + " is not supported";
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE || hparams.use_alibi || hparams.attn_soft_cap || hparams.is_mla()) {
        return "sliding windows, ALiBi, soft-capping and MLA are not supported";
    }
    if (hparams.n_pos_per_embd() != 1) {
        return "M-RoPE is not supported";
    }
    if (!cparams.causal_attn || params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || params.mem_other) {
        return "only plain causal contexts are supported";
    }

    return monarch_check_head_dim(hparams);
}

static monarch_op_params monarch_op_params_init(const monarch_knobs & knobs, int32_t head_dim) {
    monarch_op_params res = {};

    res.codec.head_dim   = head_dim;
    res.codec.page_size  = knobs.page_size;
    res.codec.bits_k     = knobs.cold_bits_k;
    res.codec.bits_v     = knobs.cold_bits_v;
    res.codec.residual_k = knobs.residual_k;

    res.scorer = knobs.scorer;

    return res;
}

monarch_kv_cache * monarch_kv_cache::create(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    try {
        const monarch_knobs knobs = monarch_knobs_take();
        const uint32_t      seed  = monarch_knobs_take_seed();

        if (knobs.mode == MONARCH_MODE_OFF) {
            return nullptr;
        }

        const std::string error = monarch_check_model(model, params, cparams);
        if (!error.empty()) {
            throw std::runtime_error(error + "; use mode off");
        }

        const monarch_op_params op    = monarch_op_params_init(knobs, model.hparams.n_embd_head_k(0));
        const monarch_place     place = monarch_place_find(model, params, cparams, knobs, op);

        return new monarch_kv_cache(model, params, cparams, knobs, op, place, seed);
    } catch (const std::exception & err) {
        monarch_error_set(err.what());
        throw std::runtime_error(std::string("monarch: ") + err.what());
    }
}

//
// monarch_kv_cache
//

// what a sequence holds in the ring between two steps
static uint32_t monarch_n_slots_seq(const monarch_knobs & knobs) {
    return knobs.sink_tokens + knobs.hot_window + knobs.page_size;
}

static bool monarch_is_unified(const llama_cparams & cparams) {
    return cparams.kv_unified || cparams.n_seq_max == 1;
}

// most tokens of a step: where sequences are split apart, llama_batch_allocr::split_equal takes one more of them
static uint32_t monarch_n_ubatch(const llama_cparams & cparams) {
    return cparams.n_ubatch + !monarch_is_unified(cparams);
}

static uint32_t monarch_n_slots(const monarch_knobs & knobs, const llama_cparams & cparams) {
    const uint64_t n_slots = (uint64_t) cparams.n_seq_max*monarch_n_slots_seq(knobs) + monarch_n_ubatch(cparams);

    return std::min<uint64_t>(n_slots, cparams.n_ctx);
}

// cut pages hold fewer tokens than they could: some room for them
static uint32_t monarch_n_pages_max(uint32_t n_ctx, uint32_t page_size) {
    const uint32_t n_pages = (n_ctx + page_size - 1)/page_size;

    return GGML_PAD(n_pages + n_pages/32 + 16, MONARCH_SUMMARY_GROUP);
}

// tells models apart that have the same shape
static uint32_t monarch_model_fingerprint(const llama_model & model) {
    const std::string desc = std::string(llm_arch_name(model.arch)) + " " + std::to_string(model.vocab.n_tokens()) + " " + std::to_string(model.n_elements());

    uint32_t crc = monarch_crc(0, desc.data(), desc.size());

    const ggml_tensor * norm = model.output_norm;

    if (norm && norm->buffer && norm->data) {
        std::vector<uint8_t> data(ggml_nbytes(norm));
        ggml_backend_tensor_get(norm, data.data(), 0, data.size());

        crc = monarch_crc(crc, data.data(), data.size());
    }

    return crc;
}

monarch_kv_cache::monarch_kv_cache(
        const llama_model         & model,
        const llama_memory_params & params,
        const llama_cparams       & cparams,
        const monarch_knobs       & knobs,
        const monarch_op_params   & op,
        monarch_place               place,
        uint32_t                    seed) :
    llama_kv_cache(model, model.hparams, params.type_k, params.type_v, /*v_trans =*/ false, /*offload =*/ place != MONARCH_PLACE_HOST, /*unified =*/ true,
            monarch_n_slots(knobs, cparams), cparams.n_seq_max, /*n_pad =*/ 1, /*n_swa =*/ 0, LLAMA_SWA_TYPE_NONE, nullptr, nullptr, nullptr, nullptr),
    knobs(knobs),
    n_ctx(cparams.n_ctx), n_ctx_seq(cparams.n_ctx_seq), is_unified(monarch_is_unified(cparams)),
    n_ubatch(monarch_n_ubatch(cparams)), n_threads(std::max(cparams.n_threads_batch, 1)),
    n_head_kv(model.hparams.n_head_kv(0)), head_dim(op.codec.head_dim),
    n_pages_max(monarch_n_pages_max(cparams.n_ctx, knobs.page_size)),
    fingerprint(monarch_model_fingerprint(model)),
    is_watched(cparams.cb_eval),
    store(op, layers.size(), n_head_kv, n_pages_max, hparams.no_alloc),
    tables(cparams.n_seq_max), cold_bits(get_size()), n_attended(cparams.n_seq_max) {
    // cold pages bring their own rotation; hot tokens stay as the model made them
    attn_rot_k = false;
    attn_rot_v = false;

    pool.init(n_pages_max, seed);

    alloc_cold(model, place);
}

// frames that a layer has: a few times what a step promotes for all sequences
int32_t monarch_kv_cache::n_frames(int32_t il) const {
    const int32_t n_tokens = il < knobs.dense_layers ? std::max(knobs.dense_tokens, knobs.promote_tokens) : knobs.promote_tokens;
    const int64_t n_frames = knobs.frames > 0 ? knobs.frames : (int64_t) MONARCH_FRAMES_PER_PROMOTED*n_seqs()*(n_tokens/knobs.page_size);

    return std::min<int64_t>(n_frames, n_pages_max);
}

monarch_kv_cache::~monarch_kv_cache() {
    if (!hparams.no_alloc) {
        log_stats();
    }
}

void monarch_kv_cache::alloc_cold(const llama_model & model, monarch_place place) {
    for (const auto & layer : layers) {
        ggml_backend_buffer_type_t buft      = monarch_place_get_buft     (place, model.dev_layer(layer.il));
        ggml_backend_buffer_type_t pool_buft = monarch_place_get_pool_buft(place, model.dev_layer(layer.il));

        store.add_layer(layer.il, buft, pool_buft, buft != pool_buft ? n_frames(layer.il) : 0);
    }

    LLAMA_LOG_INFO("%s: hot ring of %u tokens, room for %u cold pages of %d tokens\n", __func__, get_size(), n_pages_max, knobs.page_size);

    store.alloc(n_ctx);
}

void monarch_kv_cache::synchronize() const {
    if (lctx) {
        llama_synchronize(lctx);
    }
}

uint32_t monarch_kv_cache::n_hot() const {
    return v_cells[0].get_used();
}

uint32_t monarch_kv_cache::n_tokens() const {
    return n_hot() + pool.n_tokens();
}

uint32_t monarch_kv_cache::n_tokens(llama_seq_id seq_id) const {
    return v_cells[0].seq_pos_get(seq_id).size() + tables[seq_id].n_tokens();
}

int32_t monarch_kv_cache::resolve_mode(llama_seq_id seq_id) const {
    if (knobs.mode != MONARCH_MODE_AUTO) {
        return knobs.mode;
    }
    return tables[seq_id].n_tokens() <= MONARCH_AUTO_EXACT_TOKENS ? MONARCH_MODE_EXACT : MONARCH_MODE_PAGED;
}

monarch_policy monarch_kv_cache::get_policy() const {
    monarch_policy res = {};

    res.promotion_threshold = knobs.promotion_threshold;
    res.sticky_threshold    = knobs.sticky_threshold;
    res.importance_decay    = knobs.importance_decay;

    return res;
}

//
// steps
//

// last: of the batch, each sequence's position so far
bool monarch_kv_cache::is_supported(const llama_ubatch & ubatch, std::vector<llama_pos> & last) const {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_pos pos = ubatch.pos[i];

        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            const llama_seq_id seq_id = ubatch.seq_id[i][j];

            if ((uint32_t) seq_id >= n_seqs()) {
                LLAMA_LOG_ERROR("%s: sequence %d: this context was created with n_seq_max = %u\n", __func__, seq_id, n_seqs());
                return false;
            }
            if (pos <= last[seq_id] || pos >= MONARCH_MAX_POS) {
                LLAMA_LOG_ERROR("%s: sequence %d: position %d: each must be greater than the one before, and less than %d; use mode off\n",
                        __func__, seq_id, pos, MONARCH_MAX_POS);
                return false;
            }
            last[seq_id] = pos;
        }
    }
    return !ubatch.is_pos_2d();
}

bool monarch_kv_cache::has_room(const llama_ubatch & ubatch) const {
    if (n_tokens() + ubatch.n_tokens > n_ctx || n_hot() + ubatch.n_tokens > get_size()) {
        return false;
    }

    std::vector<uint32_t> n_new(n_seqs());
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        for (int32_t j = 0; j < ubatch.n_seq_id[i]; ++j) {
            n_new[ubatch.seq_id[i][j]]++;
        }
    }

    for (uint32_t s = 0; s < n_seqs(); ++s) {
        if (n_new[s] > 0 && n_tokens(s) + n_new[s] > n_ctx_seq) {
            return false;
        }
    }
    return true;
}

// takes the steps one after the other, on paper
bool monarch_kv_cache::fits(const std::vector<llama_ubatch> & ubatches) {
    if (ubatches.size() == 1) {
        return has_room(ubatches[0]);
    }

    places saved = { v_cells[0], cold_bits, pool, tables };

    bool res = true;
    try {
        for (const auto & ubatch : ubatches) {
            res = res && has_room(ubatch);
            if (res) {
                fill_cells(find_cells(ubatch), ubatch);
                schedule_page_outs();
                commit_page_outs();
            }
        }
    } catch (const std::exception &) {
        go_back(saved);
        throw;
    }
    go_back(saved);

    return res;
}

void monarch_kv_cache::go_back(places & saved) {
    std::swap(v_cells[0], saved.cells);
    std::swap(cold_bits,  saved.cold_bits);
    std::swap(pool,       saved.pool);
    std::swap(tables,     saved.tables);

    pending.clear();
}

llama_memory_context_ptr monarch_kv_cache::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    std::vector<llama_pos>    last(n_seqs(), -1);
    while (true) {
        auto ubatch = is_unified ? balloc.split_simple(n_ubatch) : balloc.split_equal(n_ubatch, true, 0);
        if (ubatch.n_tokens == 0) {
            break;
        }
        if (!is_supported(ubatch, last)) {
            return std::make_unique<monarch_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_COMPUTE); // a smaller batch would not help
        }
        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens() || !fits(ubatches)) {
        if (pool.n_free() == 0) {
            LLAMA_LOG_WARN("%s: no free page: removed tokens left too many short pages\n", __func__);
        }
        return std::make_unique<monarch_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
    }

    return std::make_unique<monarch_kv_cache_context>(this, std::move(ubatches));
}

llama_memory_context_ptr monarch_kv_cache::init_full() {
    return std::make_unique<monarch_kv_cache_context>(this);
}

llama_memory_context_ptr monarch_kv_cache::init_update(llama_context * lctx, bool optimize) {
    GGML_UNUSED(optimize);

    this->lctx = lctx;

    return std::make_unique<monarch_kv_cache_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
}

// the lowest free one: of the sequence's own part of the ring, then of what all share, then of the other parts; or size().
// Where a token lands does not depend on steps that were aborted or removed.
uint32_t monarch_kv_cache::find_cell(llama_seq_id seq_id, std::vector<bool> & is_taken) const {
    const auto & cells = v_cells[0];

    const uint32_t n_slots   = monarch_n_slots_seq(knobs);
    const uint32_t first_own = std::min(seq_id*n_slots, cells.size());
    const uint32_t first_all = std::min(n_seqs()*n_slots, cells.size());

    const std::pair<uint32_t, uint32_t> ranges[] = {
        { first_own, std::min(first_own + n_slots, cells.size()) },
        { first_all, cells.size()                                },
        { 0,         first_all                                   },
    };

    for (const auto & [begin, end] : ranges) {
        for (uint32_t i = begin; i < end; ++i) {
            if (!is_taken[i] && cells.is_empty(i)) {
                is_taken[i] = true;
                return i;
            }
        }
    }
    return cells.size();
}

llama_kv_cache::slot_info monarch_kv_cache::find_cells(const llama_ubatch & ubatch) const {
    std::vector<bool> is_taken(get_size());

    slot_info res = { 0, 0, { 0 }, { {} } };

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const uint32_t slot = find_cell(ubatch.seq_id[i][0], is_taken);

        if (slot == get_size()) {
            return { 0, 0, {}, {} };
        }
        res.idxs[0].push_back(slot);
    }

    return res;
}

void monarch_kv_cache::fill_cells(const slot_info & sinfo, const llama_ubatch & ubatch) {
    apply_ubatch(sinfo, ubatch);

    for (const uint32_t slot : sinfo.idxs[0]) {
        cold_bits[slot] = {};
    }
}

// the page that holds just these tokens already, because a sequence that shares them paged them out earlier; or -1
int32_t monarch_kv_cache::find_page(const page_out & out, llama_seq_id seq_id) const {
    const int32_t phys = cold_bits[out.slots[0]].page;

    for (size_t i = 0; i < out.slots.size(); ++i) {
        const auto & bit = cold_bits[out.slots[i]];

        if ((out.mask >> i & 1) && (bit.page != phys || bit.bit != (int32_t) i || !pool.holds(bit))) {
            return -1;
        }
    }
    return phys < 0 || tables[seq_id].has(phys) ? -1 : phys; // a table lists a page once
}

void monarch_kv_cache::schedule_page_outs() {
    pending.clear();

    for (uint32_t s = 0; s < n_seqs(); ++s) {
        schedule_page_outs(s);
    }
}

// whole pages, oldest first, that no query of the sequence's next step can see through the hot window
void monarch_kv_cache::schedule_page_outs(llama_seq_id seq_id) {
    const auto & cells    = v_cells[0];
    const auto & in_order = cells.seq_pos_get(seq_id);

    const int64_t end = (int64_t) cells.seq_pos_max(seq_id) + 1 - knobs.hot_window + 1;

    const size_t n_out_max = std::min<size_t>(pool.n_free(), n_page_outs_max());

    size_t n_out = n_page_outs_pending();

    auto it = in_order.lower_bound({ knobs.sink_tokens, 0 });

    while (it != in_order.end() && it->first <= end - knobs.page_size) {
        page_out out = { -1, it->first, 0, {}, { seq_id } };

        // where tokens were removed, the one before stands in and counts nowhere
        for (int32_t i = 0; i < knobs.page_size; ++i) {
            if (it != in_order.end() && it->first == out.first_pos + i) {
                out.mask |= 1u << i;
                out.slots.push_back(it++->second);
            } else {
                out.slots.push_back(out.slots.back());
            }
        }

        out.phys = find_page(out, seq_id);

        const auto same = std::find_if(pending.begin(), pending.end(), [&](const page_out & other) {
            return other.phys == out.phys && other.mask == out.mask && other.slots == out.slots;
        });

        if (same != pending.end()) {
            same->seqs.push_back(seq_id);
        } else if (out.phys >= 0 || n_out < n_out_max) {
            n_out += out.phys < 0;
            pending.push_back(std::move(out));
        } else {
            break;
        }
    }
}

// pages that the present step encodes
uint32_t monarch_kv_cache::n_page_outs_pending() const {
    return std::count_if(pending.begin(), pending.end(), [](const page_out & out) { return out.phys < 0; });
}

void monarch_kv_cache::commit_page_outs() {
    for (auto & table : tables) {
        table.reserve(pending.size());
    }

    for (const auto & out : pending) {
        int32_t phys = out.phys;

        for (const llama_seq_id seq_id : out.seqs) {
            if (phys < 0) {
                phys = pool.take(out.mask);
            } else {
                pool.share(phys);
            }
            tables[seq_id].push(phys, out.first_pos, out.mask);

            for (size_t i = 0; i < out.slots.size(); ++i) {
                if (out.mask >> i & 1) {
                    v_cells[0].seq_rm(out.slots[i], seq_id);
                    cold_bits[out.slots[i]] = pool.get_bit(phys, i);
                }
            }
        }
    }

    pending.clear();
}

llama_kv_cache::slot_info monarch_kv_cache::place(const llama_ubatch & ubatch) {
    pending.clear();

    auto sinfo = find_cells(ubatch);
    if (sinfo.empty()) {
        return sinfo;
    }

    try {
        fill_cells(sinfo, ubatch);
        schedule_page_outs();
    } catch (const std::exception &) {
        abandon(sinfo);
        throw;
    }

    mode = resolve_mode(ubatch.seq_id[ubatch.n_tokens - 1][0]);
    step++;

    std::fill(n_attended.begin(), n_attended.end(), 0);
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];
        n_attended[seq_id] = resolve_mode(seq_id) == MONARCH_MODE_EXACT ? tables[seq_id].n_pages() : 0;
    }

    return sinfo;
}

// takes back what place() placed, all of it or a part
void monarch_kv_cache::abandon(const slot_info & sinfo) {
    for (const uint32_t slot : sinfo.idxs[0]) {
        if (!v_cells[0].is_empty(slot)) {
            v_cells[0].rm(slot);
        }
    }
    pending.clear();
}

// false: cb_eval stopped the graph
bool monarch_kv_cache::is_encoded() const {
    synchronize();

    return store.is_encoded(step);
}

void monarch_kv_cache::commit() {
    if (is_watched && !is_encoded()) {
        pending.clear(); // the step's tokens are there, as in upstream's cache, and nothing leaves the hot window
        return;
    }

    const monarch_hooks hooks_now = hooks;
    const auto          events    = collect_events();
    const size_t        n_outs    = n_page_outs_pending();

    commit_page_outs();

    committed    = step;
    n_page_outs += n_outs;

    // last: a hook may change anything
    for (const auto & [hook, event] : events) {
        hook(&event, hooks_now.user_data);
    }
}

//
// llama_memory_i
//

bool monarch_kv_cache::get_can_shift() const {
    return false;
}

void monarch_kv_cache::clear(bool data) {
    llama_kv_cache::clear(data);

    pool.clear();
    for (auto & table : tables) {
        table.clear();
    }
    pending.clear();

    synchronize();
    store.forget_logs(committed);
}

void monarch_kv_cache::run_jobs(size_t n, const std::function<void(size_t)> & f) const {
    std::atomic<size_t> next { 0 };

    const size_t n_workers = std::min<size_t>(n_threads, n);

    const auto worker = [&]() {
        for (size_t i = next++; i < n; i = next++) {
            f(i);
        }
    };

    std::vector<std::thread> threads;
    try {
        threads.reserve(n_workers);
        for (size_t i = 1; i < n_workers; ++i) {
            threads.emplace_back(worker);
        }
    } catch (const std::exception &) {
        LLAMA_LOG_WARN("%s: only %zu threads could be started\n", __func__, threads.size() + 1);
    }
    worker();
    for (auto & thread : threads) {
        thread.join();
    }
}

void monarch_kv_cache::attempt(const std::function<void()> & action) {
    places saved = { v_cells[0], cold_bits, pool, tables };

    try {
        action();
    } catch (...) {
        go_back(saved);
        update_pages(saved.pool);
        throw;
    }
}

void monarch_kv_cache::replace(llama_seq_id seq_id, const std::function<void()> & place) {
    synchronize();
    store.apply_logs(get_policy(), committed);

    attempt([&]() {
        remove_each(seq_id, 0, std::numeric_limits<llama_pos>::max());
        place();
    });
}

void monarch_kv_cache::fill(llama_seq_id seq_id, const std::function<void()> & restore) {
    store.clear_frames();

    try {
        restore();
    } catch (...) {
        remove_each(seq_id, 0, std::numeric_limits<llama_pos>::max());
        throw;
    }
}

// summaries of pages that had other tokens
void monarch_kv_cache::update_pages(const monarch_page_pool & before) {
    synchronize();

    for (uint32_t phys = 0; phys < n_pages_max; ++phys) {
        if (!pool.is_free(phys) && pool.get_mask(phys) != before.get_mask(phys)) {
            store.update_page(phys, pool.get_mask(phys));
        }
    }
}

static void monarch_range_normalize(llama_pos & p0, llama_pos & p1) {
    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;
}

bool monarch_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    monarch_range_normalize(p0, p1);

    try {
        if (seq_id < 0) {
            attempt([&]() { remove_each(seq_id, p0, p1); });
        } else {
            remove_each(seq_id, p0, p1);
        }
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: out of memory: nothing removed\n", __func__);
        return false;
    }

    return true;
}

// of one sequence, or of all
void monarch_kv_cache::remove_each(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    for (uint32_t s = 0; s < n_seqs(); ++s) {
        if (seq_id < 0 || (uint32_t) seq_id == s) {
            remove(s, p0, p1);
        }
    }
}

void monarch_kv_cache::remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (p0 > seq_pos_max(seq_id) || p1 <= seq_pos_min(seq_id)) {
        return;
    }

    const bool has_cold = p0 < tables[seq_id].end();

    std::vector<uint32_t> masks(has_cold ? n_pages_max : 0);
    std::vector<int32_t>  changed;
    if (has_cold) {
        changed = tables[seq_id].remove(pool, p0, p1);
    }

    // from here on nothing fails
    pending.clear();

    llama_kv_cache::seq_rm(seq_id, p0, p1);

    if (!changed.empty()) {
        update_masks(changed, masks);
    }
}

// of pages that lost tokens here, which another sequence may still hold; masks: zeros for all pages, so that nothing fails
void monarch_kv_cache::update_masks(const std::vector<int32_t> & changed, std::vector<uint32_t> & masks) {
    for (const auto & table : tables) {
        for (const auto & page : table.get_pages()) {
            masks[page.phys] |= page.mask;
        }
    }

    synchronize();

    for (const int32_t phys : changed) {
        if (!pool.is_free(phys) && masks[phys] != pool.get_mask(phys)) {
            pool.set_mask(phys, masks[phys]);
            store.update_page(phys, masks[phys]);
        }
    }
}

// what the target holds there is replaced
void monarch_kv_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    if (seq_id_src == seq_id_dst) {
        return;
    }
    if (seq_id_src < 0 || seq_id_dst < 0 || (uint32_t) std::max(seq_id_src, seq_id_dst) >= n_seqs()) {
        LLAMA_LOG_ERROR("%s: sequence %d to %d: this context was created with n_seq_max = %u; nothing copied\n", __func__, seq_id_src, seq_id_dst, n_seqs());
        return;
    }

    monarch_range_normalize(p0, p1);

    try {
        attempt([&]() {
            remove(seq_id_dst, p0, p1);
            pending.clear();

            llama_kv_cache::seq_cp(seq_id_src, seq_id_dst, p0, p1);

            tables[seq_id_dst].share(pool, tables[seq_id_src], p0, p1);
        });
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: out of memory: nothing copied\n", __func__);
    }
}

void monarch_kv_cache::seq_keep(llama_seq_id seq_id) {
    for (uint32_t s = 0; s < n_seqs(); ++s) {
        if ((uint32_t) seq_id != s) {
            seq_rm(s, -1, -1);
        }
    }
}

void monarch_kv_cache::seq_add(llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (shift != 0) {
        LLAMA_LOG_ERROR("%s: cold pages keep their positions: nothing shifted\n", __func__);
    }
}

void monarch_kv_cache::seq_div(llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) {
    GGML_UNUSED(seq_id);
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (d != 1) {
        LLAMA_LOG_ERROR("%s: cold pages keep their positions: nothing divided\n", __func__);
    }
}

llama_pos monarch_kv_cache::seq_pos_min(llama_seq_id seq_id) const {
    if (seq_id < 0 || (uint32_t) seq_id >= n_seqs()) {
        return -1;
    }

    const llama_pos hot  = v_cells[0].seq_pos_min(seq_id);
    const llama_pos cold = tables[seq_id].begin();

    return hot < 0 || cold < 0 ? std::max(hot, cold) : std::min(hot, cold);
}

llama_pos monarch_kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    if (seq_id < 0 || (uint32_t) seq_id >= n_seqs()) {
        return -1;
    }

    return std::max(v_cells[0].seq_pos_max(seq_id), tables[seq_id].end() - 1);
}

std::map<ggml_backend_buffer_type_t, size_t> monarch_kv_cache::memory_breakdown() const {
    auto res = llama_kv_cache::memory_breakdown();

    store.add_memory_breakdown(res);

    return res;
}

//
// monarch_kv_cache_context
//

monarch_kv_cache_context::monarch_kv_cache_context(llama_memory_status status) : llama_kv_cache_context(status) {}

monarch_kv_cache_context::monarch_kv_cache_context(monarch_kv_cache * cache) : llama_kv_cache_context(cache), cache(cache) {}

monarch_kv_cache_context::monarch_kv_cache_context(monarch_kv_cache * cache, std::vector<llama_ubatch> ubatches) :
    llama_kv_cache_context(cache, {}, std::move(ubatches)), cache(cache) {
    sinfos.resize(this->ubatches.size());
}

// a step that threw instead of ending leaves nothing behind
monarch_kv_cache_context::~monarch_kv_cache_context() {
    if (is_open) {
        cache->abandon(sinfos[i_cur]);
    }
}

bool monarch_kv_cache_context::apply() {
    sinfos[i_cur] = cache->place(ubatches[i_cur]);

    if (sinfos[i_cur].empty()) {
        return false;
    }

    is_open = true;
    n_kv    = cache->get_n_kv(sinfos[i_cur]);

    return true;
}

bool monarch_kv_cache_context::next() {
    cache->commit();
    is_open = false;

    return llama_kv_cache_context::next();
}
