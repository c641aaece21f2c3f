#pragma once

// The paged KV cache: a ring of hot tokens (the base class), a cold store of polar pages, and what moves between them.
// Tensors of cold pages are monarch-cold-store.h; sequences, steps and the ring are here.
//
// Every sequence has a hot window, a page table and budgets of its own. The ring's slots are the base class's cells, of which
// each sequence has a part that it fills first; the pages come from one pool. Sequences may share both.
//
// A step is one ubatch. apply() places its tokens in the ring and picks the pages that leave the hot windows; the graph
// attends and, at the end of each layer, encodes those pages; next() is reached only if the graph succeeded and then makes
// the page-outs real: page table, free ring slots, counters, hooks. An aborted step leaves nothing behind.

#include "monarch.h"
#include "monarch-cold-store.h"
#include "monarch-page-table.h"
#include "monarch-place.h"

#include "llama-kv-cache.h"

#include <functional>
#include <string>

struct monarch_paged_state;
struct monarch_state_header;
struct monarch_stock_state;

class monarch_kv_cache : public llama_kv_cache {
public:
    // null: paging is off; throws std::runtime_error if it is on and this model or context cannot be paged
    static monarch_kv_cache * create(const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams);

    ~monarch_kv_cache();

    //
    // llama_memory_i
    //

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override;
    llama_memory_context_ptr init_full() override;
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override;

    bool get_can_shift() const override;

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id seq_id_src, llama_seq_id seq_id_dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id)                                                          override;
    void seq_add (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, llama_pos shift) override;
    void seq_div (llama_seq_id seq_id,                              llama_pos p0, llama_pos p1, int d) override;

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override;

    void state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags) override;

    //
    // steps
    //

    slot_info place(const llama_ubatch & ubatch);
    void      commit();
    void      abandon(const slot_info & sinfo);

    //
    // graph
    //

    monarch_op_params get_op_params(int32_t il, float kq_scale) const;

    ggml_tensor * get_pool   (int32_t il) const;
    ggml_tensor * get_summary(int32_t il) const;
    ggml_tensor * get_state  (int32_t il) const;
    ggml_tensor * get_frames (int32_t il) const; // null: none
    ggml_tensor * get_k_ring (ggml_context * ctx, int32_t il) const;
    ggml_tensor * get_v_ring (ggml_context * ctx, int32_t il) const;

    ggml_tensor * build_input_table    (ggml_context * ctx) const;
    ggml_tensor * build_input_page_outs(ggml_context * ctx) const;

    void set_input_table    (ggml_tensor * dst, const llama_ubatch & ubatch) const;
    void set_input_page_outs(ggml_tensor * dst) const;

    //
    // the C ABI's view
    //

    const monarch_knobs & get_knobs() const { return knobs; }

    void set_knobs(const monarch_knobs & knobs_new) { knobs = knobs_new; }
    void set_hooks(const monarch_hooks & hooks_new) { hooks = hooks_new; }

    monarch_stats get_stats() const;

    std::vector<monarch_page> get_pages(llama_seq_id seq_id) const;

private:
    monarch_kv_cache(
            const llama_model & model, const llama_memory_params & params, const llama_cparams & cparams,
            const monarch_knobs & knobs, const monarch_op_params & op, monarch_place place, uint32_t seed);

    void alloc_cold(const llama_model & model, monarch_place place);

    // a page that leaves the hot window in the present step; of several sequences, if they share its slots
    struct page_out {
        int32_t                   phys; // -1: to be encoded; otherwise another sequence's page holds these very tokens
        int32_t                   first_pos;
        uint32_t                  mask;
        std::vector<int32_t>      slots;
        std::vector<llama_seq_id> seqs;
    };

    // what a step changes apart from the tensors
    struct places {
        llama_kv_cells                  cells;
        std::vector<monarch_page_bit>   cold_bits;
        monarch_page_pool               pool;
        std::vector<monarch_page_table> tables;
    };

    uint32_t n_seqs()   const { return tables.size(); }
    uint32_t n_tokens() const;
    uint32_t n_tokens(llama_seq_id seq_id) const;
    uint32_t n_hot()    const;
    int32_t  resolve_mode(llama_seq_id seq_id) const;

    monarch_policy get_policy() const; // its budget is a layer's matter

    bool      is_supported(const llama_ubatch & ubatch, std::vector<llama_pos> & last) const;
    bool      has_room(const llama_ubatch & ubatch) const;
    bool      fits(const std::vector<llama_ubatch> & ubatches);
    void      go_back(places & saved);
    slot_info find_cells(const llama_ubatch & ubatch) const;
    uint32_t  find_cell(llama_seq_id seq_id, std::vector<bool> & is_taken) const;

    void     fill_cells(const slot_info & sinfo, const llama_ubatch & ubatch);
    int32_t  find_page (const page_out & out, llama_seq_id seq_id) const;
    void     schedule_page_outs();
    void     schedule_page_outs(llama_seq_id seq_id);
    void     commit_page_outs();
    bool     is_encoded() const;
    void     remove     (llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void     remove_each(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void     update_masks(const std::vector<int32_t> & changed, std::vector<uint32_t> & masks);
    void     update_pages(const monarch_page_pool & before);

    int32_t  set_table_runs(monarch_table_run * runs, monarch_table_entry * pages, const llama_ubatch & ubatch) const;

    // what the present step asked devices to do is done
    void     synchronize() const;

    // f(0), ..., f(n - 1) by the threads that a prompt would have; fails only if f does: pass it by reference
    void     run_jobs(size_t n, const std::function<void(size_t)> & f) const;

    // if the action throws, all is as it was
    void     attempt(const std::function<void()> & action);

    // a sequence, or all of them, is given up for what `place` puts there
    void     replace(llama_seq_id seq_id, const std::function<void()> & place);

    // what `place` made room for, passed by reference; where copies for a device find no memory the sequence, or all of them, ends up empty
    void     fill(llama_seq_id seq_id, const std::function<void()> & restore);

    // of stock's states
    void     stock_read        (llama_io_read_i & io, uint32_t n_streams, llama_seq_id seq_id);
    void     stock_place       (monarch_stock_state & state, llama_seq_id seq_id);
    void     stock_restore     (const monarch_stock_state & state);
    void     stock_restore_layer(const monarch_stock_state & state, size_t i_layer);

    // of our own
    monarch_state_header paged_header    ()                                          const;
    monarch_paged_state  paged_describe  (llama_seq_id seq_id)                       const;
    monarch_paged_state  paged_read_lists(llama_io_read_i & io, llama_seq_id seq_id) const;

    void     paged_write_hot   (llama_io_write_i & io, const monarch_paged_state & state) const;
    void     paged_write_cold  (llama_io_write_i & io, const monarch_paged_state & state) const;
    void     paged_write_pages (llama_io_write_i & io, const int32_t * phys, size_t n, int32_t lo, int32_t hi) const;
    void     paged_write_sticky(llama_io_write_i & io, const monarch_paged_state & state) const;
    void     paged_read        (llama_io_read_i & io, llama_seq_id seq_id);
    void     paged_place       (monarch_paged_state & state, llama_seq_id seq_id);
    void     paged_restore     (const monarch_paged_state & state, bool is_alone);
    void     paged_restore_layer(const monarch_paged_state & state, size_t i_layer, bool is_alone);

    size_t   paged_hot_size   (uint32_t n) const;
    size_t   paged_sticky_size(uint32_t n) const;

    int32_t  n_frames(int32_t il) const; // that a layer gets where tiers differ

    uint32_t n_page_outs_pending() const;
    uint32_t n_page_outs_max() const { return n_seqs()*(n_ubatch/knobs.page_size + 2); } // of one step

    using event_list = std::vector<std::pair<monarch_hook, monarch_event>>;

    void log_stats() const;

    event_list collect_events() const;

    void collect_promotions(event_list & res) const;
    void collect_promotion (event_list & res, const monarch_event & event, const monarch_log_entry & entry, uint8_t count, const std::vector<int32_t> & filled) const;

    monarch_knobs knobs;
    monarch_hooks hooks = {};

    const uint32_t n_ctx;
    const uint32_t n_ctx_seq;
    const bool     is_unified;
    const uint32_t n_ubatch;
    const uint32_t n_threads;
    const uint32_t n_head_kv;
    const int32_t  head_dim;
    const uint32_t n_pages_max;
    const uint32_t fingerprint; // of the model
    const bool     is_watched;  // by a cb_eval, which may stop a graph: llama_decode succeeds then

    monarch_cold_store              store;
    monarch_page_pool               pool;
    std::vector<monarch_page_table> tables;
    std::vector<monarch_page_bit>   cold_bits; // where a slot's token lies that another sequence has paged out
    std::vector<page_out>           pending;

    int32_t               mode = MONARCH_MODE_EXACT; // of the present step's last token: auto is resolved
    std::vector<uint32_t> n_attended;                // cold pages that each sequence attended in the present step in mode exact
    int32_t  step       = 0;
    int32_t  committed  = 0;
    uint64_t n_page_outs = 0;

    llama_context * lctx = nullptr; // whose cache this is, known from its first step on
};

class monarch_kv_cache_context : public llama_kv_cache_context {
public:
    // no step to take: an error, or nothing to update
    explicit monarch_kv_cache_context(llama_memory_status status);

    // a full cache, to reserve memory with
    explicit monarch_kv_cache_context(monarch_kv_cache * cache);

    monarch_kv_cache_context(monarch_kv_cache * cache, std::vector<llama_ubatch> ubatches);

    ~monarch_kv_cache_context();

    bool next()  override;
    bool apply() override;

    monarch_kv_cache * get_cache() const { return cache; }

private:
    monarch_kv_cache * cache   = nullptr;
    bool               is_open = false; // applied, but not ended
};
