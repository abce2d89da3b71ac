"""What is written stays whole: faults at every file operation, several writers at once, locks, and what a full disk says."""

from __future__ import annotations

import copy
import itertools
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from faults import DONE, KILLED, KINDS, Fault, each, in_a_process

import compressor
from compressor import NM, files, saving
from compressor.errors import CompressorError, LockedError, UsageError
from compressor.foreign.bounded import mapping
from compressor.runs import directory, facts, finish

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


needs_mount = pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount here")


def written(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "file.txt").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "more.txt").write_text(text * 2)

    return write


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """A new empty folder at each call."""
    numbers = itertools.count()

    def made() -> Path:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return folder

    return made


def said(folder: Path) -> str | None:
    """What the target in `folder` holds, every byte as it was written; None where there is none."""
    target = folder / "target"
    files.recover(target)
    if not target.exists():
        return None
    files.verify(target, needs=("file.txt", "inner/more.txt"))
    text = (target / "file.txt").read_text()
    assert (target / "inner" / "more.txt").read_text() == text * 2
    return text


# --- A fault at every step of a commit. ---


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "killed" else pytest.mark.slow) for kind in KINDS]
)
def test_a_fault_at_any_step_of_a_commit_leaves_the_old_or_the_new_and_the_next_one_works(kind, fresh) -> None:
    def before() -> Path:
        folder = fresh()
        files.commit(folder / "target", written("old"))
        return folder

    found = []
    for folder, code in each(kind, lambda folder: files.commit(folder / "target", written("new")), before):
        text = said(folder)
        assert text == "new" if code == DONE else text in ("old", "new")
        found.append(text)
        files.commit(folder / "target", written("third"))
        assert said(folder) == "third"
        assert [path.name for path in folder.iterdir()] == ["target"]
    assert len(found) > 15
    assert {"old", "new"} <= set(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_step_of_a_first_commit_leaves_nothing_or_all(kind, fresh) -> None:
    found = []
    for folder, code in each(kind, lambda folder: files.commit(folder / "target", written("new")), fresh):
        found.append(said(folder))
        assert found[-1] == "new" if code == DONE else found[-1] in (None, "new")
        files.commit(folder / "target", written("third"))
        assert [path.name for path in folder.iterdir()] == ["target"]
    assert None in found
    assert found[-1] == "new"


@pytest.mark.slow
def test_two_processes_that_die_one_after_the_other_lose_nothing(fresh) -> None:
    rng = random.Random(0)
    for _ in range(60):
        folder = fresh()
        files.commit(folder / "target", written("old"))
        for text in ("second", "third"):
            fault = Fault("killed", rng.randrange(45))
            in_a_process(lambda f=folder, t=text: files.commit(f / "target", written(t)), folder, fault)
        assert said(folder) in ("old", "second", "third")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_step_of_replacing_a_file_leaves_the_old_or_the_new(kind, fresh) -> None:
    def before() -> Path:
        folder = fresh()
        files.write_json(folder / "file.json", {"text": "old"})
        return folder

    found = set()
    for folder, code in each(kind, lambda folder: files.write_json(folder / "file.json", {"text": "new"}), before):
        found.add(text := json.loads((folder / "file.json").read_text())["text"])
        assert text == "new" if code == DONE else text in ("old", "new")
    assert found == {"old", "new"}


# --- Models. ---


def pruned(seed: int) -> tuple[torch.nn.Module, dict]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Linear(32, 16))
    masks = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            masks[name] = NM(2, 4).mask(weight.detach().abs())
            weight.data = masks[name].apply(weight.data)
    return model, masks


def number(path: Path, models: list) -> int:
    """Which of `models` is saved at `path`."""
    loaded = compressor.load(path, copy.deepcopy(models[0][0])).state_dict()
    same = [all(torch.equal(loaded[k], v) for k, v in model.state_dict().items()) for model, _ in models]
    return same.index(True)


@pytest.mark.slow
def test_a_save_killed_at_any_step_leaves_a_model_that_loads(fresh) -> None:
    models = [pruned(0), pruned(1)]

    def before() -> Path:
        folder = fresh()
        compressor.save(folder / "model", *models[0])
        return folder

    found = []
    for folder, _ in each("killed", lambda folder: compressor.save(folder / "model", *models[1]), before):
        only_old = not (folder / "model").exists()
        found.append((number(folder / "model", models), only_old))
        compressor.save(folder / "model", *models[1])
        assert sorted(path.name for path in folder.iterdir()) == ["model"]
    assert (0, True) in found  # killed between its two renames: the former model is put back when somebody looks
    assert {which for which, _ in found} == {0, 1}


def test_a_run_directory_is_loaded_whose_model_was_being_replaced(tmp_path) -> None:
    models = [pruned(0)]
    compressor.save(tmp_path / "run" / "model", *models[0])
    (tmp_path / "run" / "model").rename(tmp_path / "run" / ".old-model")
    assert number(tmp_path / "run", models) == 0


def test_a_file_that_is_gone_before_torch_maps_it_is_missing(tmp_path, monkeypatch) -> None:
    gone = tmp_path / "gone.safetensors"
    with pytest.raises(FileNotFoundError), mapping():
        # what safetensors calls, once it has seen that the file is there
        torch.UntypedStorage.from_file(str(gone), False, 8)
    with pytest.raises(RuntimeError, match="another"), mapping():
        raise RuntimeError("another (2)")
    path, models = tmp_path / "model", [pruned(0)]
    compressor.save(path, *models[0])
    monkeypatch.setattr(
        "compressor.saving.model.load_file", lambda _: torch.UntypedStorage.from_file(str(gone), False, 8)
    )
    with pytest.raises(CompressorError, match="No such file"):
        number(path, models)


@pytest.mark.slow
def test_savers_of_one_path_take_turns_and_readers_always_find_a_whole_model(tmp_path) -> None:
    """Some of them are killed at a random operation. What was saved last stays, and at every moment there is a model to load."""
    models, path = [pruned(seed) for seed in range(3)], tmp_path / "model"
    compressor.save(path, *models[0])
    rng = random.Random(0)
    children = []
    for which in (1, 2):
        faults = [Fault("killed", rng.randrange(40)) for _ in range(4)]

        def saver(which=which, faults=faults) -> None:
            for fault in faults:
                assert in_a_process(lambda: compressor.save(path, *models[which]), tmp_path, fault) in (DONE, KILLED)
                compressor.save(path, *models[which])

        children.append(threading.Thread(target=lambda saver=saver: results.append(in_a_process(saver, tmp_path))))
    results: list[int] = []
    for child in children:
        child.start()
    looked = [number(path, models)]
    while any(child.is_alive() for child in children):
        looked.append(number(path, models))
    assert results == [DONE, DONE]
    assert number(path, models) in (1, 2)
    compressor.save(path, *models[0])
    assert [found.name for found in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("left", ["by the reader", "by its writer"])
def test_a_reader_that_missed_a_folder_which_was_put_back_looks_again(tmp_path, monkeypatch, left) -> None:
    """A writer dies between its two renames, and the folder that comes back is the one that was there."""
    model, path = pruned(0), tmp_path / "model"
    compressor.save(path, *model)
    time.sleep(0.05)  # a file system's clock may be as coarse as 10 ms
    verify, away = saving.model.verify, tmp_path / ".old-model"

    def meanwhile(folder: Path, needs) -> None:
        monkeypatch.setattr(saving.model, "verify", verify)
        path.rename(away)
        try:
            verify(folder, needs)
        finally:
            if left == "by its writer":
                away.rename(path)

    monkeypatch.setattr(saving.model, "verify", meanwhile)
    assert number(path, [model]) == 0
    assert [found.name for found in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("given", ["the model", "its directory"])
def test_a_reader_that_looks_while_a_folder_is_away_looks_again(tmp_path, monkeypatch, given) -> None:
    model, path = pruned(0), tmp_path / "model"
    compressor.save(path, *model)
    recover = saving.model.recover

    def meanwhile(folder: Path) -> bool:
        result = recover(folder)
        if folder == path:
            monkeypatch.setattr(saving.model, "recover", recover)
            path.rename(tmp_path / ".old-model")
        return result

    monkeypatch.setattr(saving.model, "recover", meanwhile)
    assert number(path if given == "the model" else tmp_path, [model]) == 0
    assert [found.name for found in tmp_path.iterdir()] == ["model"]


# --- Who may write. ---


@contextmanager
def somebody(hold):
    """Another thread holds something."""
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with hold():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(60)
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_a_writer_that_does_not_let_go_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.0)
    files.commit(tmp_path / "target", written("old"))
    with somebody(lambda: files.claimed(tmp_path / "target")):
        with pytest.raises(LockedError, match=rf"target is in use by process {os.getpid()}"):
            files.commit(tmp_path / "target", written("new"))
        files.commit(tmp_path / "other", written("new"))
    assert said(tmp_path) == "old"


@pytest.mark.parametrize(("setting", "other"), [("steps: 4", "steps: 6"), ("warmup: 0", "warmup: 1")])
def test_a_finished_run_whose_recipe_was_edited_is_not_taken_for_one_of_it(
    finished, tmp_path, cli, setting, other
) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    recipe = out / "recipe.yaml"
    text = recipe.read_text()
    assert setting in text
    recipe.write_text(text.replace(setting, other))
    name, value = other.split(": ")
    told = f"train.{name} is {value} there, and the report is of a run with {setting.split(': ')[1]}"
    for command, code in (("resume", 1), ("evaluate", 2), ("bench", 1), ("lower", 1), ("report", 0)):
        outcome = cli(command, str(out))
        assert outcome.code == code, (command, outcome.err)
        assert told in outcome.err, (command, outcome.err)
    recipe.write_text(text)
    assert cli("resume", str(out)).code == 0


@pytest.mark.parametrize("command", ["sample", "evaluate", "report", "bench", "export --to onnx"])
def test_what_needs_a_finished_run_says_how_to_finish_one(finished, tmp_path, cli, command) -> None:
    out = tmp_path / "a run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "model")
    (out / "report.json").unlink()
    name, *options = command.split()
    outcome = cli(name, str(out), *options)
    assert outcome.code == 1 + (name == "evaluate"), outcome.err
    assert f"Finish the run first: compressor resume '{out}'" in outcome.err
    with pytest.raises(CompressorError, match="Finish the run first"):
        compressor.load(out)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc, whose folders take no new file from anyone")
def test_where_no_file_can_be_made_nobody_is_waited_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 5.0)
    with pytest.raises(CompressorError, match="/proc/x: No such file or directory"):
        files.commit(Path("/proc/x"), written("new"))


def test_what_is_in_a_run_directory_waits_for_the_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.0)
    model, masks = pruned(0)
    with somebody(lambda: directory.locked(tmp_path / "run")), pytest.raises(LockedError, match="run is in use"):
        compressor.save(tmp_path / "run" / "model", model, masks)
    with directory.locked(tmp_path / "run"):  # the run itself may
        compressor.save(tmp_path / "run" / "model", model, masks)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model"]


@pytest.mark.parametrize("command", [("sample",), ("export", "--to", "onnx")])
@pytest.mark.parametrize("busy", ["run", "target"])
def test_sample_and_export_hold_what_they_write(finished, tmp_path, cli, command, busy) -> None:
    if command[0] == "export":
        pytest.importorskip("onnxscript")
    run = shutil.copytree(finished, tmp_path / "run")
    out = run / ("drawn" if command[0] == "sample" else "model.onnx")
    hold = (lambda: directory.locked(run)) if busy == "run" else (lambda: files.claimed(out))
    with somebody(hold):
        outcome = cli(command[0], run, *command[1:])
    assert outcome.code == 4
    assert "in use by process" in outcome.err
    assert not out.exists()


def test_a_lock_that_was_let_go_while_another_waited_is_not_taken_for_the_new_one(tmp_path) -> None:
    """Who lets go removes the file: of many who come and go, never two are inside at once."""
    inside, most = 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        for _ in range(30):
            with files.claimed(tmp_path / "target", wait=60):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)  # the others may come in, if they can
                with guard:
                    inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


# --- Beginning, clearing and finishing a run. ---


def test_a_run_killed_at_any_step_before_it_has_begun_can_be_started_or_continued(fresh) -> None:
    def begin(folder: Path) -> None:
        out = folder / "run"
        with directory.locked(out):
            directory.refuse_used_directory(out, overwrite=False)
            directory.clear(out)
            facts.write(out, {"seed": 0})
            files.write_text(out / directory.RECIPE, "steps: 3\n")

    states = set()
    for folder, _ in each("killed", begin, fresh):
        out = folder / "run"
        if (out / directory.RECIPE).is_file():
            directory.refuse_unbegun(out)  # resume goes on
            assert facts.read(out) == {"seed": 0}
            states.add("continued")
        else:
            with pytest.raises(UsageError, match=r"has no recipe\.yaml") if out.exists() else somebody_else() as caught:
                directory.refuse_unbegun(out)
            if caught is not None:
                assert "compressor run --out" in str(caught.value)
                assert "resume" not in str(caught.value)
            directory.refuse_used_directory(out, overwrite=False)
            states.add("started")
    assert states == {"continued", "started"}


@contextmanager
def somebody_else():
    yield None


@pytest.mark.slow
def test_a_run_killed_while_it_clears_the_former_one_is_not_finished_and_can_be_overwritten(finished, fresh) -> None:
    def before() -> Path:
        folder = fresh()
        shutil.copytree(finished, folder / "run")
        (folder / "run" / "checkpoint-2").mkdir()
        (folder / "run" / "mine.txt").write_text("mine")
        return folder

    assert finish.unfinished(before() / "run") is None
    begun = []
    for folder, code in each("killed", lambda folder: directory.clear(folder / "run"), before):
        out = folder / "run"
        whole = {path.name for path in out.iterdir()} >= {path.name for path in finished.iterdir()}
        begun.append((out / directory.RECIPE).is_file())
        assert (finish.unfinished(out) is None) == whole
        if begun[-1]:
            # what may be continued has lost nothing but its pages
            files.verify(out / "model", needs=saving.MODEL_FILES)
        if code == KILLED:
            directory.refuse_used_directory(out, overwrite=True)
        assert (out / "mine.txt").read_text() == "mine"
    assert begun[0]
    assert not begun[-1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_weights(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    report["rows"][-1]["weights_sha256"] = "0" * 64
    (out / "report.json").write_text(json.dumps(report))


DAMAGES = {
    "no model": lambda out: shutil.rmtree(out / "model"),
    "a flipped bit": lambda out: flip(out / "model" / "model.safetensors"),
    "no manifest": lambda out: (out / "model" / "manifest.json").unlink(),
    "no page": lambda out: (out / "report.md").unlink(),
    "a report of others": other_weights,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_that_lost_something_is_not_finished_and_is_made_whole(finished, tmp_path, cli, damage) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    damage(out)
    outcome = cli("resume", out)
    assert outcome.code == 0, outcome.err
    assert "is not finished" in outcome.err
    assert finish.unfinished(out) is None
    for name in ("model/model.safetensors", "metrics.jsonl"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
def test_a_model_that_goes_while_the_run_goes_on_is_missed(tmp_path, cli, monkeypatch) -> None:
    from compressor.runs import run as runs

    def render(out: Path) -> None:
        original(out)
        shutil.rmtree(out / "model")

    original = runs.render
    monkeypatch.setattr(runs, "render", render)
    outcome = cli.trial(tmp_path / "run")
    assert outcome.code == 1
    assert "is not finished" in outcome.err
    assert "compressor resume" in outcome.err


def test_what_a_kill_while_cleaning_left_goes_when_the_run_is_resumed(finished, tmp_path, cli) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    before = {path.name for path in out.iterdir()}
    for name in ("checkpoint-2", "one-shot", ".partial-7-model", ".old-pipeline", ".partial-model"):
        (out / name).mkdir()
    for name in (".lock-model", ".lock-model-holder", ".partial-7-report.html"):
        (out / name).touch()
    assert cli("resume", out).code == 0
    assert {path.name for path in out.iterdir()} == before


# --- Whose a checkpoint is. ---


@pytest.mark.slow
def test_an_edited_run_json_is_not_reported(finished, tmp_path, cli) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "report.html").unlink()
    found = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**found, "hardware": "a better one"}))
    outcome = cli("resume", out)
    assert outcome.code == 1
    assert "run.json was changed" in outcome.err
    (out / "run.json").write_text(json.dumps(found))
    assert cli("resume", out).code == 0


def test_other_versions_are_recorded_and_said() -> None:
    same = {"platform": "x", "arithmetic": {"passes": "float32", "optimizer": "AdamW"}}
    before = {"versions": {"torch": "1", "numpy": "2"}, "hardware": "a, 2 threads", **same}
    now = {"versions": {"torch": "3", "numpy": "2"}, "hardware": "a, 1 threads", **same}
    found = dict(before)
    assert facts.resumed(found, now, 4) == ["torch 1, now 3", "hardware a, 2 threads, now a, 1 threads"]
    assert found["resumed"] == [{"step": 4, **now}]
    assert facts.resumed(found, now, 6) == []
    assert len(found["resumed"]) == 1
    assert facts.resumed(found, before, 8) != []


# --- The disk. ---

Usage = namedtuple("Usage", "total used free")


def test_a_small_disk_is_found_before_anything_is_written(tmp_path, monkeypatch) -> None:
    model, masks = pruned(0)
    compressor.save(tmp_path / "model", model, masks)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6, 100))
    with pytest.raises(CompressorError, match=r"model: it needs [\d,]{4,} bytes on the disk, and 100 bytes are free"):
        compressor.save(tmp_path / "model", *pruned(1))
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_disk_that_is_too_small_for_a_run_is_found_before_the_model_loads(
    finished, tmp_path, cli, monkeypatch
) -> None:
    from compressor.runs import inputs

    weights = tmp_path / "weights.safetensors"
    saving_state = saving.load(finished).state_dict()
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in saving_state.items()}, weights)

    def loaded(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(inputs, "load_inputs", loaded)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    outcome = cli.trial(tmp_path / "run", "--weights", weights)
    assert outcome.code == 1
    assert "bytes on the disk, and 1,000 bytes are free" in outcome.err
    assert str(tmp_path / "run") in outcome.err
    assert not (tmp_path / "run").exists()


def test_a_disk_too_small_for_the_checkpoints_is_found_before_the_first_step(tmp_path, cli, monkeypatch) -> None:
    from compressor.runs import run as runs

    def advance(self: object) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(runs.FineTuning, "advance", advance)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    outcome = cli.trial(tmp_path / "run", "--set", "checkpoint_every=1")
    assert outcome.code == 1
    assert "3 checkpoints of" in outcome.err
    assert "1,000 bytes are free" in outcome.err


def test_a_disk_that_fills_up_while_metrics_are_written_is_told_with_its_path(tmp_path, cli, monkeypatch) -> None:
    from compressor.runs import run as runs

    def full(record: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs, "_line", full)
    outcome = cli.trial(tmp_path / "run")
    assert outcome.code == 1
    assert f"error: {tmp_path / 'run'}: cannot be written: No space left on device" in outcome.err
    assert "bytes free" in outcome.err
    assert "None" not in outcome.err


# --- A disk that is really full. ---


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk(size)` gives a file system of its own, in memory, of so many KiB; called again, it has another size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = []

    def sized(kib: int) -> Path:
        options = f"{'remount,' if mounted else ''}size={kib}k"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
        mounted.append(kib)
        return place

    yield sized
    if mounted:
        subprocess.run(["umount", place], check=True)


@needs_mount
@pytest.mark.parametrize("known", [True, False], ids=["estimated", "found out"])
def test_a_model_that_does_not_fit_leaves_the_former_one(small_disk, monkeypatch, known) -> None:
    disk = small_disk(24)
    models = [pruned(0), pruned(1)]
    compressor.save(disk / "model", *models[0])
    (disk / "ballast").write_bytes(b"x" * 4096)
    if known:
        # pages are too coarse for a disk that has nearly enough
        monkeypatch.setattr(files, "_free", lambda path: 2_000)
    if not known:
        monkeypatch.setattr(files, "refuse_full", lambda *arguments: None)
    said = "on the disk, and" if known else "cannot be written: "
    with pytest.raises(CompressorError, match=rf"model: .*{said}.*bytes") as caught:
        compressor.save(disk / "model", *models[1])
    assert "free" in str(caught.value) and "None" not in str(caught.value)
    assert number(disk / "model", models) == 0
    assert sorted(path.name for path in disk.iterdir()) == ["ballast", "model"]
    monkeypatch.undo()
    small_disk(200)
    compressor.save(disk / "model", *models[1])
    assert number(disk / "model", models) == 1


@needs_mount
@pytest.mark.slow
def test_a_run_on_a_disk_that_fills_up_goes_on_when_there_is_room(small_disk, tmp_path, cli, monkeypatch) -> None:
    """Whatever was being written when it was full: the checkpoint before is whole, and the end is the same."""
    settings = ("--steps", "6", "--set", "checkpoint_every=1")
    assert cli.trial(tmp_path / "run", *settings).code == 0
    monkeypatch.setattr(files, "refuse_full", lambda *arguments: None)  # of a disk that others fill, too
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "model").iterdir())
    ended = []
    for kib in range(size // 1024, 40 * size // 1024, 5 * size // 1024):
        out = small_disk(kib) / "run"
        outcome = cli.trial(out, *settings)
        ended.append(outcome.code)
        if outcome.code:
            assert "No space left on device" in outcome.err
            assert "bytes free" in outcome.err
            assert "None:" not in outcome.err
            assert "Traceback" not in outcome.err
            small_disk(1024 * 1024)
            again = cli("resume", out) if (out / "recipe.yaml").is_file() else cli.trial(out, *settings)
            assert again.code == 0, again.err
        for name in ("model/model.safetensors", "metrics.jsonl"):
            assert (out / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
        shutil.rmtree(out)
        if not outcome.code:
            break
    assert ended[0] == 1
    assert ended[-1] == 0
