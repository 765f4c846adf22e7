"""Counts the traps: how many run here, on the CPU and on the machine, how many wait for a GPU."""

from __future__ import annotations

import re
import subprocess
import sys

# What this machine cannot show, and why.
WAITING = {
    "G1": "two GPUs: the machine's second device is the first with other memory",
    "G2": "capture on a side stream: the machine has no graphs and repeats the calls",
    "G3": "replay: the machine has no graphs and repeats the calls",
    "G4": "two GPUs: threads take turns at the machine",
}


def names_in(executable: str) -> list[str]:
    """The names of an executable's tests."""
    done = subprocess.run([executable, "--list"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def ids(names: list[str]) -> set[str]:
    """The traps that these tests are about: N4, V10, ..."""
    return {match.group() for name in names if (match := re.match(r"[A-Z]\d+", name))}


def main() -> int:
    """Arguments: device=executable ... ; 1 when a test's name has no id."""
    tests = {}
    for argument in sys.argv[1:]:
        device, executable = argument.split("=", 1)
        tests[device] = names_in(executable)
    bad = [name for names in tests.values() for name in names if not re.match(r"[A-Z]\d+ ", name)]
    here = [device for device in tests if device != "gpu"]
    all_here = set().union(*(ids(tests[device]) for device in here))
    ran = ", ".join(f"{len(tests[device])} tests on the {device}" for device in here)
    print(f"traps: {len(all_here)} run here ({ran})")
    waiting = sorted(set(tests.get("gpu", [])) - {name for d in here for name in tests[d]})
    print(f"traps: {len(waiting)} tests wait for a GPU, each with a smaller twin here:")
    for name in waiting:
        print(f"  {name}")
    tested = all_here.union(*(ids(names) for names in tests.values()))
    for trap, reason in WAITING.items():
        print(f"  {trap} {reason}{'' if trap in tested else '; no test yet'}")
    if bad:
        print(f"without an id: {bad}")
    return 1 if bad or not all_here else 0


if __name__ == "__main__":
    sys.exit(main())
