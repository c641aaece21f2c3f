// Two paged contexts of one model, each made, used and freed by a thread of its own, at the same time.
//
// Arguments: model. Each thread decodes, removes, saves, clears, restores and goes on, with the same tokens. Prints
// nothing; the status says whether both came to the same logits, bit for bit.

#include "llama.h"
#include "monarch.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

static const int N_CTX = 512;

static void check(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "failed: %s\n", what);
        abort();
    }
}

static void decode(llama_context * ctx, int n, int n_per_batch) {
    for (int i = 0; i < n; i += n_per_batch) {
        std::vector<llama_token> tokens;
        for (int j = i; j < i + n_per_batch; ++j) {
            tokens.push_back(3 + j*j%93);
        }
        check(llama_decode(ctx, llama_batch_get_one(tokens.data(), tokens.size())) == 0, "llama_decode");
    }
}

static llama_context * create(llama_model * model) {
    monarch_knobs knobs = {};
    knobs.struct_size = sizeof(knobs);
    check(monarch_knobs_default(&knobs) == 0, "monarch_knobs_default");

    knobs.mode           = MONARCH_MODE_PAGED;
    knobs.hot_window     = 32;
    knobs.promote_tokens = 64;
    knobs.dense_layers   = 0;
    check(monarch_set_pending_knobs(&knobs) == 0, "monarch_set_pending_knobs");

    llama_context_params params = llama_context_default_params();
    params.n_ctx     = N_CTX;
    params.n_batch   = 64;
    params.n_ubatch  = 64;
    params.n_threads = params.n_threads_batch = 2;

    llama_context * ctx = llama_init_from_model(model, params);
    check(ctx, "llama_init_from_model");
    return ctx;
}

static void run(llama_model * model, std::vector<float> & logits) {
    llama_context * ctx    = create(model);
    llama_memory_t  memory = llama_get_memory(ctx);

    decode(ctx, 256, 64);
    decode(ctx, 16, 1);
    check(llama_memory_seq_rm(memory, 0, 100, 123), "llama_memory_seq_rm");

    std::vector<uint8_t> state(llama_state_seq_get_size(ctx, 0));
    check(llama_state_seq_get_data(ctx, state.data(), state.size(), 0) == state.size(), "llama_state_seq_get_data");
    llama_memory_clear(memory, true);
    decode(ctx, 64, 64);
    check(llama_state_seq_set_data(ctx, state.data(), state.size(), 0) == state.size(), "llama_state_seq_set_data");
    check(llama_state_seq_set_data(ctx, state.data(), state.size() - 1, 0) == 0, "a state cut short");
    decode(ctx, 16, 1);

    monarch_stats stats = {};
    stats.struct_size = sizeof(stats);
    check(monarch_get_stats(ctx, &stats) == 0 && stats.n_pages > 0 && stats.n_promotions > 0, "it paged");

    const float * last = llama_get_logits_ith(ctx, -1);
    logits.assign(last, last + llama_vocab_n_tokens(llama_model_get_vocab(model)));
    llama_free(ctx);
}

int main(int argc, char ** argv) {
    check(argc == 2, "one argument: the model");
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    check(model, "llama_model_load_from_file");

    std::vector<float> logits[2];

    std::thread first([&] { run(model, logits[0]); });
    run(model, logits[1]);
    first.join();

    llama_model_free(model);

    check(logits[0] == logits[1], "the same logits");
    return 0;
}
