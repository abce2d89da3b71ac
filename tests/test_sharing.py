"""Comparisons that several processes share: a cell is one's at a time, the dead lose theirs, the living never, and the report is that
of one process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE

from compressor import files
from compressor.comparison import claims as protocol
from compressor.comparison.claims import FOLDER, Claims, Holder, refuse_shared
from compressor.comparison.jobs import sharing
from compressor.comparison.words import limitations
from compressor.errors import LockedError, UsageError
from compressor.report.compared import ComparisonReport

FEW = str(Path(__file__).with_name("few_digits.npz"))
TINY = (
    *("--data", FEW, "--device", "cpu"),
    *("--steps", "3", "--set", "train.batch_size=8", "--set", "train.warmup=0", "--set", "evaluate.samples=32"),
    *("--set", "evaluate.sampler_steps=2", "--set", "evaluate.bootstrap=5", "--set", "evaluate.latency_rounds=0"),
)
ELSEWHERE = Holder("far", 7, "1", "another boot", "another space")


class Clock:
    """An observer's own clock, which goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shared(tmp_path: Path, clock: Clock) -> Iterator[Any]:
    """Makes processes that share a folder; their signs of life are given by hand."""
    opened: list[Claims] = []

    def made(holder: Holder | None = None, patience: float = 60.0) -> Claims:
        one = Claims(tmp_path, patience, holder, clock)
        one._beat = lambda: None  # type: ignore[method-assign]
        opened.append(one.__enter__())
        return one

    yield made
    for one in opened:
        one.__exit__()


def crashed(claims: Claims) -> None:
    """Its process is gone: no sign of life, and nothing given back."""
    for held in claims._held.values():
        os.close(held.descriptor)
    claims._held.clear()


@pytest.fixture
def gone() -> Holder:
    """A process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, text=True)
    holder = replace(Holder.here(), pid=process.pid, started=protocol._started(process.pid))
    assert holder.started and holder.lives(Holder.here()) is True
    process.communicate("\n")
    return holder


def test_a_job_is_ones_until_it_is_given_back_done_or_failed(shared: Any) -> None:
    first, second = shared(), shared()
    assert first.take("a") and not second.take("a") and second.state("a") == "held"
    first.release("a", "free")
    assert second.take("a") and not first.take("a")
    second.release("a", "done")
    assert first.state("a") == "done" and not first.take("a")
    assert second.take("b")
    second.release("b", "failed")
    assert first.state("b") == "failed" and not first.take("b")
    later = shared()
    # whether it is there, its files say; what failed is tried again
    assert later.state("a") == later.state("b") == "free"
    assert later.take("b")


def test_of_many_that_want_a_job_at_once_one_gets_it(shared: Any) -> None:
    everyone = [shared() for _ in range(6)]
    for index in range(20):
        start, winners = threading.Barrier(len(everyone)), []

        def want(one: Claims, name: str = f"job-{index}", start: Any = start, winners: Any = winners) -> None:
            start.wait()
            if one.take(name):
                winners.append(one)

        threads = [threading.Thread(target=want, args=(one,)) for one in everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1


def test_of_two_that_saw_the_same_dead_claim_one_takes_over(shared: Any, gone: Holder) -> None:
    dead, first, second = shared(gone), shared(), shared()
    assert dead.take("a")
    crashed(dead)
    number, state = second._look("a")  # before the first one acts
    assert (number, state) == (1, "free")
    assert first.take("a")
    assert not second._make("a", number + 1, "") and second.state("a") == "held" and not first.is_lost("a")


def test_a_process_of_this_machine_that_is_gone_loses_its_job_at_once_and_one_that_lives_never(
    shared: Any, gone: Holder, clock: Clock
) -> None:
    dead, living, other = shared(gone), shared(), shared()
    assert dead.take("a") and living.take("b")
    crashed(dead)
    assert other.take("a")
    clock.now += 1_000_000  # it may be suspended
    assert other.state("b") == "held"


def test_a_number_that_another_process_has_now_is_not_taken_for_it(shared: Any) -> None:
    before = shared(replace(Holder.here(), started="1"))  # this process's number, of one that began earlier
    assert before.take("a")
    crashed(before)
    assert shared().take("a")


def test_a_silent_computer_loses_its_job_after_a_while_of_the_observers_clock_and_a_sign_of_life_keeps_it(
    shared: Any, clock: Clock
) -> None:
    far, here = shared(ELSEWHERE), shared()
    assert far.take("a") and here.state("a") == "held"
    for _ in range(5):
        clock.now += 25
        far.renew()
        assert here.state("a") == "held" and not far.is_lost("a")
    clock.now += 59
    assert here.state("a") == "held"
    clock.now += 2
    assert here.take("a")
    assert here.was_of_another("a")
    far.renew()
    assert far.is_lost("a")
    far.release("a", "done")  # which says nothing: it is another one's
    assert shared().state("a") == "held"


def test_the_patience_of_who_is_waited_for_counts_where_it_is_longer(shared: Any, clock: Clock) -> None:
    far, hasty = shared(ELSEWHERE, 500.0), shared(None, 5.0)
    assert far.take("a") and hasty.state("a") == "held"
    clock.now += 499
    assert not hasty.take("a")
    clock.now += 2
    assert hasty.take("a")


def test_who_could_give_no_sign_of_life_gives_up_before_others_take_over(shared: Any, clock: Clock) -> None:
    far, here = shared(ELSEWHERE), shared()
    assert far.take("a")
    clock.now += 31  # of 60
    assert far.is_lost("a") and here.state("a") == "held"
    far.renew()
    assert far.is_lost("a")
    assert not far.take("a")
    far.release("a", "free")  # what it was doing has ended
    assert far.take("a") and not far.is_lost("a") and here.state("a") == "held"  # nobody has taken over: it goes on


def test_a_claim_whose_writer_died_before_it_wrote_is_taken_after_a_while(
    shared: Any, tmp_path: Path, clock: Clock
) -> None:
    here = shared()
    (tmp_path / FOLDER / "a.1").touch()
    (tmp_path / FOLDER / "b.1").write_bytes(b'{"state": "held", "hol')
    assert not here.take("a") and not here.take("b")
    clock.now += 61
    assert here.take("a") and here.take("b")


def test_leaving_gives_back_what_is_not_finished(tmp_path: Path, shared: Any) -> None:
    with Claims(tmp_path) as one:
        assert one.take("a")
    assert shared().take("a")


def test_a_turn_is_one_after_another_and_ends_when_it_is_done(shared: Any) -> None:
    first, second = shared(), shared()
    turn = first.turn("report", "report")
    with pytest.raises(StopIteration, match="True"):
        next(turn)
    waiting = second.turn("report", "report")
    assert next(waiting).note == "another process is at it"
    first.release("report", "free")
    with pytest.raises(StopIteration, match="True"):
        next(waiting)
    waiting = first.turn("report", "report")
    next(waiting)
    second.release("report", "done")
    with pytest.raises(StopIteration, match="False"):
        next(waiting)


def test_who_does_not_share_and_who_has_another_plan_are_refused(tmp_path: Path, shared: Any, gone: Holder) -> None:
    one = shared()
    one.announce("plan")
    shared().announce("plan")
    with pytest.raises(LockedError, match="for another comparison"):
        shared().announce("another")
    with pytest.raises(LockedError, match=r"is shared, and in use by process \d+"):
        refuse_shared(tmp_path)
    assert (tmp_path / FOLDER).is_dir()


def test_what_dead_processes_left_is_removed_and_a_silent_computer_is_not_taken_for_dead(
    tmp_path: Path, shared: Any, gone: Holder
) -> None:
    dead = shared(gone)
    dead.announce("plan")
    crashed(dead)
    refuse_shared(tmp_path)
    assert not (tmp_path / FOLDER).exists()
    far = shared(ELSEWHERE)
    far.announce("plan")
    crashed(far)
    with pytest.raises(LockedError, match="process 7 of far"):
        refuse_shared(tmp_path)


def test_a_folder_of_others_and_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for given in ((True, None, True), (False, 60.0, False)):
        with pytest.raises(UsageError, match=r"--overwrite with --shared|--patience is for"):
            sharing(tmp_path / "out", *given)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="files of others"):
        sharing(tmp_path, True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_gpus_are_named_as_torch_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.comparison import jobs

    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,GPU-x")
    assert jobs._named_devices(["cuda:2", "cuda:0"], "auto", 0) == ["GPU-x", "5"]
    for devices, recipe, workers, said in (
        (["cuda:3"], "auto", 0, "There are cuda:0, cuda:1, cuda:2"),
        (["cuda:0"], "cuda", 2, "--workers"),
        (["cuda:0"], "cpu", 0, "the recipe's device is 'cpu'"),
    ):
        with pytest.raises(UsageError) as found:
            jobs._named_devices(devices, recipe, workers)
        assert said in str(found.value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UsageError, match="no such GPU"):
        jobs._named_devices(["cuda:0"], "auto", 0)


# --- Whole comparisons. ---


def command(out: Path, *more: str) -> list[str]:
    """A comparison of two methods."""
    return [
        *(sys.executable, "-P", "-m", "compressor.cli", "compare", "--methods", "magnitude,sparsedm", "--seeds", "1"),
        *("--out", str(out), *TINY, *more),
    ]


@cache
def node(name: str) -> list[str]:
    """What starts a command as a node `name`: with a network, a host name and process numbers of its own, where that may be had."""
    isolated = ["unshare", "-n", "-u", "-p", "-m", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
    if (
        shutil.which("unshare")
        and subprocess.run([*isolated, "hostname x"], capture_output=True, check=False).returncode == 0
    ):
        return [*isolated, f'hostname {name}; exec "$@"', "sh"]
    return []


def plain(report: dict[str, Any]) -> dict[str, Any]:
    """`report` without what differs from call to call: times, and who made a cell where."""
    for entry in report["entries"]:
        for cell in entry["cells"]:
            cell["train"]["seconds"] = 0
            cell.pop("host", None), cell.pop("environment", None)
        if entry["one_shot"]:
            entry["one_shot"]["train"]["seconds"] = 0
    report.pop("environment")
    return report


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = subprocess.run(command(out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not [path for path in out.iterdir() if path.name.startswith(".lock")]
    report = files.read_json(out / "report.json")
    assert all("host" not in cell for entry in report["entries"] for cell in entry["cells"])
    return plain(report)


@pytest.mark.slow
def test_two_nodes_that_share_a_folder_give_the_report_of_one_process_though_one_is_killed(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    out, logs = tmp_path / "out", {name: tmp_path / f"{name}.log" for name in ("one", "two")}

    def started(name: str) -> subprocess.Popen[bytes]:
        with logs[name].open("wb") as log:
            arguments = [*node(name), *command(out, "--shared", "--patience", "3", "--set", "checkpoint_every=1")]
            return subprocess.Popen(arguments, stderr=log, stdout=log, start_new_session=True)

    one, two = started("one"), started("two")
    try:
        while not (lost := cell_of(out, one, "one")):
            assert one.poll() is None and two.poll() is None, logs["one"].read_text() + logs["two"].read_text()
            time.sleep(0.01)
        os.killpg(one.pid, signal.SIGKILL)
        assert two.wait(timeout=PATIENCE) == 0, logs["two"].read_text()
    finally:
        for process in (one, two):
            process.kill()
            process.wait()
    report = files.read_json(out / "report.json")
    cells = [cell for entry in report["entries"] for cell in entry["cells"]]
    hosts = {cell["host"] for cell in cells}
    assert hosts <= ({"two"} if node("x") else {os.uname().nodename}) and len(cells) == 2
    claims = sorted(path.name for path in (out / FOLDER).glob("cells-*"))
    assert claims == sorted([f"cells-{method}-seed-0.1" for method in ("magnitude", "sparsedm")] + [f"{lost}.2"])
    assert plain(report) == alone


def cell_of(out: Path, process: subprocess.Popen[bytes], host: str) -> str | None:
    """The claim on a cell that the node has which runs as `process`, once the cell's training has begun."""
    own = f'"host": "{host}"' if node("x") else f'"pid": {process.pid}'
    for path in (out / FOLDER).glob("cells-*.1") if (out / FOLDER).is_dir() else ():
        begun = (out / "cells" / path.stem.removeprefix("cells-") / "run" / "metrics.jsonl").is_file()
        told = path.read_text(encoding="utf-8").strip()
        if begun and own in told and '"held"' in told:
            return path.stem
    return None


def test_cells_of_different_machines_are_said_to_be(alone_report: dict[str, Any]) -> None:
    place = {"versions": {"torch": "2"}, "hardware": "one", "platform": "p"}
    cells = alone_report["entries"][0]["cells"]
    assert len(cells) == 2
    for cell in cells:
        cell |= {"host": "a", "environment": place}
    said = " ".join(limitations(ComparisonReport.model_validate(alone_report)))
    assert "different hardware" not in said and "different versions" not in said
    cells[1]["environment"] = {**place, "hardware": "two", "versions": {"torch": "3"}}
    said = " ".join(limitations(ComparisonReport.model_validate(alone_report)))
    assert "different hardware, one; two" in said and "different versions of torch" in said


@pytest.fixture
def alone_report() -> dict[str, Any]:
    """A report that an earlier version wrote: it has no computers."""
    before = Path(__file__).with_name("before") / "comparison" / "report.json"
    return files.read_json(before)
