"""A disk that fills up while a test writes to it."""

import errno
import os


class FullDisk:
    """Lets `free` more bytes through to files whose path has `name` in it, then fails as the kernel does: partly."""

    def __init__(self, monkeypatch, name: str, *, free: int):
        self.name, self.free, self.write = name, free, os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.name not in os.readlink(f"/proc/self/fd/{descriptor}"):
            return self.write(descriptor, data)
        if not self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.write(descriptor, data[: self.free])
        self.free -= taken
        return taken
