// Counts the heap by standing in front of glibc's allocator. The resident memory of an emulated process says nothing:
// most of it belongs to the emulator.
//
// What is counted is malloc_usable_size(), what the allocator set aside. Every shared library of the process comes
// through here as well, because the dynamic linker looks in the executable first.
#include "heap.h"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <malloc.h>

extern "C" {
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);
}

namespace {

// Constant-initialized: the first allocations come before any constructor has run.
constinit std::atomic<size_t> live_bytes{0};
constinit std::atomic<size_t> peak_bytes{0};

void *taken(void *block) {
    if (block == nullptr) return block;
    const size_t size = malloc_usable_size(block);
    const size_t live = live_bytes.fetch_add(size) + size;
    size_t peak = peak_bytes.load();
    while (live > peak && !peak_bytes.compare_exchange_weak(peak, live)) {
    }
    return block;
}

void given_back(void *block) {
    if (block != nullptr) live_bytes.fetch_sub(malloc_usable_size(block));
}

}  // namespace

namespace heap {
size_t live() { return live_bytes.load(); }
size_t peak() { return peak_bytes.load(); }
void reset_peak() { peak_bytes.store(live_bytes.load()); }
}  // namespace heap

extern "C" {

void *malloc(size_t size) noexcept { return taken(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) noexcept { return taken(__libc_calloc(count, size)); }

void *realloc(void *block, size_t size) noexcept {
    const size_t before = block == nullptr ? 0 : malloc_usable_size(block);
    void *moved = __libc_realloc(block, size);
    if (moved != nullptr || size == 0) live_bytes.fetch_sub(before);  // else the old block is still there
    return taken(moved);
}

void free(void *block) noexcept {
    given_back(block);
    __libc_free(block);
}

void *memalign(size_t alignment, size_t size) noexcept { return taken(__libc_memalign(alignment, size)); }

void *aligned_alloc(size_t alignment, size_t size) noexcept { return memalign(alignment, size); }

int posix_memalign(void **block, size_t alignment, size_t size) noexcept {
    if (alignment % sizeof(void *) != 0 || alignment == 0 || (alignment & (alignment - 1)) != 0) return EINVAL;
    void *made = memalign(alignment, size);
    if (made == nullptr) return ENOMEM;
    *block = made;
    return 0;
}

}  // extern "C"
