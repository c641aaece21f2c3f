#pragma once

// Frames on CUDA, monarch-frames.h: which promoted pages get one, and their copies. All on the device, after a layer attended
// and before it does so again.

#include "monarch-cuda-attend.cuh"

#define MONARCH_FRAME_AGES 256

// steps since it was promoted, as far as they matter; a frame without a page is older than any
MONARCH_DEVICE int32_t monarch_frame_get_age(int32_t page, int32_t used, int32_t step) {
    const int32_t age = step - used;

    return page < 0 ? MONARCH_FRAME_AGES - 1 : age < MONARCH_FRAME_AGES - 2 ? age : MONARCH_FRAME_AGES - 2;
}

// the frames that the present query found are used in this step; by a whole block of threads
MONARCH_DEVICE void monarch_mark_group_frames(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t * sums) {
    monarch_frame_head * head = monarch_frame_head_get(a, group.head_kv);

    const int32_t * chosen = a.chosen + (size_t) group.i*a.n_pages_max;

    int32_t n_hits = 0;
    for (int32_t i = threadIdx.x; i < a.n_chosen[group.i]; i += blockDim.x) {
        const int32_t frame = monarch_frame_find(head, a.op.n_frames, group.table[chosen[i]].page);

        if (frame >= 0) {
            monarch_frame_head_used(head, a.op.n_frames)[frame] = a.table[MONARCH_TABLE_STEP];
            n_hits++;
        }
    }
    monarch_block_scan(n_hits, sums);

    if (threadIdx.x == 0) {
        head->n_hits += sums[blockDim.x - 1];
    }
    __syncthreads();
}

// the pages of the present query without a frame, the first n_max of them; returns how many there are
MONARCH_DEVICE int32_t monarch_find_missed(
        const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t n_max, int32_t * missed, int32_t * sums) {
    monarch_frame_head * head = monarch_frame_head_get(a, group.head_kv);

    const int32_t   n_chosen = a.n_chosen[group.i];
    const int32_t * chosen   = a.chosen + (size_t) group.i*a.n_pages_max;

    const monarch_share share = monarch_share_get(n_chosen);

    int32_t n_missed = 0;
    for (int32_t i = share.i0; i < share.i1; ++i) {
        n_missed += monarch_frame_find(head, a.op.n_frames, group.table[chosen[i]].page) < 0;
    }

    int32_t i_missed = monarch_block_scan(n_missed, sums) - n_missed;
    for (int32_t i = share.i0; i < share.i1 && i_missed < n_max; ++i) {
        const int32_t page = group.table[chosen[i]].page;

        if (monarch_frame_find(head, a.op.n_frames, page) < 0) {
            missed[i_missed++] = page;
        }
    }
    const int32_t res = sums[blockDim.x - 1];
    __syncthreads();

    return res;
}

// the age from which on frames are given away; of those that have it, the first n_equal are
MONARCH_DEVICE int32_t monarch_find_age(const monarch_cuda_attend & a, monarch_frame_head * head, int32_t n_wanted, int32_t * histogram, int32_t & n_equal) {
    const int32_t   step = a.table[MONARCH_TABLE_STEP];
    const int32_t * page = monarch_frame_head_page(head);
    const int32_t * used = monarch_frame_head_used(head, a.op.n_frames);

    for (int32_t i = threadIdx.x; i < MONARCH_FRAME_AGES; i += blockDim.x) {
        histogram[i] = 0;
    }
    __syncthreads();
    for (int32_t i = threadIdx.x; i < a.op.n_frames; i += blockDim.x) {
        atomicAdd(&histogram[monarch_frame_get_age(page[i], used[i], step)], 1);
    }
    __syncthreads();

    // every thread finds the same; at 0 are those of this step, which stay
    int32_t age = MONARCH_FRAME_AGES - 1;
    for (; age > 0 && histogram[age] < n_wanted; --age) {
        n_wanted -= histogram[age];
    }
    n_equal = age > 0 ? n_wanted : 0;

    return age;
}

// gives missed pages the frames that were promoted longest ago; by a whole block of threads
MONARCH_DEVICE void monarch_plan_group_frames(const monarch_cuda_attend & a, const monarch_cuda_group & group, int32_t * shared) {
    int32_t * missed    = shared;
    int32_t * histogram = missed    + MONARCH_FRAME_BATCH;
    int32_t * sums      = histogram + MONARCH_FRAME_AGES;

    monarch_frame_head * head = monarch_frame_head_get(a, group.head_kv);

    int32_t * page  = monarch_frame_head_page (head);
    int32_t * used  = monarch_frame_head_used (head, a.op.n_frames);
    int32_t * frame = monarch_frame_head_frame(head, a.op.n_frames);

    const int32_t step     = a.table[MONARCH_TABLE_STEP];
    const int32_t n_before = head->n_filled;
    const int32_t n_max    = MONARCH_FRAME_BATCH - n_before;
    const int32_t n_missed = monarch_find_missed(a, group, n_max, missed, sums);
    const int32_t n_wanted = n_missed < n_max ? n_missed : n_max;

    int32_t n_equal;
    const int32_t oldest = monarch_find_age(a, head, n_wanted, histogram, n_equal);

    const monarch_share share = monarch_share_get(a.op.n_frames);

    int32_t n_own_older = 0;
    int32_t n_own_equal = 0;
    for (int32_t i = share.i0; i < share.i1; ++i) {
        const int32_t age = monarch_frame_get_age(page[i], used[i], step);

        n_own_older += age > oldest;
        n_own_equal += age == oldest;
    }

    const int32_t n_equal_before = monarch_block_scan(n_own_equal, sums) - n_own_equal;
    __syncthreads();

    const int32_t n_left  = n_equal - n_equal_before;
    const int32_t n_taken = n_left < 0 ? 0 : n_left < n_own_equal ? n_left : n_own_equal; // of those that are equal

    int32_t ic = monarch_block_scan(n_own_older + n_taken, sums) - n_own_older - n_taken;

    int32_t n_seen = 0;
    for (int32_t i = share.i0; i < share.i1; ++i) {
        const int32_t age = monarch_frame_get_age(page[i], used[i], step);

        if (age > oldest || (age == oldest && n_seen++ < n_taken)) {
            page [i]                    = missed[ic];
            used [i]                    = step;
            frame[missed[ic]]           = i;
            head->filled[n_before + ic] = i;
            ic++;
        }
    }
    if (threadIdx.x == 0) {
        const int32_t n_filled = sums[blockDim.x - 1];

        head->n_page_ins += n_filled;
        head->n_filled   += n_filled;
    }
    __syncthreads();
}

static size_t monarch_plan_shared() {
    return (MONARCH_FRAME_BATCH + MONARCH_FRAME_AGES + MONARCH_SELECT_THREADS)*sizeof(int32_t);
}

MONARCH_DEVICE bool monarch_group_has_frames(const monarch_cuda_group & group) {
    return group.n_rows > 0 && group.is_last && group.mode == MONARCH_MODE_PAGED;
}

// One sequence after the other: they may share pages. None loses a frame to another that it uses itself, and each has its turn
// to be the first. Grid: KV heads; shared: monarch_plan_shared()
MONARCH_KERNEL monarch_plan_frames(const monarch_cuda_attend a) {
    MONARCH_SHARED(shared);

    for (int32_t i = 0; i < a.n_blocks; ++i) {
        const monarch_cuda_group group = monarch_group_get(a, i*a.n_head_kv + blockIdx.x);

        if (monarch_group_has_frames(group)) {
            monarch_mark_group_frames(a, group, (int32_t *) shared);
        }
    }
    for (int32_t i = 0; i < a.n_blocks; ++i) {
        const int32_t i_block = (int32_t) (((uint32_t) a.table[MONARCH_TABLE_STEP] + i)%a.n_blocks);

        const monarch_cuda_group group = monarch_group_get(a, i_block*a.n_head_kv + blockIdx.x);

        if (monarch_group_has_frames(group)) {
            monarch_plan_group_frames(a, group, (int32_t *) shared);
        }
    }
}

// grid: places in the batch, KV heads
MONARCH_KERNEL monarch_fill_frames(const monarch_cuda_attend a) {
    monarch_frame_head * head = monarch_frame_head_get(a, blockIdx.y);

    if ((int32_t) blockIdx.x >= head->n_filled) {
        return;
    }

    const int32_t frame = head->filled[blockIdx.x];
    const int32_t page  = monarch_frame_head_page(head)[frame];

    // blocks are whole numbers of these
    struct alignas(16) vector {
        uint32_t x[4];
    };

    const vector * src = (const vector *) monarch_cold_block(a, blockIdx.y, page, -1);
    vector       * dst = (vector       *) monarch_cold_block(a, blockIdx.y, page, frame);

    for (int32_t i = threadIdx.x; i < (int32_t) (monarch_codec_block_size(&a.op.codec)/sizeof(vector)); i += blockDim.x) {
        dst[i] = src[i];
    }
}
