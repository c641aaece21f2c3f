#pragma once

// One head vector of a K or V row as f32.

#include "ggml.h"

#include <string.h>

static inline void monarch_convert_to_f32(enum ggml_type type, const void * src, float * dst, int64_t n) {
    if (type == GGML_TYPE_F32) {
        memcpy(dst, src, n*sizeof(float));
    } else {
        ggml_get_type_traits(type)->to_float(src, dst, n);
    }
}
