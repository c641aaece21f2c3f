#pragma once

// Knobs: defaults, validation, the environment, and those that wait for this thread's next context.

#include "monarch.h"

#include <string>

monarch_knobs monarch_knobs_get_default();

// empty, or what is wrong: the knob's name, the value and the allowed range
std::string monarch_knobs_check(const monarch_knobs & knobs);

// empty, or why knobs cannot replace old in a live context
std::string monarch_knobs_check_live(const monarch_knobs & old, const monarch_knobs & knobs);

// what the knob calls it; mode: enum monarch_mode
std::string monarch_knobs_get_mode_name(int32_t mode);

// the pending knobs of this thread, which are consumed, or those of the environment; throws std::runtime_error
monarch_knobs monarch_knobs_take();

// the pending page order of this thread, which is consumed
uint32_t monarch_knobs_take_seed();

void monarch_knobs_set_pending(const monarch_knobs * knobs);
void monarch_knobs_set_pending_seed(uint32_t seed);

