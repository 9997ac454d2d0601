"""A disk that is really full: a few pages of memory, mounted where only what is run on it sees them."""

from __future__ import annotations

import errno
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

import pytest

OWN = ("unshare", "--user", "--map-root-user", "--mount", "--")


class Disk:
    """A mount at `folder` until the block is left; skips the test where a user may not have one.

    Attributes:
        run: Begins the command line of a process that has this disk at `folder`; the process begins in /.
        seen: The same folder, for a process that has it not.
    """

    def __init__(self, folder: Path, size: str) -> None:
        folder.mkdir()
        if shutil.which("unshare") is None or shutil.which("nsenter") is None:
            pytest.skip("NO FULL DISK: this machine has no unshare or no nsenter")
        script = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && echo mounted && exec cat'
        line = [*OWN, "sh", "-c", script, "sh", size, str(folder)]
        self._keeper = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"mounted\n":
            self.close()
            pytest.skip("NO FULL DISK: this machine does not let a user mount a small disk (unshare, tmpfs)")
        target = ("--target", str(self._keeper.pid))
        self.run = ("nsenter", *target, "--user", "--preserve-credentials", "--mount", "--")
        self.folder, self.seen = folder, Path(f"/proc/{self._keeper.pid}/root{folder}")

    def grow(self, size: str) -> None:
        """Give it this size."""
        options = ("-o", f"remount,size={size}")
        subprocess.run([*self.run, "mount", *options, str(self.folder)], check=True)

    def fill(self) -> None:
        """Leave not one byte; see that this is so."""
        with pytest.raises(OSError, match="No space left") as found:
            self._write_all()
        assert found.value.errno == errno.ENOSPC

    def _write_all(self) -> None:
        with (self.seen / "ballast").open("wb", 0) as file:
            while True:
                file.write(bytes(512))

    def empty(self) -> None:
        """Undo `fill`."""
        (self.seen / "ballast").unlink()

    def close(self) -> None:
        """It is gone when the last process that has it ends."""
        self._keeper.kill()
        self._keeper.communicate()

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
