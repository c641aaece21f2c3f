#pragma once

// Page table of one sequence and the pool of physical pages behind it: which cold page holds which tokens.

#include <cstdint>
#include <vector>

class monarch_page_table {
public:
    struct page {
        int32_t phys;
        int32_t first_pos;
        int32_t n_tokens; // valid ones; fewer than were encoded once a tail was removed

        uint32_t mask() const { return n_tokens == 32 ? UINT32_MAX : (1u << n_tokens) - 1; }
        int32_t  end()  const { return first_pos + n_tokens; }
    };

    // seed: 0 hands out physical pages in ascending order, anything else in a shuffled one
    void init(uint32_t n_phys, uint32_t seed);

    // all pages become free
    void clear();

    // the physical page that the i-th next push will use
    int32_t  get_free(uint32_t i) const;
    uint32_t n_free() const { return free.size(); }

    void push(int32_t first_pos, int32_t n_tokens);

    // forget the tokens at pos and after; returns the page that was cut in two, or null
    const page * truncate(int32_t pos);

    const std::vector<page> & get_pages() const { return pages; }

    uint32_t n_pages()  const { return pages.size(); }
    uint32_t n_tokens() const { return n_cold; }

private:
    void pop();

    uint32_t n_phys = 0;
    uint32_t seed   = 0;
    uint32_t n_cold = 0;

    std::vector<page>    pages; // ascending positions
    std::vector<int32_t> free;  // used from the back
};
