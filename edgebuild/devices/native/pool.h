// Parallel loops of simulated threads, and the marks that tell the plugin of them; see simulation.h and marks.h.
#pragma once

#include "marks.h"

namespace simulated_pool {
void enable(unsigned threads, bool sampled);
}

#if defined(__aarch64__)
inline void mark(long kind, long a = 0, long b = 0, long c = 0) {
    register long number asm("x8") = MARK_SYSTEM_CALL;
    register long x0 asm("x0") = MARK_MAGIC | kind;
    register long x1 asm("x1") = a;
    register long x2 asm("x2") = b;
    register long x3 asm("x3") = c;
    asm volatile("svc 0" : "+r"(x0) : "r"(number), "r"(x1), "r"(x2), "r"(x3) : "memory");
}
#else
inline void mark(long, long = 0, long = 0, long = 0) {}  // only Arm machines are simulated
#endif
