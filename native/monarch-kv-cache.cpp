#include "monarch-kv-cache.h"

#include "monarch-crc.h"
#include "monarch-error.h"
#include "monarch-knobs.h"
#include "monarch-summary.h"

#include "llama-batch.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

// auto mode attends every cold page up to this many cold tokens, then promotes
static const uint32_t MONARCH_AUTO_EXACT_TOKENS = 8192;

//
// what can be paged
//

static bool monarch_arch_is_supported(llm_arch arch) {
    switch (arch) {
        case LLM_ARCH_LLAMA:
        case LLM_ARCH_BITNET:
        case LLM_ARCH_QWEN2:
        case LLM_ARCH_QWEN3:
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

    if (head_dim % 16 != 0 || head_dim == 0 || head_dim > MONARCH_MAX_HEAD_DIM) {
        return "head size " + std::to_string(head_dim) + " is not supported: must be a multiple of 16, at most " + std::to_string(MONARCH_MAX_HEAD_DIM);
    }

    return "";
}

// empty, or why this model or context cannot be paged
static std::string monarch_check_model(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams) {
    const auto & hparams = model.hparams;

    if (!monarch_arch_is_supported(model.arch)) {
        return std::string("architecture ") + llm_arch_name(model.arch) + " is not supported (llama, bitnet, qwen2 and qwen3 are)";
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE || hparams.use_alibi || hparams.attn_soft_cap || hparams.is_mla()) {
        return "sliding windows, ALiBi, soft-capping and MLA are not supported";
    }
    if (!cparams.causal_attn || params.ctx_type != LLAMA_CONTEXT_TYPE_DEFAULT || params.mem_other) {
        return "only plain causal contexts are supported";
    }
    if (cparams.n_seq_max != 1) {
        return "n_seq_max = " + std::to_string(cparams.n_seq_max) + ": one sequence per context is supported so far";
    }

    return monarch_check_head_dim(hparams);
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

        const uint32_t n_ring = knobs.sink_tokens + knobs.hot_window + cparams.n_ubatch + knobs.page_size;

        return new monarch_kv_cache(model, params, cparams, knobs, std::min(n_ring, cparams.n_ctx_seq), seed);
    } catch (const std::exception & err) {
        monarch_error_set(err.what());
        throw std::runtime_error(std::string("monarch: ") + err.what());
    }
}

//
// monarch_kv_cache
//

// cut pages hold fewer tokens than they could: some room for them
static uint32_t monarch_n_pages_max(uint32_t n_ctx, uint32_t page_size) {
    const uint32_t n_pages = (n_ctx + page_size - 1)/page_size;

    return GGML_PAD(n_pages + n_pages/16 + 16, MONARCH_SUMMARY_GROUP);
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
        uint32_t                    n_slots,
        uint32_t                    seed) :
    llama_kv_cache(model, model.hparams, params.type_k, params.type_v, /*v_trans =*/ false, /*offload =*/ false, /*unified =*/ true,
            n_slots, /*n_seq_max =*/ 1, /*n_pad =*/ 1, /*n_swa =*/ 0, LLAMA_SWA_TYPE_NONE, nullptr, nullptr, nullptr, nullptr),
    knobs(knobs),
    n_ctx(cparams.n_ctx_seq), n_ubatch(cparams.n_ubatch), n_threads(cparams.n_threads_batch),
    n_head_kv(model.hparams.n_head_kv(0)), head_dim(model.hparams.n_embd_head_k(0)),
    n_pages_max(monarch_n_pages_max(cparams.n_ctx_seq, knobs.page_size)),
    fingerprint(monarch_model_fingerprint(model)) {
    // cold pages bring their own rotation; hot tokens stay as the model made them
    attn_rot_k = false;
    attn_rot_v = false;

    table.init(n_pages_max, seed);

    ggml_init_params init_params = {
        /*.mem_size   =*/ 3*layers.size()*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx { ggml_init(init_params) };
    if (!ctx) {
        throw std::runtime_error("failed to create ggml context for the cold store");
    }

    const monarch_op_params op = get_op_params(0, 0.0f);

    for (const auto & layer : layers) {
        cold_layer cold = {
            ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I8, monarch_codec_block_size(&op.codec), n_pages_max, n_head_kv),
            ggml_new_tensor_3d(ctx.get(), GGML_TYPE_I8, MONARCH_SUMMARY_GROUP*monarch_summary_size(head_dim), n_pages_max/MONARCH_SUMMARY_GROUP, n_head_kv),
            ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I8, monarch_state_size(n_head_kv, n_pages_max)),
        };

        ggml_format_name(cold.pool,    "cold_pool_l%d",    layer.il);
        ggml_format_name(cold.summary, "cold_summary_l%d", layer.il);
        ggml_format_name(cold.state,   "cold_state_l%d",   layer.il);

        cold_layers.push_back(cold);
    }

    // not cleared: the cold store is committed by the operating system page by page, as it fills
    ggml_backend_buffer_type_t buft = ggml_backend_cpu_buffer_type();

    ggml_backend_buffer_ptr buf;
    if (hparams.no_alloc) {
        buf.reset(ggml_backend_buft_alloc_buffer(buft, 0));
        for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
            t->buffer = buf.get();
        }
    } else {
        buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft));
    }
    if (!buf) {
        throw std::runtime_error("failed to reserve memory for " + std::to_string(n_ctx) + " tokens of cold pages: use a smaller n_ctx");
    }

    for (size_t i = 0; i < cold_layers.size() && !hparams.no_alloc; ++i) {
        memset(cold_layers[i].state->data, 0, sizeof(monarch_layer_state));
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            memset(get_head_state(i, h), 0, sizeof(monarch_head_state));
        }
    }

    cold_ctx = std::move(ctx);
    cold_buf = std::move(buf);

    LLAMA_LOG_INFO("%s: hot ring of %u tokens, room for %u cold pages of %d tokens, %.2f MiB when full\n", __func__,
            n_slots, n_pages_max, knobs.page_size, ggml_backend_buffer_get_size(cold_buf.get())/1024.0/1024.0);
}

uint32_t monarch_kv_cache::n_hot() const {
    return v_cells[0].get_used();
}

uint32_t monarch_kv_cache::n_tokens() const {
    return n_hot() + table.n_tokens();
}

int32_t monarch_kv_cache::resolve_mode() const {
    if (knobs.mode != MONARCH_MODE_AUTO) {
        return knobs.mode;
    }
    return table.n_tokens() <= MONARCH_AUTO_EXACT_TOKENS ? MONARCH_MODE_EXACT : MONARCH_MODE_PAGED;
}

//
// steps
//

static bool monarch_ubatch_is_supported(const llama_ubatch & ubatch) {
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        if (ubatch.n_seq_id[i] != 1 || ubatch.seq_id[i][0] != 0) {
            return false;
        }
    }
    return !ubatch.is_pos_2d();
}

// places the ubatches one after the other without touching anything, page-outs included
bool monarch_kv_cache::fits(const std::vector<llama_ubatch> & ubatches) const {
    const auto & in_order = v_cells[0].seq_pos_get(0);

    uint32_t n_sink = 0;
    for (auto it = in_order.begin(); it != in_order.end() && it->first < knobs.sink_tokens; ++it) {
        ++n_sink;
    }

    uint32_t n_total = n_tokens();
    uint32_t n_ring  = n_hot();
    uint32_t n_free  = table.n_free();

    for (const auto & ubatch : ubatches) {
        n_total += ubatch.n_tokens;
        n_ring  += ubatch.n_tokens;

        if (n_total > n_ctx || n_ring > get_size()) {
            return false;
        }

        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            n_sink += ubatch.pos[i] < knobs.sink_tokens;
        }

        const int32_t  n_past = (int32_t) n_ring - (int32_t) n_sink - (knobs.hot_window - 1);
        const uint32_t n_out  = std::min<uint32_t>(n_free, std::max(0, n_past)/knobs.page_size);

        n_free -= n_out;
        n_ring -= n_out*knobs.page_size;
    }

    return true;
}

llama_memory_context_ptr monarch_kv_cache::init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) {
    GGML_UNUSED(embd_all);

    balloc.split_reset();

    std::vector<llama_ubatch> ubatches;
    while (true) {
        auto ubatch = balloc.split_simple(n_ubatch);
        if (ubatch.n_tokens == 0) {
            break;
        }
        if (!monarch_ubatch_is_supported(ubatch)) {
            LLAMA_LOG_ERROR("%s: paging supports sequence 0 alone so far\n", __func__);
            return std::make_unique<monarch_kv_cache_context>(LLAMA_MEMORY_STATUS_FAILED_PREPARE);
        }
        ubatches.push_back(std::move(ubatch)); // NOLINT
    }

    if (balloc.get_n_used() < balloc.get_n_tokens() || !fits(ubatches)) {
        if (table.n_free() == 0) {
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
    GGML_UNUSED(lctx);
    GGML_UNUSED(optimize);

    return std::make_unique<monarch_kv_cache_context>(LLAMA_MEMORY_STATUS_NO_UPDATE);
}

// whole pages, oldest first, that no query of the next step can see through the hot window
void monarch_kv_cache::schedule_page_outs() {
    const auto & in_order = v_cells[0].seq_pos_get(0);

    const int64_t end = (int64_t) seq_pos_max(0) + 1 - knobs.hot_window + 1;

    const size_t n_out_max = std::min<size_t>(table.n_free(), n_page_outs_max());

    auto it = in_order.lower_bound({ knobs.sink_tokens, 0 });

    while (it != in_order.end() && it->first <= end - knobs.page_size && pending.size() < n_out_max) {
        page_out out = { it->first, 0, {} };

        // where tokens were removed, the one before stands in and counts nowhere
        for (int32_t i = 0; i < knobs.page_size; ++i) {
            if (it != in_order.end() && it->first == out.first_pos + i) {
                out.mask |= 1u << i;
                out.slots.push_back(it++->second);
            } else {
                out.slots.push_back(out.slots.back());
            }
        }

        pending.push_back(std::move(out));
    }
}

llama_kv_cache::slot_info monarch_kv_cache::place(const llama_ubatch & ubatch) {
    pending.clear();

    // always the lowest free slots: where a token lands does not depend on steps that were aborted or removed
    v_heads[0] = 0;

    auto sinfo = find_slot(ubatch, false);
    if (sinfo.empty()) {
        return sinfo;
    }

    try {
        apply_ubatch(sinfo, ubatch);
        schedule_page_outs();
    } catch (const std::exception &) {
        abandon(sinfo);
        throw;
    }

    mode       = resolve_mode();
    n_attended = table.n_pages();
    step++;

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

void monarch_kv_cache::commit() {
    const monarch_hooks hooks_now = hooks;
    const auto          events    = collect_events(); // the last that can fail

    committed = step;

    for (const auto & out : pending) {
        table.push(out.first_pos, out.mask);

        for (size_t i = 0; i < out.slots.size(); ++i) {
            if (out.mask >> i & 1) {
                v_cells[0].rm(out.slots[i]);
            }
        }
    }

    n_page_outs += pending.size();

    pending.clear();

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

    table.clear();
    pending.clear();

    forget_logs();
}

// what the last step promoted counts, but its pages are gone
void monarch_kv_cache::forget_logs() {
    for (size_t i = 0; i < cold_layers.size() && !hparams.no_alloc; ++i) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_head_state * head = get_head_state(i, h);

            if (head->step == committed) {
                head->n_promotions += head->log_promoted;
                head->n_scored     += head->log_scored;
            }

            head->n_log        = 0;
            head->log_promoted = 0;
            head->log_scored   = 0;
        }
    }
}

// the summary of a page that lost tokens, from what is left of it
void monarch_kv_cache::update_summaries(const monarch_page_table::page & page) {
    const monarch_op_params op = get_op_params(0, 0.0f);

    float k[MONARCH_MAX_PAGE_SIZE*MONARCH_MAX_HEAD_DIM];

    for (const auto & cold : cold_layers) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_codec_decode_page_k(&op.codec, (const uint8_t *) cold.pool->data + monarch_pool_offset(&op.codec, n_pages_max, h, page.phys), k);

            int32_t n = 0;
            for (int32_t i = 0; i < knobs.page_size; ++i) {
                if (page.mask >> i & 1) {
                    std::copy_n(k + i*head_dim, head_dim, k + n++*head_dim);
                }
            }

            for (int32_t i = 0; i < n && op.codec.bits_k != 16; ++i) {
                monarch_codec_unrotate(head_dim, k + i*head_dim);
            }

            monarch_summary_encode(op.scorer, head_dim, n, k,
                    (uint8_t *) cold.summary->data + monarch_summary_offset(head_dim, n_pages_max, h, page.phys), page.phys%MONARCH_SUMMARY_GROUP);
        }
    }
}

bool monarch_kv_cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id > 0) {
        return true; // nothing is there
    }

    p0 = std::max(p0, 0);
    p1 = p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1;

    if (p0 > seq_pos_max(0) || p1 <= seq_pos_min(0)) {
        return true;
    }

    std::vector<monarch_page_table::page> cut;
    try {
        cut = table.remove(p0, p1);
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: out of memory: nothing removed\n", __func__);
        return false;
    }

    pending.clear();

    llama_kv_cache::seq_rm(0, p0, p1);

    for (const auto & page : cut) {
        update_summaries(page);
    }

    return true;
}

void monarch_kv_cache::seq_cp(llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) {
    GGML_UNUSED(p0);
    GGML_UNUSED(p1);

    if (seq_id_src != seq_id_dst) {
        LLAMA_LOG_ERROR("%s: a paged context holds one sequence so far: nothing copied\n", __func__);
    }
}

void monarch_kv_cache::seq_keep(llama_seq_id seq_id) {
    if (seq_id != 0) {
        clear(false);
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
    if (seq_id != 0) {
        return -1;
    }

    const llama_pos hot = v_cells[0].seq_pos_min(0);

    if (table.n_pages() == 0) {
        return hot;
    }

    const llama_pos cold = table.get_pages().front().begin();

    return hot < 0 ? cold : std::min(hot, cold);
}

llama_pos monarch_kv_cache::seq_pos_max(llama_seq_id seq_id) const {
    if (seq_id != 0) {
        return -1;
    }

    const llama_pos hot  = v_cells[0].seq_pos_max(0);
    const llama_pos cold = table.n_pages() == 0 ? -1 : table.get_pages().back().end() - 1;

    return std::max(hot, cold);
}

std::map<ggml_backend_buffer_type_t, size_t> monarch_kv_cache::memory_breakdown() const {
    auto res = llama_kv_cache::memory_breakdown();

    ggml_backend_buffer_type_t buft = ggml_backend_buffer_get_type(cold_buf.get());

    res[buft] += hparams.no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(cold_ctx.get(), buft) : ggml_backend_buffer_get_size(cold_buf.get());

    return res;
}

//
// graph
//

monarch_op_params monarch_kv_cache::get_op_params(int32_t il, float kq_scale) const {
    monarch_op_params res = {};

    res.codec.head_dim   = head_dim;
    res.codec.page_size  = knobs.page_size;
    res.codec.bits_k     = knobs.cold_bits_k;
    res.codec.bits_v     = knobs.cold_bits_v;
    res.codec.residual_k = knobs.residual_k;

    res.scorer   = knobs.scorer;
    res.dense    = il < knobs.dense_layers;
    res.kq_scale = kq_scale;

    return res;
}

ggml_tensor * monarch_kv_cache::get_pool(int32_t il) const {
    return cold_layers[map_layer_ids.at(il)].pool;
}

ggml_tensor * monarch_kv_cache::get_summary(int32_t il) const {
    return cold_layers[map_layer_ids.at(il)].summary;
}

ggml_tensor * monarch_kv_cache::get_state(int32_t il) const {
    return cold_layers[map_layer_ids.at(il)].state;
}

static ggml_tensor * monarch_ring_view(ggml_context * ctx, ggml_tensor * t, int64_t head_dim) {
    return ggml_view_3d(ctx, t, head_dim, t->ne[0]/head_dim, t->ne[1], ggml_row_size(t->type, head_dim), t->nb[1], 0);
}

ggml_tensor * monarch_kv_cache::get_k_ring(ggml_context * ctx, int32_t il) const {
    return monarch_ring_view(ctx, layers[map_layer_ids.at(il)].k, head_dim);
}

ggml_tensor * monarch_kv_cache::get_v_ring(ggml_context * ctx, int32_t il) const {
    return monarch_ring_view(ctx, layers[map_layer_ids.at(il)].v, head_dim);
}

ggml_tensor * monarch_kv_cache::build_input_table(ggml_context * ctx) const {
    ggml_tensor * res = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, MONARCH_TABLE_HEADER + 2*n_pages_max);

    ggml_set_input(res);
    ggml_set_name(res, "monarch_table");

    return res;
}

ggml_tensor * monarch_kv_cache::build_input_page_outs(ggml_context * ctx) const {
    ggml_tensor * res = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 1 + n_page_outs_max()*(1 + knobs.page_size));

    ggml_set_input(res);
    ggml_set_name(res, "monarch_page_outs");

    return res;
}

void monarch_kv_cache::set_input_table(ggml_tensor * dst) const {
    int32_t * data = (int32_t *) dst->data;

    memset(data, 0, MONARCH_TABLE_HEADER*sizeof(int32_t));

    data[MONARCH_TABLE_N_PAGES]          = table.n_pages();
    data[MONARCH_TABLE_MODE]             = mode;
    data[MONARCH_TABLE_PROMOTE_PAGES]    = knobs.promote_tokens/knobs.page_size;
    data[MONARCH_TABLE_DENSE_PAGES]      = std::max(knobs.dense_tokens, knobs.promote_tokens)/knobs.page_size;
    data[MONARCH_TABLE_STICKY_THRESHOLD] = knobs.sticky_threshold;
    data[MONARCH_TABLE_STEP]             = step;
    data[MONARCH_TABLE_COMMITTED]        = committed;

    memcpy(data + MONARCH_TABLE_PROMOTION_THRESHOLD, &knobs.promotion_threshold, sizeof(float));
    memcpy(data + MONARCH_TABLE_IMPORTANCE_DECAY,    &knobs.importance_decay,    sizeof(float));

    int32_t * entry = data + MONARCH_TABLE_HEADER;

    for (const auto & page : table.get_pages()) {
        *entry++ = page.phys;
        *entry++ = (int32_t) page.mask;
    }
}

void monarch_kv_cache::set_input_page_outs(ggml_tensor * dst) const {
    int32_t * data = (int32_t *) dst->data;

    *data++ = pending.size();

    for (size_t i = 0; i < pending.size(); ++i) {
        *data++ = table.get_free(i);
        data = std::copy(pending[i].slots.begin(), pending[i].slots.end(), data);
    }
}

//
// hooks and statistics
//

monarch_head_state * monarch_kv_cache::get_head_state(size_t i_layer, uint32_t head_kv) const {
    return monarch_state_head(cold_layers[i_layer].state->data, n_pages_max, head_kv);
}

bool monarch_kv_cache::is_sticky(uint8_t count) const {
    return knobs.sticky_threshold > 0 && count >= knobs.sticky_threshold;
}

// what the step's hooks will be told: promotions first, then page-outs
std::vector<std::pair<monarch_hook, monarch_event>> monarch_kv_cache::collect_events() const {
    std::vector<std::pair<monarch_hook, monarch_event>> res;

    if (hooks.on_promote || hooks.on_sticky) {
        collect_promotions(res);
    }

    for (size_t i = 0; i < pending.size() && hooks.on_page_out; ++i) {
        res.push_back({ hooks.on_page_out, { 0, -1, -1, pending[i].first_pos, knobs.page_size, 0.0f, 0.0f } });
    }

    return res;
}

void monarch_kv_cache::collect_promotions(std::vector<std::pair<monarch_hook, monarch_event>> & res) const {
    std::vector<const monarch_page_table::page *> by_phys(n_pages_max);
    for (const auto & page : table.get_pages()) {
        by_phys[page.phys] = &page;
    }

    for (size_t i = 0; i < cold_layers.size(); ++i) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_head_state * head = get_head_state(i, h);

            const monarch_log_entry * log   = monarch_head_state_log(head);
            const uint8_t           * count = monarch_head_state_count(head, n_pages_max);

            for (int32_t j = 0; j < head->n_log; ++j) {
                if (!(log[j].flags & MONARCH_LOG_PROMOTED)) {
                    continue;
                }

                const auto * page = by_phys[log[j].page];

                const monarch_event event = { 0, (int32_t) layers[i].il, (int32_t) h, page->begin(), page->n_tokens(), log[j].estimated, log[j].measured };

                if (hooks.on_promote) {
                    res.push_back({ hooks.on_promote, event });
                }
                // this promotion is counted when the next step applies the log
                if (hooks.on_sticky && !(log[j].flags & MONARCH_LOG_STICKY) && is_sticky(std::min(count[log[j].page] + 1, 255))) {
                    res.push_back({ hooks.on_sticky, event });
                }
            }
        }
    }
}

monarch_stats monarch_kv_cache::get_stats() const {
    monarch_stats res = {};

    res.struct_size = sizeof(res);
    res.n_layer     = layers.size();
    res.n_head_kv   = n_head_kv;
    res.mode        = mode;
    res.n_tokens    = n_tokens();
    res.n_hot       = n_hot();
    res.n_cold      = table.n_tokens();
    res.n_pages     = table.n_pages();
    res.n_page_outs = n_page_outs;
    res.hot_bytes   = total_size();

    for (size_t i = 0; i < cold_layers.size(); ++i) {
        const cold_layer & cold = cold_layers[i];

        res.cold_bytes    += table.n_pages()*n_head_kv*cold.pool->nb[1];
        res.summary_bytes += table.n_pages()*n_head_kv*monarch_summary_size(head_dim);
        res.table_bytes   += ggml_nbytes(cold.state);

        const monarch_layer_state * layer = (const monarch_layer_state *) cold.state->data;

        res.score_us  += layer->score_us;
        res.attend_us += layer->attend_us;
        res.encode_us += layer->encode_us;

        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_head_state * head  = get_head_state(i, h);
            const uint8_t      * count = monarch_head_state_count(head, n_pages_max);

            const bool is_last = head->step == committed; // its log is not in the totals yet

            res.n_promotions += head->n_promotions + (is_last ? head->log_promoted : 0);
            res.n_scored     += head->n_scored     + (is_last ? head->log_scored   : 0);
            res.n_promoted   += is_last ? head->log_promoted : 0;

            for (const auto & page : table.get_pages()) {
                res.n_sticky += is_sticky(count[page.phys]);
            }
        }
    }

    res.table_bytes += n_pages_max*(sizeof(monarch_page_table::page) + sizeof(int32_t));

    res.cold_bytes_per_token = (double) layers.size()*n_head_kv*cold_layers[0].pool->nb[1]/knobs.page_size;

    return res;
}

std::vector<monarch_page> monarch_kv_cache::get_pages() const {
    std::vector<monarch_page> res;

    std::vector<int32_t> index(n_pages_max, -1);
    for (const auto & page : table.get_pages()) {
        index[page.phys] = res.size();
        res.push_back({ page.begin(), page.n_tokens(), 0, 0 });
    }

    for (size_t i = 0; i < cold_layers.size(); ++i) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_head_state * head  = get_head_state(i, h);
            const uint8_t      * count = monarch_head_state_count(head, n_pages_max);

            for (size_t j = 0; j < res.size(); ++j) {
                res[j].n_sticky   += is_sticky(count[table.get_pages()[j].phys]);
                res[j].n_promoted += mode == MONARCH_MODE_EXACT && j < n_attended;
            }

            const monarch_log_entry * log = monarch_head_state_log(head);

            for (int32_t j = 0; head->step == committed && j < head->n_log; ++j) {
                if ((log[j].flags & MONARCH_LOG_PROMOTED) && index[log[j].page] >= 0) {
                    res[index[log[j].page]].n_promoted++;
                }
            }
        }
    }

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
