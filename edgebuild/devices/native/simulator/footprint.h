// Which lines a piece of work uses, and from two pieces of a loop which lines the pieces behind them will use.
#pragma once
#include "memory.h"

struct footprint;

struct footprint *footprint_create(void);
void footprint_destroy(struct footprint *footprint);
void footprint_clear(struct footprint *footprint);
void footprint_add(struct footprint *footprint, uint64_t address, unsigned size, bool write);

// Touches what the next `pieces` pieces would have used, `before` and `last` being the two latest ones: each run of
// neighbouring lines moves on as it moved between the two. False where the two are not alike, and nothing was touched.
bool footprint_continue(const struct footprint *before, const struct footprint *last, uint64_t pieces,
                        struct memory *memory, unsigned core, uint64_t most_lines);
