#include "description.h"

#include <stdio.h>
#include <string.h>

static bool read_slot(const char *word, struct slot *out) {
    unsigned ports, cycles;
    if (sscanf(word, "%u:%u", &ports, &cycles) != 2 || ports == 0 || ports >> MAX_PORTS || cycles == 0 || cycles > 255)
        return false;
    out->ports = (uint16_t)ports;
    out->cycles = (uint8_t)cycles;
    return true;
}

// class NAME LATENCY ACCUMULATE MICRO_OPS [PORTS:CYCLES]...
static bool read_class(const char *line, struct description *out, bool seen[CLASS_COUNT]) {
    char name[32];
    unsigned latency, accumulate, micro_ops;
    int at = 0;
    if (sscanf(line, "class %31s %u %u %u%n", name, &latency, &accumulate, &micro_ops, &at) != 4) return false;
    int class = 0;
    while (class < CLASS_COUNT && strcmp(name, class_names[class]) != 0) class++;
    if (class == CLASS_COUNT || seen[class] || latency > 255 || accumulate > latency || micro_ops > 255) return false;
    seen[class] = true;
    struct execution *execution = &out->execution[class];
    execution->latency = (uint8_t)latency;
    execution->accumulate = (uint8_t)accumulate;
    execution->micro_ops = (uint8_t)micro_ops;
    char word[16];
    int length;
    while (sscanf(line + at, "%15s%n", word, &length) == 1) {
        if (execution->slots == MAX_SLOTS || !read_slot(word, &execution->slot[execution->slots++])) return false;
        at += length;
    }
    return true;
}

// l1|l2|l3 BYTES WAYS RANDOM SHARED LATENCY INTERVAL INTERVAL_ALL
static bool read_level(const char *line, struct level *out) {
    unsigned long long bytes;
    unsigned ways, random, shared, latency, interval, all;
    if (sscanf(line, "%*s %llu %u %u %u %u %u %u", &bytes, &ways, &random, &shared, &latency, &interval, &all) != 7 ||
        ways == 0 || bytes < 64ull * ways)
        return false;
    *out = (struct level){bytes, ways, random != 0, shared != 0, latency, interval, all};
    return true;
}

static bool read_line(const char *line, struct description *out, bool seen[CLASS_COUNT]) {
    char order[16];
    if (strncmp(line, "class ", 6) == 0) return read_class(line, out, seen);
    if (strncmp(line, "l1 ", 3) == 0) return read_level(line, &out->l1);
    if (strncmp(line, "l2 ", 3) == 0) return read_level(line, &out->l2);
    if (strncmp(line, "l3 ", 3) == 0) return read_level(line, &out->l3);
    if (sscanf(line, "pipeline %15s %u %u %u %u", order, &out->width, &out->reorder_buffer, &out->store_buffer,
               &out->mispredict) == 5) {
        out->in_order = strcmp(order, "in-order") == 0;
        return true;
    }
    return sscanf(line, "misses %u %u", &out->fill_buffers, &out->prefetch) == 2 ||
           sscanf(line, "memory %lf %lf %lf", &out->memory_latency, &out->memory_one_core, &out->memory_all_cores) == 3 ||
           sscanf(line, "cores %u %lf", &out->cores, &out->fork_join) == 2;
}

// Gives equal slots an equal number. False where there are too many.
static bool number_slots(struct description *d) {
    struct slot kinds[MAX_KINDS];
    unsigned count = 0;
    for (int class = 0; class < CLASS_COUNT; class++)
        for (unsigned i = 0; i < d->execution[class].slots; i++) {
            struct slot *slot = &d->execution[class].slot[i];
            unsigned kind = 0;
            while (kind < count && (kinds[kind].ports != slot->ports || kinds[kind].cycles != slot->cycles)) kind++;
            if (kind == MAX_KINDS) return false;
            if (kind == count) kinds[count++] = *slot;
            slot->kind = (uint8_t)kind;
        }
    return true;
}

// An in-order core issues all micro-operations of an instruction together, each on the first port that is free.
static bool fits_together(const struct execution *execution) {
    unsigned taken = 0;
    for (unsigned i = 0; i < execution->slots; i++) {
        const unsigned free = execution->slot[i].ports & ~taken;
        if (free == 0) return false;
        taken |= free & -free;
    }
    return true;
}

static bool in_range(const struct description *d) {
    return d->width >= 1 && (d->in_order || (d->reorder_buffer >= d->width && d->reorder_buffer <= MAX_REORDER)) &&
           d->store_buffer >= 1 && d->store_buffer <= MAX_STORES && d->fill_buffers >= 1 &&
           d->fill_buffers <= MAX_FILL_BUFFERS && d->l1.bytes && d->l2.bytes && d->memory_latency > 0 &&
           d->memory_one_core > 0 && d->memory_all_cores > 0 && d->cores >= 1 && d->cores <= MAX_CORES &&
           d->fork_join >= 0;
}

bool description_read(const char *path, struct description *out, char *message, unsigned long message_size) {
    memset(out, 0, sizeof *out);
    FILE *file = fopen(path, "r");
    if (file == NULL) {
        snprintf(message, message_size, "%s cannot be read", path);
        return false;
    }
    bool seen[CLASS_COUNT] = {false}, right = true;
    char line[512];
    while (right && fgets(line, sizeof line, file) != NULL) right = read_line(line, out, seen);
    fclose(file);
    for (int class = 0; right && class < CLASS_COUNT; class++)
        if (!seen[class]) {
            snprintf(message, message_size, "%s: no class %s", path, class_names[class]);
            return false;
        }
    for (int class = 0; right && out->in_order && class < CLASS_COUNT; class++)
        if (!fits_together(&out->execution[class])) {
            snprintf(message, message_size, "%s: class %s wants a port twice, or one after another has taken it", path,
                     class_names[class]);
            return false;
        }
    if (!right)
        snprintf(message, message_size, "%s: not understood: %.200s", path, line);
    else if (!(right = in_range(out) && number_slots(out)))
        snprintf(message, message_size, "%s: a figure is missing or out of range", path);
    return right;
}
