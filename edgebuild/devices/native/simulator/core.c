#include "core.h"
#include "allocate.h"

#include <stdlib.h>
#include <string.h>

const char *const bound_names[BOUNDS] = {"issue", "latency", "cache", "memory", "threads"};

// Ports are booked ahead of time, at most so far; a power of two.
enum { BOOKING = 1 << 14, PREDICTORS = 1 << 14, HISTORY = (1 << 10) - 1 };

struct core {
    const struct description *d;
    struct memory *memory;
    unsigned number;

    uint16_t busy[BOOKING];    // ports taken in a cycle
    uint64_t stamp[BOOKING];   // which cycle the slot stands for now
    struct {
        uint64_t from, to;
    } full[MAX_KINDS];         // cycles in which a kind of slot is known to find no port; bookings are never undone

    uint64_t ready[REGISTERS];        // when a register can be read
    uint64_t accumulates[REGISTERS];  // when a multiply-accumulate can add to it
    bool accumulator[REGISTERS];      // made by a multiply-accumulate

    uint64_t dispatch;         // in-order: the cycle of the last issue
    unsigned dispatched;       // of `width`, in that cycle
    enum bound held;           // why the next instruction cannot come before that cycle
    uint64_t reorder[MAX_REORDER], in_flight;  // ring of commit times, and how many there have been
    uint64_t stores[MAX_STORES], stored;       // ring of the cycles in which stores leave the buffer
    uint8_t store_origin[MAX_STORES];
    uint64_t committed;
    uint64_t issued, resolved;  // of the last instruction: when it was issued, when its result was there

    uint8_t predictor[PREDICTORS];
    unsigned history;
    struct counts counts;
};

struct core *core_create(const struct description *description, struct memory *memory, unsigned number) {
    struct core *core = allocated(calloc(1, sizeof *core));
    core->d = description;
    core->memory = memory;
    core->number = number;
    return core;
}

void core_destroy(struct core *core) { free(core); }

uint64_t core_now(const struct core *core) { return core->committed; }

const struct counts *core_counts(const struct core *core) { return &core->counts; }

void core_wait(struct core *core, uint64_t now, enum bound bound) {
    if (now <= core->committed) return;
    core->counts.bound[bound] += now - core->committed;
    core->committed = now;
    if (core->dispatch < now) {
        core->dispatch = now;
        core->dispatched = 0;
    }
}

// ---------------------------------------------------------------------------------------------------------- ports

static uint16_t *booked(struct core *core, uint64_t cycle) {
    const unsigned slot = cycle % BOOKING;
    if (core->stamp[slot] != cycle) {
        core->stamp[slot] = cycle;
        core->busy[slot] = 0;
    }
    return &core->busy[slot];
}

// One port of the mask that is free for so many cycles, as a bit; 0 where there is none.
static uint16_t free_port(struct core *core, uint64_t cycle, uint16_t ports, unsigned cycles) {
    for (unsigned i = 0; i < cycles && ports; i++) ports &= (uint16_t)~*booked(core, cycle + i);
    return ports & (uint16_t)-ports;
}

static void take_port(struct core *core, uint64_t cycle, uint16_t port, unsigned cycles) {
    for (unsigned i = 0; i < cycles; i++) *booked(core, cycle + i) |= port;
}

// The first cycle from `from` on in which a slot finds a port.
static uint64_t first_free(struct core *core, struct slot slot, uint64_t from, uint16_t *port) {
    uint64_t *known_from = &core->full[slot.kind].from, *known_to = &core->full[slot.kind].to;
    const bool inside = from >= *known_from && from <= *known_to;
    uint64_t cycle = inside ? *known_to : from;
    while ((*port = free_port(core, cycle, slot.ports, slot.cycles)) == 0) cycle++;
    if (!inside) *known_from = from;
    *known_to = cycle;
    return cycle;
}

// How often a multi-register access does what its class says: that stands for two 128-bit registers of a load, and for
// one of a store.
static unsigned repeats_of(const struct instruction *in) {
    if (in->class == CLASS_LOAD_MULTIPLE) return (in->registers + 1u) / 2;
    return in->class == CLASS_STORE_Q ? in->registers : 1;
}

// Out of order: each micro-operation goes where and when it can. Returns the cycle of the last.
static uint64_t issue_any(struct core *core, const struct execution *execution, uint64_t from, unsigned repeats) {
    uint64_t last = from;
    for (unsigned i = 0; i < execution->slots; i++) {
        const struct slot slot = execution->slot[i];
        for (unsigned n = 0; n < repeats; n++) {
            uint16_t port;
            const uint64_t cycle = first_free(core, slot, from, &port);
            take_port(core, cycle, port, slot.cycles);
            if (cycle > last) last = cycle;
        }
    }
    return last;
}

// In order: all micro-operations in the same cycle. Returns it. Repeats follow on the same ports.
static uint64_t issue_together(struct core *core, const struct execution *execution, uint64_t from, unsigned repeats) {
    for (uint64_t cycle = from;; cycle++) {
        if (cycle == core->dispatch && core->dispatched >= core->d->width) continue;
        uint16_t taken = 0, port[MAX_SLOTS];
        unsigned found = 0;
        for (; found < execution->slots; found++) {
            const struct slot slot = execution->slot[found];
            port[found] = free_port(core, cycle, slot.ports & (uint16_t)~taken, slot.cycles * repeats);
            if (port[found] == 0) break;
            taken |= port[found];
        }
        if (found < execution->slots) continue;
        for (unsigned i = 0; i < found; i++) take_port(core, cycle, port[i], execution->slot[i].cycles * repeats);
        return cycle;
    }
}

// ---------------------------------------------------------------------------------------------------- instructions

static enum bound bound_of(enum origin origin) {
    return origin == FROM_MEMORY ? BOUND_MEMORY : origin == FROM_L1 ? BOUND_ISSUE : BOUND_CACHE;
}

// Where an instruction is on its way, and what it waited for last.
struct progress {
    uint64_t cycle;
    enum bound bound;
};

static void delay(struct progress *progress, uint64_t until, enum bound bound) {
    if (until > progress->cycle) *progress = (struct progress){until, bound};
}

// The cycle before which a store cannot enter the buffer.
static void wait_for_store_buffer(struct core *core, struct progress *progress) {
    const unsigned size = core->d->store_buffer;
    if (core->stored < size) return;
    const unsigned oldest = (core->stored - size) % MAX_STORES;
    delay(progress, core->stores[oldest], bound_of(core->store_origin[oldest]));
}

static struct progress dispatch(struct core *core, const struct instruction *in, unsigned micro_ops) {
    const struct description *d = core->d;
    struct progress progress = {core->dispatch, core->held};
    core->held = BOUND_ISSUE;
    if (core->in_flight >= d->reorder_buffer)
        delay(&progress, core->reorder[(core->in_flight - d->reorder_buffer) % MAX_REORDER], BOUND_ISSUE);
    if (in->stores) wait_for_store_buffer(core, &progress);
    if (progress.cycle > core->dispatch) {
        core->dispatch = progress.cycle;
        core->dispatched = 0;
    }
    if (core->dispatched && core->dispatched + micro_ops > d->width) {
        core->dispatch++;
        core->dispatched = 0;
    }
    core->dispatched += micro_ops;
    while (core->dispatched > d->width) {
        core->dispatch++;
        core->dispatched -= d->width;
    }
    return (struct progress){core->dispatch + 1, progress.bound};
}

static struct progress issue_out_of_order(struct core *core, const struct instruction *in,
                                          const struct execution *execution, uint64_t operands, uint64_t base,
                                          unsigned repeats) {
    struct progress progress = dispatch(core, in, execution->micro_ops * repeats + in->writes_back);
    delay(&progress, in->stores ? base : operands, BOUND_LATENCY);  // what a store writes may come later
    delay(&progress, issue_any(core, execution, progress.cycle, repeats), BOUND_ISSUE);
    return progress;
}

static struct progress issue_in_order(struct core *core, const struct instruction *in,
                                      const struct execution *execution, uint64_t operands, uint64_t base,
                                      unsigned repeats) {
    enum { STORE_DATA_LATE = 2 };  // a store reads what it writes so many cycles after it is issued
    struct progress progress = {core->dispatch, core->held};
    core->held = BOUND_ISSUE;
    if (in->stores) {
        delay(&progress, base, BOUND_LATENCY);
        delay(&progress, operands > STORE_DATA_LATE ? operands - STORE_DATA_LATE : 0, BOUND_LATENCY);
        wait_for_store_buffer(core, &progress);
    } else {
        delay(&progress, operands, BOUND_LATENCY);
    }
    delay(&progress, issue_together(core, execution, progress.cycle, repeats), BOUND_ISSUE);
    if (progress.cycle > core->dispatch) {
        core->dispatch = progress.cycle;
        core->dispatched = 0;
    }
    core->dispatched++;
    if (repeats > 1 && execution->slots) {  // the rest of a multiple access follows, and holds up what comes behind
        core->dispatch = progress.cycle + (repeats - 1) * execution->slot[0].cycles;
        core->dispatched = 0;
    }
    return progress;
}

static uint64_t operands_ready(const struct core *core, const struct instruction *in,
                               const struct execution *execution) {
    uint64_t latest = 0;
    for (unsigned i = 0; i < in->sources; i++) {
        const unsigned reg = in->source[i];
        const bool adds = in->accumulator == i + 1 && execution->accumulate && core->accumulator[reg];
        const uint64_t ready = adds ? core->accumulates[reg] : core->ready[reg];
        if (ready > latest) latest = ready;
    }
    return latest;
}

static void commit(struct core *core, struct progress issued, uint64_t hit, uint64_t done, enum bound missing) {
    if (done > core->committed) {
        uint64_t late = done - core->committed;
        if (done > hit) {  // the part that the data came late
            const uint64_t missed = done - (hit > core->committed ? hit : core->committed);
            core->counts.bound[missing] += missed;
            late -= missed;
        }
        core->counts.bound[issued.bound] += late;
        core->committed = done;
    }
    if (!core->d->in_order) core->reorder[core->in_flight++ % MAX_REORDER] = core->committed;
    core->issued = issued.cycle;
    core->resolved = done;
}

void core_execute(struct core *core, const struct instruction *in, uint64_t address, unsigned size) {
    const struct execution *execution = &core->d->execution[in->class];
    core->counts.instructions[in->class]++;
    core->counts.macs += in->macs;

    const bool accesses = (in->loads || in->stores) && size > 0;
    const unsigned repeats = repeats_of(in);
    const uint64_t operands = operands_ready(core, in, execution);
    const uint64_t base = in->sources ? core->ready[in->source[0]] : 0;
    const struct progress issued =
        (core->d->in_order ? issue_in_order : issue_out_of_order)(core, in, execution, operands, base, repeats);

    uint64_t done = issued.cycle + execution->latency;
    if (in->loads && repeats > 1 && execution->slots) done += (repeats - 1) * execution->slot[0].cycles;
    const uint64_t hit = done;
    enum origin origin = FROM_L1;
    if (in->stores && accesses) {
        const uint64_t ready = issued.cycle > operands ? issued.cycle : operands;
        const uint64_t written = memory_store(core->memory, core->number, ready, address, size, &origin);
        core->store_origin[core->stored % MAX_STORES] = (uint8_t)origin;
        core->stores[core->stored++ % MAX_STORES] = written;
        done = ready + 1;
        commit(core, issued, done, done, BOUND_ISSUE);
    } else {
        if (in->loads && accesses)
            done += memory_load(core->memory, core->number, issued.cycle, address, size, &origin) - issued.cycle;
        commit(core, issued, hit, done, bound_of(origin));
    }

    for (unsigned i = 0; i < in->destinations; i++) {
        const unsigned reg = in->destination[i];
        const bool updated_base = i == 0 && in->writes_back;
        core->ready[reg] = updated_base ? issued.cycle + 1 : done;
        core->accumulator[reg] = !updated_base && execution->accumulate != 0;
        core->accumulates[reg] = issued.cycle + execution->accumulate;
    }
}

// Two bits for each branch and recent history (McFarling, "Combining Branch Predictors", WRL TN-36, 1993: gshare).
void core_branch(struct core *core, const struct instruction *branch, uint64_t address, bool taken) {
    core->counts.branches++;
    if (branch->conditional) {
        uint8_t *predictor = &core->predictor[(address >> 2 ^ (core->history & HISTORY) << 2) % PREDICTORS];
        if ((*predictor >= 2) != taken) {
            core->counts.mispredictions++;
            const uint64_t again = (core->d->in_order ? core->issued : core->resolved) + core->d->mispredict;
            if (again > core->dispatch) {
                core->held = BOUND_LATENCY;
                core->dispatch = again;
                core->dispatched = 0;
            }
        }
        if (taken && *predictor < 3) ++*predictor;
        if (!taken && *predictor > 0) --*predictor;
        core->history = core->history << 1 | taken;
    }
    if (!taken || core->held != BOUND_ISSUE) return;  // after a wrong guess fetching starts over anyway
    if (core->d->in_order) {
        core->dispatched = core->d->width;
    } else if (core->dispatched) {  // the group of instructions that were fetched together ends
        core->dispatch++;
        core->dispatched = 0;
    }
}
