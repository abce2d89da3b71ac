"""`python -m compressor.comparison`: a process that does jobs of a comparison (`worker`)."""

from __future__ import annotations

import os
import sys

from compressor.comparison.worker import main

code = main(sys.stdin)
sys.stdout.flush()
os._exit(code)  # a thread may still wait for stdin
