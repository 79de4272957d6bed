/* The touching side of every row: one byte read from each page, in a given order.
 *
 * Linked into the reference programs, and built as a shared object that the benchmark calls through ctypes (which
 * releases the GIL), so that the C pager and ours are touched by the very same loop.
 */
#include "reference.h"

#include <time.h>

uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Fill `order` with the offsets of `count` pages: ascending, or shuffled (Fisher-Yates on xorshift64, fixed seed). */
void page_order(uint64_t *order, uint64_t count, uint64_t page, int shuffled)
{
    uint64_t state = 88172645463325252u;

    for (uint64_t i = 0; i < count; i++)
        order[i] = i * page;
    for (uint64_t i = count; shuffled && i > 1; i--) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        uint64_t other = state % i, kept = order[i - 1];
        order[i - 1] = order[other];
        order[other] = kept;
    }
}

/* Read one byte at each offset; store their sum and return the nanoseconds it took. */
uint64_t touch_pages(const volatile unsigned char *base, const uint64_t *order, uint64_t count, uint64_t *sum)
{
    uint64_t start = now_ns(), total = 0;

    for (uint64_t i = 0; i < count; i++)
        total += base[order[i]];
    *sum = total;
    return now_ns() - start;
}
