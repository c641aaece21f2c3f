// What a paged context says that it takes, and what the cache says that it holds once it is full.
//
// Arguments: model. Prints: bytes of a context that only pretends to allocate, of a real one, and what that holds when
// n_ctx tokens were decoded.

#include "llama.h"
#include "llama-ext.h"
#include "monarch.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

static const int N_CTX = 8192;

static void check(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "failed: %s\n", what);
        exit(1);
    }
}

static llama_context * create(const char * path, bool no_alloc, llama_model ** model) {
    llama_model_params model_params = llama_model_default_params();
    model_params.no_alloc  = no_alloc;
    model_params.load_mode = LLAMA_LOAD_MODE_NONE;

    *model = llama_model_load_from_file(path, model_params);
    check(*model, "llama_model_load_from_file");

    llama_context_params params = llama_context_default_params();
    params.n_ctx     = N_CTX;
    params.n_batch   = N_CTX;
    params.n_ubatch  = 512;
    params.n_threads = params.n_threads_batch = 2;

    llama_context * ctx = llama_init_from_model(*model, params);
    check(ctx, "llama_init_from_model");
    return ctx;
}

static size_t context_bytes(const llama_context * ctx) {
    size_t res = 0;
    for (const auto & entry : llama_get_memory_breakdown(ctx)) {
        res += entry.second.context;
    }
    return res;
}

int main(int argc, char ** argv) {
    check(argc == 2, "one argument: the model");
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    llama_model   * model;
    llama_context * ctx = create(argv[1], true, &model);
    printf("%zu ", context_bytes(ctx));
    llama_free(ctx);
    llama_model_free(model);

    ctx = create(argv[1], false, &model);
    printf("%zu ", context_bytes(ctx));

    std::vector<llama_token> tokens(N_CTX, 7);
    check(llama_decode(ctx, llama_batch_get_one(tokens.data(), tokens.size())) == 0, "llama_decode");

    monarch_stats stats = {};
    stats.struct_size = sizeof(stats);
    check(monarch_get_stats(ctx, &stats) == 0, "monarch_get_stats");
    printf("%zu\n", (size_t) (stats.hot_bytes + stats.cold_bytes + stats.summary_bytes + stats.frame_bytes + stats.table_bytes));

    llama_free(ctx);
    llama_model_free(model);
    return 0;
}
