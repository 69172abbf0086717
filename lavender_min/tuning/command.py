"""Stage 2: fine-tunes a vision-language model with its attention pulled towards Stable Diffusion's.

    python train.py --data toy --qlora                  the toy model, on any machine
    python train.py --qlora                             Llama-3.2-11B-Vision on Flickr30k, on one GPU (--plan says which)

The maps must be there (python extract.py --data …). The flags of transformers.TrainingArguments work as well, and the few that
cannot are refused by name. --eval_share 0.05 holds out pictures and logs their losses. A run that was stopped goes on from its
last checkpoint when it is started again; SIGTERM makes it save one first, and exit with status 143, so that a scheduler knows
the run is not over. Several GPUs: see configs/.
"""

import ast
import importlib.util
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from lavender_min import cli
from lavender_min.tuning import parts
from lavender_min.tuning.flags import Flags

PROG = "train.py"


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return cli.run(PROG, lambda: train(list(sys.argv[1:] if argv is None else argv)))


def train(argv: list[str]) -> int:
    """Our own flags and the data come first: the Trainer takes five seconds to import."""
    known = trainer_flags()
    names = textwrap.fill(" ".join(known), 100, break_on_hyphens=False)
    about = f"{__doc__}\nThe Trainer's flags (--help_training explains them):\n{names}"
    flags, rest = cli.parse_known(Flags, PROG, about, argv)
    unknown = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
    if unknown:
        raise ValueError(f"there is no flag {unknown[0]} (see {PROG} --help)")
    found = [] if flags.help_training or flags.plan else examples(flags)

    from lavender_min.tuning import arguments, memory, tune

    training_args = arguments.parse(["--help"] if flags.help_training else rest, flags)
    if flags.plan:
        print(memory.describe(flags.of_model, training_args))
        return 0
    return tune.run(flags, training_args, found)


def examples(flags: Flags) -> list[parts.Parts]:
    """The data, set by set. Raises OSError or ValueError, in one line, if it, or its maps, are not there."""
    found = parts.load(flags)
    lacking = [one for one in flags.sets if not flags.plain and not Path(one.maps).exists()]
    if lacking:
        commands = " && ".join(one.extract_command for one in lacking)
        raise FileNotFoundError(f"no maps in {', '.join(one.maps for one in lacking)}; make them first: {commands}")
    return found


def trainer_flags() -> list[str]:
    """The names of all fields of TrainingArguments, read from its source: importing it would take longer than our help."""
    spec = importlib.util.find_spec("transformers.training_args")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return ["--" + f.target.id for f in body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]


if __name__ == "__main__":
    sys.exit(main())
