#pragma once

// Reading states: the numbers in them, and one line about what does not fit.

#include "llama-io.h"

#include <stdexcept>
#include <string>

template <typename T>
static inline T monarch_state_get(llama_io_read_i & io) {
    T res;
    io.read(&res, sizeof(res));
    return res;
}

static inline void monarch_state_check(bool ok, const char * what) {
    if (!ok) {
        throw std::runtime_error(std::string("the state does not fit this context: ") + what);
    }
}
