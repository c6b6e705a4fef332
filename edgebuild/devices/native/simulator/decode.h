// Sorts A64 instruction words into the classes of a core's model, with the registers that they read and write.
// The encodings are those of the Arm Architecture Reference Manual for A-profile (DDI 0487), chapter C4.
#pragma once
#include <stdbool.h>
#include <stdint.h>

// In the order of INSTRUCTION_CLASSES in edgebuild/spec.py; the names are what the core's description calls them.
enum instruction_class {
    CLASS_NOP, CLASS_ALU, CLASS_ALU_SHIFT, CLASS_MUL, CLASS_DIV, CLASS_BRANCH,
    CLASS_LOAD, CLASS_LOAD_PAIR, CLASS_LOAD_D, CLASS_LOAD_Q, CLASS_LOAD_PAIR_D, CLASS_LOAD_PAIR_Q,
    CLASS_LOAD_MULTIPLE, CLASS_LOAD_REPLICATE, CLASS_LOAD_LANE,
    CLASS_STORE, CLASS_STORE_D, CLASS_STORE_Q, CLASS_STORE_PAIR_Q, CLASS_STORE_LANE,
    CLASS_PREFETCH, CLASS_ATOMIC,
    CLASS_FMA_D, CLASS_FMA_Q, CLASS_FMUL_D, CLASS_FMUL_Q, CLASS_FADD_D, CLASS_FADD_Q, CLASS_FDIV,
    CLASS_FCVT_D, CLASS_FCVT_Q,
    CLASS_IMAC, CLASS_IMAC_Q, CLASS_DOT, CLASS_MATMUL, CLASS_VALU_D, CLASS_VALU_Q, CLASS_VSHIFT_D, CLASS_VSHIFT_Q,
    CLASS_VACCUMULATE, CLASS_PERMUTE_D, CLASS_PERMUTE_Q, CLASS_TABLE,
    CLASS_VECTOR_TO_GENERAL, CLASS_GENERAL_TO_VECTOR, CLASS_VMOV,
    CLASS_COUNT
};

extern const char *const class_names[CLASS_COUNT];

// Registers: 0..30 general, 31 the stack pointer (the zero register is left out), 32..63 vector, 64 the flags.
enum { VECTOR_REGISTER = 32, FLAGS_REGISTER = 64, REGISTERS = 65 };
enum { MAX_SOURCES = 7, MAX_DESTINATIONS = 5 };

struct instruction {
    uint8_t class;
    uint8_t sources, destinations;           // how many of the following
    uint8_t source[MAX_SOURCES];             // a load's or store's base register comes first
    uint8_t destination[MAX_DESTINATIONS];   // with `writes_back`, the base register comes first
    uint8_t accumulator;                     // 1 + index in `source` of what a multiply-accumulate adds to; 0: none
    uint8_t registers;                       // 128-bit units that a multi-register access moves, at least 1
    uint8_t macs;                            // multiply-accumulates
    bool loads, stores, writes_back;
    bool branches, conditional;              // `conditional`: B.cond, CBZ, TBZ and their kind
};

void decode(uint32_t word, struct instruction *out);
