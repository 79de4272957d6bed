"""The numbers of system calls, and what tells the uses of one number apart."""

from __future__ import annotations

from tests.crash.injection.seccomp import MACHINE

from userfault.kernel import abi

NUMBERS: dict[str, tuple[int, int]] = {
    # name: (x86_64, aarch64), from <asm/unistd.h>. Where aarch64 has only the younger one of two, it is that.
    "access": (21, 48),
    "arch_prctl": (158, -1),
    "brk": (12, 214),
    "cachestat": (451, 451),
    "chdir": (80, 49),
    "clock_nanosleep": (230, 115),
    "clone": (56, 220),
    "clone3": (435, 435),
    "close": (3, 57),
    "dup2": (33, 24),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, 22),
    "eventfd2": (290, 19),
    "execve": (59, 221),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "fallocate": (285, 47),
    "fcntl": (72, 25),
    "fstat": (5, 80),
    "fstatfs": (138, 44),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "futex": (202, 98),
    "getcwd": (79, 17),
    "getdents64": (217, 61),
    "getegid": (108, 177),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getpeername": (52, 205),
    "getpid": (39, 172),
    "getrandom": (318, 278),
    "getsockname": (51, 204),
    "getsockopt": (55, 209),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "memfd_create": (319, 279),
    "mincore": (27, 232),
    "mkdir": (83, 34),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "msync": (26, 227),
    "munmap": (11, 215),
    "newfstatat": (262, 79),
    "openat": (257, 56),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pipe2": (293, 59),
    "poll": (7, 73),
    "prctl": (157, 167),
    "pread64": (17, 67),
    "preadv2": (327, 286),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "pwrite64": (18, 68),
    "read": (0, 63),
    "readlink": (89, 78),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "rename": (82, 276),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "setsid": (112, 157),
    "setsockopt": (54, 208),
    "shutdown": (48, 210),
    "sigaltstack": (131, 132),
    "socketpair": (53, 199),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "userfaultfd": (323, 282),
    "vfork": (58, -1),
    "wait4": (61, 260),
    "write": (1, 64),
}

NAMES = {numbers[MACHINE == "aarch64"]: name for name, numbers in NUMBERS.items()}

PYTHONS = (
    # Locks of the interpreter and of the C library, which retry or abort.
    "futex",
    # They cannot fail, or nobody would be left to be told.
    *("exit", "exit_group", "rt_sigreturn", "getpid", "gettid", "getuid", "geteuid", "getgid", "getegid", "uname"),
    # What the C library does when a program or a thread starts, and when malloc runs out; then it uses mmap.
    *("arch_prctl", "set_tid_address", "set_robust_list", "rseq", "sysinfo", "brk"),
    # A socket's name for the warning that nobody has closed it.
    "getpeername",
    # The second stack of faulthandler's.
    "sigaltstack",
)
"""The interpreter's own calls: they are let through, and nobody is told."""

OPERATIONS_OF_USERFAULTFD = "API REGISTER UNREGISTER WAKE COPY ZEROPAGE MOVE WRITEPROTECT CONTINUE POISON"
OPERATIONS: dict[str, tuple[int, dict[int, str]]] = {
    # name: which argument says what is done, and its values.
    "ioctl": (
        1,
        {getattr(abi, f"UFFDIO_{name}"): f"UFFDIO_{name}" for name in OPERATIONS_OF_USERFAULTFD.split()}
        | {abi.USERFAULTFD_IOC_NEW: "USERFAULTFD_IOC_NEW", abi.PAGEMAP_SCAN: "PAGEMAP_SCAN"}
        | {abi.PROCMAP_QUERY: "PROCMAP_QUERY"}
        | {0x541B: "FIONREAD", 0x5411: "TIOCOUTQ", 0x5451: "FIOCLEX", 0x5421: "FIONBIO", 0x5401: "TCGETS"},
    ),
    "fcntl": (
        1,
        {
            1: "F_GETFD",
            2: "F_SETFD",
            3: "F_GETFL",
            4: "F_SETFL",
            6: "F_SETLK",
            7: "F_SETLKW",
            8: "F_SETOWN",
            10: "F_SETSIG",
            15: "F_SETOWN_EX",
        }
        | {1030: "F_DUPFD_CLOEXEC", abi.F_ADD_SEALS: "F_ADD_SEALS", abi.F_GET_SEALS: "F_GET_SEALS"},
    ),
    "madvise": (2, {int(getattr(abi, name)): name for name in dir(abi) if name.startswith("MADV_")}),
    "lseek": (2, {0: "SEEK_SET", 1: "SEEK_CUR", 3: "SEEK_DATA", 4: "SEEK_HOLE"}),
}
PATHS = {"openat": 1, "newfstatat": 1, "readlink": 0, "access": 0, "chdir": 0, "rename": 0, "mkdir": 0}
"""Which argument is a path; one more on aarch64 where x86_64 has no descriptor of a folder before it."""
FILES = {
    **dict.fromkeys(
        ("read", "write", "pread64", "pwrite64", "preadv2", "close", "fstat", "fsync", "newfstatat", "ioctl"), 0
    ),
    **dict.fromkeys(("lseek", "getdents64", "fcntl"), 0),
    "mmap": 4,
}
"""Which argument is a descriptor."""
