"""How long this process has run. Imports nothing slow, so that what is slow to import can be measured."""

import os
import time
from pathlib import Path


def seconds_since_process_start() -> float:
    """From the start of this process as Linux counts it, so that loading Python and torch is in it."""
    # Field 22 of stat, in ticks since boot; the second field is a name in parentheses that may hold spaces.
    start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - start_ticks / os.sysconf("SC_CLK_TCK")
