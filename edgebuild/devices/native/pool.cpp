// Stands in front of pthreadpool. While nothing is simulated, every call goes on to the real library.
//
// How a loop is spread over threads follows pthreadpool (github.com/google/pthreadpool, src/pthreads.c): the tiles are split
// evenly, and each thread runs through its own from the front. Of a "dynamic" loop the tiles of a row go into one call as far
// as they are a thread's own; how pthreadpool takes them in portions, to let others help, makes no difference to equal
// cores, which have nothing to steal.
#include "pool.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <dlfcn.h>
#include <vector>

namespace {

struct {
    bool on = false, sampled = false;
    size_t threads = 1;
} pool;

constexpr size_t MAX_DIMENSIONS = 6, MAX_TILED = 2;

struct Loop {
    size_t dimensions, tiled;
    bool uarch, thread, dynamic;
    std::array<size_t, MAX_DIMENSIONS> range{}, tile{};  // tile: 1 in dimensions that are not tiled

    size_t tiles(size_t dimension) const { return (range[dimension] + tile[dimension] - 1) / tile[dimension]; }

    size_t tiles() const {
        size_t count = 1;
        for (size_t d = 0; d < dimensions; ++d) count *= tiles(d);
        return count;
    }
};

// A call of the task: where it begins, and how far it goes in the tiled dimensions.
struct Piece {
    std::array<size_t, MAX_DIMENSIONS> index{};
    std::array<size_t, MAX_TILED> size{};
    size_t weight = 1;  // how much work it is, among the pieces of its loop
};

// The piece that begins at a tile and goes on over `joined` tiles of the last dimension.
Piece piece_at(const Loop &loop, size_t first, size_t joined) {
    Piece piece;
    piece.weight = joined;
    for (size_t d = loop.dimensions; d-- > 0;) {
        const size_t count = loop.tiles(d), at = first % count * loop.tile[d];
        first /= count;
        piece.index[d] = at;
        if (d + loop.tiled < loop.dimensions) continue;
        const size_t tiles = d + 1 == loop.dimensions ? joined : 1;
        piece.size[d + loop.tiled - loop.dimensions] = std::min(loop.range[d] - at, tiles * loop.tile[d]);
    }
    return piece;
}

// Pieces [first, end). Those in [steady, unsteady) speak for others: they come neither right behind a gap nor at the end of
// the loop, where a piece may be smaller.
struct Stretch {
    size_t first, steady, unsteady, end;
};

// What one core does: pieces, and the stretches of them that are run.
struct Work {
    std::vector<Piece> pieces;
    std::vector<Stretch> stretches;
    size_t stretch = 0, at = 0;

    bool done() const { return stretch == stretches.size(); }
};

constexpr size_t SHORTEST = 4, SHARE = 24;  // pieces in a stretch, and of how many it is one
constexpr size_t MOST_PIECES = 96;          // that a row is cut into

// Of like pieces, runs a stretch at the start, one at the end, and with `middle` one between.
void sample(Work &work, size_t first, size_t end, bool middle) {
    const size_t pieces = end - first, length = std::max(SHORTEST, pieces / SHARE);
    const size_t warm = std::max<size_t>(length / 4, 1);
    if (!pool.sampled || pieces < (middle ? 3 : 2) * length + 2) return work.stretches.push_back({first, end, end, end});
    work.stretches.push_back({first, first + warm, first + length, first + length});
    if (middle) {
        const size_t at = first + (pieces - length) / 2;
        work.stretches.push_back({at, at + warm, at + length, at + length});
    }
    work.stretches.push_back({end - length, end - length + warm, end - 1, end});
}

// Cuts the tiles [first, end) into pieces. A row is all tiles of the last dimension.
void cut(const Loop &loop, size_t first, size_t end, Work &work) {
    work = Work{std::move(work.pieces), std::move(work.stretches)};
    work.pieces.clear();
    work.stretches.clear();
    const size_t row = loop.tiles(loop.dimensions - 1), rows = (end - first + row - 1) / row;
    const bool whole_rows = loop.dynamic && loop.dimensions > 1 && row > 1;
    if (!whole_rows || loop.tiled < 2 || rows >= 3 * SHORTEST + 2) {
        while (first < end) {
            const size_t joined = whole_rows ? std::min(row - first % row, end - first) : 1;
            work.pieces.push_back(piece_at(loop, first, joined));
            first += joined;
        }
        return sample(work, 0, work.pieces.size(), true);
    }
    // Few rows, of many tiles: a matrix product, a block of channels in a row and a micro-kernel's height in a tile. The
    // task takes one height after the other, so that it may as well be called for each.
    while (first < end) {
        const size_t row_end = std::min(first + row - first % row, end), begun = work.pieces.size();
        const size_t step = (row_end - first + MOST_PIECES - 1) / MOST_PIECES;
        for (; first < row_end; first += step) {
            work.pieces.push_back(piece_at(loop, first, std::min(step, row_end - first)));
        }
        first = row_end;
        sample(work, begun, work.pieces.size(), false);
    }
}

void call(const Loop &loop, void *task, void *context, long uarch, size_t core, const Piece &piece) {
    std::array<size_t, 12> a{};
    size_t count = 0;
    a[count++] = reinterpret_cast<size_t>(context);
    if (loop.uarch) a[count++] = static_cast<size_t>(uarch);
    if (loop.thread) a[count++] = core;
    for (size_t d = 0; d < loop.dimensions; ++d) a[count++] = piece.index[d];
    for (size_t d = 0; d < loop.tiled; ++d) a[count++] = piece.size[d];
    using Task = void (*)(size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t, size_t);
    reinterpret_cast<Task>(task)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11]);
}

void step(const Loop &loop, void *task, void *context, long uarch, size_t core, Work &work) {
    const Stretch now = work.stretches[work.stretch];
    const bool is_last = work.stretch + 1 == work.stretches.size();
    const size_t next = is_last ? now.end : work.stretches[work.stretch + 1].first;
    const bool steady = work.at >= now.steady && work.at < now.unsteady;
    const bool recorded = next > now.end && work.at + 2 >= now.end;
    const Piece &piece = work.pieces[work.at];
    mark(MARK_CALL, static_cast<long>(core), static_cast<long>(piece.weight),
         (steady ? MARK_STEADY : 0) | (recorded ? MARK_RECORD : 0));
    call(loop, task, context, uarch, core, piece);
    if (++work.at < now.end) return;
    ++work.stretch;
    size_t skipped = 0;
    for (; work.at < next; ++work.at) skipped += work.pieces[work.at].weight;
    if (skipped > 0) {
        mark(MARK_SKIP, static_cast<long>(core), static_cast<long>(skipped), static_cast<long>(next - now.end));
    }
}

void run(const Loop &loop, void *task, void *context, long uarch) {
    static std::vector<Work> works;  // kept, so that the heap is left alone inside of inferences
    const size_t tiles = loop.tiles(), cores = std::min(pool.threads, std::max<size_t>(tiles, 1));
    if (tiles == 0) return;
    mark(MARK_FORK, static_cast<long>(cores));
    works.resize(std::max(works.size(), cores));
    for (size_t core = 0, first = 0; core < cores; ++core) {
        const size_t end = first + tiles / cores + (core < tiles % cores ? 1 : 0);
        cut(loop, first, end, works[core]);
        first = end;
    }
    for (bool busy = true; busy;) {
        busy = false;
        for (size_t core = 0; core < cores; ++core) {
            if (works[core].done()) continue;
            step(loop, task, context, uarch, core, works[core]);
            busy = true;
        }
    }
    mark(MARK_JOIN);
}

using Arguments = std::array<long, 16>;

// (pool, task, context, [default_uarch, max_uarch], ranges..., tiles..., flags)
void simulate(Loop loop, const Arguments &a) {
    size_t at = 3;
    const long uarch = loop.uarch ? a[at] : 0;
    if (loop.uarch) at += 2;
    for (size_t d = 0; d < loop.dimensions; ++d) loop.range[d] = static_cast<size_t>(a[at++]);
    for (size_t d = 0; d < loop.dimensions; ++d)
        loop.tile[d] = d + loop.tiled < loop.dimensions ? 1 : static_cast<size_t>(a[at++]);
    run(loop, reinterpret_cast<void *>(a[1]), reinterpret_cast<void *>(a[2]), uarch);
}

}  // namespace

namespace simulated_pool {
void enable(unsigned threads, bool sampled) {
    pool.threads = threads;
    pool.sampled = sampled;
    pool.on = true;
}
}  // namespace simulated_pool

// The real functions take at most as many words as this; what is given beyond their own is not read.
#define WORDS                                                                                                      \
    long a0, long a1, long a2, long a3, long a4, long a5, long a6, long a7, long a8, long a9, long a10, long a11, \
        long a12, long a13, long a14, long a15
#define GIVEN a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15

#define LOOP(name, dimensions, tiled, uarch, thread, dynamic)                                    \
    extern "C" void pthreadpool_parallelize_##name(WORDS) {                                      \
        if (pool.on) return simulate({dimensions, tiled, uarch, thread, dynamic}, {GIVEN});      \
        static const auto real =                                                                 \
            reinterpret_cast<void (*)(WORDS)>(dlsym(RTLD_NEXT, "pthreadpool_parallelize_" #name)); \
        real(GIVEN);                                                                             \
    }

//   name                                             dimensions, tiled, uarch, thread, dynamic
LOOP(1d,                                              1, 0, false, false, false)
LOOP(1d_with_thread,                                  1, 0, false, true, false)
LOOP(1d_with_uarch,                                   1, 0, true, false, false)
LOOP(1d_tile_1d,                                      1, 1, false, false, false)
LOOP(1d_tile_1d_dynamic,                              1, 1, false, false, true)
LOOP(1d_tile_1d_dynamic_with_thread,                  1, 1, false, true, true)
LOOP(1d_tile_1d_dynamic_with_uarch_with_thread,       1, 1, true, true, true)
LOOP(2d,                                              2, 0, false, false, false)
LOOP(2d_with_thread,                                  2, 0, false, true, false)
LOOP(2d_tile_1d,                                      2, 1, false, false, false)
LOOP(2d_tile_1d_with_uarch,                           2, 1, true, false, false)
LOOP(2d_tile_1d_with_uarch_with_thread,               2, 1, true, true, false)
LOOP(2d_tile_1d_dynamic,                              2, 1, false, false, true)
LOOP(2d_tile_1d_dynamic_with_thread,                  2, 1, false, true, true)
LOOP(2d_tile_1d_dynamic_with_uarch_with_thread,       2, 1, true, true, true)
LOOP(2d_tile_2d,                                      2, 2, false, false, false)
LOOP(2d_tile_2d_with_uarch,                           2, 2, true, false, false)
LOOP(2d_tile_2d_dynamic,                              2, 2, false, false, true)
LOOP(2d_tile_2d_dynamic_with_thread,                  2, 2, false, true, true)
LOOP(2d_tile_2d_dynamic_with_uarch,                   2, 2, true, false, true)
LOOP(3d,                                              3, 0, false, false, false)
LOOP(3d_tile_1d,                                      3, 1, false, false, false)
LOOP(3d_tile_1d_with_thread,                          3, 1, false, true, false)
LOOP(3d_tile_1d_with_uarch,                           3, 1, true, false, false)
LOOP(3d_tile_1d_with_uarch_with_thread,               3, 1, true, true, false)
LOOP(3d_tile_1d_dynamic,                              3, 1, false, false, true)
LOOP(3d_tile_1d_dynamic_with_thread,                  3, 1, false, true, true)
LOOP(3d_tile_1d_dynamic_with_uarch_with_thread,       3, 1, true, true, true)
LOOP(3d_tile_2d,                                      3, 2, false, false, false)
LOOP(3d_tile_2d_with_uarch,                           3, 2, true, false, false)
LOOP(3d_tile_2d_dynamic,                              3, 2, false, false, true)
LOOP(3d_tile_2d_dynamic_with_thread,                  3, 2, false, true, true)
LOOP(3d_tile_2d_dynamic_with_uarch,                   3, 2, true, false, true)
LOOP(4d,                                              4, 0, false, false, false)
LOOP(4d_tile_1d,                                      4, 1, false, false, false)
LOOP(4d_tile_2d,                                      4, 2, false, false, false)
LOOP(4d_tile_2d_with_uarch,                           4, 2, true, false, false)
LOOP(4d_tile_2d_dynamic,                              4, 2, false, false, true)
LOOP(4d_tile_2d_dynamic_with_uarch,                   4, 2, true, false, true)
LOOP(5d,                                              5, 0, false, false, false)
LOOP(5d_tile_1d,                                      5, 1, false, false, false)
LOOP(5d_tile_2d,                                      5, 2, false, false, false)
LOOP(6d,                                              6, 0, false, false, false)
LOOP(6d_tile_1d,                                      6, 1, false, false, false)
LOOP(6d_tile_2d,                                      6, 2, false, false, false)

extern "C" size_t pthreadpool_get_threads_count(void *threadpool) {
    if (pool.on) return pool.threads;
    static const auto real = reinterpret_cast<size_t (*)(void *)>(dlsym(RTLD_NEXT, "pthreadpool_get_threads_count"));
    return real(threadpool);
}
