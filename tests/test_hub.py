"""The hub of Hugging Face, which is never asked here: a folder stands in for it, and an imitation of its client for uploads."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from ruamel.yaml import YAML
from test_report import example

import compressor
from compressor import registry
from compressor.errors import CompressorError, UsageError
from compressor.runs import card
from compressor.saving import hub
from compressor.sparsity.notation import parse


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, as far as the hub is concerned: a model, a report of it, samples."""
    run = tmp_path_factory.mktemp("hub") / "run"
    torch.manual_seed(0)
    model = registry.adapter("uvit-digits").build()
    weight = model.get_parameter("mid_block.attn.qkv.weight")
    mask = parse("2:4").mask(weight.detach().abs())
    with torch.no_grad():
        weight.mul_(mask.keep)
    compressor.save(run / "model", model, {"mid_block.attn.qkv.weight": mask}, name="uvit-digits")
    report = example()
    report["rows"][2]["weights_sha256"] = compressor.saving.read_config(run / "model").weights_sha256
    report["limitations"] = ["<b>Not</b> lowered."]
    report["recipe"] |= {
        "method": "another, which is not the report's",
        "data": "/home/somebody/pictures",
        "train": {"steps": 5},
    }
    (run / "report.json").write_text(json.dumps(report))
    (run / "samples").mkdir()
    for row in ("dense", "sparsedm"):
        (run / "samples" / f"{row}.png").write_bytes(b"picture")
    return run


@pytest.fixture
def remote(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A hub with `me/digits` alone, which also holds what must not be fetched; what it was asked for."""
    stored = tmp_path / "remote"
    card.folder_for_hub(pruned, stored)
    (stored / "evil.py").write_text("raise SystemExit")
    (stored / "evil.pkl").write_bytes(b"evil")
    asked: list[dict[str, Any]] = []

    def snapshot(name: str, revision: str | None = None, allow_patterns: Any = None, **more: Any) -> str:
        asked.append({"name": name, "revision": revision, "allowed": allow_patterns})
        if name != "me/digits" or revision not in (None, "v1"):
            raise FileNotFoundError("404: no such repository")
        place = tmp_path / f"snapshot-{len(asked)}"
        blobs = shutil.copytree(stored, tmp_path / f"blobs-{len(asked)}")
        place.mkdir()
        for path in blobs.iterdir():  # as in the hub's cache: links to what lies elsewhere
            if path.name in allow_patterns:
                (place / path.name).symlink_to(path)
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_a_pushed_model_is_loaded_by_its_name_and_nothing_else_is_fetched(
    pruned: Path, remote: list[dict[str, Any]]
) -> None:
    here, there = compressor.load(pruned), compressor.load("me/digits", revision="v1")
    assert all(torch.equal(a, b) for a, b in zip(here.state_dict().values(), there.state_dict().values(), strict=True))
    assert remote == [{"name": "me/digits", "revision": "v1", "allowed": list(hub.FILES)}]
    assert {Path(name).suffix for name in hub.FILES} == {".json", ".safetensors"}


def test_what_is_not_there_or_offline_is_one_error(
    remote: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CompressorError, match=r"me/other at v2: .*404") as caught:
        compressor.load("me/other", revision="v2")
    assert "Check the name" in caught.value.hint
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CompressorError) as caught:
        compressor.load("me/other")
    assert "HF_HUB_OFFLINE is set" in caught.value.hint


def test_a_folder_on_the_disk_is_never_a_repository(
    pruned: Path, remote: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pruned.parent)
    compressor.load("run/model")
    compressor.load(str(pruned))
    with pytest.raises(UsageError, match="revision"):
        compressor.load("run/model", revision="v1")
    with pytest.raises(CompressorError):
        compressor.load("not/a/repository")
    assert remote == []


class Api:
    """What `compressor push` uses of `huggingface_hub.HfApi`."""

    done: ClassVar[list[tuple[str, dict[str, Any]]]] = []
    fails = False

    def create_repo(self, name: str, **more: Any) -> None:
        if self.fails:
            raise ConnectionError("no route\nto host")
        self.done.append(("create", {"name": name, **more}))

    def create_branch(self, name: str, **more: Any) -> None:
        self.done.append(("branch", more))

    def upload_folder(self, **more: Any) -> Any:
        folder = Path(more.pop("folder_path"))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self.done.append(("upload", {**more, "files": files, "card": (folder / "README.md").read_text()}))
        return type("Done", (), {"commit_url": "hub/me/digits/commit/1"})()


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Api, "done", [])
    return Api


def test_push_uploads_model_samples_and_card_to_a_private_repository(pruned: Path, cli: Any, api: type[Api]) -> None:
    outcome = cli("push", pruned, "me/digits", "--revision", "v1")
    assert outcome.code == 0 and "hub/me/digits/commit/1" in outcome.out, outcome.err
    (_, made), (_, branch), (_, sent) = api.done
    assert (
        made == {"name": "me/digits", "private": True, "exist_ok": True, "repo_type": "model"}
        and branch["branch"] == "v1"
    )
    assert sent["files"] == [
        *("README.md", "config.json", "manifest.json", "model.safetensors", "samples/dense.png", "samples/sparsedm.png")
    ]
    text = sent["card"]
    assert text.startswith("---\nlibrary_name: compressor\n") and 'compressor.load("me/digits")' in text
    for part in (
        "# sparsedm on uvit-digits",
        "4.10 [3.10, 5.10]",
        "## Hardware\n\na processor, 2 threads",
        "![dense](samples/dense.png)",
    ):
        assert part in text
    front = YAML(typ="safe").load(text.split("---")[1])
    [index] = front["model-index"]
    [result] = index["results"]
    assert index["name"] == "me/digits" and result["dataset"]["name"] == "digits"
    assert result["metrics"] == [{"type": "fd-digits", "name": "fd-digits", "value": 4.1}] and "2:4" in front["tags"]
    settings = json.loads(re.findall(r"```json\n(.*?)\n```", text)[0])
    assert settings == {"method": "sparsedm", "train": {"steps": 5}} and "/home/somebody" not in text
    assert "- &lt;b>Not&lt;/b> lowered." in text and "decay=0.0002" in text and str(pruned) not in text
    assert cli("push", pruned, "me/digits", "--public").code == 0 and api.done[-2][1]["private"] is False


def test_a_card_tells_of_the_pipeline_that_is_not_pushed(pruned: Path, cli: Any, tmp_path: Path) -> None:
    piped = shutil.copytree(pruned, tmp_path / "piped")
    (piped / "pipeline").mkdir()
    (piped / "pipeline" / "model_index.json").write_text("{}")
    said = {}
    for run in (pruned, piped):
        outcome = cli("push", run, "--folder", tmp_path / f"of {run.name}")
        assert outcome.code == 0, outcome.err
        said[run] = (tmp_path / f"of {run.name}" / "README.md").read_text()
    assert "pipeline" not in said[pruned]
    assert "in its folder `pipeline/`. It is not in this repository" in said[piped]
    assert not (tmp_path / "of piped" / "pipeline").exists()


def test_push_offline_or_without_a_network_is_one_error(
    pruned: Path, cli: Any, api: type[Api], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "fails", True)
    failed = cli("push", pruned, "me/digits")
    assert failed.code == 1 and "me/digits: no route" in failed.err and "hf auth login" in failed.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = cli("push", pruned, "me/digits")
    assert offline.code == 1 and "HF_HUB_OFFLINE is set" in offline.err and api.done == []


def test_push_refuses_what_is_no_finished_run_or_no_name(
    pruned: Path, cli: Any, api: type[Api], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    other = shutil.copytree(pruned, tmp_path / "other")
    report = json.loads((other / "report.json").read_text())
    report["rows"][2]["weights_sha256"] = "0" * 64
    (other / "report.json").write_text(json.dumps(report))
    for arguments, code, said in (
        ((tmp_path / "empty", "me/x"), 1, "no report.json"),
        ((pruned, "digits"), 2, "not the name of a repository"),
        ((pruned,), 2, "OWNER/NAME or --folder DIR"),
        ((pruned, "me/x", "--folder", tmp_path / "out"), 2, "Give one of them"),
        ((pruned, "--folder", other), 1, "is there already"),
        ((other, "me/x"), 1, "the report is of other weights"),
    ):
        outcome = cli("push", *arguments)
        assert outcome.code == code and said in outcome.err, (arguments, outcome.err)
    assert api.done == []
    assert cli("push", pruned, "--folder", tmp_path / "out").code == 0
    assert (
        compressor.load(tmp_path / "out") is not None
        and "samples/dense.png" in (tmp_path / "out/README.md").read_text()
    )
