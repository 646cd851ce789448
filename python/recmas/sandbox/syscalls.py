"""The system calls of foreign code: one process that computes, in threads, with files of its own. All else fails.

A list of what is allowed, because a list of what is forbidden ages with every kernel. What it leaves out counts as much
as what it holds: no process is started, so that a limit on the one process holds for all there is; no socket is
opened; nothing is traced, mounted, signalled or shared; what a kernel keeps without counting it (record locks, queued
messages, segments of shared memory, memory files, wide pipes) is not made. Standard library and `seccompy` only.
"""

from __future__ import annotations

import errno

import seccompy
from seccompy import ArgCmp, CmpOp, Filter

ALLOWED = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
    open openat creat stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat
    getdents getdents64 getcwd chdir fchdir statfs fstatfs umask
    mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink symlinkat
    truncate ftruncate fallocate fadvise64 fsync fdatasync sendfile copy_file_range flock dup dup2 dup3 pipe pipe2
    mmap munmap mprotect mremap madvise brk mincore msync membarrier
    futex set_robust_list get_robust_list rseq set_tid_address gettid arch_prctl exit exit_group
    sched_yield sched_getaffinity sched_setaffinity sched_getparam sched_getscheduler
    sched_get_priority_max sched_get_priority_min getcpu
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall
    pause alarm setitimer getitimer
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage
    timerfd_create timerfd_settime timerfd_gettime
    poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
    sendto recvfrom shutdown getsockopt setsockopt getsockname getpeername
    getpid getppid getpgrp getpgid getsid getuid geteuid getgid getegid getgroups getresuid getresgid
    uname sysinfo getrandom getrlimit getpriority wait4 waitid
"""
REFUSED = "fork vfork clone socket socketpair kill tgkill fcntl ioctl prctl prlimit64 setrlimit execve"
"""Fail as not permitted where no rule below allows them; any other call fails as one that the kernel does not have."""

THREAD, NAMESPACES = 0x00010000, 0x7E020000  # CLONE_*
LOCAL, STREAM = 1, 1  # AF_UNIX, SOCK_STREAM: a connected pair, which reaches nobody else
DESCRIPTOR = (0, 1, 2, 3, 4, 1030)  # F_*: duplicates and flags; no locks, owners, signals or sizes of pipes
TERMINAL_SIZE, READABLE = 0x5413, 0x541B  # TIOCGWINSZ, FIONREAD
DEVICE = (0x5401, TERMINAL_SIZE, READABLE, 0x5421, 0x5450, 0x5451)  # TCGETS; FIONBIO, FIONCLEX, FIOCLEX
THREAD_NAME = (15, 16, 0x53564D41)  # PR_SET_NAME, PR_GET_NAME, PR_SET_VMA


def filter_of(process: int | None = None) -> Filter:
    """The filter; with the number of a process it is that one's own, complete.

    Without it namespaces hold whom a signal reaches, and what is still to come is allowed: bubblewrap installs the
    filter before it executes the program, which sets its limits then.
    """
    found = Filter(default=int(seccompy.Action.ERRNO) | errno.ENOSYS)
    for name in ALLOWED.split():
        if _exists(name):
            found.allow(name)
    found.allow("clone", args=[ArgCmp(0, CmpOp.MASKED_EQ, THREAD, THREAD | NAMESPACES)])
    found.allow("socketpair", args=[ArgCmp(0, CmpOp.EQ, LOCAL), ArgCmp(1, CmpOp.MASKED_EQ, STREAM, 0xF)])
    for name, values in (("fcntl", DESCRIPTOR), ("ioctl", DEVICE)):
        for value in values:
            found.allow(name, args={1: value})
    for value in THREAD_NAME:
        found.allow("prctl", args={0: value})
    if process is None:
        found.allow("execve")
        found.allow("prlimit64", args={0: 0})  # without privileges: lower
    else:
        found.allow("prlimit64", args={0: 0, 2: 0})  # one's own, read
    for name in ("kill", "tgkill"):
        found.allow(name, args=None if process is None else {0: process})
    for name in REFUSED.split():
        if _exists(name):
            found.errno(name, errno.EPERM)
    return found


def _exists(name: str) -> bool:
    """Whether this processor's kernels have a call of that name: newer ones lack many of the older."""
    try:
        seccompy.syscall_nr(name)
    except ValueError:
        return False
    return True
