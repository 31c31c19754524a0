"""Write the problems of the smoke runs: grade-school word problems from reasoning_gym, reproducible by seed.

python scripts/make_problems.py [--out prompts] [--train 512] [--validation 128] [--seed 7]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

TASK = "gsm_symbolic"
STORY = r"^\s*Once upon a time"
"""Regular expression that matches a response if it follows the rule of the demo."""
MAX_CHARACTERS = 190
"""Maximum length of a problem, about 45 tokens: a step takes seconds without a GPU."""
_INSTRUCTION = re.compile(r" *Give the result as your final answer\. Do not include units\.$")


def problems(seed: int) -> Iterator[dict[str, str]]:
    """Generate distinct problems without end: question, gold answer, source."""
    sys.modules.setdefault("pycosat", ModuleType("pycosat"))  # has no wheel; imported, but not needed for this task
    import reasoning_gym

    seen: set[str] = set()
    block = 0
    while True:
        for item in reasoning_gym.create_dataset(TASK, size=256, seed=seed + 1_000_000 * block):
            question = _INSTRUCTION.sub("", str(item["question"]))
            if question not in seen and len(question) <= MAX_CHARACTERS:
                seen.add(question)
                yield {"question": question, "answer": str(item["answer"]), "source": TASK}
        block += 1


def write(path: Path, stream: Iterator[dict[str, str]], count: int) -> None:
    """Write the next ``count`` problems of ``stream``, one JSON object per line."""
    lines = [json.dumps(next(stream), ensure_ascii=False) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {count} problems")


def main() -> None:
    """Write both files from one stream, so that no validation problem is a training problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("prompts"))
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--validation", type=int, default=128)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    stream = problems(args.seed)
    write(args.out / "gsm_train.jsonl", stream, args.train)
    write(args.out / "gsm_validation.jsonl", ({**problem, "story": STORY} for problem in stream), args.validation)


if __name__ == "__main__":
    main()
