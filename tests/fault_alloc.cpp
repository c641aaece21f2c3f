// Preloaded into a child process: fails one allocation of those that follow fault_arm(), and counts what is not freed.

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <dlfcn.h>
#include <new>

static const size_t LEAST_BUFFER = 16384; // ggml answers for smaller ones by itself: it aborts

static std::atomic<int64_t> left { 0 }; // allocations until one fails; 0: none will
static std::atomic<int64_t> live { 0 };

static bool fault_take() {
    return left.load() > 0 && left.fetch_sub(1) == 1;
}

extern "C" void fault_arm(int64_t n) {
    left = n;
}

// whether the allocation that was to fail did
extern "C" int32_t fault_disarm(void) {
    return left.exchange(0) == 0;
}

extern "C" int64_t fault_live(void) {
    return live;
}

void * operator new(size_t size) {
    void * res = fault_take() ? nullptr : malloc(size ? size : 1);
    if (!res) {
        throw std::bad_alloc();
    }
    live++;
    return res;
}

void operator delete(void * ptr) noexcept {
    live -= ptr != nullptr;
    free(ptr);
}

void operator delete(void * ptr, size_t) noexcept {
    operator delete(ptr);
}

// ggml's buffers
extern "C" int posix_memalign(void ** ptr, size_t alignment, size_t size) {
    static const auto next = (int (*)(void **, size_t, size_t)) dlsym(RTLD_NEXT, "posix_memalign");

    return size >= LEAST_BUFFER && fault_take() ? ENOMEM : next(ptr, alignment, size);
}
