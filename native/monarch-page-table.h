#pragma once

// The pool of physical pages, and one sequence's page table: which cold page holds which of its tokens.
//
// A page never changes once it is encoded, so sequences share pages: the pool counts the tables that hold each.

#include <cstddef>
#include <cstdint>
#include <vector>

// one past the greatest position: sums of positions cannot overflow
static const int32_t MONARCH_MAX_POS = 1 << 30;

// one token of a physical page, for as long as the page is not freed and taken again
struct monarch_page_bit {
    int32_t  page = -1;
    int32_t  bit  = 0;
    uint32_t take = 0;
};

// nothing is allocated after init()
class monarch_page_pool {
public:
    // seed: 0 hands out physical pages in ascending order, anything else in a shuffled one
    void init(uint32_t n_pages, uint32_t seed);

    // all pages become free
    void clear();

    // the physical page that the i-th next take() will return
    int32_t  get_free(uint32_t i) const;
    uint32_t n_free()   const { return n_free_left; }
    uint32_t n_used()   const { return refs.size() - n_free_left; }
    uint32_t n_tokens() const { return n_cold; } // of all pages; what is shared counts once
    size_t   n_bytes()  const;                   // of the pool itself

    int32_t take   (uint32_t mask);
    void    share  (int32_t page);
    void    release(int32_t page);

    bool     is_free (int32_t page) const { return refs[page] == 0; }
    uint32_t get_mask(int32_t page) const { return masks[page]; } // tokens that any table holds
    void     set_mask(int32_t page, uint32_t mask);

    monarch_page_bit get_bit(int32_t page, int32_t bit) const;
    bool             holds(const monarch_page_bit & bit) const;

private:
    uint32_t seed        = 0;
    uint32_t n_cold      = 0;
    uint32_t n_free_left = 0;

    std::vector<int32_t>  free;  // [0, n_free_left), used from the back
    std::vector<uint32_t> refs;  // tables that hold a page
    std::vector<uint32_t> masks;
    std::vector<uint32_t> takes; // how often it was taken
};

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

    void clear();

    // room for n more pages, so that push() cannot fail
    void reserve(uint32_t n);

    // phys: the caller took or shared it
    void push(int32_t phys, int32_t first_pos, uint32_t mask);

    // forget the tokens at [p0, p1); returns the physical pages of which some or all are gone here. Fails before it begins.
    std::vector<int32_t> remove(monarch_page_pool & pool, int32_t p0, int32_t p1);

    // the tokens that src has at [p0, p1), where this table holds nothing
    void share(monarch_page_pool & pool, const monarch_page_table & src, int32_t p0, int32_t p1);

    bool has(int32_t phys) const;

    const std::vector<page> & get_pages() const { return pages; }

    uint32_t n_pages()  const { return pages.size(); }
    uint32_t n_tokens() const { return n_cold; }
    size_t   n_bytes()  const { return pages.size()*sizeof(page); }

    // positions of the first token and one past the last; -1 and 0 if there is none
    int32_t begin() const;
    int32_t end()   const;

private:
    std::vector<page>::iterator find(int32_t phys, int32_t first_pos);

    uint32_t n_cold = 0;

    std::vector<page> pages; // ascending positions
};
