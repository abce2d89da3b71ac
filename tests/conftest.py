"""What tests share: a tiny model with its adapter, commands and small runs, and no way to the network."""

from __future__ import annotations

import ctypes
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from imitated import Library
from torch import Tensor, nn

from compressor import Adapter
from compressor.export.engines import _Stack
from compressor.lower import cusparselt, cusparselt_library
from compressor.lower.cusparselt_tuning import Algorithm, Tuned
from compressor.lower.vnm_kernels import kernels

torch.set_num_threads(1)  # for tensors this small, threads only wait for each other
os.environ["OMP_NUM_THREADS"] = "1"  # and in the processes that tests start
os.environ.pop("COLUMNS", None)  # tables are as wide as they are


PATIENCE = 1200.0
"""Seconds that tests wait for other processes: only what hangs takes so long, however busy the machine is."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests start processes and measure: on a busy machine they take many times what they usually do."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(2 * PATIENCE))


@pytest.fixture(scope="session", autouse=True)
def signal_stack() -> _Stack:
    """The one that the tests' thread had before the first of them."""
    found = _Stack()
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(None, ctypes.byref(found))
    return found


@pytest.fixture(autouse=True)
def signal_stack_restored(signal_stack: _Stack) -> Iterator[None]:
    """No test leaves the next a signal stack that is not this thread's own: OpenVINO's is freed with a model, and then any signal ends
    the process. Compilers set one too (LLVM, in Triton)."""
    yield
    if sys.platform == "linux":
        ctypes.CDLL(None).sigaltstack(ctypes.byref(signal_stack), None)


class TinyAdapter(Adapter):
    """Noise prediction for a plain network on vectors: x + noise -> noise."""

    name = "tiny"

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        noise = torch.randn(batch.shape, generator=rng)
        return 0.8 * batch + 0.6 * noise, noise

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        out: Tensor = module(inputs)
        return out

    def example_inputs(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 16)


def tiny_model(seed: int = 0) -> nn.Sequential:
    """Two linear layers, 16 -> 32 -> 16."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


class Clock:
    """Time that passes only where a test lets it: what is measured by it does not depend on what else the machine does."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-4  # no call takes no time
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock by which latencies are measured during this test."""
    clock = Clock()
    monkeypatch.setattr("compressor.cost.timing.time", clock)
    return clock


@pytest.fixture
def at_once() -> Callable[[], AbstractContextManager[None]]:
    """`with at_once():` fails where what is inside waits for something, or works for 20 seconds of processor time; however
    busy the machine is otherwise."""

    def refused(*_: object) -> None:
        raise AssertionError("this should have been over at once")

    @contextmanager
    def held() -> Iterator[None]:
        before = signal.signal(signal.SIGPROF, refused) if hasattr(signal, "SIGPROF") else None
        with pytest.MonkeyPatch.context() as patch:
            for name in ("time.sleep", "socket.getaddrinfo", "socket.socket.connect"):
                patch.setattr(name, refused)
            if hasattr(signal, "SIGPROF"):
                signal.setitimer(signal.ITIMER_PROF, 20)
            try:
                yield
            finally:
                if hasattr(signal, "SIGPROF"):
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    signal.signal(signal.SIGPROF, before)

    return held


@pytest.fixture
def adapter() -> TinyAdapter:
    return TinyAdapter()


@pytest.fixture
def tiny() -> Callable[..., nn.Sequential]:
    """`tiny_model`, for tests that need several."""
    return tiny_model


@pytest.fixture
def model() -> nn.Sequential:
    return tiny_model()


@pytest.fixture
def samples() -> Tensor:
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


# --- The outside: commands, runs and plugins. ---


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit code, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


def _settings(text: str) -> tuple[str, ...]:
    return tuple(part for setting in text.split() for part in ("--set", setting))


SMALL = (
    *("--steps", "4"),
    *_settings("train.batch_size=8 train.warmup=0 evaluate.samples=16 evaluate.sampler_steps=2"),
    *_settings("evaluate.bootstrap=5 evaluate.latency_rounds=2"),
)
UNMEASURED = _settings("evaluate.samples=0 evaluate.latency_rounds=0")


class Cli:
    """`cli("list", "models")` calls the console script's function in this process, as a shell would."""

    def __call__(self, *arguments: object) -> Outcome:
        from compressor.cli import main

        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", ["compressor", *map(str, arguments)])
            with pytest.raises(SystemExit) as exit_info:
                main()
        return Outcome(int(exit_info.value.code or 0), out.getvalue(), err.getvalue())

    def run(self, out: Path, *arguments: object) -> Outcome:
        """A small run in `out`; later arguments win."""
        return self("run", "--out", out, *SMALL, *arguments)

    def trial(self, out: Path, *arguments: object) -> Outcome:
        """A small run whose quality and latency nobody asks for."""
        return self.run(out, *UNMEASURED, *arguments)


@pytest.fixture(scope="session")
def cli() -> Cli:
    return Cli()


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    """The directory of a small run. To be read only; copy it to change it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    outcome = cli.run(out, "--set", "evaluate.metric=fd-digits")
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`install("name", source, pruners={"entry": "Class"})` installs a distribution of one module, `name`."""
    modules: list[str] = []

    def installed(name: str, source: str, **groups: dict[str, str]) -> None:
        site = tmp_path / f"site-{name}"
        information = site / f"{name}-1.0.dist-info"
        information.mkdir(parents=True)
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [
            f"[compressor.{g}]\n" + "".join(f"{k} = {name}:{v}\n" for k, v in e.items()) for g, e in groups.items()
        ]
        (information / "entry_points.txt").write_text("\n".join(lines))
        (site / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(site))
        modules.append(name)

    yield installed
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """cuSPARSELt, imitated, on a GPU that is imitated too."""
    made = Library()
    monkeypatch.setattr(torch, "_cslt_compress", made.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", made.sparse_mm)
    monkeypatch.setattr(cusparselt, "tuned", lambda product, index: Tuned(Algorithm(3, -1, -1)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: made.capability)
    return made


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`machine((9, 0), 801)`: a GPU of that compute capability, and torch with that cuSPARSELt (None: without). `loaded` is the
    version of the loaded file where that is another than the header's."""

    def made(
        capability: tuple[int, int],
        version: int | None,
        current: int = 0,
        hip: str | None = None,
        loaded: int | None = None,
    ) -> None:
        monkeypatch.setattr(cusparselt_library, "_loaded", lambda: loaded)
        monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: version is not None)
        monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.version, "hip", hip)

    return made


@pytest.fixture
def few_bits_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the times of this machine: where forms are chosen, few bits are fast here, and sparse ones faster."""
    if kernels()[0] is None:
        pytest.skip("the compiled kernels are not installed")

    times = {"vnm": 5.0, "vnm-int8": 2.0, "vnm-dense-int8": 3.0, "vnm-w8a8": 1.0, "vnm-w7a8": 1.0}
    times |= {"vnm-dense-w8a8": 1.5, "vnm-dense-w7a8": 1.5, "dense": 1.5, "lowered": 1.0}
    monkeypatch.setattr(
        "compressor.lower.contest.timed",
        lambda calls, rounds, device, sparse: {name: (times.get(name, 10.0),) * 25 for name in calls},
    )


@pytest.fixture(params=kernels()[0].levels() if kernels()[0] is not None else [])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that the compiled kernels have here, one after the other."""
    extension = kernels()[0]
    before = extension.level()
    extension.set_level(request.param)
    yield request.param
    extension.set_level(before)
