// Counts the heap by standing in front of glibc's allocator. The resident memory of an emulated process says nothing:
// most of it belongs to the emulator.
//
// What is counted is malloc_usable_size(), what the allocator set aside. Every shared library of the process comes
// through here as well, because the dynamic linker looks in the executable first.
//
// A block's kind is that of the thread's `Only`, else that of the delegate where the delegate's library asks for it. When
// the block is freed, a table tells its kind. It holds the blocks that are not the runtime's, which are few: the others
// need no entry. Its memory comes from mmap, so that it neither counts nor calls the allocator.
#include "heap.h"
#include "library.h"

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <malloc.h>
#include <sched.h>
#include <sys/mman.h>

extern "C" {
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void __libc_free(void *);
}

namespace {

using heap::Bytes;
using heap::Kind;

// All of this is constant-initialized: the first allocations come before any constructor has run.

class Lock {
  public:
    Lock() {
        for (int tries = 0; taken.test_and_set(std::memory_order_acquire); ++tries) {
            if (tries % 100 == 99) sched_yield();  // its holder may have lost the core
        }
    }
    ~Lock() { taken.clear(std::memory_order_release); }

  private:
    static constinit std::atomic_flag taken;
};
constinit std::atomic_flag Lock::taken;

// Open addressing with linear probing; the size is a power of two and at most half of it is used.
class Table {
  public:
    void put(uintptr_t block, Kind kind) {
        if (2 * (used + 1) > size) grow();
        size_t at = home(block);
        while (entries[at].block != 0) at = next(at);
        entries[at] = {block, kind};
        ++used;
    }

    // Takes a block out. What is not in here is the runtime's.
    Kind take(uintptr_t block) {
        if (used == 0) return heap::RUNTIME;
        size_t at = home(block);
        while (entries[at].block != block) {
            if (entries[at].block == 0) return heap::RUNTIME;
            at = next(at);
        }
        const Kind kind = entries[at].kind;
        // What follows moves up where a search for it would stop at the gap.
        for (size_t other = next(at); entries[other].block != 0; other = next(other)) {
            const size_t way = (other - home(entries[other].block)) & (size - 1);
            if (way < ((other - at) & (size - 1))) continue;
            entries[at] = entries[other];
            at = other;
        }
        entries[at] = {};
        --used;
        return kind;
    }

  private:
    struct Entry {
        uintptr_t block;
        Kind kind;
    };

    Entry *entries = nullptr;
    size_t size = 0, used = 0;

    size_t home(uintptr_t block) const { return (block >> 4) * 0x9E3779B97F4A7C15u >> 20 & (size - 1); }
    size_t next(size_t at) const { return (at + 1) & (size - 1); }

    void grow() {
        const Table before = *this;
        size = size == 0 ? 4096 : 2 * size;
        used = 0;
        void *memory = mmap(nullptr, size * sizeof(Entry), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) std::abort();
        entries = static_cast<Entry *>(memory);
        for (size_t i = 0; i < before.size; ++i) {
            if (before.entries[i].block != 0) put(before.entries[i].block, before.entries[i].kind);
        }
        if (before.size != 0) munmap(before.entries, before.size * sizeof(Entry));
    }
};

constinit Table table;
constinit Bytes live_bytes, peak_bytes;
constinit thread_local Kind only = heap::KINDS;  // none
// The delegate's library: what it asks for is the runtime's until `delegate_takes`.
constinit std::atomic<uintptr_t> delegate_begins{0}, delegate_ends{0};
constinit std::atomic<Kind> delegate_kind{heap::RUNTIME};

Kind kind_for(void *caller) {
    if (only != heap::KINDS) return only;
    const auto at = reinterpret_cast<uintptr_t>(caller);
    return at >= delegate_begins && at < delegate_ends ? delegate_kind.load() : heap::RUNTIME;
}

void *taken(void *block, Kind kind) {
    if (block == nullptr) return block;
    const auto size = static_cast<long long>(malloc_usable_size(block));
    const Lock lock;
    if (kind != heap::RUNTIME) table.put(reinterpret_cast<uintptr_t>(block), kind);
    live_bytes.total += size;
    live_bytes.of[kind] += size;
    if (live_bytes.total > peak_bytes.total) peak_bytes = live_bytes;
    return block;
}

// Comes before the allocator gets the block, which may give it to another thread at once.
Kind given_back(void *block) {
    if (block == nullptr) return heap::RUNTIME;
    const auto size = static_cast<long long>(malloc_usable_size(block));
    const Lock lock;
    const Kind kind = table.take(reinterpret_cast<uintptr_t>(block));
    live_bytes.total -= size;
    live_bytes.of[kind] -= size;
    return kind;
}

}  // namespace

namespace heap {

Bytes live() {
    const Lock lock;
    return live_bytes;
}

Bytes peak() {
    const Lock lock;
    return peak_bytes;
}

void reset_peak() {
    const Lock lock;
    peak_bytes = live_bytes;
}

void delegate_takes(Kind kind) {
    if (delegate_ends == 0) {
        const Code code = xnnpack_code();
        delegate_begins = code.begin;
        delegate_ends = code.end;
    }
    delegate_kind = kind;
}

Only::Only(Kind kind) : before(only) { only = kind; }
Only::~Only() { only = before; }

}  // namespace heap

extern "C" {

void *malloc(size_t size) noexcept { return taken(__libc_malloc(size), kind_for(__builtin_return_address(0))); }

void *calloc(size_t count, size_t size) noexcept {
    return taken(__libc_calloc(count, size), kind_for(__builtin_return_address(0)));
}

void *realloc(void *block, size_t size) noexcept {
    const Kind kind = kind_for(__builtin_return_address(0)), before = given_back(block);
    void *moved = __libc_realloc(block, size);
    if (moved != nullptr) return taken(moved, kind);
    if (block != nullptr && size != 0) taken(block, before);  // it could not grow and is still there
    return nullptr;
}

void free(void *block) noexcept {
    given_back(block);
    __libc_free(block);
}

void *memalign(size_t alignment, size_t size) noexcept {
    return taken(__libc_memalign(alignment, size), kind_for(__builtin_return_address(0)));
}

void *aligned_alloc(size_t alignment, size_t size) noexcept {
    return taken(__libc_memalign(alignment, size), kind_for(__builtin_return_address(0)));
}

int posix_memalign(void **block, size_t alignment, size_t size) noexcept {
    if (alignment % sizeof(void *) != 0 || alignment == 0 || (alignment & (alignment - 1)) != 0) return EINVAL;
    void *made = taken(__libc_memalign(alignment, size), kind_for(__builtin_return_address(0)));
    if (made == nullptr) return ENOMEM;
    *block = made;
    return 0;
}

}  // extern "C"
