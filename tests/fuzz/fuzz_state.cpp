// States: an input is a saved state of one sequence whose checksums and fingerprint are made to fit, so that what lies
// behind them is reached. A refused one changes nothing; an accepted one is decoded with, cut, saved and forgotten.
//
// FUZZ_MODEL: the model's path

#include "llama.h"
#include "monarch.h"

#include "monarch-crc.h"
#include "monarch-page-table.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static const size_t UPSTREAM = 8; // magic and sequence
static const size_t HEADER   = 80;
static const size_t SEQUENCE = 12; // records behind it
static const size_t PAGE     = 12;
static const size_t TOKEN    = 8;

// offsets in the header
static const size_t VERSION     = 4;
static const size_t FINGERPRINT = 8;
static const size_t N_SEQS      = 60;
static const size_t N_PAGES     = 64;
static const size_t N_HOT       = 68;

static const uint32_t N_CTX = 256;

static llama_context *      ctx;
static llama_memory_t       memory;
static std::vector<uint8_t> live;      // a state as it is saved
static size_t               hot_size;  // of one token
static size_t               page_size; // of one page
static size_t               sticky_size[2]; // without pages, and of one

static void check(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "failed: %s\n", what);
        abort();
    }
}

static int decode(int n) {
    std::vector<llama_token> tokens(n);
    for (int i = 0; i < n; ++i) {
        tokens[i] = 3 + i*i%93;
    }
    return llama_decode(ctx, llama_batch_get_one(tokens.data(), n));
}

static std::vector<uint8_t> save() {
    std::vector<uint8_t> res(llama_state_seq_get_size(ctx, 0));
    check(llama_state_seq_get_data(ctx, res.data(), res.size(), 0) == res.size(), "a state of the size that was announced");
    return res;
}

static size_t load(const std::vector<uint8_t> & data) {
    return llama_state_seq_set_data(ctx, data.data(), data.size(), 0);
}

static uint32_t get_number(const std::vector<uint8_t> & data, size_t offset) {
    uint32_t res;
    memcpy(&res, data.data() + UPSTREAM + offset, sizeof(res));
    return res;
}

// the checksum of data[*pos, *pos + size) where it belongs, as far as there is any
static void seal(std::vector<uint8_t> & data, size_t * pos, size_t size) {
    if (size > data.size() || *pos + size + sizeof(uint32_t) > data.size()) {
        *pos = data.size();
        return;
    }
    const uint32_t crc = monarch_crc(0, data.data() + *pos, size);
    memcpy(data.data() + *pos + size, &crc, sizeof(crc));
    *pos += size + sizeof(crc);
}

static void seal_all(std::vector<uint8_t> & data) {
    if (data.size() < UPSTREAM + HEADER) {
        return;
    }
    std::copy_n(live.begin(), UPSTREAM + VERSION, data.begin()); // or upstream refuses it, or takes it for one of its own
    std::copy_n(live.begin() + UPSTREAM + FINGERPRINT, sizeof(uint32_t), data.begin() + UPSTREAM + FINGERPRINT);

    const size_t n_seqs  = get_number(data, N_SEQS);
    const size_t n_pages = get_number(data, N_PAGES);
    const size_t n_hot   = get_number(data, N_HOT);

    size_t pos = UPSTREAM;
    seal(data, &pos, HEADER + SEQUENCE*n_seqs + PAGE*n_pages + TOKEN*n_hot);
    seal(data, &pos, n_hot*hot_size);
    for (size_t i = 0; i < n_pages && pos < data.size(); ++i) {
        seal(data, &pos, page_size);
    }
    seal(data, &pos, sticky_size[0] + n_pages*sticky_size[1]);
}

// where the parts end follows from the sizes of states
static void learn_sizes() {
    llama_memory_clear(memory, true);
    check(decode(1) == 0, "decode");
    const size_t one = save().size();
    check(decode(1) == 0, "decode");
    const size_t two = save().size();

    hot_size       = two - one - TOKEN;
    sticky_size[0] = one - (two - one) - UPSTREAM - HEADER - SEQUENCE - 3*sizeof(uint32_t);

    check(decode(64) == 0, "decode");
    const std::vector<uint8_t> paged = save();

    const size_t n_pages = get_number(paged, N_PAGES);
    const size_t n_heads = sticky_size[0]/16;
    check(n_pages > 0, "pages");

    sticky_size[1] = n_heads*5;
    page_size      = (paged.size() - (one - (two - one)) - get_number(paged, N_HOT)*(two - one))/n_pages - PAGE - sticky_size[1] - sizeof(uint32_t);
}

extern "C" void fuzz_init(std::vector<std::vector<uint8_t>> & corpus) {
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    const char  * path  = getenv("FUZZ_MODEL");
    llama_model * model = llama_model_load_from_file(path ? path : "", llama_model_default_params());
    check(model, "FUZZ_MODEL names no model");

    monarch_knobs knobs = {};
    knobs.struct_size = sizeof(knobs);
    check(monarch_knobs_default(&knobs) == 0, "monarch_knobs_default");
    knobs.mode             = MONARCH_MODE_PAGED;
    knobs.hot_window       = 16;
    knobs.sink_tokens      = 4;
    knobs.promote_tokens   = 48;
    knobs.sticky_threshold = 1;
    knobs.dense_layers     = 0;
    check(monarch_set_pending_knobs(&knobs) == 0, "monarch_set_pending_knobs");

    llama_context_params params = llama_context_default_params();
    params.n_ctx     = N_CTX;
    params.n_batch   = params.n_ubatch = 64;
    params.n_threads = params.n_threads_batch = 1;

    ctx = llama_init_from_model(model, params);
    check(ctx, "llama_init_from_model");
    memory = llama_get_memory(ctx);

    learn_sizes();
    for (const int n : { 0, 1, 30, 64 }) {
        for (int i = 0; i < 3 && n > 0; ++i) {
            check(decode(n) == 0 && (n > 1 || decode(1) == 0), "decode");
        }
        corpus.push_back(save());
        check(llama_memory_seq_rm(memory, 0, n, n + n/2) && (n == 0 || llama_memory_seq_rm(memory, 0, n + 40, -1)), "llama_memory_seq_rm");
        corpus.push_back(save());
        llama_memory_clear(memory, true);
    }

    check(decode(60) == 0 && decode(1) == 0, "decode");
    live = save();
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    std::vector<uint8_t> state(data, data + size);
    seal_all(state);

    if (load(state) == 0) {
        check(save() == live, "a refused state changes nothing");
        return 0;
    }

    // however full it is
    for (const int n : { 1, 20, 1 }) {
        const bool is_over = llama_memory_seq_pos_max(memory, 0) + n >= MONARCH_MAX_POS;
        const int  status  = decode(n);
        check(is_over ? status == -2 : status == 0 || status == 1, "decode");
    }
    const llama_pos end = llama_memory_seq_pos_max(memory, 0) + 1;
    check(llama_memory_seq_rm(memory, 0, end/3, end/2), "llama_memory_seq_rm");
    check(decode(1) >= (end < MONARCH_MAX_POS ? 0 : -2), "decode");
    save();

    check(load(live) == live.size() && save() == live, "the live state again");
    return 0;
}
