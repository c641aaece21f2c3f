#pragma once

// Frames of one layer: slots in a device's memory that hold copies of promoted pages while the cold store lies in the host's.
// The layout of the op's `frames` tensor: the heads, then the blocks, monarch-codec.h, of all frames of the first KV head,
// then those of the next.
//
// A copy is as good as the page: it goes when the page is written again, and a step that fails leaves no wrong one behind.

#include "monarch-codec.h"
#include "monarch-hd.h"

#include <stddef.h>
#include <stdint.h>

// most pages that a step copies, per KV head
#define MONARCH_FRAME_BATCH 16

// one KV head; followed by page[n_frames], used[n_frames] and frame[n_pages] (int32_t)
struct monarch_frame_head {
    uint64_t n_hits;                       // promotions that found their page in a frame, since creation
    uint64_t n_page_ins;                   // copies, since creation
    int32_t  n_filled;                     // in the last step
    int32_t  filled[MONARCH_FRAME_BATCH];  // these frames
    int32_t  reserved[3];
};

MONARCH_HD static inline size_t monarch_frame_head_size(int64_t n_pages, int64_t n_frames) {
    const size_t size = sizeof(struct monarch_frame_head) + (2*n_frames + n_pages)*sizeof(int32_t);
    return (size + 63)/64*64;
}

MONARCH_HD static inline size_t monarch_frames_size(const struct monarch_codec * codec, int64_t n_head_kv, int64_t n_pages, int64_t n_frames) {
    return n_head_kv*(monarch_frame_head_size(n_pages, n_frames) + n_frames*monarch_codec_block_size(codec));
}

MONARCH_HD static inline size_t monarch_frame_head_offset(int64_t n_pages, int64_t n_frames, int64_t head_kv) {
    return head_kv*monarch_frame_head_size(n_pages, n_frames);
}

MONARCH_HD static inline struct monarch_frame_head * monarch_frames_head(void * frames, int64_t n_pages, int64_t n_frames, int64_t head_kv) {
    return (struct monarch_frame_head *) ((char *) frames + monarch_frame_head_offset(n_pages, n_frames, head_kv));
}

// the block of a KV head's frame
MONARCH_HD static inline size_t monarch_frame_offset(
        const struct monarch_codec * codec, int64_t n_head_kv, int64_t n_pages, int64_t n_frames, int64_t head_kv, int64_t frame) {
    return monarch_frame_head_offset(n_pages, n_frames, n_head_kv) + (head_kv*n_frames + frame)*monarch_codec_block_size(codec);
}

// the physical page that each frame holds, -1: none
MONARCH_HD static inline int32_t * monarch_frame_head_page(struct monarch_frame_head * head) {
    return (int32_t *) (head + 1);
}

// the last step that promoted it
MONARCH_HD static inline int32_t * monarch_frame_head_used(struct monarch_frame_head * head, int64_t n_frames) {
    return monarch_frame_head_page(head) + n_frames;
}

// where a physical page may be; it is there if the frame says so, too
MONARCH_HD static inline int32_t * monarch_frame_head_frame(struct monarch_frame_head * head, int64_t n_frames) {
    return monarch_frame_head_used(head, n_frames) + n_frames;
}

// the frame that holds a physical page, -1: none
MONARCH_HD static inline int32_t monarch_frame_find(struct monarch_frame_head * head, int64_t n_frames, int32_t page) {
    const int32_t frame = monarch_frame_head_frame(head, n_frames)[page]; // of a page that never had one it is anything

    return frame >= 0 && frame < n_frames && monarch_frame_head_page(head)[frame] == page ? frame : -1;
}
