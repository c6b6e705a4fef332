// Memory for the simulator's own use. Where there is none left the process ends with a message.
#pragma once
#include <stdio.h>
#include <stdlib.h>

static inline void *allocated(void *block) {
    if (block == NULL) {
        fprintf(stderr, "edgebuild simulator: out of memory\n");
        exit(2);
    }
    return block;
}
