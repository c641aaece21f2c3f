// The CUDA kernels of the op, emulated on the CPU, against the plain path on made-up pages.
//
// Each line of the input is a case: some steps, each of them attention and then a page-out, by the plain path and by the
// emulated kernels in three orders of threads. For each case a line tells how they compare.

#include "native_cases.h"

#include "monarch-cuda.cuh"

struct cuda_case {
    test_case base;
    int32_t   residual_k, n_sm, n_steps, threshold, sticky_threshold, n_masked, hot_f32, q_zero, n_runs, n_frames; // threshold: in millionths
};

static bool cuda_case_read(cuda_case * c) {
    test_case * b = &c->base;
    return scanf("%d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d", &b->head_dim, &b->n_gqa, &b->n_tokens, &b->page_size, &b->bits_k,
            &b->bits_v, &b->scorer, &b->mode, &b->n_pages, &b->n_promote, &b->n_kv, &b->mask_f32, &c->residual_k, &c->n_sm, &c->n_steps,
            &c->threshold, &c->sticky_threshold, &c->n_masked, &c->hot_f32, &c->q_zero, &c->n_runs, &c->n_frames) == 22;
}

// bytes with a guard on either side
struct guarded {
    static const size_t GUARD = 4096;

    std::vector<uint8_t> bytes;
    size_t               size;

    guarded(size_t size) : bytes(size + 2*GUARD, 0xff), size(size) {
    }

    void * data() {
        return bytes.data() + GUARD;
    }

    bool is_whole() const {
        const auto is_untouched = [](uint8_t x) { return x == 0xff; };
        return std::all_of(bytes.begin(), bytes.begin() + GUARD, is_untouched) && std::all_of(bytes.end() - GUARD, bytes.end(), is_untouched);
    }
};

// the tensors of one run: the plain path's, or those of an order of threads
struct world {
    guarded pool, summary, state, dst, frames;

    world(size_t pool, size_t summary, size_t state, size_t dst, size_t frames) : pool(pool), summary(summary), state(state), dst(dst), frames(frames) {
    }

    bool is_whole() const {
        return pool.is_whole() && summary.is_whole() && state.is_whole() && dst.is_whole() && frames.is_whole();
    }
};

// what frames of one KV head should hold
struct frame_oracle {
    std::vector<int32_t> page, used;
    uint64_t             n_hits     = 0;
    uint64_t             n_page_ins = 0;

    frame_oracle(int32_t n_frames) : page(n_frames, -1), used(n_frames, 0) {
    }

    void promote(int32_t step, const std::vector<int32_t> & promoted) {
        std::vector<int32_t> missed;
        for (const int32_t p : promoted) {
            const auto found = std::find(page.begin(), page.end(), p);
            if (found != page.end()) {
                used[found - page.begin()] = step;
            } else {
                missed.push_back(p);
            }
        }
        n_hits += promoted.size() - missed.size();

        const auto age = [&](int32_t i) { return page[i] < 0 ? INT32_MAX : step - used[i]; };

        std::vector<int32_t> oldest;
        for (size_t i = 0; i < page.size(); ++i) {
            if (age(i) > 0) {
                oldest.push_back(i);
            }
        }
        std::stable_sort(oldest.begin(), oldest.end(), [&](int32_t i, int32_t j) { return age(i) > age(j); });
        oldest.resize(std::min({ oldest.size(), missed.size(), (size_t) MONARCH_FRAME_BATCH }));
        std::sort(oldest.begin(), oldest.end());

        for (size_t j = 0; j < oldest.size(); ++j) {
            page[oldest[j]] = missed[j];
            used[oldest[j]] = step;
        }
        n_page_ins += oldest.size();
    }

    void forget(int32_t p) {
        std::replace(page.begin(), page.end(), p, -1);
    }
};

struct comparison {
    double  nmse      = 0.0; // the worst step's
    double  mass      = 0.0; // the greatest difference of a logged probability
    int32_t n_logged  = 0;   // log entries
    int32_t n_dropped = 0;
    int32_t n_state   = 0;   // differences in logs, counters and sticky counts
    int32_t n_pages   = 0;   // pages whose bytes differ
    int32_t n_orders  = 0;   // results that the order of threads changes
    int32_t n_guards  = 0;   // writes out of bounds
    int32_t n_frames  = 0;   // differences in what frames hold
    uint64_t n_page_ins = 0;
    uint64_t n_hits     = 0;
    uint64_t n_promoted = 0;
};

static double nmse(const float * x, const float * y, size_t n) {
    double error = 0.0;
    double power = 0.0;
    for (size_t i = 0; i < n; ++i) {
        error += ((double) x[i] - y[i])*((double) x[i] - y[i]);
        power += (double) y[i]*y[i];
    }
    return error/power;
}

static void compare_states(int64_t n_pages_max, world & want, world & got, comparison * res) {
    for (int64_t h = 0; h < n_head_kv; ++h) {
        monarch_head_state * a = monarch_state_head(want.state.data(), n_pages_max, h);
        monarch_head_state * b = monarch_state_head(got .state.data(), n_pages_max, h);

        res->n_state += a->step != b->step || a->n_log != b->n_log || a->log_promoted != b->log_promoted || a->log_scored != b->log_scored;
        res->n_state += a->n_promotions != b->n_promotions || a->n_scored != b->n_scored;
        res->n_promoted += a->log_promoted;

        for (int32_t i = 0; i < a->n_log && a->n_log == b->n_log; ++i) {
            const monarch_log_entry x = monarch_head_state_log(a)[i];
            const monarch_log_entry y = monarch_head_state_log(b)[i];

            res->n_logged  += 1;
            res->n_dropped += (x.flags & MONARCH_LOG_DROPPED) != 0;
            res->n_state   += x.page != y.page || x.flags != y.flags || x.seq != y.seq;
            // a NaN must not pass
            if (!(fabs(x.estimated - y.estimated) <= res->mass)) {
                res->mass = fabs(x.estimated - y.estimated);
            }
            if (!(fabs(x.measured - y.measured) <= res->mass)) {
                res->mass = fabs(x.measured - y.measured);
            }
        }
        res->n_state += memcmp(monarch_head_state_count(a, n_pages_max), monarch_head_state_count(b, n_pages_max), n_pages_max) != 0;
    }
}

static std::vector<int32_t> promoted_pages(monarch_head_state * head) {
    std::vector<int32_t> res;
    for (int32_t i = 0; i < head->n_log; ++i) {
        const monarch_log_entry entry = monarch_head_state_log(head)[i];
        if (entry.flags & MONARCH_LOG_PROMOTED) {
            res.push_back(entry.page);
        }
    }
    return res;
}

// every copy is as the page is; with several sequences, which of them has its turn first decides who gets a frame
static int32_t frames_compare(const monarch_op_params & op, int64_t n_pages_max, world & w, const std::vector<frame_oracle> & oracles, bool is_ordered) {
    int32_t res = 0;
    for (int64_t h = 0; h < n_head_kv; ++h) {
        monarch_frame_head * head = monarch_frames_head(w.frames.data(), n_pages_max, op.n_frames, h);

        const frame_oracle & oracle = oracles[h];
        const size_t         size   = monarch_codec_block_size(&op.codec);

        for (int32_t i = 0; i < op.n_frames; ++i) {
            const int32_t page = monarch_frame_head_page(head)[i];

            res += is_ordered && page != oracle.page[i];
            res += page >= 0 && monarch_frame_find(head, op.n_frames, page) != i;
            res += page >= 0 && memcmp((uint8_t *) w.pool.data() + monarch_pool_offset(&op.codec, n_pages_max, h, page),
                (uint8_t *) w.frames.data() + monarch_frame_offset(&op.codec, n_head_kv, n_pages_max, op.n_frames, h, i), size) != 0;
        }
        res += is_ordered && (head->n_hits != oracle.n_hits || head->n_page_ins != oracle.n_page_ins);
    }
    return res;
}

static test_tensor view_of(ggml_type type, size_t type_size, int64_t ne0, int64_t ne1, int64_t ne2, guarded & data) {
    test_tensor res(type, type_size, ne0, ne1, ne2);
    res.tensor.data = data.data();
    return res;
}

static void run_plain(ggml_tensor * dst) {
    std::vector<char> work(ggml_compute_forward_monarch_work_size(dst, 1) + 64, (char) 0xff);

    ggml_compute_params params = {};
    params.nth   = 1;
    params.wsize = work.size() - 64;
    params.wdata = (char *) (((uintptr_t) work.data() + 63)/64*64);

    ggml_compute_forward_monarch(&params, dst);
}

static bool run_emulated(ggml_tensor * dst, int32_t n_sm) {
    if (monarch_cuda_get_params(dst).kind == MONARCH_OP_PAGE_OUT) {
        monarch_cuda_forward_page_out(dst, nullptr);
        return true;
    }
    guarded work(monarch_cuda_attend_size(dst, n_sm));
    monarch_cuda_forward_attend(dst, n_sm, work.data(), nullptr);
    return work.is_whole();
}

static const int32_t MAX_RUNS = 4;

// Runs of about as many tokens, each with all pages in an order of its own, so that sequences share them. The last run is of
// the first one's sequence.
static void runs_fill(const cuda_case & cc, int32_t * table) {
    const test_case & c = cc.base;

    const monarch_table_entry * from = monarch_table_get_pages(table); // as table_fill() left it

    const std::vector<monarch_table_entry> pages(from, from + c.n_pages);

    table[MONARCH_TABLE_N_RUNS]     = cc.n_runs;
    table[MONARCH_TABLE_N_RUNS_MAX] = MAX_RUNS;

    monarch_table_run   * runs = monarch_table_get_runs (table);
    monarch_table_entry * list = monarch_table_get_pages(table);

    for (int32_t i = 0; i < cc.n_runs; ++i) {
        const bool    again   = i > 0 && i == cc.n_runs - 1;
        const int32_t i_token = c.n_tokens*i/cc.n_runs;
        const int32_t n_pages = i == 1 ? c.n_pages/2 : c.n_pages;

        runs[i] = { again ? 0 : i, i_token, c.n_tokens*(i + 1)/cc.n_runs - i_token, i > 0 || cc.n_runs == 1, c.mode, i*c.n_pages, n_pages, 0 };

        for (int32_t j = 0; j < c.n_pages; ++j) {
            list[i*c.n_pages + j] = pages[i == 0 ? j : (j*7 + i)%c.n_pages];
        }
    }
}

static float bits_of(int32_t * dst, float x) {
    memcpy(dst, &x, sizeof(x));
    return x;
}

static comparison cuda_case_run(const cuda_case & cc) {
    const test_case & c = cc.base;

    const int64_t n_pages_max = (c.n_pages + cc.n_steps*2 + 16)/16*16;
    const int32_t n_outs_max  = 3;

    monarch_op_params op = {};
    op.codec    = { c.head_dim, c.page_size, c.bits_k, c.bits_v, cc.residual_k };
    op.scorer   = c.scorer;
    op.kq_scale = 1.5f/sqrtf((float) c.head_dim);
    op.n_frames = cc.n_frames;

    const ggml_type hot_type  = cc.hot_f32 ? GGML_TYPE_F32 : GGML_TYPE_F16;
    const ggml_type mask_type = c.mask_f32 ? GGML_TYPE_F32 : GGML_TYPE_F16;

    const size_t block_size = monarch_codec_block_size(&op.codec);
    const size_t group_size = MONARCH_SUMMARY_GROUP*monarch_summary_size(c.head_dim);
    const size_t state_size = monarch_state_size(n_head_kv, n_pages_max);
    const size_t frame_size = monarch_frames_size(&op.codec, n_head_kv, n_pages_max, cc.n_frames);
    const size_t n_dst      = c.head_dim*n_head_kv*c.n_gqa*c.n_tokens;

    test_tensor q    (GGML_TYPE_F32, 4, c.head_dim, n_head_kv*c.n_gqa, c.n_tokens);
    test_tensor k    (hot_type, cc.hot_f32 ? 4 : 2, c.head_dim, n_head_kv, c.n_kv);
    test_tensor v    (hot_type, cc.hot_f32 ? 4 : 2, c.head_dim, n_head_kv, c.n_kv);
    test_tensor mask (mask_type, c.mask_f32 ? 4 : 2, c.n_kv, c.n_tokens, 1);
    test_tensor table(GGML_TYPE_I32, 4, monarch_table_head_size(MAX_RUNS) + 2*MAX_RUNS*n_pages_max, 1, 1);
    test_tensor outs (GGML_TYPE_I32, 4, monarch_page_outs_size(n_outs_max, c.page_size), 1, 1);

    seed = 1;

    // what pages hold at first
    test_tensor pool   (GGML_TYPE_I8, 1, block_size, n_pages_max, n_head_kv);
    test_tensor summary(GGML_TYPE_I8, 1, group_size, n_pages_max/MONARCH_SUMMARY_GROUP, n_head_kv);
    pages_fill(c, op, n_pages_max, &pool, &summary);

    int32_t * fields = (int32_t *) table.tensor.data;
    table_fill(c, n_pages_max, fields);
    runs_fill(cc, fields);
    bits_of(&fields[MONARCH_TABLE_PROMOTION_THRESHOLD], cc.threshold*1e-6f);
    bits_of(&fields[MONARCH_TABLE_IMPORTANCE_DECAY],    0.9f);
    fields[MONARCH_TABLE_STICKY_THRESHOLD] = cc.sticky_threshold;

    std::vector<world> worlds;
    for (int32_t i = 0; i < 4; ++i) {
        worlds.emplace_back(block_size*n_pages_max*n_head_kv, group_size*n_pages_max/MONARCH_SUMMARY_GROUP*n_head_kv, state_size, n_dst*sizeof(float), frame_size);
        memcpy(worlds[i].pool   .data(), pool   .data.data(), pool   .data.size());
        memcpy(worlds[i].summary.data(), summary.data.data(), summary.data.size());

        // as monarch_cold_store makes it: only the heads of it are cleared; a page's past is cleared when it is written
        memset(worlds[i].state.data(), 0, worlds[i].state.size);
        for (int64_t h = 0; h < n_head_kv; ++h) {
            memset((char *) worlds[i].frames.data() + monarch_frame_head_offset(n_pages_max, cc.n_frames, h), 0, sizeof(monarch_frame_head));
        }
    }

    std::vector<frame_oracle> oracles(n_head_kv, frame_oracle(cc.n_frames));

    comparison res;
    for (int32_t step = 1; step <= cc.n_steps; ++step) {
        fields[MONARCH_TABLE_STEP]      = step;
        fields[MONARCH_TABLE_COMMITTED] = step == 3 ? 1 : step - 1; // one step fails

        for (size_t i = 0; i < n_dst; ++i) {
            q.set(i, cc.q_zero ? 0.0f : random_value());
        }
        for (int64_t i = 0; i < c.head_dim*n_head_kv*c.n_kv; ++i) {
            k.set(i, random_value());
            v.set(i, random_value());
        }
        mask_fill(c, &mask);
        for (int64_t i = 0; i < (int64_t) c.n_tokens*cc.n_masked; ++i) {
            mask.set(i/cc.n_masked*c.n_kv + i%cc.n_masked, -INFINITY);
        }
        hidden_fill(c, mask, &k, &v);

        // two pages of three that there is room for: a fresh one and one that was used before, from slots in any order
        const uint32_t all = c.page_size == 32 ? 0xffffffff : (1u << c.page_size) - 1;

        int32_t * out = (int32_t *) outs.tensor.data;
        *out++ = 2;
        *out++ = step;
        for (int32_t i = 0; i < n_outs_max; ++i) {
            *out++ = i == 0 ? c.n_pages/2 + 1 + step : step - 1;
            *out++ = (i == 0 ? all : (random_bits() & all) | 1); // some tokens were removed
            for (int32_t t = 0; t < c.page_size; ++t) {
                *out++ = random_bits()%c.n_kv;
            }
        }

        for (int32_t i = 0; i < 4; ++i) {
            world & w = worlds[i];

            test_tensor pool_view    = view_of(GGML_TYPE_I8,  1, block_size, n_pages_max, n_head_kv, w.pool);
            test_tensor summary_view = view_of(GGML_TYPE_I8,  1, group_size, n_pages_max/MONARCH_SUMMARY_GROUP, n_head_kv, w.summary);
            test_tensor state_view   = view_of(GGML_TYPE_I8,  1, state_size, 1, 1, w.state);
            test_tensor dst          = view_of(GGML_TYPE_F32, 4, c.head_dim, n_head_kv*c.n_gqa, c.n_tokens, w.dst);
            test_tensor page_out     = view_of(GGML_TYPE_I8,  1, block_size, n_pages_max, n_head_kv, w.pool);

            test_tensor frames = view_of(GGML_TYPE_I8, 1, frame_size, 1, 1, w.frames);

            const bool has_frames = i > 0 && cc.n_frames > 0; // the plain path knows none

            dst.tensor.src[MONARCH_ATTEND_Q]       = &q           .tensor;
            dst.tensor.src[MONARCH_ATTEND_K]       = &k           .tensor;
            dst.tensor.src[MONARCH_ATTEND_V]       = &v           .tensor;
            dst.tensor.src[MONARCH_ATTEND_MASK]    = &mask        .tensor;
            dst.tensor.src[MONARCH_ATTEND_POOL]    = &pool_view   .tensor;
            dst.tensor.src[MONARCH_ATTEND_SUMMARY] = &summary_view.tensor;
            dst.tensor.src[MONARCH_ATTEND_STATE]   = &state_view  .tensor;
            dst.tensor.src[MONARCH_ATTEND_TABLE]   = &table       .tensor;
            dst.tensor.src[MONARCH_ATTEND_FRAMES]  = has_frames ? &frames.tensor : nullptr;

            page_out.tensor.src[MONARCH_PAGE_OUT_POOL]    = &pool_view   .tensor;
            page_out.tensor.src[MONARCH_PAGE_OUT_K]       = &k           .tensor;
            page_out.tensor.src[MONARCH_PAGE_OUT_V]       = &v           .tensor;
            page_out.tensor.src[MONARCH_PAGE_OUT_SUMMARY] = &summary_view.tensor;
            page_out.tensor.src[MONARCH_PAGE_OUT_STATE]   = &state_view  .tensor;
            page_out.tensor.src[MONARCH_PAGE_OUT_PAGES]   = &outs        .tensor;
            page_out.tensor.src[MONARCH_PAGE_OUT_FRAMES]  = has_frames ? &frames.tensor : nullptr;

            op.kind = MONARCH_OP_ATTEND;
            memcpy(dst.tensor.op_params, &op, sizeof(op));
            op.kind = MONARCH_OP_PAGE_OUT;
            memcpy(page_out.tensor.op_params, &op, sizeof(op));

            memset(w.dst.data(), 0xff, w.dst.size);

            if (i == 0) {
                run_plain(&dst.tensor);
                for (int64_t h = 0; h < n_head_kv && c.mode == MONARCH_MODE_PAGED; ++h) {
                    oracles[h].promote(step, promoted_pages(monarch_state_head(w.state.data(), n_pages_max, h)));
                }
                run_plain(&page_out.tensor);
                continue;
            }
            cuda_emulation_order = i - 1;
            res.n_guards += !run_emulated(&dst.tensor, cc.n_sm);
            res.n_frames += frames_compare(op, n_pages_max, w, oracles, cc.n_runs == 1);
            res.n_guards += !run_emulated(&page_out.tensor, cc.n_sm);
            res.n_guards += !w.is_whole();
        }

        for (world & w : worlds) {
            GGML_ASSERT(((const monarch_layer_state *) w.state.data())->encoded == step);
        }
        for (int32_t i = 0; i < 2; ++i) {
            for (auto & oracle : oracles) {
                oracle.forget(monarch_page_outs_get((const int32_t *) outs.tensor.data, i, c.page_size)[0]);
            }
        }
        for (int32_t i = 1; i < 4; ++i) {
            res.n_frames += frames_compare(op, n_pages_max, worlds[i], oracles, cc.n_runs == 1);
        }

        const double error = nmse((const float *) worlds[1].dst.data(), (const float *) worlds[0].dst.data(), n_dst);
        if (!(error <= res.nmse)) {
            res.nmse = error;
        }
        compare_states(n_pages_max, worlds[0], worlds[1], &res);

        res.n_pages += memcmp(worlds[0].pool   .data(), worlds[1].pool   .data(), worlds[0].pool   .size) != 0;
        res.n_pages += memcmp(worlds[0].summary.data(), worlds[1].summary.data(), worlds[0].summary.size) != 0;

        for (int32_t i = 2; i < 4; ++i) {
            res.n_orders += worlds[i].dst.bytes != worlds[1].dst.bytes || worlds[i].state.bytes != worlds[1].state.bytes || worlds[i].frames.bytes != worlds[1].frames.bytes;
            res.n_orders += worlds[i].pool.bytes != worlds[1].pool.bytes || worlds[i].summary.bytes != worlds[1].summary.bytes;
        }
    }
    for (const auto & oracle : oracles) {
        res.n_page_ins += oracle.n_page_ins;
        res.n_hits     += oracle.n_hits;
    }
    return res;
}

int main() {
    cuda_case c;
    while (cuda_case_read(&c)) {
        const comparison res = cuda_case_run(c);

        printf("%g %g %d %d %d %d %d %d %d %llu %llu %llu %llu\n", res.nmse, res.mass, res.n_logged, res.n_dropped, res.n_state, res.n_pages, res.n_orders, res.n_guards,
                res.n_frames, (unsigned long long) res.n_page_ins, (unsigned long long) res.n_hits, (unsigned long long) res.n_promoted, (unsigned long long) cuda_emulation_launches);
        fflush(stdout);
    }
    return 0;
}
