"""`python -m compressor` is the command line."""

from __future__ import annotations

from compressor.cli import main

if __name__ == "__main__":  # processes that a command starts may import this file
    main()
