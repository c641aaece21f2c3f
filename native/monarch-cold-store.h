#pragma once

// The cold store: the tensors of every layer that hold cold pages, and what is done to them apart from the graph. A page goes
// by its physical number here; whose it is and which tokens it holds is up to the page tables and the pool.

#include "monarch.h"
#include "monarch-bytes.h"
#include "monarch-frames.h"
#include "monarch-op.h"
#include "monarch-page-table.h"
#include "monarch-policy.h"
#include "monarch-state.h"

#include "ggml-cpp.h"

#include <map>
#include <vector>

// sticky state of one KV head as the host sees it
struct monarch_cold_head {
    monarch_head_state      * state;
    const monarch_log_entry * log;
    float                   * importance; // of each physical page
    uint8_t                 * count;      // likewise
};

class monarch_cold_store {
public:
    struct layer {
        int32_t       il;
        int32_t       n_frames; // of each KV head
        ggml_tensor * pool;
        ggml_tensor * summary;
        ggml_tensor * state;
        ggml_tensor * frames;   // null: none
    };

    // op: its codec and scorer; no_alloc: tensors without memory, to know how much it would be
    monarch_cold_store(const monarch_op_params & op, uint32_t n_layer, uint32_t n_head_kv, uint32_t n_pages_max, bool no_alloc);

    // pool_buft: memory for blocks; buft: for all else; n_frames: of each KV head, where the two differ
    void add_layer(int32_t il, ggml_backend_buffer_type_t buft, ggml_backend_buffer_type_t pool_buft, int32_t n_frames);

    // after the last layer; n_ctx: tokens that it is meant for
    void alloc(uint32_t n_ctx);

    const monarch_codec      & get_codec()  const { return codec; }
    const std::vector<layer> & get_layers() const { return layers; }

    // records of a page, over all layers and KV heads
    size_t page_bytes() const { return layers.size()*n_head_kv*monarch_codec_block_size(&codec); }

    void add_memory_breakdown(std::map<ggml_backend_buffer_type_t, size_t> & res) const;

    // sizes of what is in use, and what was counted
    void add_stats(monarch_stats & res, const monarch_page_pool & pages, const monarch_policy & policy, int32_t committed) const;

    // state: the bytes of a layer's
    monarch_cold_head get_head(monarch_bytes & state, uint32_t head_kv) const;

    // the physical pages that the last step copied to frames
    std::vector<int32_t> get_filled_pages(const layer & cold, uint32_t head_kv) const;

    // blocks of physical pages [lo, hi], one piece for each KV head of each layer
    std::vector<monarch_bytes> read_blocks(int32_t lo, int32_t hi) const;

    // no frame holds a page
    void clear_frames();

    // summaries of a page that has other tokens now; nothing fails
    void update_page(int32_t phys, uint32_t mask);

    // whether a step's graph ran to its end, and encoded its pages
    bool is_encoded(int32_t step) const;

    // what the last step promoted counts now, before its pages change
    void apply_logs(const monarch_policy & policy, int32_t committed);

    // it counts, but its pages are gone; nothing fails
    void forget_logs(int32_t committed);

private:
    friend class monarch_cold_writer;

    // tensors in one kind of memory
    struct cold_buf {
        ggml_backend_buffer_type_t buft;
        ggml_context_ptr           ctx;
        ggml_backend_buffer_ptr    buf;
    };

    void alloc_cold_buf(cold_buf & cold, uint32_t n_ctx);

    ggml_context * get_ctx(ggml_backend_buffer_type_t buft);

    void clear_states();

    monarch_frame_head get_frame_head(const layer & cold, uint32_t head_kv) const;

    // f(layer, head_kv) for every KV head that has memory
    template <typename F> void each_head(const F & f) const;

    const monarch_codec codec;
    const int32_t       scorer;
    const uint32_t      n_layer;
    const uint32_t      n_head_kv;
    const uint32_t      n_pages_max;
    const bool          no_alloc;

    std::vector<layer>    layers;
    std::vector<cold_buf> bufs; // one for each kind of memory

    // update_page()'s copies of a page's block and of its group of summaries
    std::vector<uint8_t> page_block;
    std::vector<uint8_t> page_group;
};

// one layer's pages as the host writes them; different pages may be written by different threads
class monarch_cold_writer {
public:
    monarch_cold_writer(const monarch_cold_store & store, size_t i_layer);

    // a page of one KV head, from its block
    void put_block(uint32_t head_kv, int32_t phys, uint32_t mask, const uint8_t * block);

    // from K and V, [page_size][head_dim]; its sticky state begins anew
    void put_tokens(uint32_t head_kv, int32_t phys, uint32_t mask, const float * k, const float * v);

    monarch_cold_head get_head(uint32_t head_kv) { return store.get_head(state, head_kv); }

private:
    uint8_t * get_block(uint32_t head_kv, int32_t phys);
    uint8_t * get_group(uint32_t head_kv, int32_t phys);

    const monarch_cold_store & store;

    monarch_bytes pool;
    monarch_bytes summary;
    monarch_bytes state;
};
