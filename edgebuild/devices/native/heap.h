// Live and peak bytes of the heap of this process by what they are for, exact to the byte and independent of page
// residency.
#pragma once

#include <array>
#include <cstddef>

namespace heap {

enum Kind : unsigned char {
    PROGRAM,    // the file's bytes that are held: constants and instructions
    WEIGHTS,    // what the delegate makes of them while loading: packed weights, operators
    ARENA,      // planned buffers: inputs, outputs, activations outside of the delegate
    WORKSPACE,  // what the delegate takes while running: activations inside of it, pointers to convolutions' inputs
    RUNTIME,    // everything else
    KINDS
};

// Bytes, and their split by kind. Each of both is counted on its own. As a difference of two it may be negative.
struct Bytes {
    long long total = 0;
    std::array<long long, KINDS> of{};

    Bytes &operator+=(const Bytes &other) {
        total += other.total;
        for (size_t kind = 0; kind < KINDS; ++kind) of[kind] += other.of[kind];
        return *this;
    }
    Bytes &operator-=(const Bytes &other) {
        total -= other.total;
        for (size_t kind = 0; kind < KINDS; ++kind) of[kind] -= other.of[kind];
        return *this;
    }
};

inline Bytes operator-(Bytes a, const Bytes &b) { return a -= b; }
inline Bytes operator+(Bytes a, const Bytes &b) { return a += b; }

Bytes live();
Bytes peak();  // at the moment when most was live since the last reset_peak()
void reset_peak();

// From now on what the delegate's library asks for is of this kind.
void delegate_takes(Kind kind);

// What this thread asks for while this lives is of one kind, whichever library does it.
class Only {
  public:
    explicit Only(Kind kind);
    ~Only();
    Only(const Only &) = delete;
    Only &operator=(const Only &) = delete;

  private:
    Kind before;
};

}  // namespace heap
