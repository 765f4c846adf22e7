"""Counts what became of the cells of the test matrix: passed, refused with a reason, untested.

Reads the list that list_cases printed and the outcomes that the tests left in a directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

PASSES = ("forward", "backward")
OUTCOMES = ("passed", "refused", "failed", "untested")
SKIPPED = 77
RANK = {"untested": 0, "refused": 1, "passed": 1, "failed": 2}


def read_outcomes(directory: Path) -> dict[tuple[str, str, int], str]:
    """(device, pass, cell) -> outcome; a failure stays one."""
    outcomes: dict[tuple[str, str, int], str] = {}
    for path in sorted(directory.glob("*.tsv")):
        for line in path.read_text().splitlines():
            device, name, index, outcome = line.split("\t")
            key = (device, name, int(index))
            if RANK[outcome] >= RANK[outcomes.get(key, "untested")]:
                outcomes[key] = outcome
    return outcomes


def main() -> int:
    """Prints the counts; 1 when a cell failed or was not tested, 77 when a device was left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=Path, required=True, help="the output of list_cases")
    parser.add_argument("--outcomes", type=Path, required=True, help="the tests' directory")
    parser.add_argument("devices", nargs="+", help="that must have run every cell")
    arguments = parser.parse_args()
    cells = [cell["index"] for cell in json.loads(arguments.cells.read_text())]
    outcomes = read_outcomes(arguments.outcomes)
    print(f"{'device':15} {'pass':9}" + "".join(f"{name:>10}" for name in OUTCOMES))
    total: Counter[str] = Counter()
    for device in arguments.devices:
        for name in PASSES:
            counts = Counter(outcomes.get((device, name, cell), "untested") for cell in cells)
            print(f"{device:15} {name:9}" + "".join(f"{counts[key]:10}" for key in OUTCOMES))
            total += counts
    print(
        f"cells: {total['passed']} passed, {total['refused']} refused with a reason, "
        f"{total['untested']} untested, {total['failed']} failed"
    )
    left_out = set(arguments.devices) - {device for device, _, _ in outcomes}
    if left_out:
        print(f"not run this time: {', '.join(sorted(left_out))}")
        total["untested"] -= len(left_out) * len(PASSES) * len(cells)
    if total["failed"] + total["untested"]:
        return 1
    return SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
