"""`python3 tests/benchmarks/gpu`, from anywhere; see gpu/runner.py for the flags. Needs no virtual environment."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
# Python puts the folder of a script first on its path, where this one's `kernels` would pass for Hugging Face's package of that
# name.
sys.path[0:1] = [str(BENCHMARKS), str(BENCHMARKS.parent), str(BENCHMARKS.parents[1])]

from gpu.runner import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
