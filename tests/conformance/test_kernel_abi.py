"""The numbers in `abi`, compared with what the C compiler makes of the kernel's own definitions."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from userfault.kernel import abi

if TYPE_CHECKING:
    from collections.abc import Iterator
    from struct import Struct

_HEADER = Path("/usr/include/linux/userfaultfd.h")
_COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(_COMPILER is None, reason="no C compiler: install one, such as gcc")

# Headers are as old as the distribution. What they may lack is defined here as the manual pages have it, so
# that sizes and request numbers are still worked out by the compiler.
_INCLUDES = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/memfd.h>
#include <linux/types.h>
#include <linux/userfaultfd.h>

#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1<<13)
#endif
#ifndef UFFDIO_CONTINUE_MODE_WP
#define UFFDIO_CONTINUE_MODE_WP ((__u64)1<<1)
#endif

#ifndef UFFDIO_POISON
#define _UFFDIO_POISON (0x08)
struct uffdio_poison { struct uffdio_range range; __u64 mode; __s64 updated; };
#define UFFDIO_POISON _IOWR(UFFDIO, _UFFDIO_POISON, struct uffdio_poison)
#define UFFDIO_POISON_MODE_DONTWAKE ((__u64)1<<0)
#define UFFD_FEATURE_POISON (1<<14)
#endif

#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1<<15)
#endif

#ifndef UFFDIO_MOVE
#define _UFFDIO_MOVE (0x05)
struct uffdio_move { __u64 dst; __u64 src; __u64 len; __u64 mode; __s64 move; };
#define UFFDIO_MOVE _IOWR(UFFDIO, _UFFDIO_MOVE, struct uffdio_move)
#define UFFDIO_MOVE_MODE_DONTWAKE ((__u64)1<<0)
#define UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES ((__u64)1<<1)
#define UFFD_FEATURE_MOVE (1<<16)
#endif

#ifndef PROCMAP_QUERY
#define PROCMAP_QUERY _IOWR('f', 17, struct procmap_query)
#define PROCMAP_QUERY_VMA_READABLE 0x01
#define PROCMAP_QUERY_VMA_WRITABLE 0x02
#define PROCMAP_QUERY_VMA_EXECUTABLE 0x04
#define PROCMAP_QUERY_COVERING_OR_NEXT_VMA 0x10
struct procmap_query {
    __u64 size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
    __u32 dev_major, dev_minor, vma_name_size, build_id_size;
    __u64 vma_name_addr, build_id_addr;
};
#endif

#ifndef PAGEMAP_SCAN
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_WPALLOWED (1 << 0)
#define PAGE_IS_WRITTEN (1 << 1)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)
#define PAGE_IS_SWAPPED (1 << 4)
#define PAGE_IS_PFNZERO (1 << 5)
#define PAGE_IS_HUGE (1 << 6)
#define PAGE_IS_SOFT_DIRTY (1 << 7)
struct page_region { __u64 start; __u64 end; __u64 categories; };
#define PM_SCAN_WP_MATCHING (1 << 0)
#define PM_SCAN_CHECK_WPASYNC (1 << 1)
struct pm_scan_arg {
  __u64 size; __u64 flags; __u64 start; __u64 end; __u64 walk_end; __u64 vec; __u64 vec_len; __u64 max_pages;
  __u64 category_inverted; __u64 category_mask; __u64 category_anyof_mask; __u64 return_mask;
};
#endif
#ifndef PAGE_IS_SOFT_DIRTY
#define PAGE_IS_SOFT_DIRTY (1 << 7)
#endif
#ifndef PAGE_IS_GUARD
#define PAGE_IS_GUARD (1 << 8)
#endif

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE 101
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#define MFD_EXEC 0x0010U
#endif
#ifndef F_SEAL_EXEC
#define F_SEAL_EXEC 0x0020
#endif
#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif
"""

# Names that the compiler knows by another name or not at all.
_PREFIXES = (
    "UFFD_",
    "UFFDIO_",
    "_UFFDIO_",
    "USERFAULTFD_IOC_",
    "MADV_",
    "MAP_",
    "MREMAP_",
    "MFD_",
    "F_",
    "FALLOC_",
    "PAGE_IS_",
    "PM_SCAN_",
    "PAGEMAP_",
    "PROCMAP_",
    "EHWPOISON",
)
_NOT_IN_C = {"MFD_HUGE_SHIFT": "MFD_HUGE_SHIFT", "UFFD_MSG_SIZE": "sizeof(struct uffd_msg)"}
_STRUCTS = {
    "UFFDIO_API_STRUCT": ("uffdio_api", "api features ioctls"),
    "UFFDIO_RANGE_STRUCT": ("uffdio_range", "start len"),
    "UFFDIO_REGISTER_STRUCT": ("uffdio_register", "range.start range.len mode ioctls"),
    "UFFDIO_COPY_STRUCT": ("uffdio_copy", "dst src len mode copy"),
    "UFFDIO_ZEROPAGE_STRUCT": ("uffdio_zeropage", "range.start range.len mode zeropage"),
    "UFFDIO_MOVE_STRUCT": ("uffdio_move", "dst src len mode move"),
    "UFFDIO_WRITEPROTECT_STRUCT": ("uffdio_writeprotect", "range.start range.len mode"),
    "UFFDIO_CONTINUE_STRUCT": ("uffdio_continue", "range.start range.len mode mapped"),
    "UFFDIO_POISON_STRUCT": ("uffdio_poison", "range.start range.len mode updated"),
    "UFFD_MSG_STRUCT": (
        "uffd_msg",
        "event arg.reserved.reserved1 arg.reserved.reserved2 arg.reserved.reserved3",
    ),
    "UFFD_MSG_PAGEFAULT_STRUCT": (
        "uffd_msg",
        "event arg.pagefault.flags arg.pagefault.address arg.pagefault.feat.ptid",
    ),
    "UFFD_MSG_FORK_STRUCT": ("uffd_msg", "event arg.fork.ufd"),
    "UFFD_MSG_REMAP_STRUCT": ("uffd_msg", "event arg.remap.from arg.remap.to arg.remap.len"),
    "UFFD_MSG_RANGE_STRUCT": ("uffd_msg", "event arg.remove.start arg.remove.end"),
    "PAGE_REGION_STRUCT": ("page_region", "start end categories"),
    "PROCMAP_QUERY_STRUCT": (
        "procmap_query",
        (
            "size query_flags query_addr vma_start vma_end vma_flags vma_page_size vma_offset inode dev_major dev_minor"
            " vma_name_size build_id_size vma_name_addr build_id_addr"
        ),
    ),
    "PM_SCAN_ARG_STRUCT": (
        "pm_scan_arg",
        (
            "size flags start end walk_end vec vec_len max_pages category_inverted category_mask"
            " category_anyof_mask return_mask"
        ),
    ),
}


def _constants() -> dict[str, int]:
    found = {
        name: value
        for name, value in vars(abi).items()
        if name.startswith(_PREFIXES) and type(value) is int and not name.endswith("_STRUCT")
    }
    return found | {"__NR_userfaultfd": abi.NR_userfaultfd, "__NR_process_madvise": abi.NR_process_madvise}


def _compile_and_run(folder: Path, lines: Iterator[str] | list[str]) -> dict[str, int]:
    assert _COMPILER
    source, program = folder / "abi.c", folder / "abi"
    body = "\n".join(lines)
    source.write_text(f"{_INCLUDES}\nint main(void) {{\n{body}\nreturn 0; }}\n", encoding="ascii")
    command = [_COMPILER, "-Wall", "-Wextra", "-Werror", "-o", str(program), str(source)]
    subprocess.run(command, check=True, timeout=60)
    output = subprocess.run([program], check=True, capture_output=True, text=True, timeout=10).stdout
    return {name: int(value) for name, value in (line.split("=") for line in output.splitlines())}


@needs_compiler
def test_every_constant_is_what_the_compiler_says(tmp_path: Path) -> None:
    ours = _constants()
    expressions = {name: _NOT_IN_C.get(name, name) for name in ours}
    # Old headers lack the shift's name; the size of a page of 2 MiB tells it.
    expressions["MFD_HUGE_SHIFT"] = "__builtin_ctz(MFD_HUGE_2MB / 21)"

    theirs = _compile_and_run(
        tmp_path,
        [f'printf("{name}=%llu\\n", (unsigned long long)({text}));' for name, text in expressions.items()],
    )

    assert len(ours) > 100
    assert theirs == ours


@needs_compiler
def test_every_structure_has_the_compilers_size_and_offsets(tmp_path: Path) -> None:
    lines = [f'printf("{name}=%zu\\n", sizeof(struct {struct}));' for name, (struct, _) in _STRUCTS.items()]
    lines += [
        f'printf("{name}:{number}=%zu\\n", offsetof(struct {struct}, {field}));'
        for name, (struct, fields) in _STRUCTS.items()
        for number, field in enumerate(fields.split())
    ]

    theirs = _compile_and_run(tmp_path, lines)

    ours = {name: getattr(abi, name).size for name in _STRUCTS}
    for name, (_, fields) in _STRUCTS.items():
        ours |= {f"{name}:{number}": offset for number, offset in enumerate(_offsets(getattr(abi, name)))}
        assert len(_offsets(getattr(abi, name))) == len(fields.split())
    assert theirs == ours


def _offsets(layout: Struct) -> list[int]:
    """Find where each field of a layout starts, by packing a one into it alone."""
    count = len(layout.unpack(bytes(layout.size)))
    blank = [0] * count
    packed = [layout.pack(*blank[:number], 1, *blank[number + 1 :]) for number in range(count)]
    return [data.index(1) for data in packed]  # little-endian: the lowest byte comes first


def test_every_structure_of_ours_is_compared() -> None:
    assert {name for name in vars(abi) if name.endswith("_STRUCT")} == set(_STRUCTS)


@pytest.mark.skipif(not _HEADER.exists(), reason="no kernel headers: install linux-libc-dev")
def test_everything_in_the_kernels_header_is_wrapped() -> None:
    text = _HEADER.read_text(encoding="utf-8")
    names = set(re.findall(r"^#define\s+((?:_?UFFD|USERFAULTFD)\w+)", text, re.MULTILINE))
    # Sums of the others, and the type letters, which are in the request numbers.
    names -= {"UFFD_API_REGISTER_MODES", "UFFD_API_FEATURES", "UFFD_API_IOCTLS", "UFFD_API_RANGE_IOCTLS"}
    names -= {"UFFD_API_RANGE_IOCTLS_BASIC", "UFFDIO", "USERFAULTFD_IOC"}

    assert names - set(vars(abi)) == set()


def test_the_manuals_own_words_are_the_names_here() -> None:
    names = {flag.name for flag in abi.Ioctl}

    assert {f"UFFDIO_{name}" for name in names} <= set(vars(abi))
    assert " ".join(sorted(map(str, names))) == (
        "API CONTINUE COPY MOVE POISON REGISTER UNREGISTER WAKE WRITEPROTECT ZEROPAGE"
    )
