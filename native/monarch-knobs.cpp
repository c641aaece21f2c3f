#include "monarch-knobs.h"

#include "monarch-codec.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <vector>

enum monarch_knob_kind {
    MONARCH_KNOB_KIND_ENUM,
    MONARCH_KNOB_KIND_INT,
    MONARCH_KNOB_KIND_FLOAT,
};

struct monarch_knob {
    const char *             name;
    monarch_knob_kind        kind;
    std::vector<std::string> choices;
    std::string              initial;
    double                   least;
    double                   greatest;
    bool                     live;
    size_t                   offset;
};

static std::vector<std::string> monarch_choices_split(const std::string & choices) {
    std::vector<std::string> res;

    for (size_t i = 0, end = 0; end != std::string::npos; i = end + 1) {
        end = choices.find('|', i);
        res.push_back(choices.substr(i, end - i));
    }

    return res;
}

static const std::vector<monarch_knob> & monarch_knob_list() {
#define MONARCH_KNOB_ENUM(name, initial, choices, live, help) \
    { #name, MONARCH_KNOB_KIND_ENUM,  monarch_choices_split(choices), #initial, 0, 0, live != 0, offsetof(monarch_knobs, name) },
#define MONARCH_KNOB_INT(name, initial, least, greatest, live, help) \
    { #name, MONARCH_KNOB_KIND_INT,   {}, #initial, least, greatest, live != 0, offsetof(monarch_knobs, name) },
#define MONARCH_KNOB_FLOAT(name, initial, least, greatest, live, help) \
    { #name, MONARCH_KNOB_KIND_FLOAT, {}, #initial, least, greatest, live != 0, offsetof(monarch_knobs, name) },
    static const std::vector<monarch_knob> list = {
#include "monarch-knobs.def"
    };
#undef MONARCH_KNOB_ENUM
#undef MONARCH_KNOB_INT
#undef MONARCH_KNOB_FLOAT
    return list;
}

static double monarch_knob_get(const monarch_knob & knob, const monarch_knobs & knobs) {
    const char * src = (const char *) &knobs + knob.offset;

    if (knob.kind == MONARCH_KNOB_KIND_FLOAT) {
        float res;
        memcpy(&res, src, sizeof(res));
        return res;
    }

    int32_t res;
    memcpy(&res, src, sizeof(res));
    return res;
}

static void monarch_knob_set(const monarch_knob & knob, monarch_knobs & knobs, double value) {
    char * dst = (char *) &knobs + knob.offset;

    if (knob.kind == MONARCH_KNOB_KIND_FLOAT) {
        const float f = (float) value;
        memcpy(dst, &f, sizeof(f));
    } else {
        const int32_t i = (int32_t) value;
        memcpy(dst, &i, sizeof(i));
    }
}

static std::string monarch_number(const monarch_knob & knob, double value) {
    char buf[64];
    snprintf(buf, sizeof(buf), knob.kind == MONARCH_KNOB_KIND_FLOAT ? "%g" : "%.0f", value);
    return buf;
}

static std::string monarch_knob_range(const monarch_knob & knob) {
    if (knob.kind != MONARCH_KNOB_KIND_ENUM) {
        return "from " + monarch_number(knob, knob.least) + " to " + monarch_number(knob, knob.greatest);
    }

    std::string res = "one of";
    for (const auto & choice : knob.choices) {
        res += " " + choice;
    }
    return res;
}

// false: not a value of this knob
static bool monarch_knob_parse(const monarch_knob & knob, const std::string & text, monarch_knobs & knobs) {
    if (knob.kind == MONARCH_KNOB_KIND_ENUM) {
        const auto it = std::find(knob.choices.begin(), knob.choices.end(), text);
        monarch_knob_set(knob, knobs, it - knob.choices.begin());
        return it != knob.choices.end();
    }

    // a decimal point whatever the program's locale says
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());
    stream.exceptions(std::ios::badbit); // out of memory is not a wrong value

    double value;
    if (!(stream >> value) || !stream.eof() || !(value >= knob.least && value <= knob.greatest)) {
        return false;
    }

    monarch_knob_set(knob, knobs, value);
    return knob.kind == MONARCH_KNOB_KIND_FLOAT || value == std::floor(value);
}

monarch_knobs monarch_knobs_get_default() {
    monarch_knobs res = {};
    res.struct_size = sizeof(res);

    for (const auto & knob : monarch_knob_list()) {
        monarch_knob_parse(knob, knob.initial, res);
    }

    return res;
}

static std::string monarch_knob_check(const monarch_knob & knob, const monarch_knobs & knobs) {
    const double value = monarch_knob_get(knob, knobs);

    const double least    = knob.kind == MONARCH_KNOB_KIND_ENUM ? 0 : knob.least;
    const double greatest = knob.kind == MONARCH_KNOB_KIND_ENUM ? (double) knob.choices.size() - 1 : knob.greatest;

    if (value >= least && value <= greatest) {
        return "";
    }

    return std::string(knob.name) + " = " + monarch_number(knob, value) + ": must be " + monarch_knob_range(knob);
}

// what the ranges do not say
static std::string monarch_knobs_check_together(const monarch_knobs & knobs) {
    const auto str = [](int32_t value) { return std::to_string(value); };

    if (!monarch_page_size_is_valid(knobs.page_size)) {
        return "page_size = " + str(knobs.page_size) + ": must be 8, 16 or 32";
    }
    if (!monarch_bits_are_valid(knobs.cold_bits_k)) {
        return "cold_bits_k = " + str(knobs.cold_bits_k) + ": must be 2, 3 or 4";
    }
    if (!monarch_bits_are_valid(knobs.cold_bits_v)) {
        return "cold_bits_v = " + str(knobs.cold_bits_v) + ": must be 2, 3 or 4";
    }
    if (knobs.residual_k && knobs.cold_bits_k == 16) {
        return "residual_k = on: needs cold_bits_k 2, 3 or 4";
    }
    if (knobs.hot_window < knobs.page_size) {
        return "hot_window = " + str(knobs.hot_window) + ": must be at least page_size = " + str(knobs.page_size);
    }
    return "";
}

std::string monarch_knobs_check(const monarch_knobs & knobs) {
    for (const auto & knob : monarch_knob_list()) {
        const std::string error = monarch_knob_check(knob, knobs);
        if (!error.empty()) {
            return error;
        }
    }

    return monarch_knobs_check_together(knobs);
}

std::string monarch_knobs_check_live(const monarch_knobs & old, const monarch_knobs & knobs) {
    for (const auto & knob : monarch_knob_list()) {
        if (!knob.live && monarch_knob_get(knob, old) != monarch_knob_get(knob, knobs)) {
            return std::string(knob.name) + ": cannot change while a context lives; make a new one";
        }
    }

    if (knobs.mode == MONARCH_MODE_OFF) {
        return "mode = off: a paged context cannot turn paging off; make a new one";
    }

    return monarch_knobs_check(knobs);
}

std::string monarch_knobs_get_mode_name(int32_t mode) {
    for (const auto & knob : monarch_knob_list()) {
        if (knob.offset == offsetof(monarch_knobs, mode)) {
            return knob.choices.at(mode);
        }
    }
    return "";
}

static std::string monarch_knob_env(const monarch_knob & knob) {
    std::string res = std::string("MONARCH_") + knob.name;
    for (auto & c : res) {
        c = (char) toupper(c);
    }
    return res;
}

// MONARCH=1, or MONARCH_MODE, turns paging on for programs that know nothing of it
static monarch_knobs monarch_knobs_from_env() {
    monarch_knobs res = monarch_knobs_get_default();

    const char * on = getenv("MONARCH");

    if (on && strcmp(on, "0") != 0 && strcmp(on, "1") != 0) {
        throw std::runtime_error(std::string("MONARCH = ") + on + ": must be 0 or 1");
    }
    if (!getenv("MONARCH_MODE") && !(on && strcmp(on, "1") == 0)) {
        res.mode = MONARCH_MODE_OFF;
        return res;
    }

    for (const auto & knob : monarch_knob_list()) {
        const std::string name = monarch_knob_env(knob);
        const char *      text = getenv(name.c_str());

        if (text && !monarch_knob_parse(knob, text, res)) {
            throw std::runtime_error(name + " = " + text + ": must be " + monarch_knob_range(knob));
        }
    }

    return res;
}

// "" unless MONARCH_KERNEL names no kernel: the plain path would serve, and nobody would notice
static std::string monarch_kernel_check_env() {
    static const char * const names[] = {
#define MONARCH_CPU_KERNEL(name) #name,
#include "monarch-cpu-kernels.def"
#undef MONARCH_CPU_KERNEL
    };

    const char * text = getenv("MONARCH_KERNEL");

    std::string choices;
    for (const char * name : names) {
        if (!text || strcmp(text, name) == 0) {
            return "";
        }
        choices += std::string(" ") + name;
    }

    return std::string("MONARCH_KERNEL = ") + text + ": must be one of" + choices;
}

static thread_local bool          pending = false;
static thread_local monarch_knobs pending_knobs;
static thread_local uint32_t      pending_seed = 0;

void monarch_knobs_set_pending(const monarch_knobs * knobs) {
    pending = knobs != nullptr;

    if (knobs) {
        pending_knobs = *knobs;
    }
}

void monarch_knobs_set_pending_seed(uint32_t seed) {
    pending_seed = seed;
}

monarch_knobs monarch_knobs_take() {
    const monarch_knobs res = pending ? pending_knobs : monarch_knobs_from_env();

    pending = false;

    std::string error = monarch_knobs_check(res);
    if (error.empty() && res.mode != MONARCH_MODE_OFF) {
        error = monarch_kernel_check_env();
    }
    if (!error.empty()) {
        throw std::runtime_error(error);
    }

    return res;
}

uint32_t monarch_knobs_take_seed() {
    const uint32_t res = pending_seed;
    pending_seed = 0;
    return res;
}
