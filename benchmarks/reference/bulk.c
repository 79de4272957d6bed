/* The ceiling: UFFDIO_COPY into a memfd with no faults at all, one call after another.
 *
 *   bulk FILE SIZE CALL CPU
 *
 * Installs SIZE bytes of FILE, CALL bytes at a time, straight from a mapping of the file, which is in the page cache and
 * touched beforehand. Prints "NANOSECONDS SUM", the sum of one byte of each page, taken after the clock has stopped.
 * Compile: cc -O2 -Wall -Wextra -Werror bulk.c touch.c -o bulk
 */
#define _GNU_SOURCE
#include "reference.h"

#include <err.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static uint64_t map_shared(int fd, uint64_t size, int flags)
{
    void *address = mmap(NULL, size, PROT_READ, MAP_SHARED | flags, fd, 0);

    if (address == MAP_FAILED)
        err(1, "mmap");
    return (uint64_t)address;
}

static void pin(int cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (cpu >= 0 && sched_setaffinity(0, sizeof set, &set))
        err(1, "sched_setaffinity(%d)", cpu);
}

int main(int argc, char **argv)
{
    if (argc != 5)
        errx(2, "usage: FILE SIZE CALL CPU");
    uint64_t size = strtoull(argv[2], NULL, 10), call = strtoull(argv[3], NULL, 10), sum;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), *order = malloc(size / page * sizeof *order);
    struct uffdio_api api = { .api = UFFD_API };
    int file = open(argv[1], O_RDONLY | O_CLOEXEC), memory = memfd_create("bulk", MFD_CLOEXEC);
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

    pin(atoi(argv[4]));
    if (file < 0 || memory < 0 || ftruncate(memory, (off_t)size))
        err(1, "%s", argv[1]);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        err(1, "userfaultfd");
    uint64_t region = map_shared(memory, size, 0), source = map_shared(file, size, MAP_POPULATE);
    struct uffdio_register range = { .range = { region, size }, .mode = UFFDIO_REGISTER_MODE_MISSING };
    if (ioctl(uffd, UFFDIO_REGISTER, &range))
        err(1, "UFFDIO_REGISTER");

    uint64_t start = now_ns();
    for (uint64_t offset = 0; offset < size; offset += call) {
        struct uffdio_copy copy = { .dst = region + offset, .src = source + offset, .len = call };

        if (ioctl(uffd, UFFDIO_COPY, &copy))
            err(1, "UFFDIO_COPY");
    }
    uint64_t elapsed = now_ns() - start;
    page_order(order, size / page, page, 0);
    touch_pages((unsigned char *)region, order, size / page, &sum);
    printf("%llu %llu\n", (unsigned long long)elapsed, (unsigned long long)sum);
    return 0;
}
