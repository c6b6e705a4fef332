// Drives the simulator's model without qemu, for test_simulator_model.py: reads a machine's description (the first
// argument) and a script on standard input, a command on each line, and prints a line of JSON for each `report`,
// `holds`, `channel` and `continue`. Numbers are decimal, instruction words hexadecimal.
//
//   core N                          what follows runs on core N
//   run TIMES ... end               repeats the lines between: `WORD`, `WORD ADDRESS SIZE STRIDE` (the address moves on
//                                   by the stride with each turn), and `branch WORD ADDRESS PATTERN`, where the pattern
//                                   is a string of t and n (taken or not), turn after turn
//   chase WORD ADDRESS LINES STEPS  loads from LINES lines (a power of two), in an order that no prefetcher follows
//   wait CYCLE                      core_wait, put down to threads
//   empty                           empties the caches
//   report                          what the core did so far
//   holds LEVEL LINE                whether L1 or L2 of the core or L3 has the line: 0, 1, and 2 where it is dirty
//   channel INTERVAL COUNT FROM STEP MODULUS   serves requests at FROM + i * STEP % MODULUS; prints the last cycle
//   piece WHICH LINE LENGTH WRITES  adds to the footprint of the piece before (0) or the last one (1)
//   continue PIECES MOST            footprint_continue; prints whether the two were alike
#include "memory.c"  // for what is static in it

#include "core.h"
#include "footprint.h"

#include <inttypes.h>
#include <stdio.h>

enum { MAX_BODY = 256 };

struct step {
    bool branch;
    uint32_t word;
    struct instruction instruction;
    uint64_t address;
    int64_t stride;
    unsigned size;
    char pattern[256];
};

static struct core *cores[MAX_CORES];

static struct step read_step(const char *line) {
    struct step step = {0};
    step.branch = sscanf(line, "branch %" SCNx32 " %" SCNu64 " %255s", &step.word, &step.address, step.pattern) == 3;
    if (!step.branch &&
        sscanf(line, "%" SCNx32 " %" SCNu64 " %u %" SCNd64, &step.word, &step.address, &step.size, &step.stride) < 1) {
        fprintf(stderr, "not understood: %s", line);
        exit(2);
    }
    decode(step.word, &step.instruction);
    return step;
}

static void run(struct core *core, unsigned long times) {
    static struct step body[MAX_BODY];
    char line[512];
    unsigned count = 0;
    while (fgets(line, sizeof line, stdin) != NULL && strncmp(line, "end", 3) != 0) body[count++] = read_step(line);
    for (unsigned long turn = 0; turn < times; turn++)
        for (unsigned i = 0; i < count; i++) {
            struct step *step = &body[i];
            core_execute(core, &step->instruction, step->branch ? 0 : step->address, step->size);
            if (step->branch)
                core_branch(core, &step->instruction, step->address,
                            step->pattern[turn % strlen(step->pattern)] == 't');
            else
                step->address += (uint64_t)step->stride;
        }
}

static void chase(struct core *core, uint32_t word, uint64_t address, uint64_t lines, uint64_t steps) {
    struct instruction load;
    decode(word, &load);
    uint64_t at = 0;
    for (uint64_t i = 0; i < steps; i++) {
        core_execute(core, &load, address + at * LINE, 8);
        at = (at * 1664525 + 1013904223) % lines;  // visits each line once in a round
    }
}

static void report(const struct core *core, const struct traffic *traffic) {
    const struct counts *counts = core_counts(core);
    printf("{\"cycles\": %" PRIu64 ", \"macs\": %" PRIu64 ", \"branches\": %" PRIu64 ", \"mispredictions\": %" PRIu64,
           core_now(core), counts->macs, counts->branches, counts->mispredictions);
    printf(", \"accesses\": %" PRIu64 ", \"l1\": %" PRIu64 ", \"l2\": %" PRIu64 ", \"l3\": %" PRIu64
           ", \"bytes\": %" PRIu64 ", \"bounds\": {",
           traffic->accesses, traffic->l1_misses, traffic->l2_misses, traffic->l3_misses, traffic->memory_bytes);
    for (int i = 0; i < BOUNDS; i++) printf("%s\"%s\": %" PRIu64, i ? ", " : "", bound_names[i], counts->bound[i]);
    printf("}}\n");
}

static int holds(struct memory *memory, unsigned core, int level, uint64_t number) {
    if (level == 3 && !memory->d.l3.bytes) return 0;
    const struct line *line = cache_find(
        level == 1 ? &memory->core[core].l1 : level == 2 ? &memory->l2[l2_of(memory, core)] : &memory->l3, number);
    return line == NULL ? 0 : line->dirty ? 2 : 1;
}

static uint64_t serve(double interval, uint64_t count, uint64_t from, uint64_t step, uint64_t modulus) {
    struct channel channel;
    channel_create(&channel, interval);
    uint64_t last = 0;
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t served = channel_take(&channel, from + i * step % modulus);
        if (served > last) last = served;
    }
    channel_destroy(&channel);
    return last;
}

int main(int argc, char **argv) {
    static struct description description;
    char message[512], line[512];
    if (argc != 2 || !description_read(argv[1], &description, message, sizeof message)) {
        fprintf(stderr, "%s\n", argc == 2 ? message : "one description is wanted");
        return 1;
    }
    struct memory *memory = memory_create(&description);
    struct footprint *pieces[2] = {footprint_create(), footprint_create()};
    for (unsigned i = 0; i < description.cores; i++) cores[i] = core_create(&description, memory, i);

    unsigned now = 0, size, writes;
    while (fgets(line, sizeof line, stdin) != NULL) {
        uint64_t a, b, c, d;
        double interval;
        uint32_t word;
        if (sscanf(line, "core %u", &now) == 1) continue;
        if (sscanf(line, "run %" SCNu64, &a) == 1) {
            run(cores[now], a);
        } else if (sscanf(line, "chase %" SCNx32 " %" SCNu64 " %" SCNu64 " %" SCNu64, &word, &a, &b, &c) == 4) {
            chase(cores[now], word, a, b, c);
        } else if (sscanf(line, "wait %" SCNu64, &a) == 1) {
            core_wait(cores[now], a, BOUND_THREADS);
        } else if (strncmp(line, "empty", 5) == 0) {
            memory_empty(memory);
        } else if (strncmp(line, "report", 6) == 0) {
            report(cores[now], memory_traffic(memory, now));
        } else if (sscanf(line, "holds %u %" SCNu64, &size, &a) == 2) {
            printf("%d\n", holds(memory, now, (int)size, a));
        } else if (sscanf(line, "channel %lf %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64, &interval, &a, &b, &c,
                          &d) == 5) {
            printf("%" PRIu64 "\n", serve(interval, a, b, c, d));
        } else if (sscanf(line, "piece %u %" SCNu64 " %" SCNu64 " %u", &size, &a, &b, &writes) == 4) {
            for (uint64_t i = 0; i < b; i++) footprint_add(pieces[size % 2], (a + i) * LINE, LINE, writes != 0);
        } else if (sscanf(line, "continue %" SCNu64 " %" SCNu64, &a, &b) == 2) {
            printf("%d\n", footprint_continue(pieces[0], pieces[1], a, memory, now, b));
        } else {
            fprintf(stderr, "not understood: %s", line);
            return 2;
        }
    }
    for (unsigned i = 0; i < description.cores; i++) core_destroy(cores[i]);
    footprint_destroy(pieces[0]);
    footprint_destroy(pieces[1]);
    memory_destroy(memory);
    return 0;
}
