"""The list of every system call that the package makes: who makes it, and with which errnos it may fail.

A call is named as `witness.label` names it: with the operation, or the kind of file.  The roles: **A** the
application, **L** the launcher that it starts, **S** the supervisor, **W** the worker, **T** a trial (`pager.trial`),
and these three while they begin (`pager.boot`, and what Python does before it): **s**, **w**, **t**.

The errnos are what a machine without memory, descriptors, processes or disk space, a signal, a sandbox or a broken
disk may give, as the manual pages have them.  What would be a lie is not among them, since the code believes the
kernel: that nothing is registered there (ENOENT), a process is gone (ESRCH), or there is no data behind this place
(ENXIO).  A call without errnos cannot fail: what is no file of a disk has nothing to flush when it is closed.
"""

from __future__ import annotations

import errno
from typing import NamedTuple


class Entry(NamedTuple):
    """A call of the list.

    Attributes:
        label: What it is.
        roles: Who makes it.
        errnos: How it may fail.
    """

    label: str
    roles: tuple[str, ...]
    errnos: tuple[int, ...]


ROLES = {
    "A": "application",
    "L": "launcher",
    "s": "supervisor's start",
    "S": "supervisor",
    "w": "worker's start",
    "W": "worker",
    "t": "trial's start",
    "T": "trial",
}

_TABLE = """
# userfaultfd
userfaultfd                     A        EINTR ENOMEM EMFILE ENFILE EPERM ENOSYS
openat(userfaultfd's device)    A        EINTR ENOMEM EMFILE ENFILE EPERM EACCES
ioctl(USERFAULTFD_IOC_NEW)      A        EINTR ENOMEM EMFILE ENFILE EPERM
close(userfaultfd's device)     A
close(userfaultfd)              ASW
read(userfaultfd)               AW       EAGAIN EINTR ENOMEM EMFILE EIO
preadv2(userfaultfd)            A        EAGAIN EINTR ENOMEM EIO
ioctl(UFFDIO_API)               A        ENOMEM EPERM EINVAL
ioctl(UFFDIO_REGISTER)          A        ENOMEM EPERM EBUSY
ioctl(UFFDIO_UNREGISTER)        A        ENOMEM EPERM
ioctl(UFFDIO_WAKE)              AW       EPERM
ioctl(UFFDIO_COPY)              AW       EAGAIN EINTR ENOMEM ENOSPC EEXIST EPERM EIO EFAULT
ioctl(UFFDIO_MOVE)              A        EAGAIN EINTR ENOMEM EEXIST EPERM EBUSY
ioctl(UFFDIO_ZEROPAGE)          AW       EAGAIN EINTR ENOMEM EEXIST EPERM
ioctl(UFFDIO_CONTINUE)          W        EAGAIN EINTR ENOMEM EEXIST EPERM
ioctl(UFFDIO_POISON)            ASW      EAGAIN EINTR ENOMEM EEXIST EPERM
ioctl(UFFDIO_WRITEPROTECT)      W        EAGAIN EINTR ENOMEM EPERM
# memory
mmap(anonymous)                 ALsSwWtT EAGAIN ENOMEM EPERM
mmap(memfd)                     ASWT     EAGAIN ENOMEM EPERM
mmap(file)                      W        EAGAIN ENOMEM EPERM ENODEV
munmap                          ALsSwWtT ENOMEM
mprotect                        ALsSwWtT ENOMEM EACCES
mremap                          A        EAGAIN ENOMEM
madvise(MADV_DODUMP)            A        EAGAIN ENOMEM EPERM
madvise(MADV_DOFORK)            A        EAGAIN ENOMEM EPERM
madvise(MADV_DONTDUMP)          AWT      EAGAIN ENOMEM EPERM
madvise(MADV_DONTFORK)          A        EAGAIN ENOMEM EPERM
madvise(MADV_DONTNEED)          AW       EAGAIN ENOMEM EPERM
madvise(MADV_POPULATE_WRITE)    A        EAGAIN EINTR ENOMEM EPERM
process_madvise                 A        EAGAIN EINTR ENOMEM EPERM
mincore                         A        EAGAIN ENOMEM
msync                           A        EIO EBUSY
memfd_create                    ASW      ENOMEM EMFILE ENFILE EPERM
ftruncate                       AW       EINTR ENOMEM ENOSPC EPERM EIO
fcntl(F_ADD_SEALS)              ASW      EPERM EBUSY
fallocate                       AW       EINTR ENOMEM ENOSPC EPERM EIO
lseek(SEEK_DATA)                W        ENOMEM EIO
lseek(SEEK_HOLE)                W        ENOMEM EIO
write(memfd)                    ASW      EINTR ENOMEM ENOSPC EPERM EIO
read(memfd)                     swt      EINTR ENOMEM EIO
pread64(memfd)                  SWT      EINTR ENOMEM EIO
pwrite64(memfd)                 AT       EINTR ENOMEM ENOSPC EPERM EIO
newfstatat(memfd)               AsSwWtT  ENOMEM EIO
close(memfd)                    AsSwWt
# files of stores
openat(file)                    AW       EINTR ENOMEM EMFILE ENFILE EPERM EACCES EIO
newfstatat(file)                AW       ENOMEM EACCES EIO
preadv2(file)                   W        EAGAIN EINTR ENOMEM EIO
preadv2(memfd)                  W        EAGAIN EINTR ENOMEM EIO
pwrite64(file)                  W        EINTR ENOMEM ENOSPC EDQUOT EFBIG EPERM EIO
fsync(file)                     AW       EINTR ENOSPC EDQUOT EROFS EIO
write(file)                     A        EINTR ENOMEM ENOSPC EDQUOT EFBIG EPERM EIO
cachestat                       W        ENOMEM EPERM ENOSYS EOPNOTSUPP
fstatfs                         W        ENOMEM EIO
close(file)                     AswWt    EINTR EIO
# sockets, pipes, events
socketpair                      ASW      ENOMEM EMFILE ENFILE EPERM
sendmsg                         ASW      EAGAIN EINTR ENOMEM ENOBUFS EPERM ETOOMANYREFS
recvmsg                         ASW      EAGAIN EINTR ENOMEM EPERM
sendto                          W        EAGAIN EINTR ENOMEM ENOBUFS EPERM
recvfrom                        W        EAGAIN EINTR ENOMEM EPERM
shutdown                        AW       EPERM
getsockname                     ASW      ENOMEM ENOBUFS EPERM
getsockopt                      SW       ENOMEM EPERM
setsockopt                      AW       ENOMEM EPERM
ioctl(TIOCOUTQ)                 W        EPERM
ioctl(FIONBIO)                  W        EPERM
fcntl(F_SETOWN_EX)              A        EPERM ENOMEM
fcntl(F_SETOWN)                 SW       EPERM ENOMEM
fcntl(F_SETSIG)                 ASW      EPERM
fcntl(F_GETFL)                  ASW      EPERM
fcntl(F_SETFL)                  ASW      EPERM ENOMEM
close(socket)                   AsSwW
pipe2                           A        EMFILE ENFILE
write(pipe)                     A        EAGAIN EINTR ENOMEM
read(pipe)                      A        EAGAIN EINTR ENOMEM EIO
close(pipe)                     A
eventfd2                        AW       ENOMEM EMFILE ENFILE ENODEV
write(eventfd)                  W        EAGAIN EINTR
read(eventfd)                   W        EAGAIN EINTR
close(eventfd)                  A
poll                            ASWT     EAGAIN EINTR ENOMEM
epoll_create1                   ASW      ENOMEM EMFILE ENFILE
epoll_ctl                       AW       ENOMEM ENOSPC EEXIST EPERM
epoll_wait                      W        EINTR ENOMEM
close(epoll)                    ASW
fcntl(F_SETLK)                  A        EAGAIN EINTR ENOLCK
fcntl(F_SETLKW)                 A        EINTR ENOLCK
# processes and threads
clone                           A        EAGAIN ENOMEM EPERM
clone3                          ALSWT    EAGAIN ENOMEM EPERM
execve                          ALSW     EAGAIN ENOMEM EMFILE EPERM EACCES EIO
setsid                          ASW      EPERM
dup2                            swt      EINTR EMFILE EBUSY
fcntl(F_DUPFD_CLOEXEC)          SW       EMFILE
fcntl(F_GETFD)                  ASW      EPERM
fcntl(F_SETFD)                  ASW      EPERM
ioctl(FIOCLEX)                  Aswt     EPERM
wait4                           ASW      EINTR
pidfd_open                      ASW      ENOMEM EMFILE ENFILE EPERM ENODEV
pidfd_send_signal               SW       EPERM
newfstatat(pidfd)               A        ENOMEM
close(pidfd)                    ASW
rt_sigaction                    ALsSwWtT EPERM
rt_sigprocmask                  ALSWT    EPERM
clock_nanosleep                 SW       EINTR
sched_getaffinity               W        ENOMEM EPERM
sched_setaffinity               W        ENOMEM EPERM EINVAL
sched_setscheduler              W        EPERM
prlimit64                       ALsSwWtT EPERM
chdir(root)                     SWT      EINTR ENOMEM EACCES EIO
getrandom                       ALswWtT  EAGAIN EINTR EPERM
# what the kernel tells in files
openat(proc)                    AsSwWt   EINTR ENOMEM EMFILE ENFILE EPERM EACCES
read(proc)                      ASW      EAGAIN EINTR ENOMEM EPERM EIO
write(proc)                     swt      EINTR ENOMEM EPERM EIO
pread64(proc)                   A        EINTR ENOMEM EPERM EIO
getdents64(proc)                Aswt     EINTR ENOMEM EIO
readlink(proc)                  A        ENOMEM EACCES EIO
newfstatat(proc)                AsSwWt   ENOMEM EACCES
ioctl(PAGEMAP_SCAN)             AW       EINTR ENOMEM EPERM ENOTTY
ioctl(PROCMAP_QUERY)            A        EINTR ENOMEM EPERM ENOTTY
close(proc)                     AsSwWtT
openat(cgroup)                  A        EINTR ENOMEM EMFILE ENFILE EPERM EACCES
read(cgroup)                    A        EAGAIN EINTR ENOMEM EIO
close(cgroup)                   A
newfstatat(cgroup)              A        ENOMEM EACCES
openat(null)                    Aswt     EINTR ENOMEM EMFILE ENFILE EACCES
close(null)                     Aswt
write(standard error)           SW       EAGAIN EINTR ENOSPC EIO EPIPE
# what Python's open() asks of a file
ioctl(TCGETS)                   AsSwWt   EPERM
lseek(SEEK_CUR)                 AsSwWt   EPERM
lseek(SEEK_SET)                 Aswt     EPERM
# what Python does with its own files: it is not the package's, but it may fail as well
python's own                    LsSwWtT  EINTR ENOMEM EMFILE ENFILE EACCES EIO"""


def _parse(line: str) -> Entry:
    label, roles, *errnos = line[:32].strip(), *line[32:].split()
    return Entry(label, tuple(ROLES[role] for role in roles), tuple(getattr(errno, name) for name in errnos))


CALLS = {entry.label: entry for entry in map(_parse, filter(lambda line: line and line[0] != "#", _TABLE.splitlines()))}
"""All of it, by label."""
