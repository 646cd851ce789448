"""``python -m tests.runtime.families [TYPE ...]``: examine types and print what holds; all of them by default."""

from __future__ import annotations

import sys
from collections import Counter

from tests.runtime.families.matrix import TYPES, examine


def main(types: list[str]) -> int:
    verdicts: Counter[str] = Counter()
    for model_type in types or TYPES:
        result = examine(model_type)
        verdicts[result.verdict] += 1
        detail = result.faults or result.refused or result.not_built or ", ".join(result.off)
        print(f"{model_type:26} {result.verdict:20} {detail}", flush=True)
    print(dict(verdicts))
    return 1 if verdicts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
