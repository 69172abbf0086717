"""Stage 1: what Stable Diffusion looks at for every word of every picture's text, stored for stage 2.

    python extract.py --data toy                                     any machine, minutes
    python extract.py --data flickr30k --data_root ~/flickr30k       Stable Diffusion v1.4, one GPU
    accelerate launch extract.py --data flickr30k ...                several GPUs; each writes its own shards

If it is stopped or killed, start it again with the same arguments: it goes on where it was, with the same maps.
"""

import sys
from collections.abc import Sequence

from lavender_min import cli, data
from lavender_min.teachers.flags import ExtractionFlags

PROG = "extract.py"


def main(argv: Sequence[str] | None = None) -> int:
    """The command `extract.py`, which an installed package has as `lavender-extract`; returns the exit code."""
    return cli.run(PROG, lambda: start(argv))


def start(argv: Sequence[str] | None) -> int:
    flags = cli.parse(ExtractionFlags, PROG, __doc__, argv)
    examples = data.load(flags.data, flags.data_root, flags.split, flags.captions)[: flags.limit]
    # This imports torch and diffusers, which takes seconds. A wrong flag or missing data is said before.
    from lavender_min.teachers.extraction import extract

    return extract(flags, examples)


if __name__ == "__main__":
    sys.exit(main())
