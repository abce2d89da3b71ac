"""Several processes do one run: the same masks in all, the weights of one process, and nothing hangs where one of them fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_pipelines
import torch
from conftest import PATIENCE, UNMEASURED, TinyAdapter, tiny_model
from launched import launched
from safetensors.torch import load_file
from torch import nn

import compressor
from compressor import NM, Pruner, Shadow, Unstructured, files, found, processes
from compressor.errors import CompressorError, UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.plugins.ste import STE
from compressor.training.engine import FineTuning
from compressor.training.ranks import check_ranks
from compressor.training.settings import Training
from compressor.training.shards import refuse_cut

SETTINGS: dict[str, Any] = {"steps": 20, "batch_size": 8, "warmup": 0, "lr": 1e-3, "ema": 0.9, "clip": 1.0}
CLOSE = 1e-6  # what sums in another order may change; a wrong share of a batch changes a thousand times as much


def samples():
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def pruned(pruner, **settings):
    return compressor.prune(tiny_model(), pruner, adapter=TinyAdapter(), data=samples(), **{**SETTINGS, **settings})


def plainly(result):
    """What processes tell each other of a result."""
    weights = {name: value.numpy() for name, value in result.model.state_dict().items()}
    masks = {name: mask.keep.numpy() for name, mask in result.masks.items()}
    return weights, masks, [(step.loss, step.grad_norm, step.flip_rate) for step in result.steps], dict(result.flipped)


def farthest(found, expected):
    return max(float(abs(found[name] - value).max()) for name, value in expected.items())


def same(masks, others):
    return masks.keys() == others.keys() and all((masks[name] == others[name]).all() for name in masks)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Training. ---


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_to_the_weights_of_one(parallel):
    settings = {"accumulate": 2, "parallel": parallel}
    expected, masks, steps, flipped = plainly(pruned(STE(), accumulate=2))
    for own, own_masks, own_steps, own_flipped in launched(lambda rank: plainly(pruned(STE(), **settings))):
        assert farthest(own, expected) < CLOSE
        assert same(own_masks, masks) and own_flipped == pytest.approx(flipped)
        for ours, theirs in zip(own_steps, steps, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_two_processes_recover_by_the_adapters_of_one():
    expected = plainly(pruned(STE(), mode="lora"))[0]
    assert all(farthest(own, expected) < CLOSE for own in launched(lambda rank: plainly(pruned(STE(), mode="lora"))[0]))


def test_moments_in_8_bits_follow_the_gradients_of_two_processes_bit_for_bit():
    """Sums in another order may end in another code, so that two processes differ from one by more than float32 does: given the same
    gradients, they do not differ at all."""
    pytest.importorskip("torchao")

    def tuned(given=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16))
        training = Training(**{**SETTINGS, "optimizer": "adamw-8bit"})
        run = FineTuning(model, Magnitude(), adapter=TinyAdapter(), data=samples(), training=training)
        parameters, told = list(run.parameters.values()), []

        def gradients(*_):
            if given is not None:
                for parameter, value in zip(parameters, given[len(told)], strict=True):
                    parameter.grad.copy_(torch.from_numpy(value))
            told.append([parameter.grad.clone().numpy() for parameter in parameters])

        run.optimizer.register_step_pre_hook(gradients)
        hooks = run.optimizer._optimizer_step_pre_hooks
        hooks.move_to_end(next(reversed(hooks)), last=False)  # before the Shadow's
        for _ in range(SETTINGS["steps"]):
            run.advance()
        moments = [own[name].dequantize() for own in run.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        return told, [value.detach().numpy() for value in (*parameters, *moments)]

    first, second = launched(lambda rank: tuned())
    alone = tuned(first[0])
    assert all(
        (one == other).all() for ours in (second[1], alone[1]) for one, other in zip(first[1], ours, strict=True)
    )


class Unused(nn.Module):
    """A network with a part that nobody asks."""

    def __init__(self):
        super().__init__()
        self.net, self.idle = tiny_model(), nn.Linear(16, 16)

    def forward(self, inputs):
        return self.net(inputs)


def test_parts_of_a_model_that_nobody_asks_are_left_alone():
    def weights(rank):
        result = compressor.prune(Unused(), STE(), adapter=TinyAdapter(), data=samples(), **SETTINGS)
        return plainly(result)[0]

    expected = weights(0)
    assert all(farthest(own, expected) < CLOSE for own in launched(weights))


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_another_number_of_processes(parallel):
    def run(steps, previous=None):
        training = Training(**{**SETTINGS, "parallel": parallel})
        tuned = FineTuning(
            tiny_model(), STE(), adapter=TinyAdapter(), data=samples(), training=training, previous=previous
        )
        for _ in range(steps):
            tuned.advance()
        return tuned

    def first(rank):
        state = run(8).state()
        return state if rank == 0 else None

    def rest(state):
        return {name: value.numpy() for name, value in run(12, state).finish().model.state_dict().items()}

    expected = rest(run(8).state())
    halfway = launched(first)[0]
    assert farthest(rest(halfway), expected) < CLOSE
    assert all(farthest(own, expected) < CLOSE for own in launched(lambda rank: rest(halfway)))


@dataclass(frozen=True)
class Calibrated(Pruner):
    """A method that finds something else on every device."""

    order: Any = found()

    def prepare(self, model, adapter, batches):
        with torch.no_grad():
            next(model.parameters()).add_(0.1 * processes.team().rank)
        return Calibrated(torch.randn(16, generator=torch.Generator().manual_seed(processes.team().rank)))

    def masks(self, weights, progress, previous):
        return {name: NM(2, 4).mask(self.order.expand(len(w), -1)) for name, w in weights.items() if w.shape[1] == 16}

    def state(self):
        return {"order": self.order}

    def restored(self, state):
        return Calibrated(state["order"])


def test_what_a_method_finds_is_what_the_first_process_found():
    expected, masks, _, _ = plainly(pruned(Calibrated()))
    for own, own_masks, _, _ in launched(lambda rank: plainly(pruned(Calibrated()))):
        assert same(own_masks, masks) and farthest(own, expected) < CLOSE


class Random(Magnitude):
    """A method that draws its masks, without a seed that all know."""

    def masks(self, weights, progress, previous):
        rng = torch.Generator().manual_seed(processes.team().rank)
        return {name: NM(2, 4).mask(torch.rand(w.shape, generator=rng)) for name, w in weights.items()}


def test_other_masks_or_other_data_in_one_process_are_refused_in_all():
    def other_data(rank):
        compressor.prune(tiny_model(), Magnitude(), adapter=TinyAdapter(), data=samples() + rank, **SETTINGS)

    for action, what in ((lambda rank: pruned(Random()), "masks"), (other_data, "batches")):
        for error in launched(action):
            assert isinstance(error, CompressorError)
            assert error.message == f"the {what} of the 2 processes differ"


def test_a_shadow_in_a_users_own_loop_has_the_same_masks_in_all_processes():
    def weights(rank, count=2):
        model = tiny_model()
        targets = {name: value for name, value in model.named_parameters() if value.dim() == 2}
        if count > 1:
            processes.team()
        asked = nn.parallel.DistributedDataParallel(model) if count > 1 else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        shadow = Shadow(targets, STE(), optimizer)
        for step in range(10):
            batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            each = 8 // count
            optimizer.zero_grad()
            asked(batch[rank * each : (rank + 1) * each]).square().mean().backward()
            optimizer.step()
        return {n: w.detach().numpy() for n, w in targets.items()}, {n: m.keep.numpy() for n, m in shadow.masks.items()}

    expected, masks = weights(0, 1)
    for own, own_masks in launched(weights):
        assert same(own_masks, masks) and farthest(own, expected) < CLOSE


# --- What is refused, before anything is loaded. ---


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 7}, "train.batch_size 7 cannot be divided by 2 processes"),
        ({"parallel": "fsdp", "mode": "lora"}, "adapters need the gradients of whole weights"),
        ({"device": "cuda:1"}, "2 processes cannot share one GPU"),
    ],
)
def test_settings_that_cannot_be_shared_are_refused(two, settings, said):
    with pytest.raises(UsageError, match=said):
        check_ranks(Training(**settings))
    with pytest.raises(UsageError, match=said):
        pruned(Magnitude(), **settings)


def test_launchers_that_say_no_place_to_meet_are_refused(two):
    with pytest.raises(
        UsageError, match=r"launched as 2 processes \(this is rank 1\), and nothing says where they meet"
    ):
        pruned(Magnitude())


@pytest.mark.parametrize(
    ("pattern", "rows", "count", "said"),
    [
        (NM(2, 4), 32, 2, None),
        (NM(2, 4), 33, 4, None),
        (NM(2, 4, 4), 32, 8, None),
        (NM(2, 4, 4), 32, 3, "groups 4 rows, and a process has 11"),
        (NM(2, 4), 4, 3, "leave nothing for some"),
        (Unstructured(0.5), 32, 2, "chooses among all rows"),
        (compressor.Pattern, 32, 2, "chooses among all rows"),
    ],
)
def test_masks_that_need_the_rows_of_other_processes_are_refused(pattern, rows, count, said):
    if said is None:
        refuse_cut(pattern, "weight", (rows, 16), count)
        return
    with pytest.raises(UsageError, match=said):
        refuse_cut(pattern, "weight", (rows, 16), count)


class Whole(Magnitude):
    """A method whose masks depend on all rows of a weight, though its pattern does not."""

    def masks(self, weights, progress, previous):
        return {n: NM(2, 4).mask((w - w.mean(0)).abs()) for n, w in weights.items()}


@pytest.mark.slow
def test_a_method_that_looks_at_all_rows_is_found_out():
    for error in launched(lambda rank: pruned(Whole(), parallel="fsdp")):
        assert isinstance(error, CompressorError) and "chooses other masks where it sees some rows" in error.message
    for error in launched(lambda rank: pruned(Magnitude(pattern=Unstructured(0.5)), parallel="fsdp")):
        assert isinstance(error, UsageError) and "chooses among all rows" in error.message


def test_layers_that_need_the_whole_batch_are_refused():
    def run(rank):
        model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        compressor.prune(model, Magnitude(), adapter=TinyAdapter(), data=samples(), **SETTINGS)

    for error in launched(run):
        assert isinstance(error, UsageError) and "1 (BatchNorm1d) needs the whole batch" in error.message


# --- Commands. ---


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(cli, finished, tmp_path):
    def drawn(name, rank=0):
        given = ("--n", "5", "--batch", "2", "--steps", "2", "--sampler", "ddim", "--out", tmp_path / name)
        return cli("sample", finished, *given)

    alone, told = drawn("one"), launched(lambda rank: drawn("two", rank))
    assert [outcome.code for outcome in (alone, *told)] == [0, 0, 0], told
    assert told[1].out == told[1].err == "" and "5 images" in told[0].out
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_record_the_calls_that_one_records(cli, tmp_path):
    folder = tiny_pipelines.saved("sd3", tmp_path)
    lines = folder.with_suffix(".jsonl")

    def recorded(name):
        given = ("--n", "3", "--unseen", "2", "--steps", "2", "--out", tmp_path / name)
        return cli("record", folder, "--prompts", lines, *given)

    assert recorded("one").code == 0
    for outcome in launched(lambda rank: recorded("two")):
        assert outcome.code == 0, outcome.err
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


FAULTY = """
import sys
import time
from compressor import processes
from compressor.plugins.magnitude import Magnitude

class Faulty(Magnitude):
    def masks(self, weights, progress, previous):
        if progress > 0.4 and processes.team().rank == 1:
            raise ValueError("no luck")
        return super().masks(weights, progress, previous)
"""


@pytest.mark.slow
def test_an_error_of_one_process_is_the_one_error_of_all(cli, here, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(here / "cache"))
    (here / "faulty.py").write_text(FAULTY)
    first, second = launched(lambda rank: cli.trial(here / "run", "--pruner", "faulty.py:Faulty"))
    assert (first.code, second.code) == (1, 1)
    assert len(re.findall("^error: ", first.err, re.MULTILINE)) == 1 and second.err == second.out == ""
    assert "error: process 1: ValueError: no luck" in first.err
    assert not (here / "run" / "model").exists()


def test_the_first_process_tells_its_own_error_though_another_was_faster():
    def late(rank):
        with processes.together():
            if processes.team().leads:
                while not processes._store().check([processes._failure()]):
                    time.sleep(0.01)
            raise UsageError("the batch cannot be shared")

    assert [error.message for error in launched(late)] == ["the batch cannot be shared"] * 2


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_loaded(cli, here, monkeypatch):
    monkeypatch.setattr("compressor.runs.inputs.load_inputs", lambda recipe: pytest.fail("it loads"))
    first, second = launched(lambda rank: cli("run", "--out", here / "run", "--set", "train.batch_size=9"))
    assert (first.code, second.code) == (2, 2) and second.err == ""
    assert first.err.startswith("error: train.batch_size 9 cannot be divided by 2 processes")
    assert list(here.iterdir()) == []


# --- E2: torchrun itself. ---

RUN = (
    *("--method", "magnitude", "--steps", "20", "--set", "train.batch_size=8", "--set", "train.warmup=0"),
    *("--set", "train.lr=2e-4", "--set", "checkpoint_every=4"),
)
MEASURED = ("--set", "evaluate.samples=12", "--set", "evaluate.batch_size=5", "--set", "evaluate.sampler_steps=2")
QUICK = ("--set", "evaluate.bootstrap=2", "--set", "evaluate.latency_rounds=0")

DYING = """
import os, signal, sys
from compressor.training.engine import FineTuning
advance = FineTuning.advance

def faulted(self):
    if self.done == int(os.environ["FAULT_STEP"]) and os.environ["RANK"] == "1":
        os.kill(os.environ["FAULT"] == "job" and os.getppid() or os.getpid(), getattr(signal, os.environ["FAULT_SIGNAL"]))
    return advance(self)

FineTuning.advance = faulted
from compressor.cli import main
main()
"""


def torchrun(*command, **environment):
    """The command in two processes under torchrun: its exit code, and what it wrote to stdout and stderr."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {**os.environ, **environment}}
    process = subprocess.Popen([*launcher, *map(str, command)], **given)
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()  # and with it what it started
        pytest.fail(f"it hangs: {process.communicate(timeout=60)}")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def alone(cli, tmp_path_factory):
    """The run in one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    outcome = cli("run", "--out", out, *RUN, *MEASURED, *QUICK)
    assert outcome.code == 0, outcome.err
    return out


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def rows(out):
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return [[entry["value"] for entry in (*row["quality"], *row["drift"])] for row in report["rows"]]


def close(out, alone):
    """Whether both runs have the same masks and, to 1e-6, the same weights."""
    own, expected = weights(out), weights(alone)
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(".index"):
            assert torch.equal(own[name], value), name
        else:
            torch.testing.assert_close(own[name], value, rtol=0, atol=CLOSE)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_torchrun_ends_with_the_model_and_the_report_of_one_process(alone, tmp_path, parallel):
    out = tmp_path / "run"
    command = (
        "-m",
        "compressor.cli",
        "run",
        "--out",
        out,
        *RUN,
        *MEASURED,
        *QUICK,
        "--set",
        f"train.parallel={parallel}",
    )
    code, shown, err = torchrun(*command)
    assert code == 0, err
    assert close(out, alone)
    for own, expected in zip(rows(out), rows(alone), strict=True):
        assert own == pytest.approx(expected, rel=1e-3)
    assert shown.count("report: ") == 1 and err.count("prepare 0/1") == 1
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    assert "2 processes" in json.loads((out / "run.json").read_text(encoding="utf-8"))["hardware"]


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_one_process_goes_on(alone, cli, tmp_path):
    out, script = tmp_path / "run", tmp_path / "dying.py"
    script.write_text(DYING)
    fault = {"FAULT": "own", "FAULT_SIGNAL": "SIGKILL", "FAULT_STEP": "10"}
    code, _, err = torchrun(script, "run", "--out", out, *RUN, *UNMEASURED, **fault)
    assert code != 0
    # on a busy machine the launcher may end the other one before it has noticed: then the launcher's word is the only one
    said = re.findall("^error: .*", err, re.MULTILINE)
    assert (
        "SIGKILL" in err
        and all("one of the 2 processes of this launch died" in line for line in said)
        and len(said) <= 1
    )
    folders = sorted(out.glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-4", "checkpoint-8"]
    for folder in folders:
        files.verify(folder, needs=("state.json", "state.safetensors"))
    outcome = cli("resume", out)
    assert outcome.code == 0, outcome.err
    assert close(out, alone)


@pytest.mark.slow
def test_sigterm_to_the_job_saves_a_checkpoint_as_for_one_process(alone, cli, tmp_path):
    out, script = tmp_path / "run", tmp_path / "dying.py"
    script.write_text(DYING)
    fault = {"FAULT": "job", "FAULT_SIGNAL": "SIGTERM", "FAULT_STEP": "10"}
    never = ("--set", "checkpoint_every=100")  # so that the signal alone makes one, at whatever step it is heard
    code, _, err = torchrun(script, "run", "--out", out, *RUN, *never, *UNMEASURED, **fault)
    assert code != 0
    assert err.count("stopped; continue with: compressor resume") == 1, err
    assert not (out / "model").exists()
    (newest,) = (int(folder.name.removeprefix("checkpoint-")) for folder in out.glob("checkpoint-*"))
    assert newest > 8
    files.verify(out / f"checkpoint-{newest}", needs=("state.json", "state.safetensors"))
    outcome = cli("resume", out)
    assert outcome.code == 0, outcome.err
    assert close(out, alone)
