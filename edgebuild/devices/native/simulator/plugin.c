// The QEMU plugin: follows what the runner executes, hands it to the model of the core, and writes down how long it took.
//
// The runner speaks to it through system calls that no kernel knows (see ../marks.h): where an inference begins and ends,
// where an operator ends, and how the work of a parallel loop is spread over the cores. Work that the runner left out is
// put in by what the pieces around it took.
#define _POSIX_C_SOURCE 200809L  // strdup
#include "allocate.h"
#include "core.h"
#include "footprint.h"
#include "qemu_plugin.h"
#include "../marks.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

// ---------------------------------------------------------------------------------------------------------- tallies

// What something took. `PIECES` and `EXECUTED` count pieces of parallel loops, and those that were not left out.
enum {
    CYCLES, BOUND, INSTRUCTIONS = BOUND + BOUNDS, MACS = INSTRUCTIONS + CLASS_COUNT, ACCESSES, L1_MISSES, L2_MISSES,
    L3_MISSES, MEMORY_BYTES, BRANCHES, MISPREDICTIONS, PIECES, EXECUTED, FIELDS
};

struct tally {
    double value[FIELDS];
};

static void add(struct tally *to, const struct tally *from, double times) {
    for (int i = 0; i < FIELDS; i++) to->value[i] += times * from->value[i];
}

// ---------------------------------------------------------------------------------------------------------- machine

static struct description description;
static struct memory *memory;
static struct core *cores[MAX_CORES];
static const char *output_path;

// The part of a parallel loop that one core does.
struct share {
    struct tally since;             // the core's own tally when the piece began
    bool open;
    double weight;                  // of the open piece
    bool steady;
    struct tally done, steady_sum;  // of all pieces, of the steady ones since the last gap
    double steady_weight;
    double gap;                     // weight that was left out and is not accounted for yet
    struct tally filled;            // what all gaps took, by what is known of this core alone
    double filled_weight;
    struct tally before_gap;        // a unit of weight, in front of it
    struct footprint *footprint[2]; // of the latest two pieces that were recorded
    bool recording;
};
static struct share shares[MAX_CORES];

static bool running;        // inside of an inference
static bool paused;         // between the pieces of a parallel loop
static unsigned current;    // the core that executes
static unsigned sharing;    // cores that share a loop; 0 outside of one
static uint64_t fork_cycle;
static struct tally serial_since, *operators;
static unsigned operator_count, operator_capacity;
static unsigned unlike;     // gaps that could not be filled in the caches

static struct tally tally_of(unsigned core) {
    struct tally t = {{0}};
    const struct counts *counts = core_counts(cores[core]);
    const struct traffic *traffic = memory_traffic(memory, core);
    t.value[CYCLES] = (double)core_now(cores[core]);
    for (int i = 0; i < BOUNDS; i++) t.value[BOUND + i] = (double)counts->bound[i];
    for (int i = 0; i < CLASS_COUNT; i++) t.value[INSTRUCTIONS + i] = (double)counts->instructions[i];
    t.value[MACS] = (double)counts->macs;
    t.value[ACCESSES] = (double)traffic->accesses;
    t.value[L1_MISSES] = (double)traffic->l1_misses;
    t.value[L2_MISSES] = (double)traffic->l2_misses;
    t.value[L3_MISSES] = (double)traffic->l3_misses;
    t.value[MEMORY_BYTES] = (double)traffic->memory_bytes;
    t.value[BRANCHES] = (double)counts->branches;
    t.value[MISPREDICTIONS] = (double)counts->mispredictions;
    return t;
}

// What the core did since the tally, which is brought up to date.
static struct tally taken_since(unsigned core, struct tally *since) {
    const struct tally now = tally_of(core);
    struct tally taken = now;
    add(&taken, since, -1);
    *since = now;
    return taken;
}

static struct tally *operator_now(void) {
    if (operator_count == operator_capacity) {
        operator_capacity = operator_capacity ? operator_capacity * 2 : 256;
        operators = allocated(realloc(operators, operator_capacity * sizeof *operators));
    }
    return &operators[operator_count];
}

static void next_operator(void) {
    operator_count++;
    *operator_now() = (struct tally){{0}};
}

static void account_serial(void) {
    const struct tally taken = taken_since(0, &serial_since);
    add(operator_now(), &taken, 1);
}

// --------------------------------------------------------------------------------------------------- parallel loops

static void end_piece(void) {
    struct share *share = &shares[current];
    if (!share->open) return;
    struct tally taken = taken_since(current, &share->since);
    taken.value[PIECES] = taken.value[EXECUTED] = 1;
    add(&share->done, &taken, 1);
    if (share->steady) {
        add(&share->steady_sum, &taken, 1);
        share->steady_weight += share->weight;
    }
    share->open = share->recording = false;
    paused = true;
}

// The work that was left out took the mean of what its neighbours on both sides took.
static void fill_gap(struct share *share) {
    if (share->gap == 0) return;
    struct tally mean = share->before_gap;
    if (share->steady_weight > 0) {
        for (int i = 0; i < FIELDS; i++) mean.value[i] /= 2;
        add(&mean, &share->steady_sum, 0.5 / share->steady_weight);
    }
    mean.value[EXECUTED] = 0;
    add(&share->filled, &mean, share->gap);
    share->filled_weight += share->gap;
    share->gap = 0;
}

// The cores do alike work, and what one of them took longer for by chance should not make the whole loop wait: the gaps of
// all are filled by what they took together.
static void fill_gaps(void) {
    struct tally together = {{0}};
    double weight = 0;
    for (unsigned core = 0; core < sharing; core++) {
        fill_gap(&shares[core]);
        add(&together, &shares[core].filled, 1);
        weight += shares[core].filled_weight;
    }
    for (unsigned core = 0; weight > 0 && core < sharing; core++)
        add(&shares[core].done, &together, shares[core].filled_weight / weight);
}

static void fork_work(unsigned count) {
    account_serial();
    sharing = count;
    fork_cycle = core_now(cores[0]);
    for (unsigned core = 0; core < count; core++) {
        core_wait(cores[core], fork_cycle, BOUND_THREADS);
        struct share *share = &shares[core];
        share->since = tally_of(core);
        share->done = share->steady_sum = share->filled = (struct tally){{0}};
        share->steady_weight = share->gap = share->filled_weight = 0;
        share->open = false;
    }
    paused = true;
}

static void begin_piece(unsigned core, double weight, unsigned long kind) {
    end_piece();
    current = core;
    struct share *share = &shares[core];
    share->since = tally_of(core);
    share->open = true;
    share->weight = weight;
    share->steady = (kind & MARK_STEADY) != 0;
    share->recording = (kind & MARK_RECORD) != 0;
    if (share->recording) {
        struct footprint *oldest = share->footprint[0];
        share->footprint[0] = share->footprint[1];
        share->footprint[1] = oldest;
        footprint_clear(oldest);
    }
    paused = false;
}

static void skip_pieces(unsigned core, double weight, uint64_t pieces) {
    end_piece();
    struct share *share = &shares[core];
    fill_gap(share);
    share->gap = weight;
    share->before_gap = (struct tally){{0}};
    if (share->steady_weight > 0) add(&share->before_gap, &share->steady_sum, 1 / share->steady_weight);
    share->steady_sum = (struct tally){{0}};
    share->steady_weight = 0;
    const uint64_t lines = (description.l2.bytes + description.l3.bytes) / LINE;
    if (!footprint_continue(share->footprint[0], share->footprint[1], pieces, memory, core, lines)) unlike++;
}

static void join_work(void) {
    end_piece();
    fill_gaps();
    struct tally whole = {{0}};
    double longest = 0;
    for (unsigned core = 0; core < sharing; core++) {
        if (shares[core].done.value[CYCLES] > longest) longest = shares[core].done.value[CYCLES];
        add(&whole, &shares[core].done, 1);
    }
    if (sharing > 1) longest += description.fork_join;
    // Of the cores' cycles, those of the mean core; the rest of the time was spent on waiting for others.
    double accounted = 0;
    for (int i = 0; i < BOUNDS; i++) accounted += whole.value[BOUND + i] /= sharing;
    whole.value[BOUND + BOUND_THREADS] += longest - accounted;
    whole.value[CYCLES] = longest;
    add(operator_now(), &whole, 1);
    core_wait(cores[0], fork_cycle + (uint64_t)longest, BOUND_THREADS);
    serial_since = tally_of(0);
    sharing = current = 0;
    paused = false;
}

// ---------------------------------------------------------------------------------------------------------- results

static void write_tally(FILE *file, const struct tally *t) {
    static const char *const names[] = {"macs", "accesses", "l1_misses", "l2_misses", "l3_misses", "memory_bytes",
                                        "branches", "mispredictions", "pieces", "executed"};
    fprintf(file, "{\"cycles\": %.17g, \"bounds\": {", t->value[CYCLES]);
    for (int i = 0; i < BOUNDS; i++) fprintf(file, "%s\"%s\": %.17g", i ? ", " : "", bound_names[i], t->value[BOUND + i]);
    fprintf(file, "}, \"instructions\": {");
    for (int i = 0, some = 0; i < CLASS_COUNT; i++)
        if (t->value[INSTRUCTIONS + i] != 0)
            fprintf(file, "%s\"%s\": %.17g", some++ ? ", " : "", class_names[i], t->value[INSTRUCTIONS + i]);
    fprintf(file, "}");
    for (int i = 0; i < FIELDS - MACS; i++) fprintf(file, ", \"%s\": %.17g", names[i], t->value[MACS + i]);
    fprintf(file, "}");
}

// A line of JSON for each inference that counts.
static void write_results(void) {
    FILE *file = fopen(output_path, "a");
    if (file == NULL) {
        fprintf(stderr, "edgebuild simulator: %s cannot be written\n", output_path);
        exit(2);
    }
    fprintf(file, "{\"unlike\": %u, \"operators\": [", unlike);
    for (unsigned i = 0; i <= operator_count; i++) {
        if (i) fprintf(file, ", ");
        write_tally(file, &operators[i]);
    }
    fprintf(file, "]}\n");
    fclose(file);
}

// ----------------------------------------------------------------------------------------------------------- blocks

// Instructions that are executed one after the other.
struct block {
    struct block *next;
    uint64_t address, end;
    unsigned count;
    struct instruction instruction[];
};
enum { BUCKETS = 1 << 14, MAX_ACCESSES = 1 << 12 };
static struct block *blocks[BUCKETS];

// The block that is being executed, with the accesses of its instructions as they happen; the model takes it when the
// next one begins, because only then it is known where its branch went.
static const struct block *executing;
static struct {
    uint64_t address;
    unsigned instruction, size;
} accesses[MAX_ACCESSES];
static unsigned access_count;

static struct block *block_of(struct qemu_plugin_tb *tb) {
    const uint64_t address = qemu_plugin_tb_vaddr(tb);
    const unsigned count = (unsigned)qemu_plugin_tb_n_insns(tb);
    struct block **bucket = &blocks[(address / 4 ^ count * 977u) % BUCKETS];
    for (struct block *block = *bucket; block != NULL; block = block->next)
        if (block->address == address && block->count == count) return block;
    struct block *block = allocated(malloc(sizeof *block + count * sizeof block->instruction[0]));
    *block = (struct block){*bucket, address, address + 4ull * count, count};
    for (unsigned i = 0; i < count; i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof word);
        decode(word, &block->instruction[i]);
    }
    *bucket = block;
    return block;
}

static void take_block(uint64_t next_address) {
    const struct block *block = executing;
    executing = NULL;
    if (block == NULL) return;
    if (!running || paused) {
        access_count = 0;
        return;
    }
    struct core *core = cores[current];
    struct share *share = &shares[current];
    unsigned access = 0;
    for (unsigned i = 0; i < block->count; i++) {
        const struct instruction *in = &block->instruction[i];
        uint64_t first = 0, end = 0;
        for (; access < access_count && accesses[access].instruction == i; access++) {
            const uint64_t from = accesses[access].address, to = from + accesses[access].size;
            if (end == 0 || from < first) first = from;
            if (to > end) end = to;
        }
        if (end == 0) {
            core_execute(core, in, 0, 0);
            continue;
        }
        if (end - first > 4 * LINE) end = first + 4 * LINE;
        if (share->recording) footprint_add(share->footprint[1], first, (unsigned)(end - first), in->stores);
        core_execute(core, in, memory_number(memory, first), (unsigned)(end - first));
    }
    const struct instruction *last = &block->instruction[block->count - 1];
    if (last->branches) core_branch(core, last, block->end, next_address != block->end);
    access_count = 0;
}

static void on_block(unsigned vcpu, void *block) {
    (void)vcpu;
    take_block(((const struct block *)block)->address);
    executing = block;
}

static void on_access(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t address, void *instruction) {
    (void)vcpu;
    if (paused || access_count == MAX_ACCESSES) return;
    accesses[access_count].address = address;
    accesses[access_count].instruction = (unsigned)(uintptr_t)instruction;
    accesses[access_count++].size = 1u << qemu_plugin_mem_size_shift(info);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    struct block *block = block_of(tb);
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, QEMU_PLUGIN_CB_NO_REGS, block);
    for (unsigned i = 0; i < block->count; i++)
        if (block->instruction[i].loads || block->instruction[i].stores)
            qemu_plugin_register_vcpu_mem_cb(qemu_plugin_tb_get_insn(tb, i), on_access, QEMU_PLUGIN_CB_NO_REGS,
                                             QEMU_PLUGIN_MEM_RW, (void *)(uintptr_t)i);
}

// ------------------------------------------------------------------------------------------------------------ marks

static void on_system_call(qemu_plugin_id_t id, unsigned vcpu, int64_t number, uint64_t mark, uint64_t a, uint64_t b,
                           uint64_t c, uint64_t, uint64_t, uint64_t, uint64_t);

static void follow(qemu_plugin_id_t id) {
    qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
}

static void begin(void) {
    access_count = operator_count = unlike = sharing = current = 0;
    executing = NULL;
    running = true;
    paused = false;
    *operator_now() = (struct tally){{0}};
    serial_since = tally_of(0);
}

static void on_system_call(qemu_plugin_id_t id, unsigned vcpu, int64_t number, uint64_t mark, uint64_t a, uint64_t b,
                           uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g) {
    (void)vcpu, (void)d, (void)e, (void)f, (void)g;
    if (number != MARK_SYSTEM_CALL || (mark & ~0xFFull) != MARK_MAGIC) return;
    if (executing != NULL) take_block(executing->end);
    const unsigned core = a < description.cores ? (unsigned)a : 0;
    switch (mark & 0xFF) {
        case MARK_FOLLOW: qemu_plugin_reset(id, follow); break;  // loading is over: from here on each block counts
        case MARK_BEGIN:
            if (a) memory_empty(memory);
            begin();
            break;
        case MARK_END:
            if (!running) break;
            account_serial();
            running = false;
            if (a) write_results();
            break;
        case MARK_OPERATOR:
            if (!running) break;
            account_serial();
            next_operator();
            break;
        case MARK_FORK:
            if (running) fork_work(a >= 1 && a <= description.cores ? (unsigned)a : description.cores);
            break;
        case MARK_CALL:
            if (sharing) begin_piece(core, (double)b, c);
            break;
        case MARK_SKIP:
            if (sharing) skip_pieces(core, (double)b, c);
            break;
        case MARK_JOIN:
            if (sharing) join_work();
            break;
    }
}

// Arguments: `machine=FILE`, the description, and `out=FILE`, where the results go.
__attribute__((visibility("default"))) int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                                                               char **argv) {
    (void)info;
    const char *machine_path = "";
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "machine=", 8) == 0) machine_path = argv[i] + 8;
        if (strncmp(argv[i], "out=", 4) == 0) output_path = strdup(argv[i] + 4);
    }
    char message[512];
    if (output_path == NULL || !description_read(machine_path, &description, message, sizeof message)) {
        fprintf(stderr, "edgebuild simulator: %s\n", output_path == NULL ? "no out=FILE is given" : message);
        return 1;
    }
    memory = memory_create(&description);
    for (unsigned i = 0; i < description.cores; i++) {
        cores[i] = core_create(&description, memory, i);
        shares[i].footprint[0] = footprint_create();
        shares[i].footprint[1] = footprint_create();
    }
    qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
    return 0;
}
