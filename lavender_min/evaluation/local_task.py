"""One's own questions as a task of lmms-eval, beside its benchmarks.

    python -m lavender_min.evaluation.local_task --data toy --split heldout --limit 60 --out tasks
    python evaluate.py --benchmarks local_toy --bench "--include_path tasks" --plain runs/toy-plain --lavender runs/toy-lora

The folder holds what lmms-eval reads: local_toy.yaml, which describes the task; local_toy.py, whose function takes the picture out
of a row; and the rows, a data set saved by `datasets`. An answer is right if it equals the true one but for case and punctuation.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from lavender_min import cli, data
from lavender_min.cli import flag
from lavender_min.data import SOURCES, Example

PROG = "local_task"
TASK = """\
task: {name}
dataset_path: {rows}
dataset_kwargs:
  load_from_disk: true
test_split: test
output_type: generate_until
doc_to_visual: !function {name}.picture
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: {longest}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""
PICTURE = """\
def picture(row):
    return [row["image"].convert("RGB")]
"""


def write_task(folder: Path, name: str, examples: Sequence[Example], longest: int = 16) -> None:
    """Writes the questions among the examples into `folder`, as the task `name`. An answer is cut after `longest` tokens.

    Raises ValueError if none of the examples is a question.
    """
    asked = [example for example in examples if example.question]
    if not asked:
        raise ValueError(f"none of {len(examples)} examples is a question: captions are measured by evaluate.py --text")
    rows = datasets.Dataset.from_dict(
        {
            "id": [example.id for example in asked],
            "image": [example.image() for example in asked],
            "question": [example.question for example in asked],
            "answer": [example.answer for example in asked],
        }
    ).cast_column("image", datasets.Image())
    folder = folder.absolute()
    datasets.DatasetDict({"test": rows}).save_to_disk(folder / "rows" / name)
    (folder / f"{name}.py").write_text(PICTURE)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=folder / "rows" / name, longest=longest))
    print(f"{folder} holds the task {name}, {len(asked)} questions")


@dataclass
class Flags:
    data: str = flag("toy", "the questions", SOURCES)
    data_root: str | None = flag(None, "their folder or hub id (default: data/<data>)")
    split: str | None = flag(None, "a part of them")
    limit: int | None = flag(None, "take only the first N of them")
    longest: int = flag(16, "tokens of an answer, at most")
    out: str = flag("tasks", "the folder for the task, local_<data>", metavar="DIR")

    def __post_init__(self) -> None:
        cli.at_least(1, limit=self.limit, longest=self.longest)


def main(argv: Sequence[str] | None = None) -> int:
    def make() -> None:
        flags = cli.parse(Flags, PROG, __doc__, argv)
        examples = data.load(flags.data, flags.data_root, flags.split)
        # --limit counts questions. Where there are none, `write_task` says so.
        asked = [example for example in examples if example.question][: flags.limit]
        write_task(Path(flags.out), f"local_{flags.data}", asked or examples, flags.longest)

    return cli.run(PROG, make)


if __name__ == "__main__":
    sys.exit(main())
