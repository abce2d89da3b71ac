"""The command line: the only package that prints or exits. Heavy imports wait until a command needs them.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 usage or recipe, 3 a gate failed,
4 directory in use, 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM.
"""

from compressor.cli.app import main

__all__ = ["main"]
