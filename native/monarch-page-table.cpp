#include "monarch-page-table.h"

#include <algorithm>
#include <random>

void monarch_page_table::init(uint32_t n_phys_new, uint32_t seed_new) {
    n_phys = n_phys_new;
    seed   = seed_new;

    clear();
}

void monarch_page_table::clear() {
    pages.clear();
    free.resize(n_phys);

    n_cold = 0;

    for (uint32_t i = 0; i < n_phys; ++i) {
        free[i] = n_phys - 1 - i;
    }

    if (seed != 0) {
        std::shuffle(free.begin(), free.end(), std::mt19937(seed));
    }
}

int32_t monarch_page_table::get_free(uint32_t i) const {
    return free[free.size() - 1 - i];
}

void monarch_page_table::push(int32_t first_pos, int32_t n_tokens) {
    pages.push_back({ get_free(0), first_pos, n_tokens });
    free.pop_back();

    n_cold += n_tokens;
}

void monarch_page_table::pop() {
    n_cold -= pages.back().n_tokens;

    free.push_back(pages.back().phys);
    pages.pop_back();
}

const monarch_page_table::page * monarch_page_table::truncate(int32_t pos) {
    while (!pages.empty() && pages.back().first_pos >= pos) {
        pop();
    }

    if (pages.empty() || pages.back().end() <= pos) {
        return nullptr;
    }

    page & cut = pages.back();

    n_cold      -= cut.end() - pos;
    cut.n_tokens = pos - cut.first_pos;

    return &cut;
}
