"""Write one HTML page that shows what runs learnt: curves, and responses coloured by the KL of each token.

    python -m scripts.report RUN [RUN ...] [--out report.html] [--table]

RUN is the folder of a run, finished or not. The page is one file without network access; several runs are compared in
it. ``--table`` prints the table of final numbers and writes no page. Neither torch nor a GPU is needed. The exit code
is 2 if RUN is not the folder of a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.errors import UserError, writing_to
from distill.report.compare import as_text
from distill.report.page_data import Report, write_page
from distill.report.samples import Limits
from distill.run_files import REPORT_FILE


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page or print the table; return the exit code: 0, or 2 for a user error."""
    args = _parser().parse_args(argv)
    try:
        report = Report(args.runs, Limits(args.steps, args.samples, args.tokens))
        if args.table:
            print(as_text(report.table))
            notes = report.notes
        else:
            data = report.page_data()
            with writing_to(f"--out={args.out}", "set it to a file in a writable folder"):
                write_page(args.out, data)
            print(f"{args.out} ({args.out.stat().st_size / 2**20:.1f} MiB)")
            notes = data.index["notes"]
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, default=Path(REPORT_FILE), help="file of the page (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the table of final numbers; write no page")
    limits = Limits()
    for name, help_ in (
        ("steps", "most validations, and most steps of training samples, whose responses are read per run"),
        ("samples", "most responses in the page"),
        ("tokens", "most response tokens in the page"),
    ):
        default = getattr(limits, name)
        parser.add_argument(f"--{name}", type=_positive, default=default, help=f"{help_} (default: {default})")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not an integer of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
