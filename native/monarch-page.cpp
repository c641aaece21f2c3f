#include "monarch-page.h"

#include "monarch-summary.h"

#include <algorithm>

void monarch_page_summarize(
        const monarch_codec * codec, int32_t scorer, uint32_t mask, const uint8_t * block, uint8_t * group, int32_t i_page) {
    const int32_t head_dim = codec->head_dim;

    float k[MONARCH_MAX_PAGE_SIZE*MONARCH_MAX_HEAD_DIM];

    monarch_codec_decode_page_k(codec, block, k);

    int32_t n = 0;
    for (int32_t i = 0; i < codec->page_size; ++i) {
        if (mask >> i & 1) {
            std::copy_n(k + i*head_dim, head_dim, k + n++*head_dim);
        }
    }

    for (int32_t i = 0; i < n && codec->bits_k != 16; ++i) {
        monarch_codec_unrotate(head_dim, k + i*head_dim);
    }

    monarch_summary_encode(scorer, head_dim, n, k, group, i_page);
}

void monarch_page_encode(
        const monarch_codec * codec, int32_t scorer, uint32_t mask, const float * k, const float * v,
        uint8_t * block, uint8_t * group, int32_t i_page) {
    monarch_codec_encode_page(codec, k, v, block);
    monarch_page_summarize(codec, scorer, mask, block, group, i_page);
}
