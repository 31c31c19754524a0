"""Write the smoke runs' problems: grade-school word problems by reasoning_gym, the same ones every time.

python scripts/make_problems.py [--out prompts] [--train 512] [--validation 128] [--seed 7]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

TASK = "gsm_symbolic"
STORY = r"^\s*Once upon a time"
"""What an answer shows where it follows the rule of the demonstration, as a regular expression."""
LONGEST = 190
"""Characters of a problem at most: about 45 tokens, so that a step takes seconds without a GPU."""
_MANNERS = re.compile(r" *Give the result as your final answer\. Do not include units\.$")


def problems(seed: int) -> Iterator[dict[str, str]]:
    """An endless stream of problems without repetition: question, answer, source."""
    import reasoning_gym

    seen: set[str] = set()
    block = 0
    while True:
        for item in reasoning_gym.create_dataset(TASK, size=256, seed=seed + 1_000_000 * block):
            question = _MANNERS.sub("", str(item["question"]))
            if question not in seen and len(question) <= LONGEST:
                seen.add(question)
                yield {"question": question, "answer": str(item["answer"]), "source": TASK}
        block += 1


def write(path: Path, stream: Iterator[dict[str, str]], count: int) -> None:
    """The next ``count`` problems of ``stream``, one JSON object a line."""
    lines = [json.dumps(next(stream), ensure_ascii=False) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {count} problems")


def main() -> None:
    """Both files from one stream, so that no validation problem is among the training ones."""
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
