"""What a reader's process gives up before it reads: network, other folders, memory, time and files."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from pathlib import Path

_NEW_USER, _NEW_NETWORK, _NO_NEW_PRIVILEGES = 0x10000000, 0x40000000, 38  # linux/sched.h, linux/prctl.h
# linux/landlock.h: the same numbers on every architecture. Rights to write and remove files, and to make them of any kind.
_CREATE_RULES, _ADD_RULE, _RESTRICT = 444, 445, 446
_RULE_BENEATH, _VERSION_FLAG = 1, 1
_WRITING = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12
_SINCE = {2: 1 << 13, 3: 1 << 14}  # moving between folders, cutting a file short
_MOST_FILES, _LONGEST_FILE = 64, 64 << 20


def leave_the_network() -> bool:
    """Change into a network of its own, without any device. Not every kernel and container allows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    # Root needs no user namespace, and would lose the right to read files of others in one.
    return any(libc.unshare(what) == 0 for what in (_NEW_NETWORK, _NEW_USER | _NEW_NETWORK))


def write_only_here() -> bool:
    """Give up writing anywhere but beneath the current directory, and ever getting more rights (Landlock, Linux 5.13)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    version = libc.syscall(_CREATE_RULES, None, ctypes.c_size_t(0), _VERSION_FLAG)
    if version < 1:
        return False
    rights = _WRITING | sum(right for since, right in _SINCE.items() if version >= since)
    asked = struct.pack("=Q", rights)
    rules = libc.syscall(_CREATE_RULES, asked, ctypes.c_size_t(len(asked)), 0)
    if rules < 0:
        return False
    here = os.open(".", os.O_PATH | os.O_DIRECTORY)
    added = libc.syscall(_ADD_RULE, rules, _RULE_BENEATH, struct.pack("=Qi", rights, here), 0)
    done = libc.syscall(_RESTRICT, rules, 0)
    os.close(here)
    os.close(rules)
    return bool(added == 0 and done == 0)


def limit(cpu_s: int, memory_bytes: int) -> None:
    """Bound what this process may still use. What it has used so far, by importing its reader, is not counted."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + cpu_s
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + memory_bytes
    # A second more before SIGKILL, which could not be told from the system being out of memory.
    _lower(resource.RLIMIT_CPU, seconds, seconds + 1)
    _lower(resource.RLIMIT_AS, space, space)
    _lower(resource.RLIMIT_FSIZE, _LONGEST_FILE, _LONGEST_FILE)
    _lower(resource.RLIMIT_NOFILE, _MOST_FILES, _MOST_FILES)
    _lower(resource.RLIMIT_CORE, 0, 0)


def _lower(what: int, soft: int, hard: int) -> None:
    """Set a limit, or leave what is lower already."""
    before = [one if one != resource.RLIM_INFINITY else None for one in resource.getrlimit(what)]
    soft, hard = (most if old is None else min(most, old) for most, old in zip((soft, hard), before, strict=True))
    resource.setrlimit(what, (soft, hard))
