#pragma once

// CRC-32 (polynomial 0xEDB88320, as in zlib), eight bytes at a time.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

using monarch_crc_tables = std::array<std::array<uint32_t, 256>, 8>;

static inline monarch_crc_tables monarch_crc_init_tables() {
    monarch_crc_tables res;
    for (uint32_t i = 0; i < 256; ++i) {
        uint32_t crc = i;
        for (int bit = 0; bit < 8; ++bit) {
            crc = crc & 1 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
        }
        res[0][i] = crc;
    }
    for (int t = 1; t < 8; ++t) {
        for (uint32_t i = 0; i < 256; ++i) {
            res[t][i] = res[t - 1][i] >> 8 ^ res[0][res[t - 1][i] & 255];
        }
    }
    return res;
}

// crc: of what came before, 0 at the start
static inline uint32_t monarch_crc(uint32_t crc, const void * data, size_t size) {
    static const monarch_crc_tables tables = monarch_crc_init_tables();

    const uint8_t * src = (const uint8_t *) data;

    crc = ~crc;

    for (; size >= 8; size -= 8, src += 8) {
        uint32_t lo;
        uint32_t hi;
        memcpy(&lo, src,     sizeof(lo));
        memcpy(&hi, src + 4, sizeof(hi));

        lo ^= crc;
        crc = tables[7][lo & 255] ^ tables[6][lo >> 8 & 255] ^ tables[5][lo >> 16 & 255] ^ tables[4][lo >> 24] ^
              tables[3][hi & 255] ^ tables[2][hi >> 8 & 255] ^ tables[1][hi >> 16 & 255] ^ tables[0][hi >> 24];
    }
    for (; size > 0; --size, ++src) {
        crc = crc >> 8 ^ tables[0][(crc ^ *src) & 255];
    }

    return ~crc;
}
