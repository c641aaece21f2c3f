// The op that attends, alone: native/'s CPU files and the few functions of ggml that they call, on made-up pages.
//
// Each line of the input is a case. To the output go, as f32, attention [n_tokens][n_head][head_dim] and the estimated
// probabilities [n_head_kv][n_pages] of the pages that were promoted; to the error output the least time of n_runs runs in
// microseconds, one line to a case, and what the op logs. MONARCH_KERNEL chooses the kernel.

#include "native_cases.h"

#include <thread>

static bool test_case_read(test_case * c, int32_t * q_zero, int32_t * faint, int32_t * n_threads) {
    return scanf("%d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d %d", &c->head_dim, &c->n_gqa, &c->n_tokens, &c->page_size, &c->bits_k, &c->bits_v,
            &c->scorer, &c->mode, &c->n_pages, &c->n_promote, &c->n_kv, &c->hot_bf16, &c->mask_f32, &c->n_runs, q_zero, faint, n_threads) == 17;
}

// in the order of the table; 0: not promoted, or promoted without being estimated
static std::vector<float> get_estimates(const test_case & c, int64_t n_pages_max, void * state, int32_t * table) {
    const monarch_table_entry * entries = monarch_table_get_pages(table);

    std::vector<float> res;
    for (int64_t h = 0; h < n_head_kv; ++h) {
        monarch_head_state * head = monarch_state_head(state, n_pages_max, h);

        for (int32_t i = 0; i < c.n_pages; ++i) {
            float estimated = 0.0f;
            for (int32_t j = 0; j < head->n_log; ++j) {
                const monarch_log_entry & entry = monarch_head_state_log(head)[j];

                estimated = entry.page == entries[i].page ? entry.estimated : estimated;
            }
            res.push_back(estimated);
        }
    }
    return res;
}

// params.ith is each thread's own
static void run_op(const ggml_compute_params & params, ggml_tensor * dst) {
    std::vector<std::thread> threads;
    for (int ith = 0; ith < params.nth; ++ith) {
        threads.emplace_back([=] {
            ggml_compute_params own = params;
            own.ith = ith;
            ggml_compute_forward_monarch(&own, dst);
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

static void test_case_run(const test_case & c, int32_t q_zero, int32_t faint, int32_t n_threads) {
    const int64_t n_pages_max = (c.n_pages + 16)/16*16; // one more than needed, at least

    monarch_op_params op = {};
    op.kind     = MONARCH_OP_ATTEND;
    op.codec    = { c.head_dim, c.page_size, c.bits_k, c.bits_v, 0 };
    op.scorer   = c.scorer;
    op.kq_scale = 1.5f/sqrtf((float) c.head_dim);

    const ggml_type hot_type  = c.hot_bf16 ? GGML_TYPE_BF16 : GGML_TYPE_F16;
    const ggml_type mask_type = c.mask_f32 ? GGML_TYPE_F32  : GGML_TYPE_F16;

    test_tensor q      (GGML_TYPE_F32, 4, c.head_dim, n_head_kv*c.n_gqa, c.n_tokens);
    test_tensor k      (hot_type, 2, c.head_dim, n_head_kv, c.n_kv);
    test_tensor v      (hot_type, 2, c.head_dim, n_head_kv, c.n_kv);
    test_tensor mask   (mask_type, c.mask_f32 ? 4 : 2, c.n_kv, c.n_tokens, 1);
    test_tensor pool   (GGML_TYPE_I8, 1, monarch_codec_block_size(&op.codec), n_pages_max, n_head_kv);
    test_tensor summary(GGML_TYPE_I8, 1, MONARCH_SUMMARY_GROUP*monarch_summary_size(c.head_dim), n_pages_max/MONARCH_SUMMARY_GROUP, n_head_kv);
    test_tensor state  (GGML_TYPE_I8, 1, monarch_state_size(n_head_kv, n_pages_max), 1, 1);
    test_tensor table  (GGML_TYPE_I32, 4, monarch_table_head_size(1) + 2*n_pages_max, 1, 1);
    test_tensor dst    (GGML_TYPE_F32, 4, c.head_dim, n_head_kv*c.n_gqa, c.n_tokens);

    seed = 1;
    for (int64_t i = 0; i < c.head_dim*n_head_kv*c.n_gqa*c.n_tokens; ++i) {
        const float x = random_value();
        q.set(i, q_zero ? 0.0f : x);
    }
    for (int64_t i = 0; i < c.head_dim*n_head_kv*c.n_kv; ++i) {
        k.set(i, random_value());
        v.set(i, random_value());
    }
    mask_fill  (c, &mask);
    hidden_fill(c, mask, &k, &v);
    pages_fill (c, op, n_pages_max, &pool, &summary, faint);
    table_fill(c, n_pages_max, (int32_t *) table.tensor.data);

    dst.tensor.src[MONARCH_ATTEND_Q]       = &q      .tensor;
    dst.tensor.src[MONARCH_ATTEND_K]       = &k      .tensor;
    dst.tensor.src[MONARCH_ATTEND_V]       = &v      .tensor;
    dst.tensor.src[MONARCH_ATTEND_MASK]    = &mask   .tensor;
    dst.tensor.src[MONARCH_ATTEND_POOL]    = &pool   .tensor;
    dst.tensor.src[MONARCH_ATTEND_SUMMARY] = &summary.tensor;
    dst.tensor.src[MONARCH_ATTEND_STATE]   = &state  .tensor;
    dst.tensor.src[MONARCH_ATTEND_TABLE]   = &table  .tensor;

    memcpy(dst.tensor.op_params, &op, sizeof(op));

    // scratch is whatever was there before, and lies anywhere: at multiples of 16 at least
    std::vector<char> work(ggml_compute_forward_monarch_work_size(&dst.tensor, n_threads) + 64, (char) 0xff);

    ggml_compute_params params = {};
    params.nth   = n_threads;
    params.wsize = work.size() - 64;
    params.wdata = (char *) (((uintptr_t) work.data() + 63)/64*64 + 16);

    ggml_threadpool threadpool;
    pthread_barrier_init(&threadpool.barrier, nullptr, n_threads);
    params.threadpool = &threadpool;

    int64_t best = INT64_MAX;
    for (int i = 0; i < c.n_runs; ++i) {
        const int64_t start = ggml_time_us();
        if (n_threads == 1) {
            ggml_compute_forward_monarch(&params, &dst.tensor);
        } else {
            run_op(params, &dst.tensor);
        }
        best = std::min(best, ggml_time_us() - start);
    }
    pthread_barrier_destroy(&threadpool.barrier);

    fprintf(stderr, "%lld\n", (long long) best);
    fwrite(dst.data.data(), 1, dst.data.size(), stdout);

    const std::vector<float> estimates = get_estimates(c, n_pages_max, state.tensor.data, (int32_t *) table.tensor.data);
    fwrite(estimates.data(), sizeof(float), estimates.size(), stdout);
}

int main() {
    test_case c;
    int32_t   q_zero;
    int32_t   faint;
    int32_t   n_threads;
    while (test_case_read(&c, &q_zero, &faint, &n_threads)) {
        test_case_run(c, q_zero, faint, n_threads);
    }
    return 0;
}
