// Parallel loops of simulated threads; see simulation.h.
#pragma once

namespace simulated_pool {
void enable(unsigned threads, bool sampled);
}

#if defined(__aarch64__)
inline void mark(long kind, long a = 0, long b = 0, long c = 0) {
    register long number asm("x8") = 167;
    register long x0 asm("x0") = 0x45424400 | kind;
    register long x1 asm("x1") = a;
    register long x2 asm("x2") = b;
    register long x3 asm("x3") = c;
    asm volatile("svc 0" : "+r"(x0) : "r"(number), "r"(x1), "r"(x2), "r"(x3) : "memory");
}
#else
inline void mark(long, long = 0, long = 0, long = 0) {}  // only Arm machines are simulated
#endif
