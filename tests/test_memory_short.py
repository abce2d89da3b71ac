"""Memory that ends: wherever it does, the error says what was done, what is missing and what to change."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import compressor
from compressor import Adapter, CompressorError, files, saving
from compressor.errors import MemoryShortError, memory, memory_behind, memory_in
from compressor.plugins.magnitude import Magnitude
from compressor.runs import drawing
from compressor.runs import run as runs

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 17179869184 "
    "bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"
ERRORS: dict[str, Callable[[], BaseException]] = {
    "python": MemoryError,
    "cpu": lambda: RuntimeError(CPU),
    "cuda": lambda: torch.OutOfMemoryError(CUDA),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "system": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "safetensors": lambda: SafetensorError(
        "Error while deserializing: I/O error: Cannot allocate memory (os error 12)"
    ),
}
kinds = pytest.mark.parametrize("kind", list(ERRORS))


class Full(nn.Module):
    """A layer in which memory ends, once it is switched on."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Callable[[], BaseException] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error()
        return inputs


@kinds
def test_what_libraries_say_of_memory_is_known_behind_whatever_it_was_taken_for(kind: str) -> None:
    error = ERRORS[kind]()
    assert memory_behind(error) is error
    taken = CompressorError("model.safetensors: damaged")
    taken.__cause__ = error
    assert memory_behind(taken) is error
    with pytest.raises(MemoryShortError, match=r"^out of memory while loading: "), memory("loading"):
        raise taken from error


def test_an_error_that_stands_behind_itself_ends() -> None:
    error = CompressorError("a fact")
    error.__cause__ = error
    assert memory_behind(error) is None
    with pytest.raises(CompressorError, match="a fact"), memory("training"):
        raise error from error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not fit"),
        OSError(errno.ENOSPC, "No space left"),
        ValueError("out of memory"),
        KeyError(1),
    ],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory("training"):
        raise error
    assert caught.value is error


def test_the_innermost_says_what_was_done_and_torchs_source_is_left_out() -> None:
    @memory_in("measuring")
    def outer() -> Any:
        with memory("sampling"):
            yield 1
            raise RuntimeError(CPU)

    steps = outer()
    assert next(steps) == 1
    with pytest.raises(MemoryShortError) as caught:
        next(steps)
    assert caught.value.message.startswith(
        "out of memory while sampling: DefaultCPUAllocator: can't allocate memory: you tried"
    )
    assert "evaluate.batch_size" in caught.value.hint and caught.value.exit_code == 1


@kinds
def test_training_says_what_to_change(kind: str, model: nn.Sequential, adapter: Adapter, samples: Tensor) -> None:
    full = Full()
    training = compressor.Training(steps=3, batch_size=4)
    given = {"adapter": adapter, "data": samples, "training": training}
    tuning = compressor.FineTuning(nn.Sequential(*model, full), Magnitude(), **given)
    tuning.advance()
    tuning.student[-1].error = ERRORS[kind]
    for act in (tuning.advance, tuning.state, tuning.finish):
        with pytest.raises(MemoryShortError) as caught:
            act()
        assert caught.value.message.startswith("out of memory while training: ")
        for word in ("train.accumulate", "train.gradient_checkpointing", "train.optimizer", "train.offload"):
            assert word in caught.value.hint


@kinds
@pytest.mark.parametrize("act", [compressor.prune, compressor.prune_])
def test_calibration_says_what_to_change(
    kind: str, act: Any, model: nn.Sequential, adapter: Adapter, samples: Tensor
) -> None:
    from compressor.plugins.wanda import Wanda

    full = Full()
    full.error = ERRORS[kind]
    steps = {"steps": 0} if act is compressor.prune else {}
    with pytest.raises(MemoryShortError, match=r"^out of memory while calibrating: .*\n.*train.batch_size"):
        act(nn.Sequential(*model, full), Wanda(), adapter=adapter, data=samples, batch_size=4, **steps)


@kinds
def test_lowering_says_what_to_change(kind: str, model: nn.Sequential) -> None:
    full = Full()
    full.error = ERRORS[kind]
    with pytest.raises(MemoryShortError, match=r"^out of memory while lowering: .*\n.*smaller batch"):
        compressor.lower(nn.Sequential(*model, full), torch.zeros(2, 16), cache=False)


@kinds
def test_loading_does_not_call_a_file_damaged_for_which_there_is_no_memory(
    kind: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise ERRORS[kind]()

    monkeypatch.setattr(saving.model, "state_sha256", full)
    with pytest.raises(MemoryShortError, match=r"^out of memory while loading: "):
        compressor.load(finished)


@kinds
def test_a_checkpoint_for_which_there_is_no_memory_is_not_skipped(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint-2"
    files.commit(folder, lambda target: saving.save_state(target, {"run": {}, "value": torch.ones(2)}))

    def full(*_: Any, **__: Any) -> Any:
        raise ERRORS[kind]()

    monkeypatch.setattr(saving.state, "load_file", full)
    with pytest.raises(MemoryShortError, match=r"^out of memory while loading: "):
        runs._newest_checkpoint(None, tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_sampling_says_what_to_change(kind: str, finished: Path, tmp_path: Path, cli: Any, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise ERRORS[kind]()

    adapter = type(drawing.saved_model(finished)[0])
    monkeypatch.setattr(adapter, "sample", full)
    outcome = cli("sample", finished, "--n", "2", "--steps", "1", "--out", tmp_path / "drawn")
    assert outcome.code == 1 and not (tmp_path / "drawn").exists()
    assert "error: out of memory while sampling: " in outcome.err and "--batch-size" in outcome.err
    assert "crash" not in outcome.err and "unexpected" not in outcome.err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the size of a process is read from /proc")
def test_a_process_whose_memory_is_limited_says_what_to_change(tmp_path: Path) -> None:
    program = (
        "import resource, sys, torch\n"
        "import compressor.runs.run, compressor.registry, compressor.plugins.magnitude, diffusers\n"
        "from compressor.cli import main\n"
        "torch.set_num_threads(1)\n"
        "size = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmSize'))\n"
        "limit = size * 1024 + 600 * 2**20\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "main()\n"
    )
    command = [
        *(sys.executable, "-P", "-c", program, "run", "--method", "magnitude", "--steps", "2", "--device", "cpu"),
        *("--set", "train.batch_size=4000", "--set", "evaluate.samples=0", "--set", "evaluate.latency_rounds=0"),
        *("--out", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: out of memory while training: DefaultCPUAllocator: can't allocate memory" in done.stderr
    assert "train.accumulate" in done.stderr and not (tmp_path / "out" / "model").exists()
