"""Ask the kernel for 2 MiB pages under memory that every decoding step reads from end to end. Linux only, best effort.

A step of a small model touches some 30,000 pages of 4 KiB, more than a processor's second-level TLB holds; inside a
virtual machine each miss walks two page tables. Distributions set transparent huge pages to `madvise`: who does not
ask gets none.
"""

import ctypes
import sys

HUGE_PAGE = 2 << 20
"""Bytes, on x86-64 and on AArch64 with 4 KiB pages."""
_HUGEPAGE, _COLLAPSE = 14, 25  # MADV_*: from <asm-generic/mman-common.h>; COLLAPSE since Linux 6.1


def prefer_huge_pages(address: int, nbytes: int) -> bool:
    """Of a private mapping at `address`: those in use are gathered at once, those still unused come huge.

    Only whole huge pages inside the range count. False where the kernel would not; the memory is as good as before.
    """
    begin = -(-address // HUGE_PAGE) * HUGE_PAGE
    size = (address + nbytes) // HUGE_PAGE * HUGE_PAGE - begin
    if sys.platform != "linux" or size <= 0:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    where, length = ctypes.c_void_p(begin), ctypes.c_size_t(size)
    if libc.madvise(where, length, _HUGEPAGE):
        return False
    libc.madvise(where, length, _COLLAPSE)  # refused for a file's pages, which come huge when they are read
    return True
