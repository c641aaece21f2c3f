#include "monarch-page-table.h"

#include "monarch-table.h"

#include <algorithm>
#include <random>

//
// monarch_page_pool
//

void monarch_page_pool::init(uint32_t n_pages, uint32_t seed_new) {
    free .resize(n_pages);
    refs .resize(n_pages);
    masks.resize(n_pages);
    takes.resize(n_pages);
    seed = seed_new;

    clear();
}

void monarch_page_pool::clear() {
    const uint32_t n_pages = refs.size();

    n_cold      = 0;
    n_free_left = n_pages;

    for (uint32_t i = 0; i < n_pages; ++i) {
        free[i] = n_pages - 1 - i;
        refs[i] = 0;
    }

    if (seed != 0) {
        std::shuffle(free.begin(), free.end(), std::mt19937(seed));
    }
}

int32_t monarch_page_pool::get_free(uint32_t i) const {
    return free[n_free_left - 1 - i];
}

size_t monarch_page_pool::n_bytes() const {
    return refs.size()*(sizeof(free[0]) + sizeof(refs[0]) + sizeof(masks[0]) + sizeof(takes[0]));
}

int32_t monarch_page_pool::take(uint32_t mask) {
    const int32_t page = get_free(0);

    n_free_left--;
    n_cold += monarch_mask_count(mask);

    refs [page] = 1;
    masks[page] = mask;
    takes[page]++;

    return page;
}

void monarch_page_pool::share(int32_t page) {
    refs[page]++;
}

void monarch_page_pool::release(int32_t page) {
    if (--refs[page] == 0) {
        n_cold -= monarch_mask_count(masks[page]);
        free[n_free_left++] = page;
    }
}

monarch_page_bit monarch_page_pool::get_bit(int32_t page, int32_t bit) const {
    return { page, bit, takes[page] };
}

bool monarch_page_pool::holds(const monarch_page_bit & bit) const {
    return bit.page >= 0 && !is_free(bit.page) && takes[bit.page] == bit.take && (masks[bit.page] >> bit.bit & 1);
}

void monarch_page_pool::set_mask(int32_t page, uint32_t mask) {
    n_cold      = n_cold - monarch_mask_count(masks[page]) + monarch_mask_count(mask);
    masks[page] = mask;
}

//
// monarch_page_table
//

int32_t monarch_page_table::page::n_tokens() const {
    return monarch_mask_count(mask);
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

void monarch_page_table::clear() {
    pages.clear();

    n_cold = 0;
}

int32_t monarch_page_table::begin() const {
    return pages.empty() ? -1 : pages.front().begin();
}

int32_t monarch_page_table::end() const {
    int32_t res = 0;

    // a page may fill the hole of one before, which then ends later
    for (auto it = pages.rbegin(); it != pages.rend() && it->begin() + 32 > res; ++it) {
        res = std::max(res, it->end());
    }
    return res;
}

void monarch_page_table::reserve(uint32_t n) {
    if (pages.capacity() < pages.size() + n) {
        pages.reserve(std::max(pages.size() + n, 2*pages.size()));
    }
}

void monarch_page_table::push(int32_t phys, int32_t first_pos, uint32_t mask) {
    const page entry = { phys, first_pos, mask };

    auto it = pages.end();
    while (it != pages.begin() && (it - 1)->begin() > entry.begin()) {
        --it;
    }
    pages.insert(it, entry);

    n_cold += entry.n_tokens();
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

std::vector<int32_t> monarch_page_table::remove(monarch_page_pool & pool, int32_t p0, int32_t p1) {
    std::vector<int32_t> changed;
    std::vector<int32_t> gone;

    const auto first = std::find_if(pages.begin(), pages.end(), [p0](const page & page) { return page.end() > p0; });

    changed.reserve(pages.end() - first);
    gone   .reserve(pages.end() - first);

    auto out = first;
    auto it  = first;
    for (; it != pages.end() && it->begin() < p1; ++it) {
        const uint32_t mask = monarch_page_mask(*it, p0, p1);

        n_cold -= it->n_tokens();
        it->mask &= ~mask;

        if (it->mask == 0) {
            gone.push_back(it->phys);
            continue;
        }
        n_cold += it->n_tokens();
        if (mask != 0) {
            changed.push_back(it->phys);
        }
        *out++ = *it;
    }
    pages.erase(std::move(it, pages.end(), out), pages.end());

    // a page that lost its front may begin after one that fills its hole
    std::sort(first, pages.end(), [](const page & a, const page & b) { return a.begin() < b.begin(); });

    // the first of them is used first: neighbours stay neighbours
    for (auto phys = gone.rbegin(); phys != gone.rend(); ++phys) {
        pool.release(*phys);
    }

    changed.insert(changed.end(), gone.begin(), gone.end());

    return changed;
}

bool monarch_page_table::has(int32_t phys) const {
    return std::any_of(pages.begin(), pages.end(), [phys](const page & page) { return page.phys == phys; });
}

std::vector<monarch_page_table::page>::iterator monarch_page_table::find(int32_t phys, int32_t first_pos) {
    auto it = std::lower_bound(pages.begin(), pages.end(), first_pos, [](const page & page, int32_t pos) { return page.begin() < pos; });

    while (it != pages.end() && it->phys != phys) {
        it = it->begin() < first_pos + 32 ? it + 1 : pages.end();
    }
    return it;
}

void monarch_page_table::share(monarch_page_pool & pool, const monarch_page_table & src, int32_t p0, int32_t p1) {
    for (const page & page : src.pages) {
        uint32_t mask = monarch_page_mask(page, p0, p1);
        if (mask == 0) {
            continue;
        }

        // other tokens of it may be here already: a table lists a page once
        const auto own = find(page.phys, page.first_pos);
        if (own != pages.end()) {
            mask   |= own->mask;
            n_cold -= own->n_tokens();
            pages.erase(own);
        } else {
            pool.share(page.phys);
        }
        push(page.phys, page.first_pos, mask);
    }
}
