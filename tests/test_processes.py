"""Processes: what they are started with, when they are stopped, what they do with pipes that are gone, and that there is one."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
import torch
from conftest import SMALL, UNMEASURED
from test_report import example, written

import compressor
from compressor import Pruner, files, processes
from compressor.cli import streams
from compressor.cli.app import app
from compressor.comparison import crew
from compressor.errors import CompressorError, UsageError
from compressor.lower import cusparselt_tuning
from compressor.plugins.magnitude import Magnitude
from compressor.progress import Progress
from compressor.runs import drawing
from compressor.runs import run as runs

ROOT = Path(compressor.__file__).parents[1]
BARE = (*SMALL, *UNMEASURED)
HOOKS = ("targets", "prepare", "masks", "with_cost")


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# --- What is started. ---


def test_only_one_place_knows_how_to_start_python():
    named = [p for room in ("compressor", "plugins", "model_zoo") for p in (ROOT / room).rglob("*.py")]
    assert [p.name for p in named if "sys.executable" in p.read_text(encoding="utf-8")] == ["processes.py"]
    assert processes.python("-c", "1")[1] == "-P" == cusparselt_tuning._command()[1]


TRAP = "import pathlib; pathlib.Path({path!r}).write_text('ran')"


def test_a_worker_runs_no_file_of_the_working_folder(here, tmp_path):
    for name in ("einops", "json", "torch", "multiprocessing", "encodings"):
        (here / f"{name}.py").write_text(TRAP.format(path=str(tmp_path / "trapped")))
    worker = crew._started(None, 1, "here")
    worker.process.stdin.close()
    assert worker.process.wait(120) == 0
    worker.process.stdout.close()
    assert not (tmp_path / "trapped").exists()


def test_drawing_processes_run_no_file_of_the_working_folder_either(monkeypatch):
    """Also the process that looks after semaphores, which the first of them starts."""
    seen = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count, context, start, given):
            seen.append(os.environ.get("PYTHONSAFEPATH"))
            super().__init__(1)

    class Context:
        def SimpleQueue(self):
            seen.append(os.environ.get("PYTHONSAFEPATH"))
            return queue.SimpleQueue()

    monkeypatch.setattr(drawing, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(drawing, "get_context", lambda kind: Context())
    monkeypatch.setattr(drawing, "_work", lambda first: torch.zeros(2, 1, 4, 4).numpy())
    wanted = drawing.Draw("nowhere", 4, 2, 2, 0, drawing.Sampling(None, None, None), "cpu")
    assert {first for first, _ in drawing._batches(wanted, range(0, 4, 2), 2)} == {0, 2}
    assert seen == ["1", "1"] and "PYTHONSAFEPATH" not in os.environ


# --- What is told to stop. ---


@pytest.fixture(autouse=True)
def not_under_nohup():
    """SIGHUP as a terminal's process has it, also where the tests were started by nohup: children inherit that."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def heard(events, numbers=(signal.SIGINT, *processes.TERMINATING)):
    with pytest.raises(processes.Interrupted) as info:
        processes.drive(events, lambda event: None, numbers)
    return info.value.exit_code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_what_keeps_nothing_is_broken_off_where_it_is(number, code):
    done = []

    def events():
        yield Progress("sample", 0, 1)
        signal.raise_signal(number)
        done.append("went on")
        yield Progress("sample", 1, 1)

    before = [signal.getsignal(one) for one in (signal.SIGINT, *processes.TERMINATING)]
    assert heard(events()) == code
    assert done == []
    assert [signal.getsignal(one) for one in (signal.SIGINT, *processes.TERMINATING)] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_step_is_finished_and_told_that_it_is_the_last(number):
    done = []

    def events():
        try:
            for step in range(5):
                yield Progress("fine-tune", step, 5, unbroken=True)
                if step == 1:
                    signal.raise_signal(number)
                done.append(step)
        except processes.Interrupted:
            done.append("saved")
            raise

    assert heard(events()) == 128 + number
    assert done == [0, 1, "saved"]


def test_a_second_ctrl_c_stops_at_once_and_a_library_that_drops_the_first_does_not_win():
    def stubborn():
        yield Progress("sample", 0, 3)
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        yield Progress("sample", 1, 3)
        pytest.fail("it went on")

    assert heard(stubborn()) == 143

    def twice():
        yield Progress("fine-tune", 0, 1, unbroken=True)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt) as info:
        processes.drive(twice(), lambda event: None)
    assert type(info.value) is KeyboardInterrupt


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def events():
        yield Progress("sample", 0, 1)
        signal.raise_signal(signal.SIGHUP)

    try:
        processes.drive(events(), lambda event: None)
        with processes.terminated():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("where", "options"),
    [
        pytest.param("compressor.model_zoo.uvit.adapter.UViTAdapter.sample", (), marks=pytest.mark.slow),
        pytest.param(
            "compressor.quality.evaluate.qualities", ("--set", "evaluate.metric=fd-digits"), marks=pytest.mark.slow
        ),
        ("compressor.plugins.wanda.observe", ("--method", "wanda", *UNMEASURED)),
        pytest.param("compressor.runs.judge.drift.answers", (), marks=pytest.mark.slow),
    ],
)
def test_a_run_hears_while_it_samples_measures_and_calibrates(cli, tmp_path, monkeypatch, where, options):
    later = []

    def long(*arguments, **named):
        signal.raise_signal(signal.SIGTERM)
        later.append("went on")

    monkeypatch.setattr(where, long)
    outcome = cli.run(tmp_path / "run", *options)
    assert outcome.code == 143, outcome.err
    assert later == [] and f"compressor resume {tmp_path / 'run'}" in outcome.err
    assert files.read_json(tmp_path / "run" / "run.json")["seed"] == 0  # there is something to go on with


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_commands_that_make_no_run_end_in_order_too(cli, monkeypatch, number, code):
    monkeypatch.setattr("compressor.registry.listing", lambda kind: signal.raise_signal(number))
    outcome = cli("list")
    assert (outcome.code, outcome.err) == (code, "stopped\n")


SLEEPER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_suspended_worker_is_woken_to_stop(monkeypatch, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGSTOP)
    with crew.Crew([None]) as working:
        working._workers.append(crew._Worker(process, None, tmp_path))
    assert process.returncode == 7


# --- What plugins may not. ---


def leaving(hook):
    def leave(self, *arguments, **named):
        sys.exit(0)

    return type("Leaver", (Magnitude,), {hook: leave})()


@pytest.mark.parametrize("hook", ["targets", "prepare", "masks"])
def test_a_pruner_that_exits_is_an_error(hook, tiny, adapter, samples):
    for steps in (0, 2):
        with pytest.raises(CompressorError, match=r"an exit \(sys.exit, code 0\) before the end"):
            compressor.prune(tiny(), leaving(hook), adapter=adapter, data=samples, steps=steps, batch_size=8)
    with pytest.raises(CompressorError, match="before the end"):
        compressor.prune_(tiny(), leaving(hook), adapter=adapter, data=samples)


@pytest.mark.parametrize("hook", ["predict", "noised"])
def test_an_adapter_that_exits_is_an_error(hook, tiny, adapter, samples, monkeypatch):
    monkeypatch.setattr(type(adapter), hook, lambda self, *given: sys.exit(0))
    with pytest.raises(CompressorError, match="before the end"):
        compressor.prune(tiny(), Magnitude(), adapter=adapter, data=samples, steps=2, batch_size=8)


MINE = """
import sys
from compressor import NM, Pruner

class Mine(Pruner):
    def masks(self, weights, progress, previous):
        if progress > 0.4:
            {fault}
        return previous or {{name: NM(2, 4).mask(w.abs()) for name, w in weights.items()}}
"""


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("sys.exit(0)", "an exit (sys.exit, code 0) before the end"),
        ("raise ValueError('no luck')", "ValueError: no luck"),
    ],
)
def test_a_fault_of_a_users_file_names_the_file_and_the_place(cli, here, monkeypatch, fault, said):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(here / "cache"))
    (here / "mine.py").write_text(MINE.format(fault=fault))
    outcome = cli.trial(here / "run", "--pruner", "mine.py:Mine")
    assert outcome.code == 1
    assert f"error: {said}, raised in masks(), line 8 of {here / 'mine.py'}" in outcome.err.replace(
        "of mine.py", f"of {here / 'mine.py'}"
    )
    assert not (here / "run" / "model").exists()


METRIC = """
import sys
from compressor.model_zoo.digits import DigitsMetric

class Leaving(DigitsMetric):
    def features(self, images):
        {fault}
"""


def test_a_fault_of_an_installed_plugin_names_the_distribution(cli, here, install, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(here / "cache"))
    from compressor import registry

    own = type(registry.metric("fd-digits"))
    base = f"from {own.__module__} import {own.__name__} as DigitsMetric"
    source = METRIC.replace("from compressor.model_zoo.digits import DigitsMetric", base).format(fault="sys.exit(0)")
    install("grumpy", source, metrics={"grumpy": "Leaving"})
    outcome = cli.run(here / "run", "--set", "evaluate.metric=grumpy")
    assert outcome.code == 1
    place = f"raised by metric 'grumpy' of grumpy, in features(), line 7 of {here.parent / 'site-grumpy' / 'grumpy.py'}"
    assert f"error: an exit (sys.exit, code 0) before the end, {place}" in outcome.err


def test_a_backend_that_exits_is_left_out_and_named(tiny, install):
    from compressor import registry

    own = type(registry.backend("onednn"))
    source = f"""
import sys
from {own.__module__} import {own.__name__} as Base

class Leaving(Base):
    name = "leaving"

    def unavailable(self, device):
        sys.exit(0)
"""
    install("grumpy", source, backends={"leaving": "Leaving"})
    plan = compressor.lower(tiny(), torch.zeros(4, 16), ["leaving"], cache=False).plan
    assert "SystemExit" in json.dumps(plan.model_dump(mode="json"))


# --- How many there are. ---

GIVEN = {
    "run": (),
    "record": ("pipe", "--prompts", "prompts.txt", "--out", "records"),
    "plan": (),
    "check-plugin": ("magnitude",),
    "compare": (),
    "resume": ("run",),
    "report": ("run",),
    "lower": ("run",),
    "bench": ("run",),
    "export": ("run", "--to", "onnx"),
    "sample": ("run",),
    "inspect": ("uvit-digits",),
    "merge-lora": ("run", "lora.safetensors"),
    "train": (),
    "evaluate": ("run",),
    "push": ("run", "owner/name"),
}


SHARED = {"run", "resume", "record", "sample", "train"}
"""The commands that the processes of a launch do together; see test_ranks.py."""


def test_commands_that_are_not_shared_and_launchers_that_say_no_place_to_meet_are_refused(cli, here, monkeypatch):
    assert set(GIVEN) == set(app.list_commands(click.Context(app))) - {"list", "doctor"}
    for size, rank in (("WORLD_SIZE", "RANK"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")):
        with monkeypatch.context() as launched:
            launched.setenv(size, "2")
            for number in ("0", "1"):
                launched.setenv(rank, number)
                for name, arguments in GIVEN.items():
                    outcome = cli(name, *arguments)
                    assert outcome.code == 2
                    if number == "1":
                        assert outcome.err == outcome.out == ""
                    else:
                        what = "this" if name in SHARED else f"compressor {name}"
                        assert outcome.err.startswith(f"error: {what} was launched as 2 processes")
                assert cli("list", "pruners").code == 0
    assert list(here.iterdir()) == []


def test_one_rank_is_no_launch_of_several():
    assert processes.ranks({"WORLD_SIZE": "1", "RANK": "0"}) == (0, 1)
    assert processes.ranks({"RANK": "3"}) == (3, 1) and processes.ranks({"WORLD_SIZE": "many"}) == (0, 1)
    assert processes.ranks({"WORLD_SIZE": "4", "RANK": "3"}) == (3, 4)


def test_fine_tuning_is_refused_to_several_ranks(monkeypatch, tiny, adapter, samples):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for call in (compressor.prune, compressor.prune_):
        with pytest.raises(UsageError, match=r"launched as 2 processes \(this is rank 1\)"):
            call(tiny(), Magnitude(), adapter=adapter, data=samples)


@pytest.mark.slow
def test_torchrun_ends_with_one_line_and_nothing_written(here):
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "compressor.cli",
        "compare",
        "--out",
        "out",
    ]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode != 0
    assert len(re.findall("^error: ", ended.stderr, re.MULTILINE)) == 1
    assert "error: compressor compare was launched as 2 processes" in ended.stderr
    assert list(here.iterdir()) == []


# --- Pipes, devices, encodings, the network. ---


def command(*arguments):
    return [sys.executable, "-m", "compressor.cli", *map(str, arguments)]


def weights(out):
    return json.loads((out / "model" / "config.json").read_text(encoding="utf-8"))["weights_sha256"]


@pytest.fixture(scope="module")
def expected(cli, tmp_path_factory):
    """What the model's weights are, however the run was started."""
    out = tmp_path_factory.mktemp("expected") / "run"
    assert cli("run", "--out", out, *BARE).code == 0
    return weights(out)


@pytest.mark.slow
def test_a_pipe_whose_reader_is_gone_and_an_odd_terminal_end_nothing(tmp_path, expected):
    odd = {"PYTHONIOENCODING": "ascii", "PYTHONWARNINGS": "error", "LANG": "C", "LC_ALL": "C"}
    odd |= {"NO_COLOR": "1", "COLUMNS": "40", "PYTHONHASHSEED": "1"}
    with (tmp_path / "shown").open("wb") as shown:
        arguments = command("run", "--out", tmp_path / "run", *BARE)
        process = subprocess.Popen(arguments, stdout=shown, stderr=subprocess.PIPE, env={**os.environ, **odd})
        assert process.stderr.readline()
        process.stderr.close()
        assert process.wait(300) == 0
    assert weights(tmp_path / "run") == expected and (tmp_path / "run" / "report.html").is_file()
    text = (tmp_path / "shown").read_bytes()
    assert text.isascii() and b"\x1b" not in text and b"report: " in text


@pytest.mark.slow
def test_closed_streams_end_nothing_and_nothing_is_written_into_files(tmp_path, expected):
    line = '"$@" >&- 2>&- <&-'
    arguments = command("run", "--out", tmp_path / "run", *BARE)
    environment = {**os.environ, "PYTHONHASHSEED": "2"}
    assert (
        subprocess.run(["sh", "-c", line, "sh", *arguments], timeout=300, check=False, env=environment).returncode == 0
    )
    assert weights(tmp_path / "run") == expected
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"fine-tune 0/4" not in path.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_device_takes_progress_and_refuses_results():
    with Path("/dev/full").open("w") as full:
        progress = streams._stream(streams._Lossy(full.fileno(), "w", closefd=False), None)
        assert print("\u2026 progress\ud800", file=progress, flush=True) is None
        results = streams._Unread(full.fileno(), "w", closefd=False)
        with pytest.raises(OSError, match="No space left"):
            results.write(b"x")


def test_a_reader_that_is_gone_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    for kind in (streams._Lossy, streams._Unread):
        print("anything", file=streams._stream(kind(writing, "w", closefd=False), None), flush=True)
    os.close(writing)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_results_that_cannot_be_written_are_an_error(tmp_path):
    written(tmp_path / "run", example())
    with Path("/dev/full").open("w") as full:
        shown = command("report", tmp_path / "run")
        ended = subprocess.run(shown, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: the standard output cannot be written to: No space left")


def test_a_whole_run_needs_no_network(cli, tmp_path, monkeypatch):
    def closed(*arguments, **named):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", closed)
    monkeypatch.setattr(socket, "getaddrinfo", closed)
    monkeypatch.setattr(socket, "create_connection", closed)
    with pytest.raises(AssertionError):
        socket.create_connection(("localhost", 9))
    outcome = cli("run", "--out", tmp_path / "run", *BARE)
    assert outcome.code == 0, outcome.err
    began = time.process_time()
    assert cli("run", "--weights", tmp_path / "nowhere", "--out", tmp_path / "other").code in (1, 2)
    assert time.process_time() - began < 20


def test_what_the_interface_has_is_tried():
    """The hooks above are those of the class, so that a new one is thought of here."""
    public = {name for name in vars(Pruner) if not name.startswith("_") and callable(getattr(Pruner, name))}
    assert public == {*HOOKS, "state", "restored"}


def test_interrupted_is_what_it_was():
    assert runs.Interrupted is processes.Interrupted
