// A core: instructions in, cycles out. Each instruction waits for its operands and for a free issue port, and its result
// is there after its latency; loads and stores ask the memory model. In-order cores issue in program order. Out-of-order
// cores take in `width` micro-operations a cycle, as long as there is room in the reorder buffer.
//
// Time is told by the commits: every cycle by which an instruction completes later than all before it is put down to what
// it waited for.
#pragma once
#include "memory.h"

enum bound {
    BOUND_ISSUE,    // ports and width
    BOUND_LATENCY,  // operands that are being computed, branches guessed wrong
    BOUND_CACHE,    // data on the way from L2 or L3
    BOUND_MEMORY,   // data on the way from memory
    BOUND_THREADS,  // other threads: handing out work and waiting for the last
    BOUNDS
};

extern const char *const bound_names[BOUNDS];

struct counts {
    uint64_t instructions[CLASS_COUNT];
    uint64_t macs, branches, mispredictions, bound[BOUNDS];
};

struct core;

// The memory is shared; `number` tells this core from the others.
struct core *core_create(const struct description *description, struct memory *memory, unsigned number);
void core_destroy(struct core *core);

// Executes one instruction. `address` and `size` say where a load or store goes, numbered by `memory_number`.
void core_execute(struct core *core, const struct instruction *instruction, uint64_t address, unsigned size);

// The instruction before was a branch at `address`, and was taken or not.
void core_branch(struct core *core, const struct instruction *branch, uint64_t address, bool taken);

// The cycle in which all instructions so far are complete.
uint64_t core_now(const struct core *core);

// Nothing happens until cycle `now`; it is put down to `bound`.
void core_wait(struct core *core, uint64_t now, enum bound bound);

const struct counts *core_counts(const struct core *core);
