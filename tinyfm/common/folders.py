"""Folders with one owner, and folders that are whole or absent.

Two processes that write into one folder spoil it. So the process that writes holds a lock: not the
existence of a file, which a crash would leave behind, but a lock of the operating system on an open
file (flock; on Windows, a locked byte). The system releases it when the process ends, however it
ends. The file holds the number of the process, for the message to others.

A folder that takes long to make is written under a temporary name, .tmp-PROCESS-NAME, and renamed
when it is complete. What a killed process leaves behind is removed at the next start: a temporary
folder whose lock is free has no owner.

This module imports the standard library only, so that worker processes start quickly.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

TEMPORARY = ".tmp-"  # prefix of files and folders that are being written or removed
# Error numbers of a file system that has no locks. The work goes on there, without protection.
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}
PAUSE = 0.1  # seconds between two attempts to get a lock


def temporary_name(path: Path) -> Path:
    """A name beside `path`, with the number of this process, for a file or folder in the making."""
    return path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")


def is_running(process: str) -> bool:
    """Whether there is a process of that number on this machine; True if that cannot be told."""
    if os.name == "nt" or not process.isdecimal() or len(process) > 9:
        return True  # on Windows os.kill would end it
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of somebody else
        return True
    return True


# ---- locks ---------------------------------------------------------------------------------------


def lock_beside(folder: Path) -> Path:
    """The lock file for a folder that may not exist yet, or will be renamed."""
    return folder.with_name(f".{folder.name}.lock")


def lock_inside(folder: Path) -> Path:
    """The lock file for a folder that exists, whose parent may be read-only."""
    return folder / ".lock"


def _lock(descriptor: int) -> None:
    """Lock an open file. Raises BlockingIOError if another process has locked it."""
    if fcntl:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    # No other process can read a locked byte on Windows: lock one far behind the number.
    os.lseek(descriptor, 1 << 30, os.SEEK_SET)
    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(errno.EAGAIN, "locked by another process") from error
    os.lseek(descriptor, 0, os.SEEK_SET)


def _acquire(path: Path) -> int:
    """Create and lock a file; returns its descriptor. Raises BlockingIOError if it is locked."""
    # A symbolic link is not followed: the file that it names is not ours to write.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            _lock(descriptor)
            # The last owner removes the file. Then this lock is on a file that has no name.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.truncate(descriptor, 0)
                    os.write(descriptor, b"%d\n" % os.getpid())
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _release(path: Path, descriptor: int) -> None:
    """Remove the lock file and free the lock. The file is removed first, while the lock is held."""
    if fcntl:
        path.unlink(missing_ok=True)
    os.close(descriptor)
    if not fcntl:  # Windows removes no open file, so the next owner's file is safe
        with contextlib.suppress(OSError):
            path.unlink()


def owner(lock: Path) -> str:
    """The process that holds a lock, in words, as far as the lock file says."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(lock.read_text(encoding='utf-8'))}"
    return "another process"


@contextlib.contextmanager
def hold(lock: Path, what: str | Path, wait: bool = False) -> Iterator[None]:
    """Inside, this process is the owner of what the lock file stands for.

    lock: `lock_beside(folder)` or `lock_inside(folder)`; its folder exists. what: the name of the
    thing, for messages. wait: wait for another owner to finish, instead of raising.

    Raises ValueError with the number of the process that is the owner, unless `wait`.
    """
    descriptor = None
    told = False
    while descriptor is None:
        try:
            descriptor = _acquire(lock)
        except BlockingIOError:
            if not wait:
                raise ValueError(
                    f"{what} is being written by {owner(lock)}: wait until it has ended, "
                    "or choose another folder"
                ) from None
            if not told:
                print(f"waiting for {owner(lock)}, which is making {what}", file=sys.stderr)
                told = True
            time.sleep(PAUSE)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"{lock} cannot be locked ({error}): write from one process", stacklevel=3
            )
            break
    try:
        yield
    finally:
        if descriptor is not None:
            _release(lock, descriptor)


# ---- whole or absent -----------------------------------------------------------------------------


def clear_leftovers(parent: Path) -> None:
    """Remove the temporary folders in `parent` that ended processes left behind.

    A temporary folder belongs to the holder of the lock beside its final name.
    """
    for path in parent.glob(f"{TEMPORARY}*"):
        name = path.name.removeprefix(TEMPORARY).partition("-")[2]
        if not name:
            continue
        lock = lock_beside(parent / name)
        with contextlib.suppress(OSError):  # of a lock that is held, and of a read-only folder
            descriptor = _acquire(lock)
            try:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                _release(lock, descriptor)


def _exit_in_order(number: int, frame: Any) -> None:
    """A signal handler: as an exception, so that `finally` blocks run."""
    raise SystemExit(128 + number)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Inside, a signal that would end the process at once lets it tidy up first."""
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) == signal.SIG_DFL:
                previous[number] = signal.signal(number, _exit_in_order)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def whole_or_absent(folder: Path, replace: bool = False) -> Iterator[Path | None]:
    """A temporary folder to write to. It gets its final name if the block raises no error.

    One process at a time makes a folder, and the others wait. If the folder exists by then, None;
    or, to replace it, a temporary folder, and the old one stays until the new one is complete.
    """
    if folder.exists() and not replace:
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder.parent)
    with ending_in_order(), hold(lock_beside(folder), folder, wait=True):
        if folder.exists() and not replace:
            yield None
            return
        temporary = temporary_name(folder)
        temporary.mkdir()
        old = temporary_name(folder.with_name(f"old-{folder.name}"))
        try:
            yield temporary
            if folder.exists():
                os.rename(folder, old)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
