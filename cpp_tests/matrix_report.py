"""Counts what became of the cells of the test matrix: passed, refused with a reason, untested.

Reads the list that list_cases printed and the outcomes that the tests left in a directory. The
CPU must have run every cell, a model of the machine every one without scores. Of those with scores
the machine runs each on one model, for make test only the ones that cover pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PASSES = ("forward", "backward")
OUTCOMES = ("passed", "refused", "failed", "untested")
SKIPPED = 77
MACHINE_WITH_SCORES = "machine, scores"
RANK = {"untested": 0, "refused": 1, "passed": 1, "failed": 2}
Key = tuple[str, str, int]  # device, pass, cell
# What a cell with scores may be refused for; and one without, on CUDA.
REASONS = ("over a key/value cache", "a key/value cache has no gradient")
PLAIN_REASONS = ("allowed on CUDA: float16, bfloat16", "allowed on CUDA in this build: 1 to 256")


def read_outcomes(directory: Path) -> tuple[dict[Key, str], dict[Key, str]]:
    """What became of each; a failure stays one. And the sentences of those that are refused."""
    outcomes: dict[Key, str] = {}
    sentences: dict[Key, str] = {}
    for path in sorted(directory.glob("*.tsv")):
        for line in path.read_text().splitlines():
            device, name, index, outcome, sentence = line.split("\t")
            key = (device, name, int(index))
            if RANK[outcome] >= RANK[outcomes.get(key, "untested")]:
                outcomes[key] = outcome
            if outcome == "refused":
                sentences[key] = sentence
    return outcomes, sentences


def cells_of(device: str, cells: list[dict[str, Any]]) -> list[int]:
    """Which of them a device must have run."""
    with_scores = [cell["index"] for cell in cells if "scores" in cell]
    if device == "cpu":
        return [cell["index"] for cell in cells]
    if device == MACHINE_WITH_SCORES:
        every = os.environ.get("FLASHTILE_TEST_NIGHTLY") is not None
        of_pairs = {cell["index"] for cell in cells if cell["in_pairs"]}
        return [index for index in with_scores if every or index in of_pairs]
    return [cell["index"] for cell in cells if "scores" not in cell]


def print_reasons(sentences: dict[Key, str], with_scores: set[int]) -> bool:
    """How often which reason, a sentence without its numbers; whether all are allowed."""
    counts: Counter[str] = Counter()
    for (_, _, cell), sentence in sentences.items():
        allowed = REASONS if cell in with_scores else PLAIN_REASONS
        reason = next((r for r in allowed if sentence.endswith(r)), "")
        counts[f"...{reason}" if reason else f"NOT ALLOWED: {sentence}"] += 1
    for reason, count in sorted(counts.items()):
        print(f"refused {count:6}: {reason}")
    return not any(reason.startswith("NOT ALLOWED") for reason in counts)


def main() -> int:
    """Prints the counts; 1 when a cell failed or was not tested, 77 when a device was left out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=Path, required=True, help="the output of list_cases")
    parser.add_argument("--outcomes", type=Path, required=True, help="the tests' directory")
    parser.add_argument("devices", nargs="+", help="that must have run every cell")
    arguments = parser.parse_args()
    cells = json.loads(arguments.cells.read_text())
    outcomes, sentences = read_outcomes(arguments.outcomes)
    print(f"{'device':15} {'pass':9}" + "".join(f"{name:>10}" for name in OUTCOMES))
    total: Counter[str] = Counter()
    left_out = set(arguments.devices) - {device for device, _, _ in outcomes}
    untested_of_them = 0
    for device in arguments.devices:
        its_cells = cells_of(device, cells)
        untested_of_them += len(PASSES) * len(its_cells) if device in left_out else 0
        for name in PASSES:
            counts = Counter(outcomes.get((device, name, cell), "untested") for cell in its_cells)
            print(f"{device:15} {name:9}" + "".join(f"{counts[key]:10}" for key in OUTCOMES))
            total += counts
    print(
        f"cells: {total['passed']} passed, {total['refused']} refused with a reason, "
        f"{total['untested']} untested, {total['failed']} failed"
    )
    with_scores = {cell["index"] for cell in cells if "scores" in cell}
    all_allowed = print_reasons(sentences, with_scores)
    if left_out:
        print(f"not run this time: {', '.join(sorted(left_out))}")
        total["untested"] -= untested_of_them
    if total["failed"] + total["untested"] or not all_allowed:
        return 1
    return SKIPPED if left_out else 0


if __name__ == "__main__":
    sys.exit(main())
