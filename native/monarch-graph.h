#pragma once

// How the paged cache enters a model's graph: the inputs of its op, and attention in place of build_attn_mha.

#include "llama-graph.h"
#include "llama-kv-cache.h"

#include <memory>

// the attention inputs for this memory context: with a page table, if it is paged
std::unique_ptr<llm_graph_input_attn_kv> monarch_graph_new_input(
              ggml_context           * ctx,
        const llama_hparams          & hparams,
        const llama_cparams          & cparams,
        const llama_kv_cache_context * mctx);

// attention over hot window and cold pages, [n_embd, n_tokens]; null if the inputs are not of a paged cache
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
        int                       il);
