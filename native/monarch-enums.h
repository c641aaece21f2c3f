#pragma once

// Values of the enum knobs: the index of the choice in monarch-knobs.def.

enum monarch_mode {
    MONARCH_MODE_OFF    = 0,
    MONARCH_MODE_WINDOW = 1,
    MONARCH_MODE_PAGED  = 2,
    MONARCH_MODE_EXACT  = 3,
    MONARCH_MODE_AUTO   = 4,
};

enum monarch_scorer {
    MONARCH_SCORER_MINMAX  = 0,
    MONARCH_SCORER_MEANSTD = 1,
    MONARCH_SCORER_PARTS   = 2,
};

enum monarch_cold_tier {
    MONARCH_COLD_TIER_AUTO   = 0,
    MONARCH_COLD_TIER_DEVICE = 1,
    MONARCH_COLD_TIER_RAM    = 2,
};
