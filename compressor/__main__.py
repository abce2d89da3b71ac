"""`python -m compressor` is the command line, as the console script is it.

`python -m` has put the working folder on the path, which the console script has not there: a file that happens to lie in it,
`einops.py`, would run in the place of a library. So it is taken off before anything else is imported.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # processes that a command starts may import this file
    if not sys.flags.safe_path:
        del sys.path[0]
    from compressor.cli import main

    main()
