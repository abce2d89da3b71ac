"""What a user wrote and nothing reads is refused, or said; what a run wrote is not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_comparison import TINY

import compressor
from compressor import recipe as recipes
from compressor.data.calls import Index, Picture, Recording
from compressor.errors import UsageError
from compressor.runs.inputs import resolve
from compressor.runs.trade_offs import cache_of
from compressor.runs.unread import refuse_unread


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--set", "loading.workers=2"), "loading.workers is given, and digits holds no files of pictures to decode"),
        (("--set", "loading.skip_damaged=true"), "loading.skip_damaged is given, and digits"),
        (("--set", "cache_mb=1", "--data", "few.npz"), "loading.cache_mb is given, and .*few.npz holds no files"),
        (("--steps", "0", "--set", "lr=1e-3"), "train.lr is given, and 0 steps train nothing"),
        (("--steps", "0", "--train", "lora"), "train.mode is given, and 0 steps"),
        (("--steps", "0", "--set", "checkpoint_every=7"), "checkpoint_every is given, and 0 steps"),
        (("--set", "samples=0", "--inception-weights", "/none"), "evaluate.inception_weights is given, and 0 samples"),
        (("--set", "evaluate.samples=0", "--set", "sampler=ddpm"), "evaluate.sampler is given, and 0 samples"),
    ],
)
@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_setting_that_nothing_reads_is_refused_before_anything_begins(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, given: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "few.npz", images=np.zeros((8, 1, 8, 8), np.uint8))
    outcome = cli(command, *given)
    assert outcome.code == 2
    assert re.search(said, outcome.err), outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["few.npz"]


def test_what_is_off_or_as_by_default_or_written_by_a_run_is_taken(finished: Path) -> None:
    none: dict[str, Any] = {"train": {"steps": 0}, "evaluate": {"samples": 0}}
    off = {"train": {"ema": 0.0, "weight_decay": 0.0, "compiled": False, "lr": 2e-4}, "evaluate": {"measures": []}}
    refuse_unread([resolve(recipes.merged(none, off), "here")], recipes.merged(none, off))
    settings = recipes.read(finished / "recipe.yaml")
    settings["train"]["lr"], settings["loading"]["workers"] = 1e-3, 3  # as a run of an earlier version may have them
    refuse_unread([resolve(recipes.merged(settings, none), "here")], recipes.merged(settings, none))
    refuse_unread([resolve(recipes.merged(settings, none), "here")], settings, none)


def test_a_file_of_the_users_own_is_asked_too_but_not_where_the_command_line_says_otherwise() -> None:
    file: dict[str, Any] = {"train": {"steps": 0, "lr": 1e-3}}
    with pytest.raises(UsageError, match=r"train\.lr is given"):
        refuse_unread([resolve(file, "here")], file)
    trained: dict[str, Any] = {"train": {"lr": 1e-3}}
    told: dict[str, Any] = {"train": {"steps": 0}}
    refuse_unread([resolve(recipes.merged(trained, told), "here")], trained, told)


def test_a_comparison_refuses_what_none_of_its_entries_reads(cli: Any, tmp_path: Path) -> None:
    trains = tmp_path / "trains.yaml"
    trains.write_text("method: ste\ntrain: {steps: 1}\n", encoding="utf-8")
    idle = tmp_path / "idle.yaml"
    idle.write_text("method: magnitude\ntrain: {steps: 0}\n", encoding="utf-8")
    both = [resolve(recipes.merged(recipes.read(path), {"lr": 1e-3}), "here") for path in (trains, idle)]
    refuse_unread(both, {"train": {"lr": 1e-3}})
    for more in (("--set", "lr=1e-3"), ("--lr-grid", "1e-3,1e-4"), ("--set", "loading.workers=2")):
        outcome = cli("compare", "--config", idle, *TINY, "--steps", 0, *more, "--out", tmp_path / "out")
        assert outcome.code == 2
        assert " is given, and " in outcome.err


def test_two_numbers_of_steps_are_refused(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "num_inference_steps": 2}\n', encoding="utf-8")
    common = ("record", tmp_path / "pipe", "--steps", 3, "--out", tmp_path / "out", "--prompts")
    outcome = cli(*common, tmp_path / "p.txt", "--argument", "num_inference_steps=2")
    assert (outcome.code, "record.steps is the number of steps" in outcome.err) == (2, True), outcome.err
    outcome = cli(*common, tmp_path / "p.jsonl")
    assert (outcome.code, "p.jsonl have num_inference_steps" in outcome.err) == (2, True), outcome.err
    with pytest.raises(UsageError, match="two numbers of steps"):
        compressor.record(None, ["a cat"], tmp_path / "out", steps=3, num_inference_steps=2)


def test_a_name_given_twice_is_refused(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n", encoding="utf-8")
    given = ("--argument", "height=16", "--argument", "height=32")
    outcome = cli("record", tmp_path, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out", *given)
    assert (outcome.code, "height is given twice" in outcome.err) == (2, True)
    with pytest.raises(UsageError, match="cache first-block: threshold is given twice"):
        cache_of("first-block:threshold=0.1:threshold=0.2")


def test_fewer_calls_than_were_to_be_kept_are_spoken_of(tmp_path: Path) -> None:
    index = Index(
        pipeline="P", part="unet", module="M", weights_sha256="", dtype="float32", components={}, steps=3, keep=10,
        pictures=[Picture(arguments={}, seed=0)] * 2,
    )  # fmt: skip
    calls = [{"unseen": False}] * 6
    assert Recording(tmp_path, index, _listed=calls).short == (
        "keep 10: the 2 pictures have 6 calls in all, fewer than that of each"
    )
    for keep in (None, 3):
        assert Recording(tmp_path, index.model_copy(update={"keep": keep}), _listed=calls).short is None
