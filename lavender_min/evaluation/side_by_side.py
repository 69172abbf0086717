"""Reports of several hosts as one table: `python -m lavender_min.evaluation.side_by_side runs/hosts/*`.

A report is a folder that evaluate.py wrote. Each host is there untuned, after plain tuning and after Lavender.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from lavender_min import cli
from lavender_min.evaluation.intervals import interval
from lavender_min.evaluation.names import PLAIN, UNTUNED, settings, spell, title
from lavender_min.evaluation.tables import Models, table
from lavender_min.failing import read_json, shaped

PROG = "side_by_side"
COLUMNS = ("answers.all", "answers.color", "pointing.shape", "pointing.all")


def models_of(folder: Path) -> Models:
    path = folder / "report.json"
    models = shaped(read_json(path, dict).get("models"), dict, f"{path}, models")
    return {name: models[name]["runs"] for name in (UNTUNED, PLAIN, *settings(models)) if name in models}


def side_by_side(folders: Sequence[Path]) -> str:
    rows = []
    for folder in folders:
        for name, runs in models_of(folder).items():
            cells = [spell(key, *interval([run[key] for run in runs])) if key in runs[0] else "–" for key in COLUMNS]
            rows.append([folder.name if name == UNTUNED else "", name, *cells])
    return table(["host", "", *map(title, COLUMNS)], rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog=PROG, description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="folders that evaluate.py wrote, one a host")
    args = parser.parse_args(argv)
    return cli.run(PROG, lambda: print(side_by_side(args.reports)))


if __name__ == "__main__":
    sys.exit(main())
