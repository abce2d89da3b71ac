"""Tests of Triton's kernels without a GPU: in its interpreter, which it is asked for once, when it is imported."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: it comes with torch for CUDA"
)


def in_the_interpreter(name: str) -> ModuleType:
    """The module `name` of kernels; skips the test where they would be compiled."""
    if not INTERPRETS:
        pytest.skip("needs TRITON_INTERPRET=1: test_all_of_this_file_in_the_interpreter starts it so")
    return importlib.import_module(name)


def run_in_the_interpreter(file: str) -> None:
    """All tests of `file` in a process whose Triton interprets."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rs", file]
    made = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stdout
    assert "TRITON_INTERPRET=1" not in made.stdout  # none of those that need it was skipped


def compiled_for(
    capability: int, kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], **options: Any
) -> Any:
    """`kernel` as machine code of a GPU; arguments without a type of their own are pointers to float32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    source = ASTSource(kernel, signature, {n: constants[n] for n in names if n in constants})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(made.asm["cubin"]) > 1000
    return made
