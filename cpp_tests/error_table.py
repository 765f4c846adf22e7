"""Prints the error ratios that the tests left in <build>/error_table: the largest per line."""

from __future__ import annotations

import sys
from pathlib import Path


def read_rows(directory: Path) -> dict[tuple[str, str, int, str], tuple[int, float, float]]:
    """(backend, dtype, largest head dim, result) -> (runs, largest ratio, largest error)."""
    rows: dict[tuple[str, str, int, str], tuple[int, float, float]] = {}
    for path in sorted(directory.glob("*.tsv")):
        for line in path.read_text().splitlines():
            backend, dtype, dim, result, runs, ratio, error = line.split("\t")
            key = (backend, dtype, int(dim), result)
            before = rows.get(key, (0, 0.0, 0.0))
            rows[key] = (
                before[0] + int(runs),
                max(before[1], float(ratio)),
                max(before[2], float(error)),
            )
    return rows


def main() -> int:
    """Prints the table; 1 when a ratio is above 2, 77 (ctest: skipped) when there is none."""
    rows = read_rows(Path(sys.argv[1]))
    if not rows:
        print("no test that ran compares with manual attention")
        return 77
    print(
        f"{'backend':18} {'dtype':6} {'dims to':>7}  {'result':12} {'runs':>7} {'ratio':>7}  error"
    )
    for (backend, dtype, dim, result), (runs, ratio, error) in sorted(rows.items()):
        print(f"{backend:18} {dtype:6} {dim:7}  {result:12} {runs:7} {ratio:7.3f}  {error:.2e}")
    worst = max(ratio for _, ratio, _ in rows.values())
    print(f"largest ratio {worst:.3f}; allowed 2 (lse: 1)")
    return 0 if worst <= 2 else 1


if __name__ == "__main__":
    sys.exit(main())
