"""Stage 1: a data set's word maps, made by Stable Diffusion and stored for stage 2. `python extract.py --help` says how.

The command stands in lavender_min/teachers/command.py, its flags in flags.py and the run itself in extraction.py beside it.
"""

import sys

from lavender_min.teachers.command import main

if __name__ == "__main__":
    sys.exit(main())
