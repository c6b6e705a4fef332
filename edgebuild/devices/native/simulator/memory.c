#include "memory.h"
#include "allocate.h"

#include <stdlib.h>
#include <string.h>

// ------------------------------------------------------------------------------------------------------ bandwidth

// A resource that serves one request in each interval. Requests of several cores come in out of order, a piece of one
// core's work after a piece of another's, so that "free from here on" would make the second wait for the first. Time is
// cut into windows instead, and a request takes its share of the first window that has room.
enum { WINDOW = 256, WINDOWS = 1 << 15 };

struct channel {
    double interval;
    double *used;     // cycles taken of each window
    uint64_t *stamp;  // which window the slot stands for now
};

static void channel_create(struct channel *channel, double interval) {
    channel->interval = interval;
    channel->used = allocated(calloc(WINDOWS, sizeof *channel->used));
    channel->stamp = allocated(calloc(WINDOWS, sizeof *channel->stamp));
}

static void channel_destroy(struct channel *channel) {
    free(channel->used);
    free(channel->stamp);
}

static double *used_of(struct channel *channel, uint64_t window) {
    const unsigned slot = window % WINDOWS;
    if (channel->stamp[slot] != window) {
        channel->stamp[slot] = window;
        channel->used[slot] = 0;
    }
    return &channel->used[slot];
}

// The cycle in which a request of cycle `now` is served.
static uint64_t channel_take(struct channel *channel, uint64_t now) {
    if (channel->interval == 0) return now;
    for (uint64_t window = now / WINDOW;; window++) {
        double *used = used_of(channel, window);
        if (*used >= WINDOW) continue;
        const uint64_t start = window * WINDOW + (uint64_t)*used;
        *used += channel->interval;
        // What does not fit into this window is paid by the next one that has room, or by several.
        while (*used > WINDOW) {
            const double over = *used - WINDOW;
            *used = WINDOW;
            used = used_of(channel, ++window);
            *used += over;
        }
        return start > now ? start : now;
    }
}

// --------------------------------------------------------------------------------------------------------- caches

#define NO_LINE UINT64_MAX

struct line {
    uint64_t number;  // address / LINE
    uint64_t ready;   // cycle in which the data are there
    uint32_t used;    // when it was last used
    bool dirty, prefetched;
    uint8_t origin;
    uint8_t core;     // that asked for it
};

struct cache {
    uint64_t sets;
    unsigned ways;
    bool random;
    uint32_t tick;
    struct line *lines;
};

static void cache_empty(struct cache *cache) {
    for (uint64_t i = 0; i < cache->sets * cache->ways; i++) cache->lines[i].number = NO_LINE;
}

static void cache_create(struct cache *cache, const struct level *level) {
    cache->ways = level->ways;
    cache->sets = level->bytes / LINE / level->ways;
    cache->random = level->random;
    cache->tick = 0;
    cache->lines = allocated(calloc(cache->sets * cache->ways, sizeof *cache->lines));
    cache_empty(cache);
}

static struct line *cache_set(const struct cache *cache, uint64_t number) {
    return cache->lines + (number % cache->sets) * cache->ways;
}

static struct line *cache_find(struct cache *cache, uint64_t number) {
    struct line *set = cache_set(cache, number);
    for (unsigned way = 0; way < cache->ways; way++)
        if (set[way].number == number) {
            set[way].used = ++cache->tick;
            return &set[way];
        }
    return NULL;
}

// The line that makes room in the set of `number`.
static struct line *cache_victim(struct cache *cache, uint64_t number) {
    struct line *set = cache_set(cache, number);
    for (unsigned way = 0; way < cache->ways; way++)
        if (set[way].number == NO_LINE) return &set[way];
    if (cache->random) {
        // A counter that runs with the misses, as cores have it; hashed, so that sets do not walk in step.
        const uint64_t hash = ++cache->tick * 0x9E3779B97F4A7C15u;
        return &set[(hash >> 40) % cache->ways];
    }
    struct line *oldest = set;
    for (unsigned way = 1; way < cache->ways; way++)
        if ((int32_t)(set[way].used - oldest->used) < 0) oldest = &set[way];
    return oldest;
}

static void cache_put(struct cache *cache, struct line *line, uint64_t number, uint64_t ready, bool dirty,
                      enum origin origin, unsigned core) {
    *line = (struct line){number, ready, ++cache->tick, dirty, false, (uint8_t)origin, (uint8_t)core};
}

static void cache_forget(struct cache *cache, uint64_t number) {
    struct line *set = cache_set(cache, number);
    for (unsigned way = 0; way < cache->ways; way++)
        if (set[way].number == number) set[way].number = NO_LINE;
}

// --------------------------------------------------------------------------------------------------- one machine

// A run of L1 misses over neighbouring lines.
struct stream {
    uint64_t last, used;        // the last miss, and when
    uint64_t head, far_head;    // the last lines asked for, into L1 and into L2
    int direction, confidence;
};
enum { STREAMS = 16, PAGE_LINES = 4096 / LINE };

struct private {
    struct cache l1;
    struct channel l2, memory;           // what one core can get from L2 and from memory
    uint64_t fill[MAX_FILL_BUFFERS];     // when each line fill buffer is free
    uint64_t written_back[MAX_FILL_BUFFERS], write_backs;  // ring of the cycles in which memory takes lines
    uint64_t write_back_free;            // when there is a write-back buffer for the next line
    struct stream stream[STREAMS];
    uint64_t stream_tick;
    uint64_t written;                    // the last line that was written
    unsigned written_run;                // neighbouring lines written before it
    struct traffic traffic;
};

struct page {
    uint64_t key, number;
};
// Memory is taken to be given out in blocks of 64 KiB, the least that spreads over all sets of the caches here. By single
// pages it would depend on the order of their first touch which sets they share, and samples would not be alike.
enum { PAGE_BITS = 16, RECENT_PAGES = 1024 };

struct memory {
    struct description d;
    unsigned l2s, far;  // how many L2 there are; lines that the prefetcher runs ahead into L2
    struct cache l2[MAX_CORES], l3;
    struct channel l2_output[MAX_CORES], l3_output, all;
    struct private core[MAX_CORES];
    struct page *pages, recent[RECENT_PAGES];
    uint64_t page_count, page_capacity;
};

struct memory *memory_create(const struct description *description) {
    struct memory *memory = allocated(calloc(1, sizeof *memory));
    const struct description *d = &memory->d;
    memory->d = *description;
    memory->l2s = d->l2.shared ? 1 : d->cores;
    // Little's law: to stream at full rate, that many lines must be on their way. ("A proof for the queuing formula
    // L = lambda W", Operations Research 9(3), 1961.)
    memory->far = (unsigned)(d->memory_latency / d->memory_one_core) + 2;
    for (unsigned i = 0; i < memory->l2s; i++) {
        cache_create(&memory->l2[i], &d->l2);
        channel_create(&memory->l2_output[i], d->l2.interval_all);
    }
    if (d->l3.bytes) {
        cache_create(&memory->l3, &d->l3);
        channel_create(&memory->l3_output, d->l3.interval_all);
    }
    channel_create(&memory->all, d->memory_all_cores);
    for (unsigned i = 0; i < d->cores; i++) {
        cache_create(&memory->core[i].l1, &d->l1);
        channel_create(&memory->core[i].l2, d->l2.interval);
        channel_create(&memory->core[i].memory, d->memory_one_core);
    }
    for (unsigned i = 0; i < RECENT_PAGES; i++) memory->recent[i].key = NO_LINE;
    return memory;
}

void memory_destroy(struct memory *memory) {
    for (unsigned i = 0; i < memory->l2s; i++) {
        free(memory->l2[i].lines);
        channel_destroy(&memory->l2_output[i]);
    }
    if (memory->d.l3.bytes) {
        free(memory->l3.lines);
        channel_destroy(&memory->l3_output);
    }
    channel_destroy(&memory->all);
    for (unsigned i = 0; i < memory->d.cores; i++) {
        free(memory->core[i].l1.lines);
        channel_destroy(&memory->core[i].l2);
        channel_destroy(&memory->core[i].memory);
    }
    free(memory->pages);
    free(memory);
}

void memory_empty(struct memory *memory) {
    for (unsigned i = 0; i < memory->l2s; i++) cache_empty(&memory->l2[i]);
    if (memory->d.l3.bytes) cache_empty(&memory->l3);
    for (unsigned i = 0; i < memory->d.cores; i++) cache_empty(&memory->core[i].l1);
}

static struct page *page_slot(struct page *pages, uint64_t capacity, uint64_t key) {
    uint64_t at = (key * 0x9E3779B97F4A7C15u >> 20) & (capacity - 1);
    while (pages[at].key != NO_LINE && pages[at].key != key) at = (at + 1) & (capacity - 1);
    return &pages[at];
}

uint64_t memory_number(struct memory *memory, uint64_t address) {
    const uint64_t key = address >> PAGE_BITS, offset = address & ((1u << PAGE_BITS) - 1);
    struct page *recent = &memory->recent[key % RECENT_PAGES];
    if (recent->key != key) {
        if (memory->page_count * 2 >= memory->page_capacity) {
            const uint64_t capacity = memory->page_capacity ? memory->page_capacity * 2 : 4096;
            struct page *pages = allocated(malloc(capacity * sizeof *pages));
            for (uint64_t i = 0; i < capacity; i++) pages[i].key = NO_LINE;
            for (uint64_t i = 0; i < memory->page_capacity; i++)
                if (memory->pages[i].key != NO_LINE) *page_slot(pages, capacity, memory->pages[i].key) = memory->pages[i];
            free(memory->pages);
            memory->pages = pages;
            memory->page_capacity = capacity;
        }
        struct page *page = page_slot(memory->pages, memory->page_capacity, key);
        if (page->key == NO_LINE) *page = (struct page){key, memory->page_count++};
        *recent = *page;
    }
    return recent->number << PAGE_BITS | offset;
}

const struct traffic *memory_traffic(const struct memory *memory, unsigned core) {
    return &memory->core[core].traffic;
}

static unsigned l2_of(const struct memory *memory, unsigned core) { return memory->l2s == 1 ? 0 : core; }

static uint64_t from_memory(struct memory *memory, unsigned core, uint64_t now) {
    struct private *own = &memory->core[core];
    own->traffic.memory_bytes += LINE;
    const uint64_t one = channel_take(&own->memory, now), all = channel_take(&memory->all, now);
    return one > all ? one : all;
}

// A dirty line leaves the caches. It lies in a write-back buffer until memory takes it; who needs a buffer while all are
// full waits (see `fill`). How many there are is not published: as many as there are line fill buffers.
static void to_memory(struct memory *memory, unsigned core, uint64_t now) {
    struct private *own = &memory->core[core];
    own->traffic.memory_bytes += LINE;
    const uint64_t one = channel_take(&own->memory, now), all = channel_take(&memory->all, now);
    own->written_back[own->write_backs++ % memory->d.fill_buffers] = one > all ? one : all;
    own->write_back_free = own->written_back[own->write_backs % memory->d.fill_buffers];
}

// Puts a line into L3, or lets it pass where there is none.
static void put_l3(struct memory *memory, unsigned core, uint64_t number, uint64_t now, uint64_t ready, bool dirty) {
    if (!memory->d.l3.bytes) {
        if (dirty) to_memory(memory, core, now);
        return;
    }
    struct line *line = cache_find(&memory->l3, number);
    if (line != NULL) {
        line->dirty |= dirty;
        return;
    }
    line = cache_victim(&memory->l3, number);
    if (line->number != NO_LINE && line->dirty) to_memory(memory, core, now);
    cache_put(&memory->l3, line, number, ready, dirty, FROM_MEMORY, core);
}

static void put_l2(struct memory *memory, unsigned core, uint64_t number, uint64_t now, uint64_t ready, bool dirty,
                   enum origin origin) {
    struct cache *l2 = &memory->l2[l2_of(memory, core)];
    struct line *line = cache_victim(l2, number);
    if (line->number != NO_LINE && line->dirty) put_l3(memory, core, line->number, now, now, true);
    cache_put(l2, line, number, ready, dirty, origin, core);
}

static bool elsewhere(struct memory *memory, unsigned core, uint64_t number) {
    for (unsigned i = 0; i < memory->l2s; i++)
        if (i != l2_of(memory, core) && cache_find(&memory->l2[i], number) != NULL) return true;
    return false;
}

// When a line in a shared level is there for a core. Pieces of work are simulated one core after the other, so that
// another core may have brought it at a later time than now; this core would then have asked memory for it itself.
static uint64_t arrival(const struct memory *memory, const struct line *line, unsigned core, uint64_t now) {
    const uint64_t itself = now + (uint64_t)memory->d.memory_latency;
    return line->core != core && line->ready > itself ? itself : line->ready;
}

// Brings a line that L2 does not have from further below. Returns when its data are there. Without `read`, the whole line
// is about to be written, and there is nothing to wait for.
static uint64_t fetch(struct memory *memory, unsigned core, uint64_t number, uint64_t now, bool read,
                      enum origin *origin) {
    const struct description *d = &memory->d;
    struct traffic *traffic = &memory->core[core].traffic;
    uint64_t ready = now;
    traffic->l2_misses++;
    *origin = FROM_L2;
    if (read) {
        struct line *third = d->l3.bytes ? cache_find(&memory->l3, number) : NULL;
        if (third != NULL || elsewhere(memory, core, number)) {
            ready = channel_take(&memory->l3_output, now) + d->l2.latency + d->l3.latency;
            *origin = FROM_L3;
            if (third != NULL && arrival(memory, third, core, now) > ready) {
                ready = arrival(memory, third, core, now);
                *origin = FROM_MEMORY;
            }
        } else {
            traffic->l3_misses++;
            ready = from_memory(memory, core, now) + (uint64_t)d->memory_latency;
            *origin = FROM_MEMORY;
            put_l3(memory, core, number, now, ready, false);
        }
    }
    put_l2(memory, core, number, now, ready, false, *origin);
    return ready;
}

// When the levels below L1 have the line for a core.
static uint64_t below(struct memory *memory, unsigned core, uint64_t number, uint64_t now, bool read,
                      enum origin *origin) {
    const unsigned which = l2_of(memory, core);
    const uint64_t own = channel_take(&memory->core[core].l2, now);
    const uint64_t start = channel_take(&memory->l2_output[which], own), hit = start + memory->d.l2.latency;
    struct line *line = cache_find(&memory->l2[which], number);
    if (line == NULL) {
        const uint64_t ready = fetch(memory, core, number, start, read, origin);
        return ready > hit ? ready : hit;
    }
    const uint64_t ready = arrival(memory, line, core, start);
    *origin = ready > hit ? line->origin : FROM_L2;
    return ready > hit ? ready : hit;
}

// A line leaves L1.
static void evict(struct memory *memory, unsigned core, const struct line *line, uint64_t now) {
    if (line->number == NO_LINE || !line->dirty) return;
    struct line *kept = cache_find(&memory->l2[l2_of(memory, core)], line->number);
    if (kept != NULL)
        kept->dirty = true;
    else
        put_l2(memory, core, line->number, now, now, true, FROM_L2);
}

static struct line *fill(struct memory *memory, unsigned core, uint64_t number, uint64_t now, bool read,
                         bool prefetch) {
    struct private *own = &memory->core[core];
    uint64_t start = now, *buffer = NULL;
    if (!prefetch) {
        buffer = own->fill;
        for (unsigned i = 1; i < memory->d.fill_buffers; i++)
            if (own->fill[i] < *buffer) buffer = &own->fill[i];
        if (*buffer > start) start = *buffer;
    }
    enum origin origin;
    uint64_t ready = below(memory, core, number, start, read, &origin);
    struct line *line = cache_victim(&own->l1, number);
    evict(memory, core, line, start);
    if (own->write_back_free > ready) {
        ready = own->write_back_free;
        origin = FROM_MEMORY;
    }
    if (buffer != NULL) *buffer = ready;
    cache_put(&own->l1, line, number, ready, false, origin, core);
    line->prefetched = prefetch;
    return line;
}

// The next line that a stream asks for to stay `distance` lines ahead of a line; false where it is so far already, or at
// the first line of all.
static bool ahead(uint64_t *head, uint64_t number, int64_t direction, unsigned distance, bool within_page,
                  uint64_t *next) {
    if ((int64_t)(*head - number) * direction < 0) *head = number;
    if ((int64_t)(*head - number) * direction >= (int64_t)distance) return false;
    if (*head == 0 && direction < 0) return false;
    *next = *head + (uint64_t)direction;
    if (within_page && *next / PAGE_LINES != number / PAGE_LINES) return false;
    *head = *next;
    return true;
}

// Follows streams of misses, upward or downward, and stays ahead of each, in-order cores within a page. It also stands in
// the kernels' own prefetch instructions: an emulator does not report their addresses.
static void prefetch(struct memory *memory, unsigned core, uint64_t number, uint64_t now) {
    struct private *own = &memory->core[core];
    struct stream *stream = NULL;
    for (unsigned i = 0; i < STREAMS && stream == NULL; i++) {
        const int64_t step = (int64_t)(number - own->stream[i].last);
        if (own->stream[i].used == 0 || step < -3 || step > 3) continue;
        stream = &own->stream[i];
        stream->used = ++own->stream_tick;
        if (step == 0) return;
        const int direction = step > 0 ? 1 : -1;
        if (direction != stream->direction) {
            stream->direction = direction;
            stream->confidence = 0;
            stream->head = stream->far_head = number;
        }
        if (stream->confidence < 4) stream->confidence++;
        stream->last = number;
    }
    if (stream == NULL) {
        stream = own->stream;
        for (unsigned i = 1; i < STREAMS; i++)
            if (own->stream[i].used < stream->used) stream = &own->stream[i];
        *stream = (struct stream){number, ++own->stream_tick, number, number, 1, 0};
        return;
    }
    if (stream->confidence < 2) return;
    const int64_t direction = stream->direction;
    // Into L2 as far ahead as memory needs to deliver at its full rate; into L1 a few lines.
    uint64_t far, near;
    while (ahead(&stream->far_head, number, direction, memory->far, memory->d.in_order, &far)) {
        enum origin origin;
        if (cache_find(&memory->l2[l2_of(memory, core)], far) == NULL) fetch(memory, core, far, now, true, &origin);
    }
    while (ahead(&stream->head, number, direction, memory->d.prefetch, memory->d.in_order, &near))
        if (cache_find(&own->l1, near) == NULL) fill(memory, core, near, now, true, true);
}

uint64_t memory_load(struct memory *memory, unsigned core, uint64_t now, uint64_t address, unsigned size,
                     enum origin *origin) {
    struct private *own = &memory->core[core];
    uint64_t done = now;
    *origin = FROM_L1;
    for (uint64_t number = address / LINE; number <= (address + size - 1) / LINE; number++) {
        own->traffic.accesses++;
        struct line *line = cache_find(&own->l1, number);
        if (line == NULL) {
            own->traffic.l1_misses++;
            line = fill(memory, core, number, now, true, false);
            const uint64_t ready = line->ready;
            if (ready > done) {
                done = ready;
                *origin = line->origin;
            }
            prefetch(memory, core, number, now);
            continue;
        }
        if (line->ready > done) {
            done = line->ready;
            *origin = line->origin;
        }
        if (line->prefetched) {
            line->prefetched = false;
            prefetch(memory, core, number, now);
        }
    }
    return done;
}

uint64_t memory_store(struct memory *memory, unsigned core, uint64_t now, uint64_t address, unsigned size,
                      enum origin *origin) {
    struct private *own = &memory->core[core];
    uint64_t done = now;
    *origin = FROM_L1;
    for (uint64_t number = address / LINE; number <= (address + size - 1) / LINE; number++) {
        own->traffic.accesses++;
        if (number == own->written + 1)
            own->written_run++;
        else if (number != own->written)
            own->written_run = 0;
        own->written = number;
        struct line *line = cache_find(&own->l1, number);
        if (line == NULL) {
            own->traffic.l1_misses++;
            // After a few whole lines in a row the core stops reading what it is about to overwrite.
            line = fill(memory, core, number, now, own->written_run < 3, false);
        }
        if (!line->dirty) {
            line->dirty = true;
            for (unsigned other = 0; other < memory->d.cores; other++) {
                if (other == core) continue;
                cache_forget(&memory->core[other].l1, number);
                if (l2_of(memory, other) != l2_of(memory, core)) cache_forget(&memory->l2[other], number);
            }
        }
        if (line->ready > done) {
            done = line->ready;
            *origin = line->origin;
        }
    }
    return done;
}

void memory_touch(struct memory *memory, unsigned core, uint64_t number, bool write) {
    struct line *line = cache_find(&memory->l2[l2_of(memory, core)], number);
    if (line != NULL) {
        line->dirty |= write;
        return;
    }
    struct cache *l2 = &memory->l2[l2_of(memory, core)];
    line = cache_victim(l2, number);
    if (memory->d.l3.bytes) {
        struct cache *l3 = &memory->l3;
        if (line->number != NO_LINE && line->dirty) {
            struct line *third = cache_find(l3, line->number);
            if (third != NULL)
                third->dirty = true;
            else
                cache_put(l3, cache_victim(l3, line->number), line->number, 0, true, FROM_MEMORY, core);
        }
        if (cache_find(l3, number) == NULL) cache_put(l3, cache_victim(l3, number), number, 0, false, FROM_MEMORY, core);
    }
    cache_put(l2, line, number, 0, write, FROM_L2, core);
}
