"""Less memory than a process wants: a control group that the kernel kills in. Only groups of version 1."""

import contextlib
import pathlib
import re

CONTROLLER = pathlib.Path("/sys/fs/cgroup/memory")
# The limit is this much below what is used.
SQUEEZE_BYTES = 256 << 10


def may_limit_memory():
    return (CONTROLLER / "memory.oom_control").exists()


class MemoryGroup:
    """A group whose limit follows what its one process uses, a little below."""

    def __init__(self, name):
        self.path = CONTROLLER / name
        self.path.mkdir(exist_ok=True)
        # What cannot be had is not found on a disk either.
        (self.path / "memory.swappiness").write_text("0")

    def take(self, pid):
        """From here on what the process takes counts."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def squeeze(self):
        used = int((self.path / "memory.usage_in_bytes").read_text())
        # Refused while nothing can be given back; then the next page that is asked for is one too many.
        with contextlib.suppress(OSError):
            (self.path / "memory.limit_in_bytes").write_text(str(max(used - SQUEEZE_BYTES, SQUEEZE_BYTES)))

    def kills(self):
        return int(re.search(r"^oom_kill (\d+)", (self.path / "memory.oom_control").read_text(), re.M)[1])

    def remove(self):
        self.path.rmdir()
