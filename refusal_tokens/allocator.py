"""Tell glibc to keep freed memory: CPU training runs almost twice as fast with it.

Training frees and takes large blocks at every step. By default glibc hands them back to the system,
and the page faults of getting them again cost about half of the time. The variables are read when
the process starts, so a process that wants them has to start again.
"""

from __future__ import annotations

import os
import platform
import sys

VARIABLES = {
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_MMAP_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def restart_with_allocator_settings() -> None:
    """Start this process again with the variables set; return at once if they are, or not glibc."""
    if platform.libc_ver()[0] != "glibc" or all(name in os.environ for name in VARIABLES):
        return
    print("Starting again with glibc told to keep freed memory (faster on a CPU)", flush=True)
    environment = VARIABLES | dict(os.environ)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
