/* How the runner speaks to the simulator's plugin: a system call that no kernel knows (a prctl with an unknown option,
 * which fails without effect). In C and in C++, on both sides. */
#pragma once

enum { MARK_SYSTEM_CALL = 167 /* prctl on AArch64 */, MARK_MAGIC = 0x45424400 };

enum {
    MARK_FOLLOW = 1, /* the model is loaded: count from here on */
    MARK_BEGIN,      /* (cold) an inference begins, with empty caches where it is cold */
    MARK_END,        /* (counts) it ended, and is written down where it counts */
    MARK_OPERATOR,   /* an operator ended */
    MARK_FORK,       /* (cores) a parallel loop begins */
    MARK_CALL,       /* (core, weight, kind) the core begins a piece of it; weight is in tiles */
    MARK_SKIP,       /* (core, weight, pieces) the core leaves out pieces */
    MARK_JOIN        /* the loop ended */
};

/* Kinds of a piece. */
enum {
    MARK_STEADY = 1, /* not the first behind a gap: what it takes speaks for pieces that are left out */
    MARK_RECORD = 2  /* one of the last two before a gap: what it touches says what the pieces in the gap touch */
};
