"""One client's view of a directory that stands for a file server, through FUSE.

    python storage_server.py DIRECTORY MOUNT CONTROL STALE_SECONDS

Locks are the server's: taken here, they hold against all other clients of the same directory. For
STALE_SECONDS the client believes what it has seen: attributes, names that are missing, listings; as
an NFS client does. CONTROL is a JSON file that may change meanwhile: `delay` (seconds of every
operation), `down` (true: the server does not answer, and nobody is told), `broken` (an operation's
name: it fails with EIO), `locks` (false: there are none).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import json
import os
import struct
import sys
import time
from pathlib import Path

import mfusepy

_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
_LOCK_COMMANDS = {5: 36, 6: 37, 7: 38}  # of POSIX locks -> of an open file's own (F_OFD_*)


class _Flock(ctypes.Structure):
    _fields_ = (("type", ctypes.c_short), ("whence", ctypes.c_short), ("start", ctypes.c_int64),
                ("length", ctypes.c_int64), ("pid", ctypes.c_int))


class Client(mfusepy.Operations):
    use_ns = True

    def __init__(self, directory: str, control: Path, stale: float):
        self.directory, self.control, self.stale = directory, control, stale
        self.read_at, self.state = -1, {}
        self.listed: dict[str, tuple[float, list[str]]] = {}
        self.holders: dict[tuple[str, int], int] = {}  # (path, owner) -> its own file
        for name in ("access", "chmod", "chown", "create", "fsync", "getattr", "link", "lock",
                     "mkdir", "open", "read", "readdir", "readlink", "release", "rename", "rmdir",
                     "statfs", "symlink", "truncate", "unlink", "utimens", "write"):
            setattr(self, name, self._as_told(name, getattr(self, name)))

    def _as_told(self, name: str, work):
        @functools.wraps(work)
        def told(*args):
            while self._told("down"):
                time.sleep(0.02)
            time.sleep(self._told("delay") or 0)
            if self._told("broken") == name:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return work(*args)
        return told

    def _told(self, name: str):
        changed = os.stat(self.control).st_mtime_ns
        if changed != self.read_at:
            self.state, self.read_at = json.loads(self.control.read_text()), changed
        return self.state.get(name)

    def _at(self, path: str) -> str:
        return self.directory + path

    def _changed(self, *paths: str) -> None:
        """A client knows what it has changed itself."""
        for path in paths:
            self.listed.pop(os.path.dirname(path), None)

    # ---- names --------------------------------------------------------------------------------

    def getattr(self, path, info=None):
        found = os.lstat(self._at(path)) if info is None else os.fstat(info.fh)
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_blocks")
        times = {f"st_{one}": getattr(found, f"st_{one}_ns") for one in ("atime", "mtime", "ctime")}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path, info):
        when, names = self.listed.get(path, (0.0, []))
        if time.monotonic() > when + self.stale:
            names = [".", "..", *os.listdir(self._at(path))]
            self.listed[path] = time.monotonic(), names
        return names

    def access(self, path, mode):
        return 0 if os.access(self._at(path), mode) else -errno.EACCES

    def mkdir(self, path, mode):
        self._changed(path)
        return os.mkdir(self._at(path), mode)

    def rmdir(self, path):
        self._changed(path)
        return os.rmdir(self._at(path))

    def unlink(self, path):
        self._changed(path)
        return os.unlink(self._at(path))

    def rename(self, old, new, *flags):
        self._changed(old, new)
        return os.rename(self._at(old), self._at(new))

    def link(self, target, source):
        self._changed(target)
        return os.link(self._at(source), self._at(target))

    def symlink(self, target, source):
        self._changed(target)
        return os.symlink(source, self._at(target))

    def readlink(self, path):
        return os.readlink(self._at(path))

    def chmod(self, path, mode):
        return os.chmod(self._at(path), mode)

    def chown(self, path, uid, gid):
        return os.chown(self._at(path), uid, gid)

    def utimens(self, path, times=None):
        return os.utime(self._at(path), ns=times)

    def statfs(self, path):
        found = os.statvfs(self._at(path))
        return {name: getattr(found, name) for name in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
            "f_favail", "f_namemax")}

    # ---- contents -----------------------------------------------------------------------------

    def create(self, path, mode, info):
        self._changed(path)
        info.fh = os.open(self._at(path), os.O_RDWR | os.O_CREAT, mode)
        return 0

    def open(self, path, info):
        ours = os.O_APPEND | os.O_CREAT | os.O_EXCL  # the kernel has done
        info.fh = os.open(self._at(path), info.flags & ~ours)
        return 0

    def release(self, path, info):
        os.close(info.fh)
        return 0

    def read(self, path, size, offset, info):
        return os.pread(info.fh, size, offset)

    def write(self, path, data, offset, info):
        return os.pwrite(info.fh, data, offset)

    def truncate(self, path, length, info=None):
        return os.truncate(self._at(path) if info is None else info.fh, length)

    def fsync(self, path, datasync, info):
        os.fsync(info.fh)
        return 0

    def lock(self, path, info, cmd, lock):
        """For the owner alone: a child that closes what it inherited gives nothing up."""
        if self._told("locks") is False:
            return -errno.ENOLCK
        key = path, info.lock_owner
        if key not in self.holders:
            self.holders[key] = os.open(self._at(path), os.O_RDWR)
        one = ctypes.cast(lock, ctypes.POINTER(_Flock)).contents
        wanted = struct.pack(_FLOCK, one.type, one.whence, one.start, one.length, 0)
        found = fcntl.fcntl(self.holders[key], _LOCK_COMMANDS[cmd], wanted)
        one.type, one.whence, one.start, one.length, _ = struct.unpack(_FLOCK, found)
        if one.type == fcntl.F_UNLCK and one.length == 0 and one.start == 0:
            os.close(self.holders.pop(key))
        return 0


if __name__ == "__main__":
    directory, mount, control, stale = sys.argv[1:]
    mfusepy.FUSE(
        Client(directory, Path(control), float(stale)), mount, foreground=True, raw_fi=True,
        fsname="storage",
        entry_timeout=float(stale), negative_timeout=float(stale), attr_timeout=float(stale),
    )
