// Knobs: from the environment ("name value" lines), and as a struct that a program fills in.

#include "monarch-knobs.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <vector>

static void check(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "failed: %s\n", what);
        abort();
    }
}

static const char * const NAMES[] = {
    "MONARCH",
#define MONARCH_KNOB_ENUM(name, ...)  #name,
#define MONARCH_KNOB_INT(name, ...)   #name,
#define MONARCH_KNOB_FLOAT(name, ...) #name,
#include "monarch-knobs.def"
#undef MONARCH_KNOB_ENUM
#undef MONARCH_KNOB_INT
#undef MONARCH_KNOB_FLOAT
};

static std::string variable(const std::string & name) {
    std::string res = name == "MONARCH" ? name : "MONARCH_" + name;
    for (auto & c : res) {
        c = toupper(c);
    }
    return res;
}

static void try_environment(const std::string & text) {
    for (const auto * name : NAMES) {
        unsetenv(variable(name).c_str());
    }
    setenv("MONARCH", "1", 1);

    std::istringstream lines(text);
    std::string        name;
    std::string        value;
    while (lines >> name && std::getline(lines, value)) {
        for (const auto * known : NAMES) {
            if (name == known) {
                setenv(variable(name).c_str(), value.c_str() + !value.empty(), 1);
            }
        }
    }

    try {
        const monarch_knobs knobs = monarch_knobs_take();
        check(monarch_knobs_check(knobs).empty(), "what the environment gave is valid");
    } catch (const std::runtime_error & err) {
        check(strlen(err.what()) > 0, "a reason");
    }
}

static void try_struct(const uint8_t * data, size_t size) {
    monarch_knobs knobs = monarch_knobs_get_default();
    memcpy((char *) &knobs + sizeof(knobs.struct_size), data, std::min(size, sizeof(knobs) - sizeof(knobs.struct_size)));

    const bool ok = monarch_knobs_check(knobs).empty();
    if (ok) {
        check(std::isfinite(knobs.promotion_threshold) && std::isfinite(knobs.importance_decay), "numbers");
        check(knobs.page_size >= 8 && knobs.hot_window >= knobs.page_size && knobs.sink_tokens >= 0, "sizes");
    }

    monarch_knobs_set_pending(&knobs);
    try {
        monarch_knobs_take();
        check(ok, "pending knobs are checked");
    } catch (const std::runtime_error &) {
        check(!ok, "valid pending knobs are taken");
    }

    monarch_knobs_check_live(monarch_knobs_get_default(), knobs);
}

extern "C" void fuzz_init(std::vector<std::vector<uint8_t>> & corpus) {
    const monarch_knobs knobs = monarch_knobs_get_default();
    const uint8_t *     data  = (const uint8_t *) &knobs + sizeof(knobs.struct_size);

    std::vector<uint8_t> input(data, (const uint8_t *) (&knobs + 1));
    input.insert(input.begin(), 0);
    corpus.push_back(input);
}

// the first byte says which
extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    if (size > 0 && data[0] == 0) {
        try_struct(data + 1, size - 1);
    } else {
        try_environment(std::string((const char *) data, size));
    }
    return 0;
}
