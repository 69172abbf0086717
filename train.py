"""Stage 2, from the repository: `python train.py --data toy --qlora` (see `python train.py --help`)."""

import sys

from lavender_min.tuning.command import main

if __name__ == "__main__":
    sys.exit(main())
