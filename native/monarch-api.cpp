#include "monarch.h"

#include "monarch-error.h"
#include "monarch-knobs.h"
#include "monarch-kv-cache.h"

#include "llama-memory.h"

#include <algorithm>
#include <stdexcept>

static thread_local std::string last_error;

void monarch_error_set(const std::string & error) {
    last_error = error;
}

const char * monarch_error_get() {
    return last_error.c_str();
}

// runs f; no exception leaves it
template <typename F>
static int32_t monarch_api_call(F f) {
    try {
        last_error.clear();
        return f();
    } catch (const std::exception & err) {
        last_error = err.what();
    } catch (...) {
        last_error = "unknown error";
    }
    return -1;
}

// a null struct, or one of another ABI
template <typename T>
static void monarch_api_check(const T * t, const char * name) {
    if (!t || t->struct_size != sizeof(T)) {
        throw std::runtime_error(std::string(name) + ": struct_size does not match this library; rebuild against its monarch.h");
    }
}

static monarch_kv_cache * monarch_api_get_cache(llama_context * ctx) {
    auto * res = ctx ? dynamic_cast<monarch_kv_cache *>(llama_get_memory(ctx)) : nullptr;
    if (!res) {
        throw std::runtime_error("the context is not paged: create it with a mode other than off");
    }
    return res;
}

static void monarch_api_check_knobs(const monarch_knobs * knobs) {
    monarch_api_check(knobs, "monarch_knobs");

    const std::string error = monarch_knobs_check(*knobs);
    if (!error.empty()) {
        throw std::runtime_error(error);
    }
}

uint32_t monarch_abi_version(void) {
    return MONARCH_ABI_VERSION;
}

const char * monarch_last_error(void) {
    return monarch_error_get();
}

int32_t monarch_knobs_default(struct monarch_knobs * knobs) {
    return monarch_api_call([&] {
        monarch_api_check(knobs, "monarch_knobs");
        *knobs = monarch_knobs_get_default();
        return 0;
    });
}

int32_t monarch_knobs_validate(const struct monarch_knobs * knobs) {
    return monarch_api_call([&] {
        monarch_api_check_knobs(knobs);
        return 0;
    });
}

int32_t monarch_set_pending_knobs(const struct monarch_knobs * knobs) {
    return monarch_api_call([&] {
        if (knobs) {
            monarch_api_check_knobs(knobs);
        }
        monarch_knobs_set_pending(knobs);
        return 0;
    });
}

int32_t monarch_get_knobs(struct llama_context * ctx, struct monarch_knobs * knobs) {
    return monarch_api_call([&] {
        monarch_api_check(knobs, "monarch_knobs");
        *knobs = monarch_api_get_cache(ctx)->get_knobs();
        return 0;
    });
}

int32_t monarch_set_knobs(struct llama_context * ctx, const struct monarch_knobs * knobs) {
    return monarch_api_call([&] {
        monarch_api_check(knobs, "monarch_knobs");

        monarch_kv_cache * cache = monarch_api_get_cache(ctx);

        const std::string error = monarch_knobs_check_live(cache->get_knobs(), *knobs);
        if (!error.empty()) {
            throw std::runtime_error(error);
        }

        cache->set_knobs(*knobs);
        return 0;
    });
}

int32_t monarch_get_stats(struct llama_context * ctx, struct monarch_stats * stats) {
    return monarch_api_call([&] {
        monarch_api_check(stats, "monarch_stats");
        const monarch_kv_cache * cache = monarch_api_get_cache(ctx);
        llama_synchronize(ctx);
        *stats = cache->get_stats();
        return 0;
    });
}

int32_t monarch_set_hooks(struct llama_context * ctx, const struct monarch_hooks * hooks) {
    return monarch_api_call([&] {
        if (hooks) {
            monarch_api_check(hooks, "monarch_hooks");
        }
        monarch_api_get_cache(ctx)->set_hooks(hooks ? *hooks : monarch_hooks{});
        return 0;
    });
}

int32_t monarch_get_pages(struct llama_context * ctx, llama_seq_id seq_id, struct monarch_page * pages, int32_t n_max) {
    return monarch_api_call([&] {
        const monarch_kv_cache * cache = monarch_api_get_cache(ctx);
        llama_synchronize(ctx);
        const auto res = cache->get_pages(seq_id);

        std::copy_n(res.begin(), std::min<size_t>(std::max(n_max, 0), res.size()), pages);

        return (int32_t) res.size();
    });
}

int32_t monarch_test_shuffle_pages(uint32_t seed) {
    monarch_knobs_set_pending_seed(seed);
    return 0;
}
