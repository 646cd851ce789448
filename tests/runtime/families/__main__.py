"""``python -m tests.runtime.families [TYPE ...]``: examine types, all of them by default; ``--write`` draws the page.

Processes share the work: a type takes a second or two.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

import torch

from tests.runtime.families.matrix import CASES, Result, examine
from tests.runtime.families.page import PAGE, draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.runtime.families")
    parser.add_argument("types", nargs="*", default=CASES)
    parser.add_argument("--write", action="store_true", help=f"draw {PAGE.name} (needs all types)")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.write and tuple(options.types) != CASES:
        parser.error("--write: the page is drawn from all types")
    results: dict[str, Result] = {}
    with ProcessPoolExecutor(options.processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for result in pool.map(examine, options.types):
            results[result.model_type] = result
            print(f"{result.model_type:26} {result.row}", flush=True)
    print(dict(Counter(result.verdict for result in results.values())))
    if options.write:
        PAGE.write_text(draw(results), encoding="utf-8")
    return 1 if any(result.faults for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
