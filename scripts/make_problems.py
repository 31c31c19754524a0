"""Write the problems of the smoke runs and of the experiments, reproducible by seed.

python scripts/make_problems.py [--out prompts] [--train 512] [--validation 128] [--seed 7]

gsm_*.jsonl: grade-school word problems of reasoning_gym. sum_*.jsonl: all 200 sums and differences of two digits, 136
and 64 of them. text_*.jsonl: 256 and 32 requests for texts of one word to several hundred words.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

TASK = "gsm_symbolic"
STORY = r"^\s*Once upon a time"
"""Regular expression that matches a response if it follows the rule of the demo."""
GREETING = r"^\W*(Hi|Hey|Hello)\b"
"""Regular expression that matches a response if it follows the system prompt prompts/letter_system.txt."""
SUMS = "chain_sum"
NUM_SUMS, NUM_HELD_OUT_SUMS = 200, 64
"""Number of all sums and differences of two digits, and of those in the validation file."""
NUM_HELD_OUT_TEXTS = 32
"""Number of requests for texts in the validation file; each form has four of them."""
FORMS = (
    "Answer only with yes or no: Is {} bigger than a cup?",
    "Answer in one word: What is the color of {}?",
    "Describe {} in one short sentence.",
    "In two sentences, what is special about {}?",
    "Name three things that belong to {}.",
    "Write a poem of four lines about {}.",
    "Write a short paragraph about {}.",
    "Write a long story about {}, with many details and characters.",
)
"""Requests for texts in the order of the length that they ask for."""
SUBJECTS = (
    *("a lighthouse", "a bicycle", "a river", "an old clock", "a garden", "a train", "a mountain", "a loaf of bread"),
    *("a violin", "a spider", "a winter night", "a sailing boat", "a school", "a mirror", "a horse", "a wooden bridge"),
    *("a letter", "a thunderstorm", "a library", "a candle", "a market", "an apple tree", "a castle", "a snowman"),
    *("a fisherman", "a teapot", "a desert", "a robot", "a bakery", "an owl", "a hospital", "a pair of shoes"),
    *("a farm", "a camera", "an island", "a painting"),
)
MAX_CHARACTERS = 190
"""Maximum length of a problem, about 45 tokens: a step takes seconds without a GPU."""
_EXPRESSION = re.compile(r"problem: (.+) =$")
_INSTRUCTION = re.compile(r" *Give the result as your final answer\. Do not include units\.$")


def problems(seed: int) -> Iterator[dict[str, str]]:
    """Generate distinct problems without end: question, gold answer, source."""
    seen: set[str] = set()
    block = 0
    while True:
        for item in _reasoning_gym().create_dataset(TASK, size=256, seed=seed + 1_000_000 * block):
            question = _INSTRUCTION.sub("", str(item["question"]))
            if question not in seen and len(question) <= MAX_CHARACTERS:
                seen.add(question)
                yield {"question": question, "answer": str(item["answer"]), "source": TASK}
        block += 1


def sums(seed: int) -> Iterator[dict[str, str]]:
    """Generate each sum and difference of two digits once: question, gold answer, source."""
    sizes = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    found: dict[str, str] = {}
    for item in _reasoning_gym().create_dataset(SUMS, size=4000, seed=seed, **sizes):
        found.setdefault(_EXPRESSION.findall(item["question"])[0], str(item["answer"]))
    assert len(found) == NUM_SUMS, len(found)
    for expression, answer in found.items():
        yield {"question": f"What is {expression}?", "answer": answer, "source": SUMS}


def texts(seed: int) -> Iterator[dict[str, str]]:
    """Generate each form with each subject once, all forms in turn; the order of the subjects depends on the seed."""
    generator = random.Random(seed)
    orders = [generator.sample(SUBJECTS, len(SUBJECTS)) for _ in FORMS]
    for subjects in zip(*orders, strict=True):
        for form, subject in zip(FORMS, subjects, strict=True):
            yield {"question": form.format(subject), "source": "texts"}


def _reasoning_gym() -> ModuleType:
    sys.modules.setdefault("pycosat", ModuleType("pycosat"))  # has no wheel; imported, but not needed for these tasks
    return importlib.import_module("reasoning_gym")


def write(path: Path, stream: Iterator[dict[str, str]], count: int) -> None:
    """Write the next ``count`` problems of ``stream``, one JSON object per line."""
    lines = [json.dumps(next(stream), ensure_ascii=False) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {count} problems")


def main() -> None:
    """Write each pair of files from one stream, so that no validation problem is a training problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("prompts"))
    parser.add_argument("--train", type=int, default=512)
    parser.add_argument("--validation", type=int, default=128)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rules = {"story": STORY, "greeting": GREETING}
    stream = problems(args.seed)
    write(args.out / "gsm_train.jsonl", stream, args.train)
    write(args.out / "gsm_validation.jsonl", ({**problem, **rules} for problem in stream), args.validation)
    stream = sums(args.seed)
    write(args.out / "sum_train.jsonl", stream, NUM_SUMS - NUM_HELD_OUT_SUMS)
    write(args.out / "sum_validation.jsonl", stream, NUM_HELD_OUT_SUMS)
    stream = texts(args.seed)
    write(args.out / "text_train.jsonl", stream, len(FORMS) * len(SUBJECTS) - NUM_HELD_OUT_TEXTS)
    write(args.out / "text_validation.jsonl", stream, NUM_HELD_OUT_TEXTS)


if __name__ == "__main__":
    main()
