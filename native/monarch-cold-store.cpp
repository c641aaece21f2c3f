#include "monarch-cold-store.h"

#include "monarch-page.h"

#include "llama-impl.h"

#include <cstring>
#include <stdexcept>
#include <string>

//
// monarch_cold_store
//

monarch_cold_store::monarch_cold_store(const monarch_op_params & op, uint32_t n_layer, uint32_t n_head_kv, uint32_t n_pages_max, bool no_alloc) :
    codec(op.codec), scorer(op.scorer), n_layer(n_layer), n_head_kv(n_head_kv), n_pages_max(n_pages_max), no_alloc(no_alloc) {
}

// the context for tensors in this kind of memory
ggml_context * monarch_cold_store::get_ctx(ggml_backend_buffer_type_t buft) {
    for (const auto & cold : bufs) {
        if (cold.buft == buft) {
            return cold.ctx.get();
        }
    }

    ggml_init_params init_params = {
        /*.mem_size   =*/ 4*n_layer*ggml_tensor_overhead(),
        /*.mem_buffer =*/ nullptr,
        /*.no_alloc   =*/ true,
    };

    ggml_context_ptr ctx { ggml_init(init_params) };
    if (!ctx) {
        throw std::runtime_error("failed to create ggml context for the cold store");
    }

    bufs.push_back({ buft, std::move(ctx), nullptr });

    return bufs.back().ctx.get();
}

void monarch_cold_store::add_layer(int32_t il, ggml_backend_buffer_type_t buft, ggml_backend_buffer_type_t pool_buft, int32_t n_frames) {
    ggml_context * ctx = get_ctx(buft);

    layer cold = {
        il,
        n_frames,
        ggml_new_tensor_3d(get_ctx(pool_buft), GGML_TYPE_I8, monarch_codec_block_size(&codec), n_pages_max, n_head_kv),
        ggml_new_tensor_3d(ctx, GGML_TYPE_I8, MONARCH_SUMMARY_GROUP*monarch_summary_size(codec.head_dim), n_pages_max/MONARCH_SUMMARY_GROUP, n_head_kv),
        ggml_new_tensor_1d(ctx, GGML_TYPE_I8, monarch_state_size(n_head_kv, n_pages_max)),
        nullptr,
    };

    ggml_format_name(cold.pool,    "cold_pool_l%d",    il);
    ggml_format_name(cold.summary, "cold_summary_l%d", il);
    ggml_format_name(cold.state,   "cold_state_l%d",   il);

    if (n_frames > 0) {
        cold.frames = ggml_new_tensor_1d(ctx, GGML_TYPE_I8, monarch_frames_size(&codec, n_head_kv, n_pages_max, n_frames));
        ggml_format_name(cold.frames, "cold_frames_l%d", il);
    }

    layers.push_back(cold);
}

void monarch_cold_store::alloc(uint32_t n_ctx) {
    for (auto & cold : bufs) {
        alloc_cold_buf(cold, n_ctx);
    }

    page_block.resize(layers[0].pool   ->nb[1]);
    page_group.resize(layers[0].summary->nb[1]);

    clear_states();
    clear_frames();
}

// not cleared: in host memory that is not pinned the operating system commits it page by page, as it fills
void monarch_cold_store::alloc_cold_buf(cold_buf & cold, uint32_t n_ctx) {
    if (no_alloc) {
        cold.buf.reset(ggml_backend_buft_alloc_buffer(cold.buft, 0));
        for (ggml_tensor * t = ggml_get_first_tensor(cold.ctx.get()); t; t = ggml_get_next_tensor(cold.ctx.get(), t)) {
            t->buffer = cold.buf.get();
        }
    } else {
        cold.buf.reset(ggml_backend_alloc_ctx_tensors_from_buft(cold.ctx.get(), cold.buft));
    }
    if (!cold.buf) {
        throw std::runtime_error("failed to reserve memory for " + std::to_string(n_ctx) + " tokens of cold pages on " +
                ggml_backend_buft_name(cold.buft) + ": use a smaller n_ctx");
    }

    LLAMA_LOG_INFO("%s: %10s cold store = %8.2f MiB when full\n", __func__,
            ggml_backend_buft_name(cold.buft), ggml_backend_buffer_get_size(cold.buf.get())/1024.0/1024.0);
}

void monarch_cold_store::add_memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const {
    for (const auto & cold : bufs) {
        res[cold.buft] += no_alloc ? ggml_backend_alloc_ctx_tensors_from_buft_size(cold.ctx.get(), cold.buft) : ggml_backend_buffer_get_size(cold.buf.get());
    }
}

template <typename F> void monarch_cold_store::each_head(const F & f) const {
    for (size_t i = 0; i < layers.size() && !no_alloc; ++i) {
        for (uint32_t h = 0; h < n_head_kv; ++h) {
            f(layers[i], h);
        }
    }
}

void monarch_cold_store::clear_states() {
    const monarch_layer_state layer_state = {};
    const monarch_head_state  head_state  = {};
    const monarch_frame_head  frame_head  = {};

    for (size_t i = 0; i < layers.size() && !no_alloc; ++i) {
        ggml_backend_tensor_set(layers[i].state, &layer_state, 0, sizeof(layer_state));
    }

    each_head([&](const layer & cold, uint32_t h) {
        ggml_backend_tensor_set(cold.state, &head_state, monarch_state_head_offset(n_pages_max, h), sizeof(head_state));
        if (cold.frames) {
            ggml_backend_tensor_set(cold.frames, &frame_head, monarch_frame_head_offset(n_pages_max, cold.n_frames, h), sizeof(frame_head));
        }
    });
}

void monarch_cold_store::clear_frames() {
    each_head([&](const layer & cold, uint32_t h) {
        if (cold.frames) {
            const size_t offset = monarch_frame_head_offset(n_pages_max, cold.n_frames, h) + sizeof(monarch_frame_head);

            ggml_backend_tensor_memset(cold.frames, 0xff, offset, cold.n_frames*sizeof(int32_t)); // -1
        }
    });
}

// is_last: its log is of the last step, and not in the totals yet
static void monarch_stats_add_counters(monarch_stats & res, const monarch_head_state & head, bool is_last) {
    res.n_promotions += head.n_promotions + (is_last ? head.log_promoted : 0);
    res.n_scored     += head.n_scored     + (is_last ? head.log_scored   : 0);
    res.n_promoted   += is_last ? head.log_promoted : 0;
}

static void monarch_stats_add_times(monarch_stats & res, const monarch_layer_state & layer) {
    res.score_us  += layer.score_us;
    res.attend_us += layer.attend_us;
    res.encode_us += layer.encode_us;
}

static uint32_t monarch_stats_count_sticky(const monarch_page_pool & pages, const monarch_policy & policy, uint32_t n_pages_max, const uint8_t * count) {
    uint32_t res = 0;
    for (uint32_t phys = 0; phys < n_pages_max; ++phys) {
        res += !pages.is_free(phys) && monarch_policy_is_sticky(&policy, count[phys]);
    }
    return res;
}

void monarch_cold_store::add_stats(monarch_stats & res, const monarch_page_pool & pages, const monarch_policy & policy, int32_t committed) const {
    res.cold_bytes    += pages.n_used()*page_bytes();
    res.summary_bytes += pages.n_used()*layers.size()*n_head_kv*monarch_summary_size(codec.head_dim);

    for (const auto & cold : layers) {
        res.table_bytes += ggml_nbytes(cold.state);
        res.frame_bytes += cold.frames ? ggml_nbytes(cold.frames) : 0;

        auto state = monarch_bytes::read(cold.state);

        monarch_stats_add_times(res, *(const monarch_layer_state *) state.data());

        for (uint32_t h = 0; h < n_head_kv; ++h) {
            const monarch_cold_head head = get_head(state, h);

            monarch_stats_add_counters(res, *head.state, head.state->step == committed);

            res.n_sticky += monarch_stats_count_sticky(pages, policy, n_pages_max, head.count);
        }

        for (uint32_t h = 0; h < n_head_kv && cold.frames; ++h) {
            const monarch_frame_head frames = get_frame_head(cold, h);

            res.n_page_ins   += frames.n_page_ins;
            res.n_frame_hits += frames.n_hits;
        }
    }
}

monarch_frame_head monarch_cold_store::get_frame_head(const layer & cold, uint32_t head_kv) const {
    monarch_frame_head res;
    ggml_backend_tensor_get(cold.frames, &res, monarch_frame_head_offset(n_pages_max, cold.n_frames, head_kv), sizeof(res));
    return res;
}

monarch_cold_head monarch_cold_store::get_head(monarch_bytes & state, uint32_t head_kv) const {
    monarch_head_state * head = monarch_state_head(state.data(), n_pages_max, head_kv);

    return { head, monarch_head_state_log(head), monarch_head_state_importance(head, n_pages_max), monarch_head_state_count(head, n_pages_max) };
}

std::vector<int32_t> monarch_cold_store::get_filled_pages(const layer & cold, uint32_t head_kv) const {
    std::vector<int32_t> res;

    if (!cold.frames) {
        return res;
    }

    auto bytes = monarch_bytes::read(cold.frames, monarch_frame_head_offset(n_pages_max, cold.n_frames, head_kv), monarch_frame_head_size(n_pages_max, cold.n_frames));

    monarch_frame_head * head = (monarch_frame_head *) bytes.data();

    for (int32_t i = 0; i < head->n_filled; ++i) {
        res.push_back(monarch_frame_head_page(head)[head->filled[i]]);
    }
    return res;
}

std::vector<monarch_bytes> monarch_cold_store::read_blocks(int32_t lo, int32_t hi) const {
    std::vector<monarch_bytes> res;
    res.reserve(layers.size()*n_head_kv);

    each_head([&](const layer & cold, uint32_t h) {
        res.push_back(monarch_bytes::read(cold.pool, monarch_pool_offset(&codec, n_pages_max, h, lo), (hi - lo + 1)*cold.pool->nb[1]));
    });
    return res;
}

// the copies have their place already
void monarch_cold_store::update_page(int32_t phys, uint32_t mask) {
    each_head([&](const layer & cold, uint32_t h) {
        const size_t block_offset = monarch_pool_offset(&codec, n_pages_max, h, phys);
        const size_t group_offset = monarch_summary_offset(codec.head_dim, n_pages_max, h, phys);

        ggml_backend_tensor_get(cold.pool,    page_block.data(), block_offset, page_block.size());
        ggml_backend_tensor_get(cold.summary, page_group.data(), group_offset, page_group.size());

        monarch_page_summarize(&codec, scorer, mask, page_block.data(), page_group.data(), phys%MONARCH_SUMMARY_GROUP);

        ggml_backend_tensor_set(cold.summary, page_group.data(), group_offset, page_group.size());
    });
}

void monarch_cold_store::apply_logs(const monarch_policy & policy, int32_t committed) {
    each_head([&](const layer & cold, uint32_t h) {
        auto head = monarch_bytes::change(cold.state, monarch_state_head_offset(n_pages_max, h), monarch_head_state_size(n_pages_max));

        monarch_policy_apply_log(&policy, (monarch_head_state *) head.data(), n_pages_max, committed);
    });
}

// the layers run one after the other
bool monarch_cold_store::is_encoded(int32_t step) const {
    monarch_layer_state last;
    ggml_backend_tensor_get(layers.back().state, &last, 0, sizeof(last));

    return last.encoded == step;
}

// copies are small
void monarch_cold_store::forget_logs(int32_t committed) {
    each_head([&](const layer & cold, uint32_t h) {
        const size_t offset = monarch_state_head_offset(n_pages_max, h);

        monarch_head_state head;
        ggml_backend_tensor_get(cold.state, &head, offset, sizeof(head));
        monarch_policy_end_log(&head, committed);
        ggml_backend_tensor_set(cold.state, &head, offset, sizeof(head));
    });
}

//
// monarch_cold_writer
//

monarch_cold_writer::monarch_cold_writer(const monarch_cold_store & store, size_t i_layer) :
    store  (store),
    pool   (monarch_bytes::change(store.layers[i_layer].pool)),
    summary(monarch_bytes::change(store.layers[i_layer].summary)),
    state  (monarch_bytes::change(store.layers[i_layer].state)) {
}

uint8_t * monarch_cold_writer::get_block(uint32_t head_kv, int32_t phys) {
    return pool.data() + monarch_pool_offset(&store.codec, store.n_pages_max, head_kv, phys);
}

uint8_t * monarch_cold_writer::get_group(uint32_t head_kv, int32_t phys) {
    return summary.data() + monarch_summary_offset(store.codec.head_dim, store.n_pages_max, head_kv, phys);
}

void monarch_cold_writer::put_block(uint32_t head_kv, int32_t phys, uint32_t mask, const uint8_t * block) {
    memcpy(get_block(head_kv, phys), block, monarch_codec_block_size(&store.codec));

    monarch_page_summarize(&store.codec, store.scorer, mask, block, get_group(head_kv, phys), phys%MONARCH_SUMMARY_GROUP);
}

void monarch_cold_writer::put_tokens(uint32_t head_kv, int32_t phys, uint32_t mask, const float * k, const float * v) {
    monarch_page_encode(&store.codec, store.scorer, mask, k, v, get_block(head_kv, phys), get_group(head_kv, phys), phys%MONARCH_SUMMARY_GROUP);

    monarch_head_state_forget(monarch_state_head(state.data(), store.n_pages_max, head_kv), store.n_pages_max, phys);
}
