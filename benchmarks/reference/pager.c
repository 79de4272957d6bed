/* The reference: the shortest C pager that does the job, to measure ours against.
 *
 *   pager FILE SIZE BLOCK thread|process TOUCHER_CPU PAGER_CPU sequential|shuffled
 *
 * A shared memfd mapping of SIZE bytes is registered with userfaultfd. A thread, or a forked process, blocks in read(2)
 * and answers each fault with one UFFDIO_COPY of BLOCK bytes straight from a mapping of FILE: no statistics, no state,
 * no error recovery. The main thread touches one byte of each page. CPU -1 leaves a side to the scheduler. FILE is one
 * BLOCK longer than SIZE: that block is touched first, untimed, so that both sides are running when the clock starts.
 * The userfaultfd is for user-mode faults only, which costs the same and needs no privilege.
 * Prints "NANOSECONDS SUM". Compile: cc -O2 -Wall -Wextra -Werror pager.c touch.c -o pager -pthread
 */
#define _GNU_SOURCE
#include "reference.h"

#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int uffd, pager_cpu;
static uint64_t region, source, block;

static void pin(int cpu)
{
    cpu_set_t set;

    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        err(1, "sched_setaffinity(%d)", cpu);
}

static void *serve(void *unused)
{
    struct uffd_msg message;

    pin(pager_cpu);
    while (read(uffd, &message, sizeof message) == sizeof message) {
        uint64_t offset = (message.arg.pagefault.address - region) & ~(block - 1);
        struct uffdio_copy copy = { .dst = region + offset, .src = source + offset, .len = block };

        if (ioctl(uffd, UFFDIO_COPY, &copy) && errno != EEXIST)
            err(1, "UFFDIO_COPY");
    }
    return unused;
}

static void start(int as_process)
{
    pthread_t thread;

    if (!as_process) {
        if ((errno = pthread_create(&thread, NULL, serve, NULL)))
            err(1, "pthread_create");
        return;
    }
    pid_t child = fork();
    if (child < 0)
        err(1, "fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        serve(NULL);
        _exit(1);
    }
}

/* A shared mapping of `size` bytes at an address aligned to the block. */
static uint64_t map_aligned(int fd, uint64_t size, int extra)
{
    uint64_t room = (uint64_t)mmap(NULL, size + block, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t address = (room + block - 1) & ~(block - 1);

    if (mmap((void *)address, size, PROT_READ, MAP_SHARED | MAP_FIXED | extra, fd, 0) == MAP_FAILED)
        err(1, "mmap");
    return address;
}

int main(int argc, char **argv)
{
    if (argc != 8)
        errx(2, "usage: FILE SIZE BLOCK thread|process TOUCHER_CPU PAGER_CPU sequential|shuffled");
    uint64_t size = strtoull(argv[2], NULL, 10), page = (uint64_t)sysconf(_SC_PAGESIZE), sum;
    struct uffdio_api api = { .api = UFFD_API };
    int file = open(argv[1], O_RDONLY | O_CLOEXEC), memory = memfd_create("reference", MFD_CLOEXEC);

    block = strtoull(argv[3], NULL, 10);
    pager_cpu = atoi(argv[6]);
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);
    if (file < 0 || memory < 0 || ftruncate(memory, (off_t)(size + block)))
        err(1, "%s", argv[1]);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
        err(1, "userfaultfd");
    region = map_aligned(memory, size + block, 0);
    source = map_aligned(file, size + block, 0);
    madvise((void *)region, size + block, MADV_DONTFORK);
    struct uffdio_register range = { .range = { region, size + block }, .mode = UFFDIO_REGISTER_MODE_MISSING };
    if (ioctl(uffd, UFFDIO_REGISTER, &range))
        err(1, "UFFDIO_REGISTER");

    uint64_t *order = malloc(size / page * sizeof *order), last = size;
    page_order(order, size / page, page, !strcmp(argv[7], "shuffled"));
    start(!strcmp(argv[4], "process"));
    pin(atoi(argv[5]));
    touch_pages((unsigned char *)region, &last, 1, &sum);
    uint64_t elapsed = touch_pages((unsigned char *)region, order, size / page, &sum);
    printf("%llu %llu\n", (unsigned long long)elapsed, (unsigned long long)sum);
    return 0;
}
