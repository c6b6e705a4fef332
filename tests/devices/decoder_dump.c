// Decodes the hexadecimal words of its standard input, a line for each:
// class, sources, destinations, the accumulator's place among the sources, registers, macs, and a letter for each of
// loads, stores, writes_back, branches, conditional.
#include "decode.h"

#include <stdio.h>

static void print_registers(const uint8_t *registers, int count) {
    putchar('\t');
    for (int i = 0; i < count; i++) printf(i == 0 ? "%d" : ",%d", registers[i]);
}

int main(void) {
    unsigned word;
    while (scanf("%x", &word) == 1) {
        struct instruction decoded;
        decode(word, &decoded);
        if (decoded.class >= CLASS_COUNT || decoded.sources > MAX_SOURCES || decoded.destinations > MAX_DESTINATIONS) {
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
