"""The command line: the only package that prints or exits. Heavy imports wait until a command needs them.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 a gate failed,
4 directory in use, 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM.
"""

import os
from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """The console script, and `python -m compressor`. Ctrl-C ends it with one line at any moment, while it imports its parts too."""
    try:
        from compressor.cli.app import main as begun

        begun()
    except KeyboardInterrupt:
        os.write(2, b"stopped\n")  # the streams of Python may be anything yet
        raise SystemExit(130) from None
