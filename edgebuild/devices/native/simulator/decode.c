// One function per encoding group of the Arm ARM, chapter C4, named as the group is. SVE and SME, and extensions that
// no supported core has (MTE's loads and stores, MOPS, LS64), come out as CLASS_NOP without registers. An unallocated
// word may come out as its neighbour: it is never executed.
#include "decode.h"

#include <string.h>

const char *const class_names[CLASS_COUNT] = {
    "nop", "alu", "alu_shift", "mul", "div", "branch",
    "load", "load_pair", "load_d", "load_q", "load_pair_d", "load_pair_q",
    "load_multiple", "load_replicate", "load_lane",
    "store", "store_d", "store_q", "store_pair_q", "store_lane",
    "prefetch", "atomic",
    "fma_d", "fma_q", "fmul_d", "fmul_q", "fadd_d", "fadd_q", "fdiv",
    "fcvt_d", "fcvt_q",
    "imac", "imac_q", "dot", "matmul", "valu_d", "valu_q", "vshift_d", "vshift_q",
    "vaccumulate", "permute_d", "permute_q", "table",
    "vector_to_general", "general_to_vector", "vmov",
};

enum { LINK_REGISTER = 30, STACK_POINTER = 31, ZERO_REGISTER = 31 };

// Fields

static unsigned bits(uint32_t word, int high, int low) { return word >> low & ((1u << (high - low + 1)) - 1); }
static bool bit(uint32_t word, int position) { return word >> position & 1; }

static unsigned rd(uint32_t word) { return bits(word, 4, 0); }    // Rt of a load or store
static unsigned rn(uint32_t word) { return bits(word, 9, 5); }
static unsigned ra(uint32_t word) { return bits(word, 14, 10); }  // Rt2 of a pair
static unsigned rm(uint32_t word) { return bits(word, 20, 16); }  // Rs of an exclusive store or an atomic

// Registers

static void read_register(struct instruction *out, unsigned index) { out->source[out->sources++] = (uint8_t)index; }
static void write_register(struct instruction *out, unsigned index) {
    out->destination[out->destinations++] = (uint8_t)index;
}

// Register 31 is the zero register in the first two, the stack pointer in the others. Vectors are counted modulo 32: a
// list of them goes on with V0 behind V31.
static void read_general(struct instruction *out, unsigned number) {
    if (number != ZERO_REGISTER) read_register(out, number);
}
static void write_general(struct instruction *out, unsigned number) {
    if (number != ZERO_REGISTER) write_register(out, number);
}
static void read_general_or_sp(struct instruction *out, unsigned number) { read_register(out, number); }
static void write_general_or_sp(struct instruction *out, unsigned number) { write_register(out, number); }

static void read_vector(struct instruction *out, unsigned number) { read_register(out, VECTOR_REGISTER + number % 32); }
static void write_vector(struct instruction *out, unsigned number) {
    write_register(out, VECTOR_REGISTER + number % 32);
}

static void read_flags(struct instruction *out) { read_register(out, FLAGS_REGISTER); }
static void write_flags(struct instruction *out) { write_register(out, FLAGS_REGISTER); }

// To be called before any other destination is written.
static void write_back(struct instruction *out, unsigned base) {
    write_general_or_sp(out, base);
    out->writes_back = true;
}

static void accumulate(struct instruction *out, unsigned vector) {
    read_vector(out, vector);
    out->accumulator = out->sources;
}

// Data processing, immediate

static void add_subtract_immediate(uint32_t word, struct instruction *out) {
    read_general_or_sp(out, rn(word));
    if (bit(word, 29)) {
        write_general(out, rd(word));
        write_flags(out);
    } else {
        write_general_or_sp(out, rd(word));
    }
}

static void add_subtract_immediate_with_tags(uint32_t word, struct instruction *out) {
    read_general_or_sp(out, rn(word));
    write_general_or_sp(out, rd(word));
}

static void min_max_immediate(uint32_t word, struct instruction *out) {
    read_general(out, rn(word));
    write_general(out, rd(word));
}

static void logical_immediate(uint32_t word, struct instruction *out) {
    read_general(out, rn(word));
    if (bits(word, 30, 29) == 3) {  // ANDS
        write_general(out, rd(word));
        write_flags(out);
    } else {
        write_general_or_sp(out, rd(word));
    }
}

static void move_wide_immediate(uint32_t word, struct instruction *out) {
    if (bits(word, 30, 29) == 3) read_general(out, rd(word));  // MOVK keeps the other bits
    write_general(out, rd(word));
}

static void bitfield(uint32_t word, struct instruction *out) {
    out->class = CLASS_ALU_SHIFT;
    read_general(out, rn(word));
    if (bits(word, 30, 29) == 1) read_general(out, rd(word));  // BFM keeps the other bits
    write_general(out, rd(word));
}

static void extract(uint32_t word, struct instruction *out) {
    out->class = CLASS_ALU_SHIFT;
    read_general(out, rn(word));
    read_general(out, rm(word));
    write_general(out, rd(word));
}

static void data_processing_immediate(uint32_t word, struct instruction *out) {
    out->class = CLASS_ALU;
    switch (bits(word, 25, 23)) {
        case 0: case 1: write_general(out, rd(word)); break;  // PC-relative addressing: ADR, ADRP
        case 2: add_subtract_immediate(word, out); break;
        case 3:
            if (bit(word, 22)) min_max_immediate(word, out);
            else add_subtract_immediate_with_tags(word, out);
            break;
        case 4: logical_immediate(word, out); break;
        case 5: move_wide_immediate(word, out); break;
        case 6: bitfield(word, out); break;
        case 7: extract(word, out); break;
    }
}

// Branches, exception generating and system instructions

static void branch(struct instruction *out, bool conditional) {
    out->class = CLASS_BRANCH;
    out->branches = true;
    out->conditional = conditional;
}

static void unconditional_branch_register(uint32_t word, struct instruction *out) {
    const unsigned opc = bits(word, 24, 21);
    const bool authenticates = bit(word, 11);
    branch(out, false);
    switch (opc) {
        case 0: case 1: case 8: case 9:  // BR, BLR, BRAA, BLRAA; the last two with a modifier in what is Rd elsewhere
            read_general(out, rn(word));
            if (opc & 8) read_general_or_sp(out, rd(word));
            if (opc & 1) write_general(out, LINK_REGISTER);
            break;
        case 2:  // RET, RETAA
            read_general(out, authenticates ? LINK_REGISTER : rn(word));
            if (authenticates) read_general_or_sp(out, STACK_POINTER);
            break;
        case 4:  // ERET, ERETAA
            if (authenticates) read_general_or_sp(out, STACK_POINTER);
            break;
        default: break;
    }
}

static void system_instruction(uint32_t word, struct instruction *out) {
    static const unsigned nzcv = 0xda10;  // op0 3, op1 3, CRn 4, CRm 2, op2 0
    const unsigned op0 = bits(word, 20, 19), name = bits(word, 20, 5);
    const bool reads_system = bit(word, 21);
    if (op0 == 0) {
        if ((word & 0xffffffc0) == 0xd5031000) read_general(out, rd(word));  // WFET, WFIT
        if (bits(word, 18, 12) == 4 && bits(word, 7, 5) <= 2) {              // CFINV, XAFLAG, AXFLAG
            out->class = CLASS_ALU;
            read_flags(out);
            write_flags(out);
        }
    } else if (reads_system) {  // MRS, SYSL
        if (name == nzcv) read_flags(out);
        write_general(out, rd(word));
    } else {  // MSR, SYS
        read_general(out, rd(word));
        if (name == nzcv) write_flags(out);
    }
}

static void branches_exceptions_system(uint32_t word, struct instruction *out) {
    if (bits(word, 30, 26) == 0x05) {  // unconditional branch (immediate)
        branch(out, false);
        if (bit(word, 31)) write_general(out, LINK_REGISTER);
    } else if (bits(word, 31, 25) == 0x2a) {  // conditional branch (immediate)
        branch(out, true);
        read_flags(out);
    } else if (bits(word, 30, 26) == 0x0d) {  // compare and branch, test and branch
        branch(out, true);
        read_general(out, rd(word));
    } else if (bits(word, 31, 25) == 0x6b) {
        unconditional_branch_register(word, out);
    } else if (bits(word, 31, 22) == 0x354) {
        system_instruction(word, out);
    }
}

// Loads and stores

static void base_register(struct instruction *out, unsigned base, bool updates) {
    read_general_or_sp(out, base);
    if (updates) write_back(out, base);
}

static void general_load(struct instruction *out, unsigned number) {
    out->class = CLASS_LOAD;
    out->loads = true;
    write_general(out, number);
}

static void general_store(struct instruction *out, unsigned number) {
    out->class = CLASS_STORE;
    out->stores = true;
    read_general(out, number);
}

static void vector_load(struct instruction *out, unsigned number, bool quad) {
    out->class = quad ? CLASS_LOAD_Q : CLASS_LOAD_D;
    out->loads = true;
    write_vector(out, number);
}

static void vector_store(struct instruction *out, unsigned number, bool quad) {
    out->class = quad ? CLASS_STORE_Q : CLASS_STORE_D;
    out->stores = true;
    read_vector(out, number);
}

static unsigned structure_registers(unsigned opcode) {
    switch (opcode) {
        case 0: case 2: return 4;   // LD4, LD1 of four
        case 4: case 6: return 3;   // LD3, LD1 of three
        case 8: case 10: return 2;  // LD2, LD1 of two
        case 7: return 1;
        default: return 0;
    }
}

static void load_store_multiple_structures(uint32_t word, struct instruction *out) {
    const unsigned count = structure_registers(bits(word, 15, 12));
    const bool quad = bit(word, 30), loads = bit(word, 22);
    if (count == 0) return;
    base_register(out, rn(word), bit(word, 23));
    if (bit(word, 23)) read_general(out, rm(word));
    for (unsigned i = 0; i < count; i++) {
        if (loads) vector_load(out, rd(word) + i, quad);
        else vector_store(out, rd(word) + i, quad);
    }
    out->registers = (uint8_t)(quad ? count : (count + 1) / 2);
    if (count == 1) return;
    if (loads) out->class = CLASS_LOAD_MULTIPLE;
    else out->class = count == 2 && quad ? CLASS_STORE_PAIR_Q : CLASS_STORE_Q;
}

static void load_store_single_structure(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 15, 13), count = 1 + bit(word, 21) + 2 * (opcode & 1);
    const bool loads = bit(word, 22), replicates = opcode >= 6;
    if (replicates && !loads) return;
    base_register(out, rn(word), bit(word, 23));
    if (bit(word, 23)) read_general(out, rm(word));
    for (unsigned i = 0; i < count; i++) {
        if (loads) write_vector(out, rd(word) + i);
        if (!replicates) read_vector(out, rd(word) + i);  // a load of a lane keeps the other lanes
    }
    out->loads = loads;
    out->stores = !loads;
    if (replicates) out->class = CLASS_LOAD_REPLICATE;
    else out->class = loads ? CLASS_LOAD_LANE : CLASS_STORE_LANE;
    out->registers = (uint8_t)count;  // each is a unit, however little of it moves
}

static void compare_and_swap_pair(uint32_t word, struct instruction *out) {
    out->loads = out->stores = true;
    read_general_or_sp(out, rn(word));
    read_general(out, rm(word));
    read_general(out, (rm(word) + 1) % 32);
    read_general(out, rd(word));
    read_general(out, (rd(word) + 1) % 32);
    write_general(out, rm(word));
    write_general(out, (rm(word) + 1) % 32);
}

// Load/store exclusive pair, load/store exclusive register, load/store ordered, compare and swap, and its pair.
static void exclusive_and_ordered(uint32_t word, struct instruction *out) {
    const bool ordered = bit(word, 23), loads = bit(word, 22), pair = bit(word, 21);
    out->class = CLASS_ATOMIC;
    if (pair && !ordered && !bit(word, 31)) {
        compare_and_swap_pair(word, out);
        return;
    }
    read_general_or_sp(out, rn(word));
    if (pair && ordered) {  // CAS
        out->loads = out->stores = true;
        read_general(out, rm(word));
        read_general(out, rd(word));
        write_general(out, rm(word));
        return;
    }
    out->loads = loads;
    out->stores = !loads;
    if (loads) {
        write_general(out, rd(word));
        if (pair) write_general(out, ra(word));
    } else {
        read_general(out, rd(word));
        if (pair) read_general(out, ra(word));
        if (!ordered) write_general(out, rm(word));  // whether the exclusive store took place
    }
}

static void load_register_literal(uint32_t word, struct instruction *out) {
    const unsigned opc = bits(word, 31, 30);
    if (bit(word, 26)) {
        if (opc != 3) vector_load(out, rd(word), opc == 2);
    } else if (opc == 3) {
        out->class = CLASS_PREFETCH;
    } else {
        general_load(out, rd(word));
    }
}

// LDAPUR, STLUR and their kind.
static void ldapr_stlr_unscaled(uint32_t word, struct instruction *out) {
    read_general_or_sp(out, rn(word));
    if (bits(word, 23, 22) == 0) general_store(out, rd(word));
    else general_load(out, rd(word));
    out->class = CLASS_ATOMIC;
}

static void load_store_pair(uint32_t word, struct instruction *out) {
    const unsigned opc = bits(word, 31, 30);
    const bool vector = bit(word, 26), loads = bit(word, 22);
    if (opc == 3 || (opc == 1 && !vector && !loads)) return;  // the latter is STGP
    base_register(out, rn(word), bit(word, 23));
    out->loads = loads;
    out->stores = !loads;
    const unsigned numbers[2] = {rd(word), ra(word)};
    for (int i = 0; i < 2; i++) {
        if (vector && loads) write_vector(out, numbers[i]);
        else if (vector) read_vector(out, numbers[i]);
        else if (loads) write_general(out, numbers[i]);
        else read_general(out, numbers[i]);
    }
    static const uint8_t vector_stores[3] = {CLASS_STORE_D, CLASS_STORE_Q, CLASS_STORE_PAIR_Q};
    if (vector && loads) out->class = opc == 2 ? CLASS_LOAD_PAIR_Q : CLASS_LOAD_PAIR_D;
    else if (vector) out->class = vector_stores[opc];
    else out->class = loads ? CLASS_LOAD_PAIR : CLASS_STORE;
    if (vector && opc == 2) out->registers = 2;
}

static void atomic_memory_operation(uint32_t word, struct instruction *out) {
    const unsigned operation = bits(word, 15, 12);
    if (bit(word, 26)) return;
    if (operation > 8 && operation != 12) return;  // LS64
    out->class = CLASS_ATOMIC;
    out->loads = true;
    read_general_or_sp(out, rn(word));
    write_general(out, rd(word));
    if (operation == 12) return;  // LDAPR
    out->stores = true;
    read_general(out, rm(word));
}

// LDRAA, LDRAB.
static void load_register_pac(uint32_t word, struct instruction *out) {
    if (bits(word, 31, 30) != 3 || bit(word, 26)) return;
    base_register(out, rn(word), bit(word, 11));
    general_load(out, rd(word));
}

// What the addressing modes of single registers share.
static void load_store_register(uint32_t word, struct instruction *out, bool updates, bool indexed) {
    const unsigned size = bits(word, 31, 30), opc = bits(word, 23, 22);
    if (bit(word, 26) ? size != 0 && opc >= 2 : opc == 3 && size >= 2) return;
    base_register(out, rn(word), updates);
    if (indexed) read_general(out, rm(word));
    if (bit(word, 26)) {
        if (opc & 1) vector_load(out, rd(word), opc == 3);
        else vector_store(out, rd(word), opc == 2);
    } else if (size == 3 && opc == 2) {
        out->class = CLASS_PREFETCH;
    } else if (opc == 0) {
        general_store(out, rd(word));
    } else {
        general_load(out, rd(word));
    }
}

static void load_store_register_forms(uint32_t word, struct instruction *out) {
    const unsigned form = bits(word, 11, 10);
    if (bit(word, 24)) {  // unsigned immediate
        load_store_register(word, out, false, false);
    } else if (!bit(word, 21)) {  // unscaled immediate, unprivileged; post-indexed and pre-indexed, with odd numbers
        load_store_register(word, out, form & 1, false);
    } else if (form == 0) {
        atomic_memory_operation(word, out);
    } else if (form == 2) {  // register offset
        load_store_register(word, out, false, true);
    } else {
        load_register_pac(word, out);
    }
}

static void loads_and_stores(uint32_t word, struct instruction *out) {
    const bool vector = bit(word, 26), upper = bit(word, 24);
    switch (bits(word, 29, 27)) {
        case 1:
            if (!vector && !upper) exclusive_and_ordered(word, out);
            else if (vector && !upper && !bit(word, 31)) load_store_multiple_structures(word, out);
            else if (vector && upper && !bit(word, 31)) load_store_single_structure(word, out);
            break;
        case 3:
            if (!upper) load_register_literal(word, out);
            else if (!vector && !bit(word, 21) && bits(word, 11, 10) == 0) ldapr_stlr_unscaled(word, out);
            break;
        case 5: load_store_pair(word, out); break;
        case 7: load_store_register_forms(word, out); break;
        default: break;
    }
}

// Data processing, register

static void logical_shifted_register(uint32_t word, struct instruction *out) {
    out->class = bits(word, 15, 10) == 0 ? CLASS_ALU : CLASS_ALU_SHIFT;
    read_general(out, rn(word));
    read_general(out, rm(word));
    write_general(out, rd(word));
    if (bits(word, 30, 29) == 3) write_flags(out);
}

static void add_subtract_shifted_register(uint32_t word, struct instruction *out) {
    out->class = bits(word, 15, 10) == 0 ? CLASS_ALU : CLASS_ALU_SHIFT;
    read_general(out, rn(word));
    read_general(out, rm(word));
    write_general(out, rd(word));
    if (bit(word, 29)) write_flags(out);
}

static void add_subtract_extended_register(uint32_t word, struct instruction *out) {
    // The form that has the stack pointer; an "extension" of all bits without a shift is none.
    const bool extends = bits(word, 14, 13) < 2u + bit(word, 31);
    out->class = extends || bits(word, 12, 10) != 0 ? CLASS_ALU_SHIFT : CLASS_ALU;
    read_general_or_sp(out, rn(word));
    read_general(out, rm(word));
    if (bit(word, 29)) {
        write_general(out, rd(word));
        write_flags(out);
    } else {
        write_general_or_sp(out, rd(word));
    }
}

// Add/subtract with carry, rotate right into flags (RMIF), evaluate into flags (SETF8, SETF16).
static void with_carry(uint32_t word, struct instruction *out) {
    read_general(out, rn(word));
    if (bits(word, 15, 10) == 0) {
        read_general(out, rm(word));
        write_general(out, rd(word));
        if (bit(word, 29)) write_flags(out);
    } else {
        write_flags(out);  // some of them: the others are kept
    }
    read_flags(out);
}

static void conditional_compare(uint32_t word, struct instruction *out) {
    read_general(out, rn(word));
    if (!bit(word, 11)) read_general(out, rm(word));
    read_flags(out);
    write_flags(out);
}

static void conditional_select(uint32_t word, struct instruction *out) {
    read_general(out, rn(word));
    read_general(out, rm(word));
    read_flags(out);
    write_general(out, rd(word));
}

static void data_processing_two_source(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 15, 10);
    const bool tags = opcode == 0 || opcode == 4 || opcode == 5;  // SUBP, IRG, GMI take the stack pointer
    const bool shifts = opcode >> 2 == 2, crc = opcode >> 3 == 2;
    if (opcode == 2 || opcode == 3) out->class = CLASS_DIV;
    else if (shifts || crc) out->class = CLASS_ALU_SHIFT;
    if (tags) read_general_or_sp(out, rn(word));
    else read_general(out, rn(word));
    if (opcode == 0 || opcode == 12) read_general_or_sp(out, rm(word));  // SUBP, PACGA
    else read_general(out, rm(word));
    if (opcode == 4) write_general_or_sp(out, rd(word));
    else write_general(out, rd(word));
    if (bit(word, 29)) write_flags(out);  // SUBPS
}

static void data_processing_one_source(uint32_t word, struct instruction *out) {
    if (rm(word) == 1) {  // pointer authentication: changes Rd, with Rn as the modifier
        const bool no_modifier = bits(word, 15, 10) >= 8;
        read_general(out, rd(word));
        if (!no_modifier) read_general_or_sp(out, rn(word));
    } else {
        read_general(out, rn(word));
    }
    write_general(out, rd(word));
}

// `macs` stays 0: it counts what a network computes, and these compute indices nearly always.
static void data_processing_three_source(uint32_t word, struct instruction *out) {
    const bool upper_half = bits(word, 22, 21) == 2;  // SMULH, UMULH: without an addend
    out->class = CLASS_MUL;
    read_general(out, rn(word));
    read_general(out, rm(word));
    if (!upper_half && ra(word) != ZERO_REGISTER) {
        read_general(out, ra(word));
        out->accumulator = out->sources;
    }
    write_general(out, rd(word));
}

static void data_processing_register(uint32_t word, struct instruction *out) {
    out->class = CLASS_ALU;
    if (!bit(word, 28)) {
        if (!bit(word, 24)) logical_shifted_register(word, out);
        else if (!bit(word, 21)) add_subtract_shifted_register(word, out);
        else add_subtract_extended_register(word, out);
        return;
    }
    if (bit(word, 24)) {
        data_processing_three_source(word, out);
        return;
    }
    switch (bits(word, 23, 21)) {
        case 0: with_carry(word, out); break;
        case 2: conditional_compare(word, out); break;
        case 4: conditional_select(word, out); break;
        case 6:
            if (bit(word, 30)) data_processing_one_source(word, out);
            else data_processing_two_source(word, out);
            break;
        default: out->class = CLASS_NOP; break;
    }
}

// Scalar floating point

static void floating_point_multiply_add(uint32_t word, struct instruction *out) {
    out->class = CLASS_FMA_D;
    out->macs = 1;
    read_vector(out, rn(word));
    read_vector(out, rm(word));
    accumulate(out, ra(word));
    write_vector(out, rd(word));
}

// Conversion between floating point and integer or fixed point, FMOV to and from a general register.
static void floating_point_and_general(uint32_t word, struct instruction *out) {
    const unsigned rmode = bits(word, 20, 19), opcode = bits(word, 18, 16);
    const bool integer = bit(word, 21), moves = integer && opcode >= 6 && rmode <= 1;
    out->class = CLASS_FCVT_D;
    if ((moves && opcode == 7) || opcode == 2 || opcode == 3) {
        if (moves) out->class = CLASS_GENERAL_TO_VECTOR;
        read_general(out, rn(word));
        if (moves && rmode == 1) read_vector(out, rd(word));  // FMOV Vd.D[1] keeps the lower half
        write_vector(out, rd(word));
    } else {
        if (moves) out->class = CLASS_VECTOR_TO_GENERAL;
        read_vector(out, rn(word));
        write_general(out, rd(word));
        if (integer && opcode == 6 && rmode == 3) write_flags(out);  // FJCVTZS
    }
}

static void floating_point_one_source(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 20, 15);
    if (opcode == 0) out->class = CLASS_VMOV;
    else if (opcode <= 2) out->class = CLASS_VALU_D;  // FABS, FNEG change the sign bit
    else if (opcode == 3) out->class = CLASS_FDIV;    // FSQRT
    else out->class = CLASS_FCVT_D;
    read_vector(out, rn(word));
    write_vector(out, rd(word));
}

static void floating_point_compare(uint32_t word, struct instruction *out) {
    out->class = CLASS_FADD_D;
    read_vector(out, rn(word));
    if (!bit(word, 3)) read_vector(out, rm(word));  // else with zero
    write_flags(out);
}

static void floating_point_immediate(uint32_t word, struct instruction *out) {
    out->class = CLASS_VMOV;
    write_vector(out, rd(word));
}

static void floating_point_conditional_compare(uint32_t word, struct instruction *out) {
    out->class = CLASS_FADD_D;
    read_vector(out, rn(word));
    read_vector(out, rm(word));
    read_flags(out);
    write_flags(out);
}

static void floating_point_two_source(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 15, 12);
    if (opcode == 0 || opcode == 8) out->class = CLASS_FMUL_D;
    else if (opcode == 1) out->class = CLASS_FDIV;
    else out->class = CLASS_FADD_D;
    read_vector(out, rn(word));
    read_vector(out, rm(word));
    write_vector(out, rd(word));
}

static void floating_point_conditional_select(uint32_t word, struct instruction *out) {
    out->class = CLASS_VALU_D;
    read_vector(out, rn(word));
    read_vector(out, rm(word));
    read_flags(out);
    write_vector(out, rd(word));
}

static void scalar_floating_point(uint32_t word, struct instruction *out) {
    if (bit(word, 29)) return;  // not allocated
    if (bit(word, 24)) {
        floating_point_multiply_add(word, out);
        return;
    }
    if (!bit(word, 21)) {  // fixed point
        floating_point_and_general(word, out);
        return;
    }
    switch (bits(word, 11, 10)) {
        case 1: floating_point_conditional_compare(word, out); break;
        case 2: floating_point_two_source(word, out); break;
        case 3: floating_point_conditional_select(word, out); break;
        default:
            if (bit(word, 12)) floating_point_immediate(word, out);
            else if (bit(word, 13)) floating_point_compare(word, out);
            else if (bit(word, 14)) floating_point_one_source(word, out);
            else if (!bit(word, 15)) floating_point_and_general(word, out);
            break;
    }
}

// Advanced SIMD. The groups of scalars have the opcodes of the vectors' groups, and share their functions.

static bool scalar(uint32_t word) { return bit(word, 28); }
static bool wide(uint32_t word) { return bit(word, 30) && !scalar(word); }  // 128 bits; a scalar has Q set, too
static unsigned element_size(uint32_t word) { return bits(word, 23, 22); }  // log2 of bytes

static void by_width(uint32_t word, struct instruction *out, enum instruction_class d, enum instruction_class q) {
    out->class = (uint8_t)(wide(word) ? q : d);
}

// Elements of 2^size bytes.
static unsigned lanes(uint32_t word, unsigned size) { return scalar(word) ? 1 : (wide(word) ? 16u : 8u) >> size; }

// Results of an operation that makes them twice as wide as its elements of 2^size bytes.
static unsigned widened_lanes(uint32_t word, unsigned size) { return scalar(word) ? 1 : 8u >> size; }

static void vectors(uint32_t word, struct instruction *out) {
    read_vector(out, rn(word));
    read_vector(out, rm(word));
    write_vector(out, rd(word));
}

static void multiply_accumulate(uint32_t word, struct instruction *out, enum instruction_class class, unsigned macs) {
    out->class = (uint8_t)class;
    out->macs = (uint8_t)macs;
    accumulate(out, rd(word));
}

static void float_multiply_accumulate(uint32_t word, struct instruction *out, unsigned macs) {
    multiply_accumulate(word, out, wide(word) ? CLASS_FMA_Q : CLASS_FMA_D, macs);
}

// Results as wide as the elements; those twice as wide are CLASS_IMAC whatever the width.
static void integer_multiply_accumulate(uint32_t word, struct instruction *out) {
    multiply_accumulate(word, out, wide(word) ? CLASS_IMAC_Q : CLASS_IMAC, lanes(word, element_size(word)));
}

static void widening_multiply_accumulate(uint32_t word, struct instruction *out) {
    multiply_accumulate(word, out, CLASS_IMAC, widened_lanes(word, element_size(word)));
}

// Counted here, and not in the SADALP that sums up the products.
static void widening_multiply(uint32_t word, struct instruction *out) {
    out->class = CLASS_IMAC;
    out->macs = (uint8_t)widened_lanes(word, element_size(word));
}

// The upper quarter of "three same", and "three same (FP16)", which has the lower three bits of its opcodes.
static void floating_point_three_same(uint32_t word, struct instruction *out, unsigned opcode, unsigned size) {
    const bool u = bit(word, 29);
    by_width(word, out, CLASS_FADD_D, CLASS_FADD_Q);
    switch (opcode) {
        case 1: float_multiply_accumulate(word, out, lanes(word, u ? 2 : size)); break;  // FMLAL2, FMLSL2; FMLA, FMLS
        case 3: by_width(word, out, CLASS_FMUL_D, CLASS_FMUL_Q); break;  // FMULX, FMUL
        case 5:
            if (!u) float_multiply_accumulate(word, out, lanes(word, 2));  // FMLAL, FMLSL
            break;
        case 7:
            if (u) out->class = CLASS_FDIV;
            else by_width(word, out, CLASS_FMUL_D, CLASS_FMUL_Q);  // FRECPS, FRSQRTS
            break;
        default: break;
    }
}

static void three_same(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 15, 11);
    const bool u = bit(word, 29);
    vectors(word, out);
    if (opcode >= 24) {
        floating_point_three_same(word, out, opcode & 7, bit(word, 22) ? 3 : 2);
        return;
    }
    by_width(word, out, CLASS_VALU_D, CLASS_VALU_Q);
    switch (opcode) {
        case 3:
            if (u && element_size(word) != 0) read_vector(out, rd(word));  // BSL, BIT, BIF
            break;
        case 8: case 9: case 10: case 11: by_width(word, out, CLASS_VSHIFT_D, CLASS_VSHIFT_Q); break;
        case 15:  // SABA, UABA
            out->class = CLASS_VACCUMULATE;
            accumulate(out, rd(word));
            break;
        case 18: integer_multiply_accumulate(word, out); break;                  // MLA, MLS
        case 19: case 22: by_width(word, out, CLASS_IMAC, CLASS_IMAC_Q); break;  // MUL, PMUL; SQDMULH, SQRDMULH
        default: break;
    }
}

static void three_same_fp16(uint32_t word, struct instruction *out) {
    vectors(word, out);
    floating_point_three_same(word, out, bits(word, 13, 11), 1);
}

static void three_same_extra(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 14, 11), size = element_size(word);
    vectors(word, out);
    switch (opcode) {
        case 0: case 1: integer_multiply_accumulate(word, out); break;                     // SQRDMLAH, SQRDMLSH
        case 2: case 3: multiply_accumulate(word, out, CLASS_DOT, lanes(word, 0)); break;  // SDOT, UDOT, USDOT
        case 4: case 5: multiply_accumulate(word, out, CLASS_MATMUL, 32); break;           // SMMLA, UMMLA, USMMLA
        case 8: case 9: case 10: case 11: float_multiply_accumulate(word, out, lanes(word, size)); break;  // FCMLA
        case 12: case 14: by_width(word, out, CLASS_FADD_D, CLASS_FADD_Q); break;          // FCADD
        case 13: multiply_accumulate(word, out, CLASS_MATMUL, 16); break;                  // BFMMLA
        case 15:
            if (size == 3) multiply_accumulate(word, out, CLASS_FMA_Q, 4);   // BFMLALB, BFMLALT: Q says which
            else multiply_accumulate(word, out, CLASS_DOT, lanes(word, 1));  // BFDOT
            break;
        default: break;
    }
}

static void three_different(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 15, 12);
    vectors(word, out);
    out->class = CLASS_VALU_Q;
    switch (opcode) {
        case 4: case 6:  // ADDHN, SUBHN
            if (wide(word)) read_vector(out, rd(word));
            break;
        case 5:  // SABAL
            out->class = CLASS_VACCUMULATE;
            accumulate(out, rd(word));
            break;
        case 8: case 9: case 10: case 11: widening_multiply_accumulate(word, out); break;  // SMLAL, SQDMLAL, SMLSL ...
        case 12: case 13: widening_multiply(word, out); break;                             // SMULL, SQDMULL
        case 14: out->class = CLASS_IMAC; break;  // PMULL
        default: break;
    }
}

static void two_register_miscellaneous(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 16, 12);
    const bool u = bit(word, 29), upper = bit(word, 23);
    read_vector(out, rn(word));
    write_vector(out, rd(word));
    by_width(word, out, CLASS_VALU_D, CLASS_VALU_Q);
    switch (opcode) {
        case 0: case 1: by_width(word, out, CLASS_PERMUTE_D, CLASS_PERMUTE_Q); break;  // REV64, REV32, REV16
        case 3: read_vector(out, rd(word)); break;  // SUQADD, USQADD
        case 6:  // SADALP, UADALP
            out->class = CLASS_VACCUMULATE;
            accumulate(out, rd(word));
            break;
        case 12: case 13: case 14: by_width(word, out, CLASS_FADD_D, CLASS_FADD_Q); break;  // FCMGT with zero etc.
        case 18: case 20:  // XTN, SQXTUN; SQXTN, UQXTN. The second of a pair (XTN2) keeps the lower half.
            if (wide(word)) read_vector(out, rd(word));
            if (opcode == 18 && !u) out->class = CLASS_PERMUTE_Q;  // XTN does as UZP1
            else out->class = scalar(word) ? CLASS_VSHIFT_D : CLASS_VSHIFT_Q;
            break;
        case 19: out->class = CLASS_VSHIFT_Q; break;  // SHLL
        case 22:  // FCVTN, FCVTXN, BFCVTN
            if (wide(word)) read_vector(out, rd(word));
            out->class = scalar(word) ? CLASS_FCVT_D : CLASS_FCVT_Q;
            break;
        case 23: out->class = CLASS_FCVT_Q; break;  // FCVTL
        case 31:
            if (u && upper) out->class = CLASS_FDIV;  // FSQRT
            else by_width(word, out, CLASS_FCVT_D, CLASS_FCVT_Q);  // FRINT64Z, FRECPX
            break;
        default:
            // FRINTN to FRINT32Z, FCVTNS to FCVTZU, SCVTF; FRECPE and FRSQRTE, whose unit is the same.
            if (opcode >= 24) by_width(word, out, CLASS_FCVT_D, CLASS_FCVT_Q);
            break;
    }
}

static void across_lanes(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 16, 12);
    read_vector(out, rn(word));
    write_vector(out, rd(word));
    if (opcode == 12 || opcode == 15) by_width(word, out, CLASS_FADD_D, CLASS_FADD_Q);  // FMAXNMV, FMAXV
    else out->class = CLASS_VACCUMULATE;
}

static void scalar_pairwise(uint32_t word, struct instruction *out) {
    read_vector(out, rn(word));
    write_vector(out, rd(word));
    out->class = bits(word, 16, 12) == 27 ? CLASS_VACCUMULATE : CLASS_FADD_D;  // ADDP; FADDP, FMAXP
}

static void copy(uint32_t word, struct instruction *out) {
    const unsigned imm4 = bits(word, 14, 11);
    if (bit(word, 29) || imm4 == 0) {  // INS from an element, DUP of an element
        by_width(word, out, CLASS_PERMUTE_D, CLASS_PERMUTE_Q);
        read_vector(out, rn(word));
        if (bit(word, 29)) read_vector(out, rd(word));
        write_vector(out, rd(word));
    } else if (imm4 == 1 || imm4 == 3) {  // DUP, INS from a general register
        out->class = CLASS_GENERAL_TO_VECTOR;
        read_general(out, rn(word));
        if (imm4 == 3) read_vector(out, rd(word));
        write_vector(out, rd(word));
    } else {  // SMOV, UMOV
        out->class = CLASS_VECTOR_TO_GENERAL;
        read_vector(out, rn(word));
        write_general(out, rd(word));
    }
}

static void table_lookup(uint32_t word, struct instruction *out) {
    out->class = CLASS_TABLE;
    for (unsigned i = 0; i <= bits(word, 14, 13); i++) read_vector(out, rn(word) + i);
    read_vector(out, rm(word));
    if (bit(word, 12)) read_vector(out, rd(word));  // TBX keeps what is out of the table's range
    write_vector(out, rd(word));
}

// ZIP, UZP, TRN; EXT.
static void permute(uint32_t word, struct instruction *out) {
    by_width(word, out, CLASS_PERMUTE_D, CLASS_PERMUTE_Q);
    vectors(word, out);
}

static void modified_immediate(uint32_t word, struct instruction *out) {
    const unsigned cmode = bits(word, 15, 12);
    out->class = CLASS_VMOV;
    if ((cmode & 1) && cmode < 12) {  // ORR, BIC
        by_width(word, out, CLASS_VALU_D, CLASS_VALU_Q);
        read_vector(out, rd(word));
    }
    write_vector(out, rd(word));
}

static void shift_by_immediate(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 15, 11);
    const bool u = bit(word, 29);
    by_width(word, out, CLASS_VSHIFT_D, CLASS_VSHIFT_Q);
    read_vector(out, rn(word));
    write_vector(out, rd(word));
    switch (opcode) {
        case 2: case 6:  // SSRA, SRSRA
            out->class = CLASS_VACCUMULATE;
            accumulate(out, rd(word));
            break;
        case 8: case 10:
            if (u) read_vector(out, rd(word));  // SRI, SLI
            break;
        case 16: case 17: case 18: case 19:  // SHRN and its kind
            if (wide(word)) read_vector(out, rd(word));
            out->class = scalar(word) ? CLASS_VSHIFT_D : CLASS_VSHIFT_Q;
            break;
        case 20: out->class = CLASS_VSHIFT_Q; break;                               // SSHLL
        case 28: case 31: by_width(word, out, CLASS_FCVT_D, CLASS_FCVT_Q); break;  // SCVTF, FCVTZS
        default: break;
    }
}

// FMLAL, FMLSL, FMLAL2, FMLSL2 by element.
static bool is_fmlal_by_element(uint32_t word) {
    return element_size(word) == 2 && bits(word, 13, 12) == 0 && bit(word, 15) == bit(word, 29);
}

// The index of a 16-bit element takes the upper bit of Rm, unless it counts pairs of them.
static unsigned indexed_register(uint32_t word) {
    const unsigned opcode = bits(word, 15, 12), size = element_size(word);
    const bool u = bit(word, 29);
    const bool fp16 = size == 0 && (opcode == 1 || opcode == 5 || opcode == 9);  // FMLA, FMLS, FMUL, FMULX
    const bool fcmla = u && (opcode & 9) == 1, bfdot = !u && opcode == 15;
    const bool halves = fp16 || (size == 1 && !fcmla && !bfdot) || (size == 3 && opcode == 15);  // the last: BFMLAL
    return halves || is_fmlal_by_element(word) ? rm(word) & 15 : rm(word);
}

static void by_indexed_element(uint32_t word, struct instruction *out) {
    const unsigned opcode = bits(word, 15, 12), size = element_size(word);
    const bool u = bit(word, 29);
    read_vector(out, rn(word));
    read_vector(out, indexed_register(word));
    write_vector(out, rd(word));
    if (is_fmlal_by_element(word)) {
        float_multiply_accumulate(word, out, lanes(word, 2));
        return;
    }
    switch (opcode) {
        case 0: case 4: integer_multiply_accumulate(word, out); break;  // MLA, MLS
        case 1: case 5:                                                 // FMLA, FMLS, where size 0 means FP16; FCMLA
            float_multiply_accumulate(word, out, lanes(word, size == 0 ? 1 : size));
            break;
        case 2: case 6: widening_multiply_accumulate(word, out); break;  // SMLAL, SMLSL
        case 3: case 7:
            if (u) float_multiply_accumulate(word, out, lanes(word, size));  // FCMLA
            else widening_multiply_accumulate(word, out);                    // SQDMLAL, SQDMLSL
            break;
        case 8: case 12: by_width(word, out, CLASS_IMAC, CLASS_IMAC_Q); break;  // MUL, SQDMULH
        case 9: by_width(word, out, CLASS_FMUL_D, CLASS_FMUL_Q); break;         // FMUL, FMULX
        case 10: case 11: widening_multiply(word, out); break;                  // SMULL, SQDMULL
        case 13:
            if (u) integer_multiply_accumulate(word, out);       // SQRDMLAH
            else by_width(word, out, CLASS_IMAC, CLASS_IMAC_Q);  // SQRDMULH
            break;
        case 14: multiply_accumulate(word, out, CLASS_DOT, lanes(word, 0)); break;  // SDOT, UDOT
        case 15:
            if (u) integer_multiply_accumulate(word, out);                                   // SQRDMLSH
            else if (size == 3) multiply_accumulate(word, out, CLASS_FMA_Q, 4);              // BFMLALB, BFMLALT
            else multiply_accumulate(word, out, CLASS_DOT, lanes(word, size == 1 ? 1 : 0));  // BFDOT; SUDOT, USDOT
            break;
        default: break;
    }
}

// Cryptographic extensions, all among vector logic.

static void cryptographic(uint32_t word, struct instruction *out, unsigned operands, bool updates) {
    out->class = CLASS_VALU_Q;
    read_vector(out, rn(word));
    if (operands >= 2) read_vector(out, rm(word));
    if (operands >= 3) read_vector(out, ra(word));
    if (updates) read_vector(out, rd(word));
    write_vector(out, rd(word));
}

static void cryptographic_aes(uint32_t word, struct instruction *out) {
    cryptographic(word, out, 1, bits(word, 16, 12) <= 5);  // AESE and AESD, not AESMC and AESIMC
}

static void cryptographic_sha_two_register(uint32_t word, struct instruction *out) {
    cryptographic(word, out, 1, bits(word, 16, 12) != 0);  // all but SHA1H
}

static void cryptographic_sha_three_register(uint32_t word, struct instruction *out) {
    cryptographic(word, out, 2, true);
}

// Cryptographic three-register SHA 512, four-register, and what else lies beside them.
static void cryptographic_sha512_sm3_sm4(uint32_t word, struct instruction *out) {
    const unsigned group = bits(word, 23, 21), opcode = bits(word, 15, 10);
    if (group <= 2 && !bit(word, 15)) cryptographic(word, out, 3, false);  // EOR3, BCAX, SM3SS1
    else if (group == 2) cryptographic(word, out, 2, true);                // SM3TT1A and its kind
    else if (group == 3) cryptographic(word, out, 2, opcode != 0x23 && opcode != 0x32);  // all but RAX1, SM4EKEY
    else if (group == 4) cryptographic(word, out, 2, false);               // XAR
    else if (group == 6) cryptographic(word, out, 1, true);                // SHA512SU0, SM4E
}

static void advanced_simd(uint32_t word, struct instruction *out) {
    const unsigned group = bits(word, 20, 17);
    if (bit(word, 24)) {
        if (!bit(word, 10)) by_indexed_element(word, out);
        else if (bit(word, 23)) return;
        else if (bits(word, 22, 19) == 0 && !scalar(word)) modified_immediate(word, out);
        else shift_by_immediate(word, out);
    } else if (bit(word, 21)) {
        if (bit(word, 10)) three_same(word, out);
        else if (!bit(word, 11)) three_different(word, out);
        else if (group == 0 || group == 12) two_register_miscellaneous(word, out);
        else if (group == 8 && scalar(word)) scalar_pairwise(word, out);
        else if (group == 8) across_lanes(word, out);
        else if (group == 4 && scalar(word)) cryptographic_sha_two_register(word, out);
        else if (group == 4) cryptographic_aes(word, out);
    } else if (bit(word, 15)) {
        if (bit(word, 10)) three_same_extra(word, out);
    } else if (bit(word, 10)) {
        if (bits(word, 23, 22) == 0) copy(word, out);
        else if (bit(word, 22) && bits(word, 15, 14) == 0) three_same_fp16(word, out);
    } else if (bit(word, 29) || bit(word, 11)) {
        permute(word, out);
    } else if (scalar(word)) {
        cryptographic_sha_three_register(word, out);
    } else {
        table_lookup(word, out);
    }
}

static void simd_and_floating_point(uint32_t word, struct instruction *out) {
    if (bit(word, 28) && !bit(word, 30)) scalar_floating_point(word, out);
    else if (!bit(word, 31)) advanced_simd(word, out);
    else if (bits(word, 31, 24) == 0xce) cryptographic_sha512_sm3_sm4(word, out);
}

void decode(uint32_t word, struct instruction *out) {
    memset(out, 0, sizeof *out);
    out->class = CLASS_NOP;
    out->registers = 1;
    const unsigned op0 = bits(word, 28, 25);
    if ((op0 & 14) == 8) data_processing_immediate(word, out);
    else if ((op0 & 14) == 10) branches_exceptions_system(word, out);
    else if ((op0 & 5) == 4) loads_and_stores(word, out);
    else if ((op0 & 7) == 5) data_processing_register(word, out);
    else if ((op0 & 7) == 7) simd_and_floating_point(word, out);
}
