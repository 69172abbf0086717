"""Stage 3: where the models look and what they answer, on held-out pictures in which every word's place is known.

    python evaluate.py --data toy --seeds 3 --train "--qlora --num_train_epochs 20"     trains three pairs, then compares them
    python evaluate.py --data toy --plain runs/toy-plain --lavender runs/toy-lora       finished runs of train.py
    python evaluate.py --data flickr30k --entities DIR --plain RUN --lavender RUN       the same on photographs with boxes
    python evaluate.py --benchmarks mme,pope --plain runs/a --lavender runs/b                    benchmarks of lmms-eval
    python evaluate.py --data flickr30k --text val --plain runs/a --lavender runs/b          BLEU, CIDEr and right answers
    python evaluate.py --adapter runs/flickr30k-qlora --image my.jpg --question "What is this?"     one's own picture

With --image it prints the model's answer and draws where it looked for each word, into OUT/<name of the picture>.png. Otherwise it
writes report.md, report.json and pictures to --out. What is missing (Stable Diffusion's maps of the held-out pictures, with
--seeds the runs) is made first; stopped or killed, start it again with the same arguments and it goes on where it was.
"""

import os
import shlex
import sys
from collections.abc import Sequence

from PIL import Image

from lavender_min import cli, data
from lavender_min.evaluation.flags import Flags

PROG = "evaluate.py"
# The sides of a picture of one's own, at most, one to the other.
THINNEST = 20


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = list(sys.argv[1:] if argv is None else argv)
    return cli.run(PROG, lambda: evaluate(given))


def evaluate(argv: list[str]) -> None:
    """Checks the flags, then imports torch and what stands on it."""
    flags = cli.parse(Flags, PROG, __doc__, joined(argv))
    if flags.image is not None:
        image = open_picture(flags.image)
        from lavender_min.evaluation import own_picture

        own_picture.describe(flags, image)
    elif flags.benchmarks is not None:
        from lavender_min.evaluation import benchmarks

        benchmarks.benchmark(flags, shlex.join(["python", PROG, *argv]))
    elif flags.text is not None:
        from lavender_min.evaluation import text_quality

        text_quality.compare_texts(flags, shlex.join(["python", PROG, *argv]))
    else:
        from lavender_min.evaluation import compare

        compare.compare(flags, shlex.join(["python", PROG, *argv]))


def joined(argv: list[str]) -> list[str]:
    """`--train "--qlora"` as `--train=--qlora`: argparse takes a lone "--qlora" for a flag of our own."""
    argv = list(argv)
    for i in range(len(argv) - 1, 0, -1):
        if argv[i - 1] in ("--train", "--extract", "--bench"):
            argv[i - 1 : i + 1] = [f"{argv[i - 1]}={argv[i]}"]
    return argv


def open_picture(path: str) -> Image.Image:
    """Raises OSError or ValueError, in one line, for what is no whole picture, or too thin for models and drawings."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"--image {path}: there is no such file")
    try:
        image = data.open_image(path)
    except data.BROKEN_PICTURE as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"--image {path} is not a picture that can be read: {reason}") from None
    if max(image.size) > THINNEST * min(image.size):
        raise ValueError(
            f"--image {path} is {image.width} × {image.height} pixels: one side is over {THINNEST} times the other"
        )
    return image


if __name__ == "__main__":
    sys.exit(main())
