"""A run that is killed, stopped or damaged at any moment ends as if it had not been."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import diffusers
import faults
import pytest
import torch
from conftest import PATIENCE

from compressor import CompressorError, files, recipe, saving
from compressor.plugins.magnitude import Magnitude
from compressor.runs import facts, finish, inputs
from compressor.runs import run as runs
from compressor.training.engine import FineTuning
from compressor.training.forgetful import refuse_forgetful
from compressor.training.settings import Training

SHORT, LONG = 10, 60  # steps; the long run leaves time to kill it


def flags(steps):
    """The arguments of a run of so many steps, with a checkpoint after every second one."""
    settings = "train.batch_size=8 train.warmup=0 checkpoint_every=2 evaluate.samples=0 evaluate.latency_rounds=0"
    return ("--steps", str(steps), *(part for setting in settings.split() for part in ("--set", setting)))


def result_of(out):
    """What must not depend on interruptions."""
    return (out / "model" / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()


def checkpoints(out):
    """The steps of which there are checkpoints, oldest first."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in out.glob("checkpoint-*"))


def begun(out, steps, seed=0):
    """A short run whose process died after so many steps."""
    settings = {
        "checkpoint_every": 2,
        "train": {"steps": SHORT, "batch_size": 8, "warmup": 0, "seed": seed},
        "evaluate": {"samples": 0, "latency_rounds": 0},
    }
    progress = runs.execute(inputs.load_inputs(inputs.resolve(settings, "test")), out)
    while next(progress).done < steps:
        pass
    progress.close()
    return out


def started(*arguments):
    """The command in a process of its own."""
    command = [sys.executable, "-m", "compressor.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_until(process, holds):
    """Wait for `holds()` while the process works; fail where it ends before."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(process, number=signal.SIGKILL):
    """Send a signal; give the exit code (as a shell shows it) and stderr."""
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    return process.returncode, err


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cli):
    """The short run, left alone."""
    out = tmp_path_factory.mktemp("short") / "run"
    outcome = cli("run", "--out", out, *flags(SHORT))
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture(scope="module")
def uninterrupted_long(tmp_path_factory, cli):
    """The long run, left alone."""
    out = tmp_path_factory.mktemp("long") / "run"
    outcome = cli("run", "--out", out, *flags(LONG))
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A short run whose process died in step 7: checkpoints 4 and 6 are there. To be copied."""
    out = begun(tmp_path_factory.mktemp("halfway") / "run", 7)
    assert checkpoints(out) == [4, 6]
    return out


@pytest.fixture
def copy(halfway, tmp_path):
    return shutil.copytree(halfway, tmp_path / "run")


@pytest.fixture
def advances(monkeypatch):
    """The numbers of the training steps that were taken in this process."""
    original, taken = runs.FineTuning.advance, []

    def advance(self):
        record = original(self)
        taken.append(record.step)
        return record

    monkeypatch.setattr(runs.FineTuning, "advance", advance)
    return taken


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A long run that was killed three times: twice while training, and once while it evaluated."""
    out = tmp_path_factory.mktemp("killed") / "run"
    process = started("run", "--out", out, *flags(LONG))
    for moment in (4, 20):
        wait_until(process, lambda moment=moment: max(checkpoints(out), default=0) >= moment)
        assert kill(process)[0] == -signal.SIGKILL
        assert not (out / "model").exists()
        process = started("resume", out)
    wait_until(process, (out / "model" / "manifest.json").is_file)
    assert kill(process)[0] == -signal.SIGKILL
    assert not (out / "report.html").exists()
    return out


# --- Killed. ---


@pytest.mark.slow
def test_a_killed_run_ends_as_if_it_had_not_been(killed, uninterrupted_long, tmp_path, cli):
    shutil.copytree(killed, tmp_path / "run")
    outcome = cli("resume", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert result_of(tmp_path / "run") == result_of(uninterrupted_long)
    names = {path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".lock")}
    assert names == {path.name for path in uninterrupted_long.iterdir() if not path.name.startswith(".lock")}


@pytest.mark.slow
def test_a_run_killed_while_evaluating_is_not_trained_again(killed, tmp_path, cli):
    shutil.copytree(killed, tmp_path / "run")
    weights = tmp_path / "run" / "model" / "model.safetensors"
    before = weights.stat()
    outcome = cli("resume", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "fine-tune" not in outcome.err
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"][-1]["train"]["steps"] == LONG


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path, cli, uninterrupted, steps):
    out = tmp_path / "run"
    begun(out, 1)
    if not steps:
        (out / "metrics.jsonl").unlink()
    assert checkpoints(out) == []
    outcome = cli("resume", out)
    assert outcome.code == 0, outcome.err
    assert result_of(out) == result_of(uninterrupted)


def test_leftovers_of_a_save_are_cleared(copy, cli, uninterrupted):
    (copy / ".partial-checkpoint-8").mkdir()
    (copy / ".partial-checkpoint-8" / "state.json").write_text("{")
    (copy / ".partial-report.json").write_text("{")
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the line that was being written
    outcome = cli("resume", copy)
    assert outcome.code == 0, outcome.err
    assert result_of(copy) == result_of(uninterrupted)
    assert list(copy.glob(".partial*")) == []


# --- Damaged. ---


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate])
@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_skipped_and_an_older_one_used(copy, cli, uninterrupted, advances, damage, name):
    damage(copy / "checkpoint-6" / name)
    outcome = cli("resume", copy)
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if "skipped" in line]
    assert "checkpoint-6" in line
    assert name in line
    assert advances == list(range(5, SHORT + 1))
    assert result_of(copy) == result_of(uninterrupted)


def test_checkpoints_that_are_all_damaged_start_the_run_over(copy, cli, uninterrupted):
    flip(copy / "checkpoint-6" / "state.safetensors")
    (copy / "checkpoint-4" / "manifest.json").unlink()
    outcome = cli("resume", copy)
    assert outcome.code == 0, outcome.err
    assert {"checkpoint-4", "checkpoint-6"} <= set(re.findall(r"skipped (checkpoint-\d+)", outcome.err))
    assert result_of(copy) == result_of(uninterrupted)


def test_an_edited_recipe_is_not_resumed(copy, cli):
    text = (copy / "recipe.yaml").read_text()
    changed = re.sub(r"(?m)^  weight_decay: .*$", "  weight_decay: 0.5", text)
    assert changed != text
    (copy / "recipe.yaml").write_text(changed)
    outcome = cli("resume", copy)
    assert outcome.code in (1, 2)
    assert "recipe" in outcome.err
    assert not (copy / "model").exists()


def test_a_full_disk_at_a_checkpoint_keeps_the_older_ones(copy, cli, monkeypatch):
    def full(folder, state):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_state", full)
        outcome = cli("resume", copy)
    assert outcome.code == 1
    assert re.search(
        r"No space left on device \([\d,]+ bytes needed, [\d,]+ bytes written so far, [\d,]+ bytes free\)", outcome.err
    )
    assert checkpoints(copy) == [4, 6]
    for step in (4, 6):
        files.verify(copy / f"checkpoint-{step}")


# --- Stopped. ---


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_has_a_checkpoint_and_says_how_to_go_on(tmp_path, cli, uninterrupted_long, number, code):
    out = tmp_path / "run"
    process = started("run", "--out", out, *flags(LONG))
    wait_until(process, lambda: checkpoints(out))
    returned, err = kill(process, number)
    assert returned == code
    assert f"compressor resume {out}" in err
    assert "Traceback" not in err
    newest = checkpoints(out)[-1]
    files.verify(out / f"checkpoint-{newest}")
    assert len((out / "metrics.jsonl").read_text().splitlines()) == newest
    outcome = cli("resume", out)
    assert outcome.code == 0, outcome.err
    assert result_of(out) == result_of(uninterrupted_long)


def test_a_signal_during_training_is_answered_in_this_process_too(tmp_path, cli, monkeypatch):
    original, before = runs.FineTuning.advance, signal.getsignal(signal.SIGTERM)

    def advance(self):
        record = original(self)
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    monkeypatch.setattr(runs.FineTuning, "advance", advance)
    outcome = cli("run", "--out", tmp_path / "run", *flags(SHORT))
    assert outcome.code == 143
    assert checkpoints(tmp_path / "run") == [2, 3]
    assert signal.getsignal(signal.SIGTERM) == before


# --- Finished. ---


FORGETFUL = """
from dataclasses import dataclass
import compressor

SEEN = {}


@dataclass
class Stateful(compressor.Pruner):
    pattern: compressor.Pattern = compressor.NM(2, 4)
    sign: float = compressor.found()

    def prepare(self, model, adapter, batches):
        self.sign = -1.0
        return self

    def masks(self, weights, progress, previous):
        return {name: self.pattern.mask((self.sign or 1.0) * weight.abs()) for name, weight in weights.items()}


class Cached(Stateful):
    def prepare(self, model, adapter, batches):
        SEEN.update({name: value.detach().abs().clone() for name, value in model.named_parameters()})
        return self

    def masks(self, weights, progress, previous):
        return {name: self.pattern.mask(SEEN.get(name, weight.abs())) for name, weight in weights.items()}


class Kept(Stateful):
    def state(self):
        return {"sign": self.sign}

    def restored(self, state):
        return Kept(self.pattern, state["sign"])
"""


@pytest.mark.parametrize("name", ["Stateful", "Cached", "Kept"])
def test_a_method_that_forgets_what_it_found_is_refused_before_it_trains(tmp_path, cli, name):
    (tmp_path / "p.py").write_text(FORGETFUL, encoding="utf-8")
    outcome = cli.trial(tmp_path / "out", "--pruner", f"{tmp_path / 'p.py'}:{name}")
    if name == "Kept":
        assert outcome.code == 0, outcome.err
        return
    assert outcome.code == 1 and f"{name} chooses another mask for" in outcome.err and "`state`" in outcome.err
    assert not list((tmp_path / "out").glob("model*"))


def test_a_method_is_asked_about_other_weights_in_the_memory_of_its_own(model, adapter, samples):
    """A copy of all weights would be memory that a run does not have."""
    seen = []

    class Watched(Magnitude):
        def masks(self, weights, progress, previous):
            seen.append({name: (weight.data_ptr(), weight.clone()) for name, weight in weights.items()})
            return self.pattern.magnitude_masks(weights)

    training = Training(steps=2, batch_size=4, device="cpu")
    run = FineTuning(model, Watched(), adapter=adapter, data=samples, training=training)
    before = {name: weight.clone() for name, weight in run.shadow.dense.items()}
    sparse = {name: weight.detach().clone() for name, weight in run.parameters.items()}
    seen.clear()
    refuse_forgetful(run, Watched())
    for asked in seen:
        for name, (place, weight) in asked.items():
            assert place == run.shadow.dense[name].data_ptr()
            assert torch.equal(weight, before[name].flip(0))
    assert len(seen) == 2 and all(torch.equal(run.shadow.dense[name], value) for name, value in before.items())
    assert all(torch.equal(run.parameters[name], value) for name, value in sparse.items())


def test_resuming_a_finished_run_changes_nothing(finished, cli, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    outcome = cli("resume", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "finished" in outcome.err
    assert "one-shot" in outcome.out  # the report's table
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_that_was_trained_elsewhere_is_not_said_to_have_been_trained_here(finished, cli, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "report.json").unlink()
    trained = {**facts.read(out), "hardware": "another machine, 64 threads"}
    facts.write(out, trained)
    assert cli("resume", out).code == 0
    assert facts.read(out)["resumed"][0]["step"] == trained["train"]["steps"] > 0


def test_resume_by_flag_is_the_same_command(finished, cli):
    assert cli("run", "--resume", "--out", finished) == cli("resume", finished)


@pytest.mark.parametrize(
    "arguments", [("resume", "nowhere"), ("run", "--resume", "--out", "nowhere"), ("run", "--resume")]
)
def test_what_is_no_run_is_not_resumed(cli, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    outcome = cli(*arguments)
    assert outcome.code == 2
    assert "--out" in outcome.err if len(arguments) == 2 and arguments[0] == "run" else "nowhere" in outcome.err
    assert list(tmp_path.iterdir()) == []


# --- Whose a checkpoint is, and which stay. ---


def test_a_checkpoint_of_another_run_is_refused_in_one_line(copy, cli, tmp_path):
    other = begun(tmp_path / "other", 7, seed=1)
    shutil.rmtree(copy / "checkpoint-6")
    shutil.copytree(other / "checkpoint-6", copy / "checkpoint-6")
    outcome = cli("resume", copy)
    assert outcome.code == 1
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert "checkpoint-6 is of a run with another recipe" in line
    assert not (copy / "model").exists()


def test_a_checkpoint_that_does_not_say_whose_it_is_is_refused(copy, cli):
    folder = copy / "checkpoint-6"
    state = saving.load_state(folder)
    assert {"recipe_sha256", "weights_sha256", "data_sha256", "method", "versions"} <= state["made"].keys()
    assert "threads" in state["made"]["hardware"]
    del state["made"]
    files.commit(folder, lambda inside: saving.save_state(inside, state))
    outcome = cli("resume", copy)
    assert outcome.code == 1
    assert "checkpoint-6 does not say which run it is of" in outcome.err


def test_what_is_kept_of_another_run_before_its_first_step_is_not_reported(copy, tmp_path):
    from compressor.runs import one_shot

    other = begun(tmp_path / "other", 1, seed=1)
    mine = inputs.load_inputs(inputs.resolve(recipe.read(copy / "recipe.yaml"), "test"))
    calls = []
    mine_too = replace(mine, recipe=mine.recipe)
    object.__setattr__(mine_too, "one_shot", lambda: calls.append(1) or mine.one_shot())
    one_shot.one_shot(mine_too, copy / "one-shot")
    assert calls == []
    one_shot.one_shot(mine_too, other / "one-shot")
    assert calls == [1]


def test_a_run_that_starts_over_keeps_its_own_checkpoints_and_not_the_damaged_ones(copy, monkeypatch):
    for step in (4, 6):
        flip(copy / f"checkpoint-{step}" / "state.safetensors")
    found = inputs.load_inputs(inputs.resolve(recipe.read(copy / "recipe.yaml"), "test"))
    progress = runs.execute(found, copy, resume=True)
    while (event := next(progress)).stage != "fine-tune" or event.done < 3 or "skipped" in event.note:
        pass
    progress.close()
    assert checkpoints(copy) == [2]
    files.verify(copy / "checkpoint-2")


def test_a_run_whose_facts_were_lost_goes_on_by_what_its_checkpoints_say(copy, cli, uninterrupted):
    (copy / "run.json").unlink()
    outcome = cli("resume", copy)
    assert outcome.code == 0, outcome.err
    assert result_of(copy) == result_of(uninterrupted)


def test_lines_that_metrics_lacks_are_said(copy, cli):
    (copy / "metrics.jsonl").write_text("")
    outcome = cli("resume", copy)
    assert outcome.code == 0, outcome.err
    assert "metrics.jsonl lacks 6 of the steps before" in outcome.err


def test_what_has_not_begun_names_the_way_that_works(cli, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("{}")
    outcome = cli("resume", out)
    assert outcome.code == 2
    assert f"compressor run --out {out}" in outcome.err
    outcome = cli.trial(out)
    assert outcome.code == 0, outcome.err
    assert "resume" not in outcome.err


# --- Killed at any file operation. ---


@pytest.mark.slow
def test_a_run_killed_at_any_file_operation_ends_as_if_it_had_not_been(tmp_path, uninterrupted):
    """Eight operations, evenly over the run, each in a process of its own; `tests/soak.py` takes random ones, and moments."""
    settings = inputs.resolve(recipe.read(uninterrupted / "recipe.yaml"), "test")
    found = inputs.load_inputs(settings)

    def work(out):
        has_begun = (out / "recipe.yaml").is_file()
        for _ in runs.execute(found, out, resume=has_begun):
            pass

    (tmp_path / "count").mkdir()
    operations = faults.operations(lambda: work(tmp_path / "count" / "run"), tmp_path / "count")
    assert operations > 100
    for at in range(0, operations, operations // 8):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert (
            faults.in_a_process(lambda f=folder: work(f / "run"), folder, faults.Fault("killed", at)) == faults.KILLED
        )
        assert faults.in_a_process(lambda f=folder: work(f / "run"), folder) == faults.DONE
        assert result_of(folder / "run") == result_of(uninterrupted)
        assert finish.unfinished(folder / "run") is None


def test_a_scheduler_that_changed_since_the_run_began_is_refused(tmp_path):
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    settings = {
        **{"model": "ddpm", "weights": str(tmp_path / "ddpm"), "data": "digits", "method": "magnitude"},
        "evaluate": {"samples": 0, "latency_rounds": 0},
    }
    read = lambda: inputs.load_inputs(inputs.resolve(settings, "test"))  # noqa: E731
    before = facts.facts_of(read())
    path = tmp_path / "ddpm" / "scheduler" / "scheduler_config.json"
    config = files.read_json(path)
    files.write_json(path, {**config, "_diffusers_version": "0.1"})
    facts.refuse_other(before, read(), tmp_path)
    files.write_json(path, {**config, "prediction_type": "v_prediction"})
    with pytest.raises(CompressorError, match="the configuration of the model, or of its scheduler changed"):
        facts.refuse_other(before, read(), tmp_path)
    with pytest.raises(CompressorError, match="with another configuration of the model"):
        facts.refuse_other_checkpoint(before, read(), tmp_path)
    del before["architecture_sha256"]  # a run of an earlier version
    facts.refuse_other(before, read(), tmp_path)
    facts.refuse_other_checkpoint(before, read(), tmp_path)
