#pragma once

// Paged KV cache for llama.cpp: the C ABI.
//
// Every function returns 0 (or a count) on success and -1 on failure; monarch_last_error() then says why in one line.
// Structs start with struct_size, which the caller sets to sizeof; a library of another size refuses them.
// Nothing here throws, and nothing here is called from ggml worker threads.

#include <stddef.h>
#include <stdint.h>

#include "llama.h"

#include "monarch-enums.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MONARCH_ABI_VERSION 1

// fields and defaults: monarch-knobs.def; an enum knob holds the index of its choice
struct monarch_knobs {
    uint32_t struct_size;
#define MONARCH_KNOB_ENUM(name, ...)  int32_t name;
#define MONARCH_KNOB_INT(name, ...)   int32_t name;
#define MONARCH_KNOB_FLOAT(name, ...) float   name;
#include "monarch-knobs.def"
#undef MONARCH_KNOB_ENUM
#undef MONARCH_KNOB_INT
#undef MONARCH_KNOB_FLOAT
};

// fields: monarch-stats.def
struct monarch_stats {
    uint32_t struct_size;
#define MONARCH_STAT_U32(name, ...)  uint32_t name;
#define MONARCH_STAT_MODE(name, ...) int32_t  name;
#define MONARCH_STAT_U64(name, ...)  uint64_t name;
#define MONARCH_STAT_F64(name, ...)  double   name;
#include "monarch-stats.def"
#undef MONARCH_STAT_U32
#undef MONARCH_STAT_MODE
#undef MONARCH_STAT_U64
#undef MONARCH_STAT_F64
};

// one cold page
struct monarch_page {
    int32_t first_pos;
    int32_t n_tokens;
    int32_t n_promoted; // layers x KV heads that attended it in the last step
    int32_t n_sticky;   // layers x KV heads in which it is sticky
};

struct monarch_event {
    int32_t seq_id;
    int32_t layer;     // -1: all layers and heads together (page-out)
    int32_t head_kv;
    int32_t first_pos;
    int32_t n_tokens;
    float   estimated; // attention probability estimated from the summary
    float   measured;  // attention mass measured in this step
};

typedef void (*monarch_hook)(const struct monarch_event * event, void * user_data);

// called after a step succeeded, on the thread that called llama_decode, within it: may read and change memory and state, but must
// not decode, and finds no outputs yet
struct monarch_hooks {
    uint32_t     struct_size;
    monarch_hook on_page_out;
    monarch_hook on_promote;
    monarch_hook on_sticky;
    monarch_hook on_page_in;
    void *       user_data;
};

LLAMA_API uint32_t     monarch_abi_version(void);
LLAMA_API const char * monarch_last_error(void); // of this thread, "" when the last call succeeded

LLAMA_API int32_t monarch_knobs_default (struct monarch_knobs * knobs);
LLAMA_API int32_t monarch_knobs_validate(const struct monarch_knobs * knobs);

// consumed by the next context that this thread creates; NULL: forget them, the environment decides
LLAMA_API int32_t monarch_set_pending_knobs(const struct monarch_knobs * knobs);

LLAMA_API int32_t monarch_get_knobs(struct llama_context * ctx,       struct monarch_knobs * knobs);
LLAMA_API int32_t monarch_set_knobs(struct llama_context * ctx, const struct monarch_knobs * knobs);
LLAMA_API int32_t monarch_get_stats(struct llama_context * ctx,       struct monarch_stats * stats);
LLAMA_API int32_t monarch_set_hooks(struct llama_context * ctx, const struct monarch_hooks * hooks); // NULL: none

// fills at most n_max cold pages of the sequence in order of position and returns how many there are
LLAMA_API int32_t monarch_get_pages(struct llama_context * ctx, llama_seq_id seq_id, struct monarch_page * pages, int32_t n_max);

// for tests: the next context of this thread hands out physical pages in an order shuffled by seed (0: ascending)
LLAMA_API int32_t monarch_test_shuffle_pages(uint32_t seed);

#ifdef __cplusplus
}
#endif
