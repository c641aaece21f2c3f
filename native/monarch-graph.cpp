#include "monarch-graph.h"

#include "monarch-kv-cache.h"

class monarch_graph_input : public llm_graph_input_attn_kv {
public:
    monarch_graph_input(
                  ggml_context             * ctx,
            const llama_hparams            & hparams,
            const llama_cparams            & cparams,
            const monarch_kv_cache_context * mctx) :
        llm_graph_input_attn_kv(hparams, cparams, mctx),
        table    (mctx->get_cache()->build_input_table    (ctx)),
        page_outs(mctx->get_cache()->build_input_page_outs(ctx)) {
    }

    void set_input(const llama_ubatch * ubatch) override {
        llm_graph_input_attn_kv::set_input(ubatch);

        get_cache()->set_input_table(table, *ubatch);
        get_cache()->set_input_page_outs(page_outs);
    }

    // a context's memory never changes its shapes, so the base class's checks are enough
    monarch_kv_cache * get_cache() const {
        return static_cast<const monarch_kv_cache_context *>(mctx)->get_cache();
    }

    ggml_tensor * table;     // I32, monarch-op.h
    ggml_tensor * page_outs; // I32, likewise
};

std::unique_ptr<llm_graph_input_attn_kv> monarch_graph_new_input(
              ggml_context           * ctx,
        const llama_hparams          & hparams,
        const llama_cparams          & cparams,
        const llama_kv_cache_context * mctx) {
    if (const auto * paged = dynamic_cast<const monarch_kv_cache_context *>(mctx)) {
        return std::make_unique<monarch_graph_input>(ctx, hparams, cparams, paged);
    }

    return std::make_unique<llm_graph_input_attn_kv>(hparams, cparams, mctx);
}

ggml_tensor * monarch_graph_build_attn(
        ggml_context            * ctx,
        ggml_cgraph             * gf,
        llm_graph_input_attn_kv * inp,
        ggml_tensor             * q,
        ggml_tensor             * k,
        ggml_tensor             * v,
        ggml_tensor             * kq_b,
        ggml_tensor             * sinks,
        float                     kq_scale,
        int                       il) {
    const auto * paged = dynamic_cast<const monarch_graph_input *>(inp);
    if (!paged) {
        return nullptr;
    }

    GGML_ASSERT(!kq_b && !sinks); // no architecture that has them is let in

    const monarch_kv_cache * cache  = paged->get_cache();
    const monarch_op_params  params = cache->get_op_params(il, kq_scale);

    ggml_tensor * pool    = cache->get_pool   (il);
    ggml_tensor * summary = cache->get_summary(il);
    ggml_tensor * state   = cache->get_state  (il);
    ggml_tensor * frames  = cache->get_frames (il);

    ggml_tensor * cur = ggml_monarch_attend(ctx, &params, q, k, v, inp->get_kq_mask(), pool, summary, state, frames, paged->table);
    ggml_build_forward_expand(gf, cur);

    // after the layer attended: its hot tokens stay whole until the next graph
    ggml_build_forward_expand(gf, ggml_monarch_page_out(ctx, &params,
            cache->get_k_ring(ctx, il), cache->get_v_ring(ctx, il), pool, summary, state, frames, paged->page_outs));

    return ggml_reshape_2d(ctx, cur, cur->ne[0]*cur->ne[1], cur->ne[2]);
}
