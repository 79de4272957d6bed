/* What the reference programs share: the touching loop (touch.c). */
#ifndef REFERENCE_H
#define REFERENCE_H

#include <stdint.h>

uint64_t now_ns(void);
void page_order(uint64_t *order, uint64_t count, uint64_t page, int shuffled);
uint64_t touch_pages(const volatile unsigned char *base, const uint64_t *order, uint64_t count, uint64_t *sum);

#endif
