"""The host memory that a script took, which each of those that write weights prints."""

import resource


def peak_host_bytes() -> int:
    """The most that this process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
