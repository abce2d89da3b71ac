"""Scores of pictures with their prompts: in the report of a pipeline's run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipelines
import torch
import transformers
from safetensors.torch import load_file, save_file

from compressor import files, registry
from compressor.errors import CompressorError, UsageError
from compressor.pipelines.adapter import CallsAdapter
from compressor.quality.intervals import mean_interval
from compressor.quality.score import Score, scored
from compressor.quality.settings import Evaluation
from compressor.report import read_report
from compressor.runs import piped
from compressor.weights import weights_sha256


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP model of random weights with its processor, as transformers saves them."""
    folder = tmp_path_factory.mktemp("clip")
    text = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    vision = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**text, "bos_token_id": 188, "eos_token_id": 189, "pad_token_id": 189},
        vision_config={**vision, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(3)  # scores above 0, in transformers 4 and 5
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(images, tiny_pipelines._clip_tokenizer(folder / "tokens")).save_pretrained(folder)
    return folder


def test_a_clip_model_that_lacks_a_weight_judges_nothing(clip, tmp_path):
    """transformers gives it random numbers, others each time, and a warning that nobody sees."""
    file = shutil.copytree(clip, tmp_path / "clip") / "model.safetensors"
    state = load_file(file)
    del state["visual_projection.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CompressorError, match=r"does not fit CLIPModel: missing visual_projection\.weight"):
        registry.score("clip-score").opened(tmp_path / "clip")


def test_clip_score_is_the_cosine_of_clips_own_features(clip):
    score = registry.score("clip-score").opened(clip)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    prompts = tiny_pipelines.PROMPTS[:5]
    found = score.scores(images, prompts)
    model, processor = transformers.CLIPModel.from_pretrained(clip), transformers.CLIPProcessor.from_pretrained(clip)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    for at, prompt in enumerate(prompts):  # one by one: padding beside others changes nothing
        given = processor(text=[prompt], images=[pixels[at]], return_tensors="pt")
        with torch.no_grad():
            answer = model(**given)
        cosine = float(answer.logits_per_image / model.logit_scale.detach().exp())
        assert float(found[at]) == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    assert found.abs().max() > 0 and score.sha256 == weights_sha256(model)
    entry = scored(score, images, prompts, Evaluation(bootstrap=200))
    assert entry.value == pytest.approx(float(found.mean()), rel=1e-5) and entry.samples == 5
    assert entry.ci95 is not None and entry.ci95[0] <= entry.value <= entry.ci95[1]
    assert scored(score, images, prompts, Evaluation(bootstrap=0)).ci95 is None


@pytest.mark.parametrize("pictures", [2, 4, 16])
def test_the_interval_of_few_pictures_holds_as_often_as_it_says(pictures):
    drawn = torch.randn(1000, pictures, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = [mean_interval(values) for values in drawn.tolist()]
    held = sum(interval is not None and interval[0] <= 0 <= interval[1] for interval in found) / 1000
    assert 0.93 < held < 0.97, held


def test_the_interval_of_a_score_is_that_of_its_mean():
    @dataclass
    class Given(Score):
        values: list
        name: str = "given"
        sha256: str = "0" * 64

        def opened(self, weights):
            return self

        def scores(self, images, prompts):
            return torch.tensor(self.values)

    images = torch.zeros(2, 1, 1, 1)
    entry = scored(Given([1.0, 3.0]), images, ["", ""], Evaluation())
    assert entry.value == 2 and entry.ci95 == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    same = scored(Given([0.0, 0.0]), images, ["", ""], Evaluation())  # nobody knows how much others would differ
    assert same.value == 0 and same.ci95 is None
    assert scored(Given([1.0]), images[:1], [""], Evaluation()).ci95 is None


@pytest.mark.parametrize("kind", ["none", "empty", "another"])
def test_a_folder_that_holds_no_clip_is_told_in_a_line(tmp_path, kind):
    if kind == "another":
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UsageError, match=r"clip-score: .*\nGive the folder of a CLIP model"):
        registry.score("clip-score").opened(None if kind == "none" else tmp_path)


def test_a_pipelines_report_has_the_scores_of_every_row(clip, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    tiny_pipelines.made("sd", tmp_path / "sd-files").save_pretrained(tmp_path / "sd")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(tiny_pipelines.PROMPTS))
    own = [f"record.arguments.{key}={value}" for key, value in tiny_pipelines.arguments("sd").items()]
    short = ("record.n=2", "record.unseen=2", "record.steps=2", "evaluate.latency_rounds=0", *own)
    sets = [part for one in (*short, f"evaluate.scores.clip-score={clip}") for part in ("--set", one)]
    command = ("run", "--pipeline", tmp_path / "sd", "--prompts", prompts, "--method", "magnitude", "--steps", "0")
    outcome = cli(*command, "--out", tmp_path / "run", *sets)
    assert outcome.code == 0, outcome.err
    report = read_report(tmp_path / "run" / "report.json")
    assert [[entry.name for entry in row.scores] for row in report.rows] == [["clip-score"]] * 3
    assert all(row.scores[0].samples == 2 and len(row.scores[0].extractor_sha256) == 64 for row in report.rows)
    for page in ("report.html", "report.md"):
        assert "clip-score" in (tmp_path / "run" / page).read_text(encoding="utf-8")
    kept = files.read_json(tmp_path / "run" / "report.json")["recipe"]["evaluate"]["scores"]
    assert kept == {"clip-score": str(clip)}

    refused = cli(*command, "--out", tmp_path / "other", *sets[:-1], "evaluate.scores.clip-score=nowhere")
    assert refused.code == 2 and "nowhere holds no model" in refused.err and not (tmp_path / "other").exists()
    refused = cli(*command, "--out", tmp_path / "other", *sets[:-1], "evaluate.scores.clap-score=x")
    assert refused.code == 2 and "unknown score 'clap-score'" in refused.err
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"prompt_embeds": [1.0]}))
    refused = cli(*(bare if part is prompts else part for part in command), "--out", tmp_path / "other", *sets)
    assert refused.code == 2 and "a line of prompts has no text" in refused.err
    alone = cli("run", "--out", tmp_path / "other", "--set", f"evaluate.scores.clip-score={clip}")
    assert alone.code == 2 and "evaluate.scores without a pipeline" in alone.err


@dataclass(frozen=True)
class Made(Score):
    """What `give` makes of the pictures."""

    give: Callable[[torch.Tensor], Any]
    sha256: Any = "0" * 64
    name = "made"

    def opened(self, weights: Path | None) -> Score:
        return self

    def scores(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.give(images)


BROKEN = [
    (lambda images: images.flatten(1).mean(1) * float("nan"), "gave nan for picture 0"),
    (lambda images: torch.tensor([1.0, float("inf")]), "gave inf for picture 1"),
    (lambda images: [1.0, 2.0], "gave list, not a tensor"),
    (lambda images: torch.tensor(1.0), r"gave \(\) for 2 pictures"),
    (lambda images: images.flatten(1).mean(1)[:1], r"gave \(1,\) for 2 pictures"),
    (lambda images: images.flatten(1).mean(1).to(torch.complex64), "gave a tensor of torch.complex64"),
]


@pytest.mark.parametrize(("give", "said"), BROKEN)
def test_a_score_that_gives_no_number_for_each_picture_is_named(give, said):
    with pytest.raises(CompressorError, match=rf"score 'made' \(Made\) {said}"):
        scored(Made(give), torch.rand(2, 3, 4, 4), ["a", "b"], Evaluation())


def test_a_score_cannot_change_the_pictures_of_the_report():
    images = torch.rand(2, 3, 4, 4)
    before = images.clone()
    scored(Made(lambda own: own.zero_().flatten(1).mean(1)), images, ["a", "b"], Evaluation())
    assert torch.equal(images, before)
    with pytest.raises(CompressorError, match="sha256 None"):
        scored(Made(lambda own: own.flatten(1).mean(1), None), images, ["a", "b"], Evaluation())
    with pytest.raises(CompressorError, match="the pictures are not finite"):
        scored(Made(lambda own: own.flatten(1).mean(1)), images * float("nan"), ["a", "b"], Evaluation())


def test_scores_judge_a_picture_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(piped, "sample", lambda *_: SimpleNamespace(images=torch.rand(1, 3, 4, 4)))
    seen = SimpleNamespace(unseen=False, arguments={"prompt": "a boat"})
    records = SimpleNamespace(index=SimpleNamespace(pictures=[seen], steps=2))
    adapter = CallsAdapter(None, records, pictures=[seen])
    piped._try([Made(lambda images: images.flatten(1).mean(1))], adapter)
    with pytest.raises(CompressorError, match="gave list"):
        piped._try([Made(lambda images: [1.0, 2.0])], adapter)
