#include "footprint.h"
#include "allocate.h"

#include <stdlib.h>
#include <string.h>

struct run {
    uint64_t start, length;
    bool write;
};

struct footprint {
    uint64_t *lines;  // line number * 2 + written; unsorted, with repeats that `seen` did not catch
    uint64_t count, capacity;
    uint64_t seen[1 << 12];
};

struct footprint *footprint_create(void) {
    struct footprint *footprint = allocated(calloc(1, sizeof *footprint));
    footprint_clear(footprint);
    return footprint;
}

void footprint_destroy(struct footprint *footprint) {
    free(footprint->lines);
    free(footprint);
}

void footprint_clear(struct footprint *footprint) {
    footprint->count = 0;
    memset(footprint->seen, 0xFF, sizeof footprint->seen);
}

void footprint_add(struct footprint *footprint, uint64_t address, unsigned size, bool write) {
    for (uint64_t line = address / LINE; line <= (address + size - 1) / LINE; line++) {
        const uint64_t entry = line * 2 + write;
        uint64_t *seen = &footprint->seen[line % (sizeof footprint->seen / sizeof *footprint->seen)];
        if (*seen == entry) continue;
        *seen = entry;
        if (footprint->count == footprint->capacity) {
            footprint->capacity = footprint->capacity ? footprint->capacity * 2 : 1024;
            footprint->lines = allocated(realloc(footprint->lines, footprint->capacity * sizeof *footprint->lines));
        }
        footprint->lines[footprint->count++] = entry;
    }
}

static int ascending(const void *left, const void *right) {
    const uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

// The lines as runs of neighbours, in order of address; a line that is written counts as written.
static uint64_t runs_of(const struct footprint *footprint, struct run **out) {
    uint64_t *sorted = allocated(malloc((footprint->count + 1) * sizeof *sorted)), count = 0;
    memcpy(sorted, footprint->lines, footprint->count * sizeof *sorted);
    qsort(sorted, footprint->count, sizeof *sorted, ascending);
    struct run *runs = allocated(malloc((footprint->count + 1) * sizeof *runs));
    for (uint64_t i = 0; i < footprint->count; i++) {
        const uint64_t line = sorted[i] / 2;
        while (i + 1 < footprint->count && sorted[i + 1] / 2 == line) i++;
        const bool write = sorted[i] % 2;  // of the same line, what is written comes last
        struct run *last = count ? &runs[count - 1] : NULL;
        if (last != NULL && line == last->start + last->length && last->write == write)
            last->length++;
        else
            runs[count++] = (struct run){line, 1, write};
    }
    free(sorted);
    *out = runs;
    return count;
}

static void touch(struct memory *memory, unsigned core, const struct run *run, int64_t moved) {
    for (uint64_t i = 0; i < run->length; i++) {
        const uint64_t address = (run->start + (uint64_t)moved + i) * LINE;
        memory_touch(memory, core, memory_number(memory, address) / LINE, run->write);
    }
}

bool footprint_continue(const struct footprint *before, const struct footprint *last, uint64_t pieces,
                        struct memory *memory, unsigned core, uint64_t most_lines) {
    struct run *first_runs, *runs;
    const uint64_t count = runs_of(last, &runs);
    const bool alike = runs_of(before, &first_runs) == count;
    if (alike) {
        uint64_t moving = 0;
        for (uint64_t i = 0; i < count; i++)
            if (runs[i].start != first_runs[i].start) moving += runs[i].length;
        // What is touched last stays; the caches cannot hold more than that many lines.
        const uint64_t enough = moving ? most_lines / moving + 1 : 0;
        for (uint64_t piece = pieces > enough ? pieces - enough : 0; moving && piece < pieces; piece++)
            for (uint64_t i = 0; i < count; i++) {
                const int64_t step = (int64_t)(runs[i].start - first_runs[i].start);
                if (step != 0) touch(memory, core, &runs[i], step * (int64_t)(piece + 1));
            }
        for (uint64_t i = 0; i < count; i++)
            if (runs[i].start == first_runs[i].start) touch(memory, core, &runs[i], 0);
    }
    free(first_runs);
    free(runs);
    return alike;
}
