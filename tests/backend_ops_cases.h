// The op of the paged cache as cases of upstream's test-backend-ops: a backend against the CPU's plain path.
// Included by a copy of upstream's file, where its test_case is known.

#include "monarch-enums.h"
#include "monarch-op.h"
#include "monarch-page.h"
#include "monarch-state.h"
#include "monarch-table.h"

#include <random>

static const int64_t MONARCH_N_HEAD_KV = 2;
static const int64_t MONARCH_N_PAGES   = 32; // physical
static const int64_t MONARCH_N_KV      = 96;

struct test_monarch : public test_case {
    const int       head_dim;
    const int       bits;
    const ggml_type type_kv;

    test_monarch(int head_dim, int bits, ggml_type type_kv) : head_dim(head_dim), bits(bits), type_kv(type_kv) {}

    monarch_op_params get_params() const {
        monarch_op_params res = {};
        res.codec    = { head_dim, 16, bits, bits, 0 };
        res.scorer   = MONARCH_SCORER_PARTS;
        res.kq_scale = 1.0f/sqrtf(head_dim);
        return res;
    }

    ggml_tensor * new_named(ggml_context * ctx, const char * name, ggml_type type, int64_t ne0, int64_t ne1 = 1, int64_t ne2 = 1) {
        ggml_tensor * res = ggml_new_tensor_3d(ctx, type, ne0, ne1, ne2);
        ggml_set_name(res, name);
        return res;
    }

    ggml_tensor * new_pool(ggml_context * ctx) {
        const monarch_op_params params = get_params();
        return new_named(ctx, "pool", GGML_TYPE_I8, monarch_codec_block_size(&params.codec), MONARCH_N_PAGES, MONARCH_N_HEAD_KV);
    }

    ggml_tensor * new_summary(ggml_context * ctx) {
        return new_named(ctx, "summary", GGML_TYPE_I8, MONARCH_SUMMARY_GROUP*monarch_summary_size(head_dim), MONARCH_N_PAGES/MONARCH_SUMMARY_GROUP, MONARCH_N_HEAD_KV);
    }

    ggml_tensor * new_state(ggml_context * ctx) {
        return new_named(ctx, "state", GGML_TYPE_I8, monarch_state_size(MONARCH_N_HEAD_KV, MONARCH_N_PAGES));
    }

    // random pages, and their summaries
    void fill_pages(ggml_tensor * pool, ggml_tensor * summary) const {
        const monarch_op_params params = get_params();

        std::vector<uint8_t> blocks(ggml_nbytes(pool));
        std::vector<uint8_t> groups(summary ? ggml_nbytes(summary) : 0);
        std::vector<float>   k(16*head_dim);
        std::vector<float>   v(16*head_dim);

        std::mt19937 rng(1);
        std::normal_distribution<float> normal;

        for (int64_t h = 0; h < MONARCH_N_HEAD_KV && summary; ++h) {
            for (int64_t page = 0; page < MONARCH_N_PAGES; ++page) {
                for (size_t i = 0; i < k.size(); ++i) {
                    k[i] = normal(rng);
                    v[i] = normal(rng);
                }
                monarch_page_encode(&params.codec, params.scorer, 0xffff, k.data(), v.data(),
                        blocks.data() + monarch_pool_offset   (&params.codec, MONARCH_N_PAGES, h, page),
                        groups.data() + monarch_summary_offset(head_dim,      MONARCH_N_PAGES, h, page), page%MONARCH_SUMMARY_GROUP);
            }
        }

        ggml_backend_tensor_set(pool, blocks.data(), 0, blocks.size());
        if (summary) {
            ggml_backend_tensor_set(summary, groups.data(), 0, groups.size());
        }
    }

    static void fill_zeros(ggml_tensor * t) {
        const std::vector<uint8_t> zeros(ggml_nbytes(t));
        ggml_backend_tensor_set(t, zeros.data(), 0, zeros.size());
    }

    virtual std::vector<int32_t> get_input() = 0; // the table, or the page-outs

    void initialize_tensors(ggml_context * ctx) override {
        for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
            const std::string name = t->name;

            if (name == "pool") {
                fill_pages(t, ggml_get_tensor(ctx, "filled") ? ggml_get_tensor(ctx, "summary") : nullptr);
            } else if (name == "input") {
                const std::vector<int32_t> input = get_input();
                ggml_backend_tensor_set(t, input.data(), 0, input.size()*sizeof(input[0]));
            } else if (name == "mask") {
                init_tensor_kq_mask(t);
            } else if (name == "state" || name == "filled") {
                fill_zeros(t);
            } else if (name != "summary" && !t->view_src && t->op == GGML_OP_NONE) {
                init_tensor_uniform(t);
            }
        }
    }
};

// two sequences of different pages if there are several tokens
struct test_monarch_attend : public test_monarch {
    const int n_gqa;
    const int n_tokens;
    const int mode;

    std::string vars() override {
        return VARS_TO_STR6(head_dim, bits, type_kv, n_gqa, n_tokens, mode);
    }

    double max_nmse_err() override {
        return 2e-4; // 2 % of the codec's own; integer dot products
    }

    test_monarch_attend(int head_dim, int bits, ggml_type type_kv, int n_gqa, int n_tokens, int mode) :
        test_monarch(head_dim, bits, type_kv), n_gqa(n_gqa), n_tokens(n_tokens), mode(mode) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const monarch_op_params params = get_params();

        new_named(ctx, "filled", GGML_TYPE_F32, 1);

        ggml_tensor * q    = new_named(ctx, "q", GGML_TYPE_F32, head_dim, MONARCH_N_HEAD_KV*n_gqa, n_tokens);
        ggml_tensor * k    = new_named(ctx, "k", type_kv,       head_dim, MONARCH_N_HEAD_KV, MONARCH_N_KV);
        ggml_tensor * v    = new_named(ctx, "v", type_kv,       head_dim, MONARCH_N_HEAD_KV, MONARCH_N_KV);
        ggml_tensor * mask = new_named(ctx, "mask", GGML_TYPE_F16, MONARCH_N_KV, n_tokens);

        ggml_tensor * pool    = new_pool(ctx);
        ggml_tensor * summary = new_summary(ctx);
        ggml_tensor * state   = new_state(ctx);
        ggml_tensor * table   = new_named(ctx, "input", GGML_TYPE_I32, get_input().size());

        return ggml_monarch_attend(ctx, &params, q, k, v, mask, pool, summary, state, nullptr, table);
    }

    std::vector<int32_t> get_input() override {
        const int32_t n_runs = n_tokens > 1 ? 2 : 1;
        const int32_t n_own  = MONARCH_N_PAGES/n_runs;

        std::vector<int32_t> res(monarch_table_head_size(n_runs) + 2*MONARCH_N_PAGES);

        res[MONARCH_TABLE_N_RUNS]        = n_runs;
        res[MONARCH_TABLE_N_RUNS_MAX]    = n_runs;
        res[MONARCH_TABLE_PROMOTE_PAGES] = MONARCH_N_PAGES; // a choice would turn on a last bit
        res[MONARCH_TABLE_DENSE_PAGES]   = MONARCH_N_PAGES;
        res[MONARCH_TABLE_STEP]          = 1;

        monarch_table_run   * runs  = monarch_table_get_runs (res.data());
        monarch_table_entry * pages = monarch_table_get_pages(res.data());

        for (int32_t i = 0; i < n_runs; ++i) {
            const int32_t first = i*(n_tokens/2);
            runs[i] = { i, first, i + 1 == n_runs ? n_tokens - first : n_tokens/2, 1, mode, i*n_own, n_own, 0 };
        }
        for (int32_t i = 0; i < MONARCH_N_PAGES; ++i) {
            pages[i] = { (int32_t) ((7*i + 3)%MONARCH_N_PAGES), i%5 == 1 ? 0x5ff7u : 0xffffu };
        }
        return res;
    }
};

struct test_monarch_page_out : public test_monarch {
    static const int32_t n_outs = 5;

    std::string vars() override {
        return VARS_TO_STR3(head_dim, bits, type_kv);
    }

    test_monarch_page_out(int head_dim, int bits, ggml_type type_kv) : test_monarch(head_dim, bits, type_kv) {}

    ggml_tensor * build_graph(ggml_context * ctx) override {
        const monarch_op_params params = get_params();

        ggml_tensor * k         = new_named(ctx, "k", type_kv, head_dim, MONARCH_N_HEAD_KV, MONARCH_N_KV);
        ggml_tensor * v         = new_named(ctx, "v", type_kv, head_dim, MONARCH_N_HEAD_KV, MONARCH_N_KV);
        ggml_tensor * pool      = new_pool(ctx);
        ggml_tensor * summary   = new_summary(ctx);
        ggml_tensor * state     = new_state(ctx);
        ggml_tensor * page_outs = new_named(ctx, "input", GGML_TYPE_I32, get_input().size());

        return ggml_monarch_page_out(ctx, &params, k, v, pool, summary, state, nullptr, page_outs);
    }

    std::vector<int32_t> get_input() override {
        std::vector<int32_t> res = { n_outs, 7 };

        for (int32_t i = 0; i < n_outs; ++i) {
            res.push_back(31 - 3*i);
            res.push_back(0xffff);
            for (int32_t j = 0; j < 16; ++j) {
                res.push_back((16*i + 5*j)%MONARCH_N_KV);
            }
        }
        return res;
    }
};

static void add_monarch_cases(std::vector<std::unique_ptr<test_case>> & test_cases) {
    for (int head_dim : { 32, 64, 80, 128 }) {
        for (int mode : { MONARCH_MODE_WINDOW, MONARCH_MODE_PAGED, MONARCH_MODE_EXACT }) {
            for (int n_tokens : { 1, 5, 40 }) {
                for (int n_gqa : { 1, 4, 8 }) {
                    test_cases.emplace_back(new test_monarch_attend(head_dim, 4, GGML_TYPE_F16, n_gqa, n_tokens, mode));
                }
            }
        }
        for (int bits : { 2, 3, 4, 16 }) {
            test_cases.emplace_back(new test_monarch_attend(head_dim, bits, GGML_TYPE_F16, 4, 3, MONARCH_MODE_EXACT));
            test_cases.emplace_back(new test_monarch_page_out(head_dim, bits, GGML_TYPE_F16));
        }
    }
    for (ggml_type type_kv : { GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_Q8_0 }) {
        test_cases.emplace_back(new test_monarch_attend(64, 4, type_kv, 4, 3, MONARCH_MODE_EXACT));
        test_cases.emplace_back(new test_monarch_page_out(64, 4, type_kv));
    }
}
