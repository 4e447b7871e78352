"""Runs a command and prints the peak memory of all its processes together: peak_memory.py COMMAND [ARGUMENT ...]

The sum of their resident sets, sampled five times a second; pages that processes share count once for each.
"""

import subprocess
import sys
import time

import psutil


def resident(process: psutil.Process) -> int:
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:  # it ended just now
            continue
    return total


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    started, peak = time.monotonic(), 0
    with subprocess.Popen(sys.argv[1:]) as command:
        process = psutil.Process(command.pid)
        while command.poll() is None:
            try:
                peak = max(peak, resident(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.2)
    print(f"peak memory {peak / 1e9:.2f} GB, {time.monotonic() - started:.0f} s, exit code {command.returncode}")
    return command.returncode


if __name__ == "__main__":
    sys.exit(main())
