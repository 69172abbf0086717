"""Claims about tuning with aligned attention: tried on the toy world, where the truth is known, and judged by what came out.

    python -m lavender_min.ledger plan                    what is to be run, and how long it takes; runs nothing
    python -m lavender_min.ledger run --processes 2       runs what is missing; stopped or killed, it goes on where it was
    python -m lavender_min.ledger report                  docs/claims.md and its figures, from what is there

The claims stand in lavender_min/ledger/experiments/, one a file. With --quick trainings are short and seeds are few. That shows
that everything works, but its verdicts mean nothing.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lavender_min import cli
from lavender_min.ledger import declared, runs

PROG = "python -m lavender_min.ledger"


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = list(sys.argv[1:] if argv is None else argv)
    parser = cli.Parser(prog=PROG, description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("what", choices=["plan", "run", "report"])
    parser.add_argument("--quick", action="store_true", help="short trainings and few seeds")
    parser.add_argument("--only", type=int, metavar="CLAIM", help="the number of one claim")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="with run: processes of one thread each")
    parser.add_argument("--out", type=Path, help="the ledger's folder (default: runs/ledger, or runs/ledger-quick)")
    parser.add_argument("--page", type=Path, help="with report: the page (default: docs/claims.md, or OUT/claims.md)")
    args = parser.parse_args(given)

    def go() -> int:
        cli.at_least(1, processes=args.processes)
        setup = declared.setup(args.quick)
        claims = declared.claims(setup, args.only)
        out = args.out or Path("runs/ledger-quick" if args.quick else "runs/ledger")
        ledger = runs.Ledger(out, setup, claims)
        if args.what == "plan":
            print(runs.forecast(ledger, args.processes))
            return 0
        if args.what == "run":
            return runs.run_all(ledger, args.processes, given)
        from lavender_min.ledger import report

        report.write(ledger, args.page or (out / "claims.md" if args.quick else Path("docs/claims.md")))
        return 0

    return cli.run(PROG, go)


if __name__ == "__main__":
    sys.exit(main())
