"""Peak memory of this process; ru_maxrss would be the parent's where that was larger at the fork."""

from pathlib import Path


def peak_mb():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM: Linux only")
