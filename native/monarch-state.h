#pragma once

// Sticky state, promotion log and counters of one layer: the layout of the op's `state` tensor.
//
// A step may be aborted between two layers, so an op never changes the sticky state for the step it runs in. It logs what it
// promoted under the step's id; the next step applies a log only if its id is that of the last step that succeeded.

#include "monarch-hd.h"

#include <stddef.h>
#include <stdint.h>

struct monarch_layer_state {
    uint64_t score_us; // wall time of the first worker thread
    uint64_t attend_us;
    uint64_t encode_us;
    int64_t  encoded;   // the step whose pages were encoded last
    uint64_t reserved[4];
};

enum monarch_log_flags {
    MONARCH_LOG_PROMOTED = 1, // the page took part in attention
    MONARCH_LOG_STICKY   = 2, // it was sticky before this step
    MONARCH_LOG_DROPPED  = 4, // it was sticky and lost its place
};

// what became of a page in one step; sequences that share the page share the entry
struct monarch_log_entry {
    int32_t page; // physical
    int16_t flags;
    int16_t seq;  // the first that promoted it
    float   estimated;
    float   measured;
};

// one KV head; followed by log[n_pages], log_index[n_pages] (int32_t), importance[n_pages] (float) and count[n_pages] (uint8_t)
struct monarch_head_state {
    int32_t  step;         // the step that wrote the log
    int32_t  n_log;
    int32_t  log_promoted; // events and scored summaries of that step
    int32_t  log_scored;
    uint64_t n_promotions; // of all applied steps
    uint64_t n_scored;
};

MONARCH_HD static inline size_t monarch_head_state_size(int64_t n_pages) {
    const size_t size = sizeof(struct monarch_head_state) + n_pages*(sizeof(struct monarch_log_entry) + sizeof(int32_t) + sizeof(float) + 1);
    return (size + 63)/64*64;
}

// byte offset of a KV head
MONARCH_HD static inline size_t monarch_state_head_offset(int64_t n_pages, int64_t head_kv) {
    return sizeof(struct monarch_layer_state) + head_kv*monarch_head_state_size(n_pages);
}

MONARCH_HD static inline size_t monarch_state_size(int64_t n_head_kv, int64_t n_pages) {
    return monarch_state_head_offset(n_pages, n_head_kv);
}

MONARCH_HD static inline struct monarch_head_state * monarch_state_head(void * state, int64_t n_pages, int64_t head_kv) {
    return (struct monarch_head_state *) ((char *) state + monarch_state_head_offset(n_pages, head_kv));
}

MONARCH_HD static inline struct monarch_log_entry * monarch_head_state_log(struct monarch_head_state * head) {
    return (struct monarch_log_entry *) (head + 1);
}

// where a physical page may be in the log; it is there if the log says so, too
MONARCH_HD static inline int32_t * monarch_head_state_log_index(struct monarch_head_state * head, int64_t n_pages) {
    return (int32_t *) (monarch_head_state_log(head) + n_pages);
}

MONARCH_HD static inline float * monarch_head_state_importance(struct monarch_head_state * head, int64_t n_pages) {
    return (float *) (monarch_head_state_log_index(head, n_pages) + n_pages);
}

// promotions of each physical page; a page is sticky while it has at least sticky_threshold of them
MONARCH_HD static inline uint8_t * monarch_head_state_count(struct monarch_head_state * head, int64_t n_pages) {
    return (uint8_t *) (monarch_head_state_importance(head, n_pages) + n_pages);
}

// a page that is written again starts without a past
MONARCH_HD static inline void monarch_head_state_forget(struct monarch_head_state * head, int64_t n_pages, int32_t page) {
    monarch_head_state_count     (head, n_pages)[page] = 0;
    monarch_head_state_importance(head, n_pages)[page] = 0.0f;
}

// a physical page's entry among the first n_log of the log; null: none
MONARCH_HD static inline struct monarch_log_entry * monarch_head_state_find(struct monarch_head_state * head, int64_t n_pages, int32_t n_log, int32_t page) {
    const int32_t i = monarch_head_state_log_index(head, n_pages)[page]; // of a page that was never logged it is anything

    return i >= 0 && i < n_log && monarch_head_state_log(head)[i].page == page ? monarch_head_state_log(head) + i : NULL;
}
