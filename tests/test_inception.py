"""FID with a stand-in for torch-fidelity: what the network is given, what is refused, and what a run says of it."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import registry
from compressor.errors import CompressorError, UsageError

FILE = "weights-inception-2015-12-05-6726825d.pth"
NAME = "torch_fidelity.feature_extractor_inceptionv3"


class StandIn(nn.Module):
    """Like torch-fidelity's network: its loader would run what is in the file, and it takes uint8 RGB alone."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert features_list == ["2048"] and feature_extractor_weights_path is not None, "would download"
        self.mix = nn.Linear(3, 5)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3 and len(x) <= 64
        return (self.mix(x.float().mean((2, 3)) / 255),)


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("torch_fidelity"), ModuleType(NAME)
    module.FeatureExtractorInceptionV3 = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, NAME, module)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / FILE
    torch.manual_seed(0)
    torch.save(nn.Linear(3, 5).state_dict(), path)
    state = torch.load(path)
    torch.save({f"mix.{name}": value for name, value in state.items()}, path)
    return path


@pytest.mark.usefixtures("torch_fidelity")
@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_gets_uint8_rgb_and_features_come_in_order(weights: Path, channels: int) -> None:
    metric = registry.metric("fid").with_weights(weights)
    stored = torch.randint(0, 256, (70, channels, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    features = metric.features(stored.float() / 127.5 - 1)
    state = torch.load(weights)
    expected = stored.expand(-1, 3, -1, -1).float().mean((2, 3)) / 255 @ state["mix.weight"].T + state["mix.bias"]
    assert features.shape == (70, 5) and not features.requires_grad
    assert torch.allclose(features, expected, atol=1e-5)
    assert metric.spatial(stored) is None


@pytest.mark.usefixtures("torch_fidelity")
def test_pixels_are_rounded_and_cut_as_in_picture_files(weights: Path) -> None:
    from compressor.model_zoo.inception.fid import as_rgb

    values = torch.tensor([-7.0, -1.0, -0.999, 0.0, 1.0, 1.2]).view(1, 1, 1, 6)
    assert as_rgb(values)[0, 2, 0].tolist() == [0, 0, 0, 128, 255, 255]


@pytest.mark.usefixtures("torch_fidelity")
def test_the_hash_is_that_of_the_file(weights: Path) -> None:
    assert registry.metric("fid").with_weights(weights).sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.usefixtures("torch_fidelity")
@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 2, 8, 8), (2, 64)])
def test_latents_are_refused(weights: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(CompressorError, match="fid takes images"):
        registry.metric("fid").with_weights(weights).features(torch.zeros(shape))


def test_without_a_file_the_error_names_it_and_says_that_nothing_is_downloaded() -> None:
    metric = registry.metric("fid")
    for ask in (lambda: metric.features(torch.zeros(2, 3, 8, 8)), lambda: metric.sha256):
        with pytest.raises(UsageError, match=FILE) as caught:
            ask()
        assert "--inception-weights PATH" in caught.value.hint and "Nothing is downloaded" in caught.value.hint


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file") as caught:
        registry.metric("fid").with_weights(tmp_path / "nowhere.pth")
    assert FILE in caught.value.hint


@pytest.mark.parametrize("fault", [None, "raise RuntimeError('operator torchvision::nms does not exist')"])
def test_without_torch_fidelity_the_error_says_how_to_install_it(
    weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str | None
) -> None:
    monkeypatch.delitem(sys.modules, "torch_fidelity", raising=False)
    if fault is None:
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    else:
        (tmp_path / "torch_fidelity.py").write_text(fault)
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(CompressorError, match="torch-fidelity, which cannot be imported: ") as caught:
        registry.metric("fid").with_weights(weights)
    assert caught.value.hint == 'pip install "diffusion-compressor[fid]"'


@pytest.mark.usefixtures("torch_fidelity")
def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CompressorError, match=r"other\.pth does not fit torch-fidelity's Inception: .*mix.weight"):
        registry.metric("fid").with_weights(tmp_path / "other.pth")


class Trap:
    def __reduce__(self) -> Any:
        return (exec, ("import builtins; builtins.sprung = True",))


@pytest.mark.usefixtures("torch_fidelity")
def test_nothing_in_a_hostile_file_runs(tmp_path: Path) -> None:
    import builtins

    (tmp_path / FILE).write_bytes(pickle.dumps({"mix.weight": Trap()}))
    with pytest.raises(CompressorError, match="refused"):
        registry.metric("fid").with_weights(tmp_path / FILE)
    assert not hasattr(builtins, "sprung")


def test_a_metric_without_weights_of_its_own_refuses_some(weights: Path) -> None:
    with pytest.raises(UsageError, match="fd-digits takes no weights") as caught:
        registry.metric("fd-digits").with_weights(weights)
    assert "compressor list metrics" in caught.value.hint


@pytest.mark.usefixtures("torch_fidelity")
def test_a_run_with_weights_of_inception_measures_fid(weights: Path, tmp_path: Path, cli, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(weights.parent)
    out = tmp_path / "run"
    outcome = cli.run(out, "--inception-weights", weights.name, "--set", "evaluate.latency_rounds=0")
    assert outcome.code == 0, outcome.err
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"fid: {weights}, sha256 {digest}" in outcome.err
    report = json.loads((out / "report.json").read_text())
    assert (report["metric"]["name"], report["metric"]["extractor_sha256"]) == ("fid", digest)
    assert report["recipe"]["evaluate"]["inception_weights"] == str(weights)
    names = [entry["metric"] for entry in report["rows"][-1]["quality"]]
    assert names == ["fid", "kid", "precision", "recall", "density", "coverage"]


def test_a_run_with_fid_and_no_weights_ends_before_anything_is_written(tmp_path: Path, cli) -> None:  # type: ignore[no-untyped-def]
    outcome = cli.run(tmp_path / "run", "--set", "evaluate.metric=fid")
    assert outcome.code == 2 and FILE in outcome.err and not (tmp_path / "run").exists()


def test_a_metric_that_is_named_is_not_replaced(weights: Path, tmp_path: Path, cli) -> None:  # type: ignore[no-untyped-def]
    outcome = cli.run(tmp_path / "run", "--inception-weights", weights, "--set", "evaluate.metric=fd-digits")
    assert outcome.code == 2 and "fd-digits takes no weights" in outcome.err
    outcome = cli.trial(tmp_path / "run", "--inception-weights", tmp_path / "nowhere.pth")
    assert outcome.code == 2 and "evaluate.inception_weights is given, and 0 samples are drawn" in outcome.err
