#pragma once

#include "monarch.h"

#include <string>

// one line of JSON: the fields by name, the mode by its
std::string monarch_stats_to_json(const monarch_stats & stats);
