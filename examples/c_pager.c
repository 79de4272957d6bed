/* A pager in C for the memory of another program: read, write, poll and mmap, and nothing of userfault.
 *
 *   c_pager FD MEMORY_FD ADDRESS SIZE FILE
 *
 * FD is the exported descriptor (`Exported.fileno()`), MEMORY_FD the memory as a file. The other program sees the memory
 * at ADDRESS, which is how faults are numbered; it begins at the beginning of MEMORY_FD. Its bytes are those of FILE, and
 * zeros behind FILE's end. array_from_c.py starts this one. Whoever writes one in another language needs to know:
 *
 * - Each message is one 64-bit word, or two, in the machine's byte order, and takes one read or write.
 * - A page that has been written is not seen yet: the range write lets it be seen, all of it at once.
 * - **Never write a page again that has been announced**: the other program may have changed it. A fault is one thread:
 *   two threads in one page are two faults, and after the pager process of userfault was replaced one may be told again.
 *   (A pager that drops pages, by punching holes into MEMORY_FD, forgets that it has announced them.)
 * - But answer every one. What was answered before already does no harm.
 * - A page of zeros has to be written as well. What is nowhere in the file stays missing, and is asked for again.
 *
 * Compile: cc -O2 -Wall -Wextra -Werror c_pager.c -o c_pager
 */
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PROTOCOL 0xaaull

static int fd;

/* Say which protocol this is. The answer is the same number, or all ones if the other side does not know it. */
static void shake_hands(void)
{
    uint64_t protocol = PROTOCOL, answer = 0;

    if (write(fd, &protocol, sizeof protocol) != sizeof protocol || read(fd, &answer, sizeof answer) != sizeof answer)
        err(1, "handshake");
    if (answer != protocol)
        errx(1, "the protocol %#llx is not known there", (unsigned long long)protocol);
}

/* Wait for the next fault and read its address. Returns 0 when the memory is gone. */
static int next_fault(uint64_t *address)
{
    struct pollfd one = { .fd = fd, .events = POLLIN }; /* a pager with several memories has several of these */

    for (;;) {
        if (poll(&one, 1, -1) < 0 && errno != EINTR)
            err(1, "poll");
        ssize_t length = read(fd, address, sizeof *address);
        if (length == sizeof *address)
            return 1;
        if (length == 0 || errno == ECONNRESET) /* ECONNRESET: gone, and has not looked at all that was written */
            return 0;
        if (errno != EINTR && errno != EAGAIN) /* EAGAIN: somebody has made FD non-blocking */
            err(1, "read");
    }
}

/* Fill a page from the file, with zeros behind its end. */
static void fill(char *page, size_t size, int file, off_t offset)
{
    size_t done = 0;
    ssize_t length;

    while (done < size && (length = pread(file, page + done, size - done, offset + (off_t)done)) != 0)
        if (length > 0)
            done += (size_t)length;
        else if (errno != EINTR)
            err(1, "pread"); /* the thread goes on waiting: for another pager, after Exported.renew() */
    memset(page + done, 0, size - done);
}

int main(int argc, char **argv)
{
    if (argc != 6)
        errx(2, "usage: FD MEMORY_FD ADDRESS SIZE FILE");
    uint64_t start = strtoull(argv[3], NULL, 0), size = strtoull(argv[4], NULL, 0), address, faults = 0;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    int file = open(argv[5], O_RDONLY | O_CLOEXEC);
    char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, atoi(argv[2]), 0);
    char *announced = calloc(size / page, 1);

    fd = atoi(argv[1]);
    if (file < 0)
        err(1, "%s", argv[5]);
    if (memory == MAP_FAILED || !announced)
        err(1, "memory");
    signal(SIGPIPE, SIG_IGN); /* to answer when the memory is gone is EPIPE, and no reason to be killed */
    shake_hands();
    while (next_fault(&address)) {
        uint64_t range[2] = { address & ~(page - 1), (address & ~(page - 1)) + page }, offset = range[0] - start;

        if (offset >= size) /* no fault: who has taken over may repeat the answer of the handshake */
            continue;
        if (!announced[offset / page])
            fill(memory + offset, page, file, (off_t)offset);
        announced[offset / page] = 1;
        if (write(fd, range, sizeof range) < 0 && errno != EPIPE)
            err(1, "write");
        faults++;
    }
    printf("%llu faults answered\n", (unsigned long long)faults);
    return 0;
}
