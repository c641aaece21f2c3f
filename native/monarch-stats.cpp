#include "monarch-stats.h"

#include "monarch-knobs.h"

#include <limits>
#include <locale>
#include <sstream>

std::string monarch_stats_to_json(const monarch_stats & stats) {
    std::ostringstream out;
    out.imbue(std::locale::classic()); // a decimal point whatever the program's locale says
    out.precision(std::numeric_limits<double>::max_digits10);

    const char * separator = "{";

#define MONARCH_STAT_U64(name, ...) \
    out << separator << '"' << #name << "\": " << stats.name; \
    separator = ", ";
#define MONARCH_STAT_U32(...) MONARCH_STAT_U64(__VA_ARGS__)
#define MONARCH_STAT_F64(...) MONARCH_STAT_U64(__VA_ARGS__)
#define MONARCH_STAT_MODE(name, ...) \
    out << separator << '"' << #name << "\": \"" << monarch_knobs_get_mode_name(stats.name) << '"'; \
    separator = ", ";
#include "monarch-stats.def"
#undef MONARCH_STAT_U32
#undef MONARCH_STAT_MODE
#undef MONARCH_STAT_U64
#undef MONARCH_STAT_F64

    out << "}";
    return out.str();
}
