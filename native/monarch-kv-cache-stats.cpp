// What a paged cache tells: statistics, what became of its pages, and the events that hooks are called with.

#include "monarch-kv-cache.h"

#include "monarch-stats.h"

#include "llama-hparams.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>
#include <string>

//
// statistics
//

monarch_stats monarch_kv_cache::get_stats() const {
    monarch_stats res = {};

    res.struct_size = sizeof(res);
    res.n_layer     = layers.size();
    res.n_head_kv   = n_head_kv;
    res.mode        = mode;
    res.n_tokens    = n_tokens();
    res.n_hot       = n_hot();
    res.n_cold      = pool.n_tokens();
    res.n_pages     = pool.n_used();
    res.n_page_outs = n_page_outs;
    res.hot_bytes   = total_size();
    res.table_bytes = pool.n_bytes() + cold_bits.size()*sizeof(cold_bits[0]);

    for (const auto & table : tables) {
        res.table_bytes += table.n_bytes();
    }

    store.add_stats(res, pool, get_policy(), committed);

    res.cold_bytes_per_token = (double) store.page_bytes()/knobs.page_size;

    return res;
}

// the last chance to know: upstream's tools do not ask for statistics
void monarch_kv_cache::log_stats() const {
    try {
        LLAMA_LOG_INFO("%s: statistics: %s\n", __func__, monarch_stats_to_json(get_stats()).c_str());
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: no statistics: %s\n", __func__, err.what());
    }
}

//
// pages
//

// adds what one KV head says; index: where a physical page is in the list, -1: nowhere
static void monarch_pages_add_head(
        std::vector<monarch_page> & pages, const std::vector<int32_t> & index, const monarch_cold_head & head, const monarch_policy & policy, int32_t committed) {
    for (size_t phys = 0; phys < index.size(); ++phys) {
        if (index[phys] >= 0) {
            pages[index[phys]].n_sticky += monarch_policy_is_sticky(&policy, head.count[phys]);
        }
    }

    for (int32_t i = 0; head.state->step == committed && i < head.state->n_log; ++i) {
        const monarch_log_entry & entry = head.log[i];

        if ((entry.flags & MONARCH_LOG_PROMOTED) && index[entry.page] >= 0) {
            pages[index[entry.page]].n_promoted++;
        }
    }
}

std::vector<monarch_page> monarch_kv_cache::get_pages(llama_seq_id seq_id) const {
    if (seq_id < 0 || (uint32_t) seq_id >= n_seqs()) {
        throw std::runtime_error("sequence " + std::to_string(seq_id) + ": allowed is 0 to " + std::to_string(n_seqs() - 1));
    }

    std::vector<monarch_page> res;

    std::vector<int32_t> index(n_pages_max, -1);
    for (const auto & page : tables[seq_id].get_pages()) {
        const bool is_attended = res.size() < n_attended[seq_id];

        index[page.phys] = res.size();
        res.push_back({ page.begin(), page.n_tokens(), is_attended ? (int32_t) (layers.size()*n_head_kv) : 0, 0 });
    }

    for (const auto & cold : store.get_layers()) {
        auto state = monarch_bytes::read(cold.state);

        for (uint32_t h = 0; h < n_head_kv; ++h) {
            monarch_pages_add_head(res, index, store.get_head(state, h), get_policy(), committed);
        }
    }

    return res;
}

//
// hooks
//

// what the step's hooks will be told: promotions first, then page-outs
monarch_kv_cache::event_list monarch_kv_cache::collect_events() const {
    event_list res;

    if (hooks.on_promote || hooks.on_sticky || hooks.on_page_in) {
        collect_promotions(res);
    }

    for (size_t i = 0; i < pending.size() && hooks.on_page_out; ++i) {
        for (const llama_seq_id seq_id : pending[i].seqs) {
            res.push_back({ hooks.on_page_out, { seq_id, -1, -1, pending[i].first_pos, monarch_mask_count(pending[i].mask), 0.0f, 0.0f } });
        }
    }

    return res;
}

void monarch_kv_cache::collect_promotions(event_list & res) const {
    std::vector<const monarch_page_table::page *> by_phys(n_seqs()*n_pages_max);
    for (uint32_t s = 0; s < n_seqs(); ++s) {
        for (const auto & page : tables[s].get_pages()) {
            by_phys[s*n_pages_max + page.phys] = &page;
        }
    }

    synchronize();

    for (const auto & cold : store.get_layers()) {
        auto state = monarch_bytes::read(cold.state);

        for (uint32_t h = 0; h < n_head_kv; ++h) {
            const monarch_cold_head    head   = store.get_head(state, h);
            const std::vector<int32_t> filled = hooks.on_page_in ? store.get_filled_pages(cold, h) : std::vector<int32_t>();

            for (int32_t i = 0; i < head.state->n_log; ++i) {
                const monarch_log_entry & entry = head.log[i];

                if (entry.flags & MONARCH_LOG_PROMOTED) {
                    const auto & page = *by_phys[entry.seq*n_pages_max + entry.page];

                    collect_promotion(res, { entry.seq, cold.il, (int32_t) h, page.begin(), page.n_tokens(), entry.estimated, entry.measured },
                            entry, head.count[entry.page], filled);
                }
            }
        }
    }
}

// count: the page's promotions before this one, which the next step will count
void monarch_kv_cache::collect_promotion(
        event_list & res, const monarch_event & event, const monarch_log_entry & entry, uint8_t count, const std::vector<int32_t> & filled) const {
    const monarch_policy policy = get_policy();

    if (hooks.on_promote) {
        res.push_back({ hooks.on_promote, event });
    }
    if (hooks.on_sticky && !(entry.flags & MONARCH_LOG_STICKY) && monarch_policy_is_sticky(&policy, std::min(count + 1, 255))) {
        res.push_back({ hooks.on_sticky, event });
    }
    if (std::find(filled.begin(), filled.end(), entry.page) != filled.end()) {
        res.push_back({ hooks.on_page_in, event });
    }
}
