// What a paged cache gives to the graph: its tensors, the op's constants, and the inputs of a step.

#include "monarch-kv-cache.h"

#include "llama-batch.h"
#include "llama-hparams.h"

#include <algorithm>
#include <cstring>

monarch_op_params monarch_kv_cache::get_op_params(int32_t il, float kq_scale) const {
    monarch_op_params res = {};

    res.codec    = store.get_codec();
    res.scorer   = knobs.scorer;
    res.dense    = il < knobs.dense_layers;
    res.kq_scale = kq_scale;
    res.n_frames = store.get_layers()[map_layer_ids.at(il)].n_frames;

    return res;
}

ggml_tensor * monarch_kv_cache::get_pool(int32_t il) const {
    return store.get_layers()[map_layer_ids.at(il)].pool;
}

ggml_tensor * monarch_kv_cache::get_summary(int32_t il) const {
    return store.get_layers()[map_layer_ids.at(il)].summary;
}

ggml_tensor * monarch_kv_cache::get_state(int32_t il) const {
    return store.get_layers()[map_layer_ids.at(il)].state;
}

ggml_tensor * monarch_kv_cache::get_frames(int32_t il) const {
    return store.get_layers()[map_layer_ids.at(il)].frames;
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

//
// inputs
//

ggml_tensor * monarch_kv_cache::build_input_table(ggml_context * ctx) const {
    ggml_tensor * res = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, monarch_table_head_size(n_ubatch) + 2*(int64_t) n_seqs()*n_pages_max);

    ggml_set_input(res);
    ggml_set_name(res, "monarch_table");

    return res;
}

ggml_tensor * monarch_kv_cache::build_input_page_outs(ggml_context * ctx) const {
    ggml_tensor * res = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, monarch_page_outs_size(n_page_outs_max(), knobs.page_size));

    ggml_set_input(res);
    ggml_set_name(res, "monarch_page_outs");

    return res;
}

// the step's knobs, apart from those that are constant over the life of a context
static void monarch_table_set_header(int32_t * data, const monarch_knobs & knobs, int32_t n_runs_max, int32_t step, int32_t committed) {
    memset(data, 0, MONARCH_TABLE_HEADER*sizeof(int32_t));

    data[MONARCH_TABLE_N_RUNS_MAX]       = n_runs_max;
    data[MONARCH_TABLE_PROMOTE_PAGES]    = knobs.promote_tokens/knobs.page_size;
    data[MONARCH_TABLE_DENSE_PAGES]      = std::max(knobs.dense_tokens, knobs.promote_tokens)/knobs.page_size;
    data[MONARCH_TABLE_STICKY_THRESHOLD] = knobs.sticky_threshold;
    data[MONARCH_TABLE_STEP]             = step;
    data[MONARCH_TABLE_COMMITTED]        = committed;

    memcpy(data + MONARCH_TABLE_PROMOTION_THRESHOLD, &knobs.promotion_threshold, sizeof(float));
    memcpy(data + MONARCH_TABLE_IMPORTANCE_DECAY,    &knobs.importance_decay,    sizeof(float));
}

static int32_t monarch_table_set_pages(monarch_table_entry * dst, const monarch_page_table & table) {
    for (const auto & page : table.get_pages()) {
        *dst++ = { page.phys, page.mask };
    }
    return table.n_pages();
}

void monarch_kv_cache::set_input_table(ggml_tensor * dst, const llama_ubatch & ubatch) const {
    int32_t * data = (int32_t *) dst->data;

    monarch_table_set_header(data, knobs, n_ubatch, step, committed);

    data[MONARCH_TABLE_N_RUNS] = set_table_runs(monarch_table_get_runs(data), monarch_table_get_pages(data), ubatch);
}

// the pages of each sequence come once, with its first run; returns the number of runs
int32_t monarch_kv_cache::set_table_runs(monarch_table_run * runs, monarch_table_entry * pages, const llama_ubatch & ubatch) const {
    std::vector<monarch_table_run> last(n_seqs()); // of each sequence

    int32_t n_runs  = 0;
    int32_t n_pages = 0;

    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const llama_seq_id seq_id = ubatch.seq_id[i][0];

        if (i > 0 && ubatch.seq_id[i - 1][0] == seq_id) {
            runs[n_runs - 1].n_tokens++;
            continue;
        }

        monarch_table_run & run = last[seq_id];

        if (run.n_tokens == 0) {
            run = { seq_id, 0, 1, 0, resolve_mode(seq_id), n_pages, (int32_t) tables[seq_id].n_pages(), 0 };

            n_pages += monarch_table_set_pages(pages + n_pages, tables[seq_id]);
        }
        run.i_token = i;

        runs[n_runs++] = run;
    }

    for (int32_t i = 0; i < n_runs; ++i) {
        runs[i].is_last = last[runs[i].seq].i_token == runs[i].i_token;
    }
    return n_runs;
}

void monarch_kv_cache::set_input_page_outs(ggml_tensor * dst) const {
    int32_t * data = (int32_t *) dst->data;

    data[MONARCH_PAGE_OUTS_N]    = n_page_outs_pending();
    data[MONARCH_PAGE_OUTS_STEP] = step;

    data += MONARCH_PAGE_OUTS_HEADER;

    uint32_t i = 0;
    for (const auto & out : pending) {
        if (out.phys < 0) {
            *data++ = pool.get_free(i++);
            *data++ = (int32_t) out.mask;
            data = std::copy(out.slots.begin(), out.slots.end(), data);
        }
    }
}
