// Caches, prefetchers and main memory below the cores. It knows when data arrive, not what they are.
//
// Each core has an L1 with a stream prefetcher in front of it; L2 and L3 are shared or each core's own, as the target
// says. What moves lines - the output of a cache, the memory - gives out one line in each interval; who asks while it
// is busy waits. Addresses are numbered by the order in which pages are first touched, so that results do not depend on
// where the emulator maps the process.
#pragma once
#include "description.h"

enum { LINE = 64 };
enum origin { FROM_L1, FROM_L2, FROM_L3, FROM_MEMORY };

struct traffic {
    uint64_t accesses, l1_misses, l2_misses, l3_misses, memory_bytes;
};

struct memory;

struct memory *memory_create(const struct description *description);
void memory_destroy(struct memory *memory);

// The numbered address of an address of the process.
uint64_t memory_number(struct memory *memory, uint64_t address);

// A core reads or writes `size` bytes at a numbered address, from cycle `now` on. Returns the cycle in which the data are
// there (of a store: in which the line can take them), and sets where the last of them came from.
uint64_t memory_load(struct memory *memory, unsigned core, uint64_t now, uint64_t address, unsigned size,
                     enum origin *origin);
uint64_t memory_store(struct memory *memory, unsigned core, uint64_t now, uint64_t address, unsigned size,
                      enum origin *origin);

// Brings a line into the levels below L1, as if a core had used it a while ago, without taking time.
void memory_touch(struct memory *memory, unsigned core, uint64_t line, bool write);

// Empties all caches.
void memory_empty(struct memory *memory);

const struct traffic *memory_traffic(const struct memory *memory, unsigned core);
