"""What the readers share: text files, and rows of which some may be wrong.

One rule holds for all data. A row (a line, an entry) that is not as expected is left out; all of them are counted in one line
on stderr that names the first. A file that is broken as a whole, or whose rows are all wrong, is a ValueError.
"""

import sys


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
