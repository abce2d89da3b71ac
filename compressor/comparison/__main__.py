"""`python -m compressor.comparison [HOST]`: a process that does jobs of a comparison (`worker`)."""

from __future__ import annotations

import os
import sys

from compressor.comparison.worker import main

with os.fdopen(os.dup(1), "w", encoding="utf-8") as told:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what plugins print is not taken for what a job says
    code = main(sys.stdin, told, *sys.argv[1:])
os._exit(code)  # a thread may still wait for stdin
