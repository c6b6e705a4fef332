// A simulated machine as numbers: the cores' model and the memory below them. Written by edgebuild/devices/simulator.py
// from the target's TOML as lines of words; times are in cycles of the core.
#pragma once
#include "decode.h"

#include <stdbool.h>
#include <stdint.h>

enum { MAX_SLOTS = 4, MAX_KINDS = 64, MAX_PORTS = 16, MAX_CORES = 16, MAX_FILL_BUFFERS = 64, MAX_REORDER = 1024, MAX_STORES = 256 };

// One micro-operation takes one of the ports in `ports` (a bit mask) for `cycles`.
struct slot {
    uint16_t ports;
    uint8_t cycles;
    uint8_t kind;  // numbers the different pairs of the two
};

struct execution {
    struct slot slot[MAX_SLOTS];
    uint8_t slots;
    uint8_t latency;     // cycles until the result can be used; of a load, with the data in L1
    uint8_t accumulate;  // cycles until the next multiply-accumulate can add to the result; 0: as `latency`
    uint8_t micro_ops;
};

struct level {
    uint64_t bytes;  // 0: there is no such level
    unsigned ways;
    bool random;     // which line goes: a random one, else the least recently used
    bool shared;     // one for all cores, else each has its own
    unsigned latency;
    unsigned interval, interval_all;  // between two lines, with one core asking and with all
};

struct description {
    bool in_order;
    unsigned width, reorder_buffer, store_buffer, mispredict, fill_buffers, prefetch;
    struct execution execution[CLASS_COUNT];
    struct level l1, l2, l3;
    double memory_latency;                       // from the miss in L1 to the data
    double memory_one_core, memory_all_cores;    // cycles between two lines
    unsigned cores;
    double fork_join;
};

// Reads the lines of an open file. False, with a message, where they are not a whole description.
bool description_read(const char *path, struct description *out, char *message, unsigned long message_size);
