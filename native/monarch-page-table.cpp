#include "monarch-page-table.h"

#include <algorithm>
#include <random>

int32_t monarch_page_table::page::n_tokens() const {
    int32_t res = 0;
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        ++res;
    }
    return res;
}

int32_t monarch_page_table::page::begin() const {
    int32_t i = 0;
    while (!(mask >> i & 1)) {
        ++i;
    }
    return first_pos + i;
}

int32_t monarch_page_table::page::end() const {
    int32_t i = 32;
    while (!(mask >> (i - 1) & 1)) {
        --i;
    }
    return first_pos + i;
}

void monarch_page_table::init(uint32_t n_phys_new, uint32_t seed_new) {
    n_phys = n_phys_new;
    seed   = seed_new;

    pages.reserve(n_phys); // push() cannot fail

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

void monarch_page_table::push(int32_t first_pos, uint32_t mask) {
    pages.push_back({ get_free(0), first_pos, mask });
    free.pop_back();

    n_cold += pages.back().n_tokens();
}

// tokens of a page at [p0, p1)
static uint32_t monarch_page_mask(const monarch_page_table::page & page, int32_t p0, int32_t p1) {
    uint32_t res = 0;
    for (int32_t i = 0; i < 32; ++i) {
        const int32_t pos = page.first_pos + i;
        res |= (uint32_t) (pos >= p0 && pos < p1) << i;
    }
    return res & page.mask;
}

std::vector<monarch_page_table::page> monarch_page_table::remove(int32_t p0, int32_t p1) {
    std::vector<page>    cut;
    std::vector<int32_t> freed;

    const auto first = std::find_if(pages.begin(), pages.end(), [p0](const page & page) { return page.end() > p0; });

    // out of memory: nothing is removed
    cut  .reserve(pages.end() - first);
    freed.reserve(pages.end() - first);

    auto out = first;
    auto it  = first;
    for (; it != pages.end() && it->begin() < p1; ++it) {
        const uint32_t gone = monarch_page_mask(*it, p0, p1);

        n_cold -= it->n_tokens();
        it->mask &= ~gone;

        if (it->mask == 0) {
            freed.push_back(it->phys);
            continue;
        }
        n_cold += it->n_tokens();
        if (gone != 0) {
            cut.push_back(*it);
        }
        *out++ = *it;
    }
    pages.erase(std::move(it, pages.end(), out), pages.end());

    // the first of them is used first: neighbours stay neighbours
    free.insert(free.end(), freed.rbegin(), freed.rend());

    return cut;
}
