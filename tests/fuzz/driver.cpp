// Feeds a harness (LLVMFuzzerTestOneInput, as libFuzzer and AFL++ call it) where neither is at hand: the corpus as it is,
// then mutations of it, the same ones for the same seed.
//
//   harness -seconds N | -runs N [-seed N] [-last FILE] corpus-file...
//
// -last: the input that is being tried, so that a crash leaves it behind.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

using bytes = std::vector<uint8_t>;

extern "C" int  LLVMFuzzerTestOneInput(const uint8_t * data, size_t size);
extern "C" void fuzz_init(std::vector<bytes> & corpus); // may add what it knows to be valid

static const size_t MAX_SIZE = 1 << 16;

static const uint32_t ODD_VALUES[] = {
    0, 1, 15, 16, 17, 0x7e00, 0x7c00, 0xffff, 0x10000, 0x3fffffff, 0x40000000, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff, 0x7f800000, 0x7fc00000,
};

static void mutate(bytes & data, const std::vector<bytes> & corpus, std::mt19937 & rng) {
    const auto below = [&](size_t n) { return n == 0 ? 0 : rng()%n; };

    const size_t at = below(data.size());

    switch (rng()%7) {
        case 0: // a bit
            if (!data.empty()) {
                data[at] ^= 1 << rng()%8;
            }
            break;
        case 1: // a byte
            if (!data.empty()) {
                data[at] = rng();
            }
            break;
        case 2: // a number; headers lie at the beginning
        case 3:
            if (data.size() >= 4) {
                const size_t   pos   = (rng()%2 ? below(std::min<size_t>(data.size() - 3, 256)) : below(data.size() - 3)) & ~(size_t) 3;
                const uint32_t value = ODD_VALUES[below(std::size(ODD_VALUES))];
                memcpy(data.data() + pos, &value, sizeof(value));
            }
            break;
        case 4: // cut
            data.resize(at);
            break;
        case 5: // repeat a part
            if (data.size() < MAX_SIZE) {
                const bytes part(data.begin() + at, data.begin() + at + below(data.size() - at));
                data.insert(data.begin() + below(data.size()), part.begin(), part.end());
            }
            break;
        case 6: // go on as another input does
            {
                const bytes & other = corpus[below(corpus.size())];
                const size_t  from  = below(other.size());
                data.resize(at);
                data.insert(data.end(), other.begin() + from, other.end());
            } break;
    }
}

static void write_file(const std::string & path, const bytes & data) {
    std::ofstream(path, std::ios::binary).write((const char *) data.data(), data.size());
}

int main(int argc, char ** argv) {
    double      seconds = 0;
    int64_t     n_runs  = 0;
    uint32_t    seed    = 1;
    std::string last;

    std::vector<bytes> corpus;

    for (int i = 1; i < argc; ++i) {
        const std::string arg = argv[i];
        if (arg[0] != '-') {
            std::ifstream file(arg, std::ios::binary);
            corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
            continue;
        }
        if (++i == argc) {
            fprintf(stderr, "%s: needs a value\n", arg.c_str());
            return 2;
        }
        if (arg == "-seconds") { seconds = atof(argv[i]); }
        if (arg == "-runs")    { n_runs  = atoll(argv[i]); }
        if (arg == "-seed")    { seed    = atoi(argv[i]); }
        if (arg == "-last")    { last    = argv[i]; }
    }

    fuzz_init(corpus);

    std::mt19937 rng(seed);

    const auto start = std::chrono::steady_clock::now();
    const auto is_on = [&](int64_t i) {
        return i < n_runs || std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds;
    };

    int64_t i = 0;
    for (; i < (int64_t) corpus.size() || is_on(i); ++i) {
        bytes data = corpus[i%corpus.size()];
        for (uint32_t n = i < (int64_t) corpus.size() ? 0 : 1 + rng()%6; n > 0; --n) {
            mutate(data, corpus, rng);
        }
        if (!last.empty()) {
            write_file(last, data);
        }
        LLVMFuzzerTestOneInput(data.data(), data.size());
    }

    if (!last.empty()) {
        remove(last.c_str());
    }
    printf("%lld runs\n", (long long) i);
    return 0;
}
