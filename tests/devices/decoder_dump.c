// Decodes the hexadecimal words of its standard input, a line for each:
// class, sources, destinations, the accumulator's place among the sources, registers, macs, and a letter for each of
// loads, stores, writes_back, branches, conditional. With the argument `classes`: the names of the classes.
#include "decode.h"

#include <stdio.h>
#include <string.h>

static void print_registers(const uint8_t *registers, int count) {
    putchar('\t');
    for (int i = 0; i < count; i++) printf(i == 0 ? "%d" : ",%d", registers[i]);
}

static bool in_range(const struct instruction *decoded) {
    if (decoded->class >= CLASS_COUNT || decoded->sources > MAX_SOURCES) return false;
    if (decoded->destinations > MAX_DESTINATIONS || decoded->accumulator > decoded->sources) return false;
    for (int i = 0; i < decoded->sources; i++) {
        if (decoded->source[i] >= REGISTERS) return false;
    }
    for (int i = 0; i < decoded->destinations; i++) {
        if (decoded->destination[i] >= REGISTERS) return false;
    }
    return decoded->registers >= 1;
}

int main(int arguments, char **argument) {
    if (arguments == 2 && strcmp(argument[1], "classes") == 0) {
        for (int i = 0; i < CLASS_COUNT; i++) puts(class_names[i]);
        return 0;
    }
    unsigned word;
    while (scanf("%x", &word) == 1) {
        struct instruction decoded;
        decode(word, &decoded);
        if (!in_range(&decoded)) {
            fprintf(stderr, "%08x: out of range\n", word);
            return 1;
        }
        fputs(class_names[decoded.class], stdout);
        print_registers(decoded.source, decoded.sources);
        print_registers(decoded.destination, decoded.destinations);
        printf("\t%d\t%d\t%d\t", decoded.accumulator, decoded.registers, decoded.macs);
        if (decoded.loads) putchar('L');
        if (decoded.stores) putchar('S');
        if (decoded.writes_back) putchar('W');
        if (decoded.branches) putchar('B');
        if (decoded.conditional) putchar('C');
        putchar('\n');
    }
    return ferror(stdout) != 0;
}
