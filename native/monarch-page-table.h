#pragma once

// Page table of one sequence and the pool of physical pages behind it: which cold page holds which tokens.

#include <cstdint>
#include <vector>

class monarch_page_table {
public:
    struct page {
        int32_t  phys;
        int32_t  first_pos; // of bit 0, whether or not that token is there
        uint32_t mask;      // tokens that are there; fewer than were encoded once some were removed

        int32_t n_tokens() const;
        int32_t begin()    const; // position of the first token there
        int32_t end()      const; // and one past the last
    };

    // seed: 0 hands out physical pages in ascending order, anything else in a shuffled one
    void init(uint32_t n_phys, uint32_t seed);

    // all pages become free
    void clear();

    // the physical page that the i-th next push will use
    int32_t  get_free(uint32_t i) const;
    uint32_t n_free() const { return free.size(); }

    void push(int32_t first_pos, uint32_t mask);

    // forget the tokens at [p0, p1); returns the pages that lost some but not all
    std::vector<page> remove(int32_t p0, int32_t p1);

    const std::vector<page> & get_pages() const { return pages; }

    uint32_t n_pages()  const { return pages.size(); }
    uint32_t n_tokens() const { return n_cold; }

private:
    uint32_t n_phys = 0;
    uint32_t seed   = 0;
    uint32_t n_cold = 0;

    std::vector<page>    pages; // ascending positions
    std::vector<int32_t> free;  // used from the back
};
