"""How many processors are free at this moment.

OpenMP's threads wait for each other by spinning. Where another program keeps a processor busy, one
of them waits there for its turn, and the others spin that time away, hundreds of times in a forward
pass. With fewer threads, one for each processor that is free, nobody waits.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

LOAD = Path("/proc/loadavg")
OWN = Path("/proc/self/task")
LOOKS = 4
BETWEEN_S = 0.001


def running() -> int:
    """Threads that run or want to, of all programs; 0 where the system does not tell."""
    try:
        return int(LOAD.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 0


def own_running() -> int:
    """Those of this process."""
    count = 0
    with contextlib.suppress(OSError):
        for task in os.listdir(OWN):
            with contextlib.suppress(OSError):  # it has ended
                told = (OWN / task / "stat").read_text()
                count += told[told.rindex(")") + 2] == "R"
    return count


def free_for(threads: int) -> int:
    """How many of so many threads would have a processor of their own now; at least one.

    The other threads of this process do not count: who computes takes turns. Nor does who runs for
    an instant only, such as the system's own threads that write files: looked at several times, the
    most that is found free is.
    """
    free = _free_for(threads)
    for _ in range(LOOKS - 1):
        if free == threads:
            break
        time.sleep(BETWEEN_S)
        free = max(free, _free_for(threads))
    return free


def _free_for(threads: int) -> int:
    processors, seen = os.cpu_count() or threads, running()
    if seen - 1 + threads <= processors:  # the one that asks is among them
        return threads
    others = max(seen - max(own_running(), 1), 0)
    return max(1, min(threads, processors - others))
