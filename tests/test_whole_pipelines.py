"""Several parts of a pipeline, each lowered on what the pipeline calls it with."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_pipelines
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import compressor
from compressor import CompressorError
from compressor.pipelines.opened import opened
from compressor.plugins.magnitude import Magnitude


@pytest.mark.parametrize("name", tiny_pipelines.MAKERS)
def test_an_example_is_the_first_call_by_name(name: str, tmp_path: Path) -> None:
    pipe = tiny_pipelines.made(name, tmp_path)
    own, prompt = tiny_pipelines.arguments(name), tiny_pipelines.PROMPTS[0]
    records = compressor.record(pipe, [prompt], tmp_path / "records", n=1, unseen=1, steps=2, **own)
    call, seed = records.take(torch.tensor([0]))[0], records.index.pictures[0].seed
    calls: list[str] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: calls.append("decoder"))
    example = compressor.example_inputs(pipe, prompt, steps=2, seed=seed, **own)
    module = opened(pipe).module
    with torch.no_grad():
        assert torch.equal(module(**example)[0], call.output)
    given, found = ([x for x in tree_leaves(of) if isinstance(x, Tensor)] for of in ((call.args, call.kwargs), example))
    assert sorted(x.shape for x in given) == sorted(x.shape for x in found) and not calls  # it went no further


@pytest.mark.parametrize("part", ["vae.decoder", "text_encoder", "unet"])
def test_parts_are_lowered_on_it_and_put_back_into_the_pipeline(part: str, few_bits_fast: Any, tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("sd", tmp_path)
    pipe.set_progress_bar_config(disable=True)
    own = {**tiny_pipelines.arguments("sd"), "num_inference_steps": 2, "output_type": "np"}

    def picture() -> Any:
        return pipe(tiny_pipelines.PROMPTS[0], generator=torch.Generator().manual_seed(1), **own).images

    before, whole = picture(), pipe
    example = compressor.example_inputs(pipe, tiny_pipelines.PROMPTS[0], part=part, **own)
    for name in part.split("."):
        whole = getattr(whole, name)
    lowered = compressor.lower(whole, example, max_error=0.05)
    with compressor.apply(pipe, lowered, part=part):
        assert 0 < abs(picture() - before).max() < 0.2  # in few bits, and the same picture
    assert (picture() == before).all()


def test_an_example_has_tensors_of_its_own_in_the_models_dtype(tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("sd", tmp_path).to(torch.bfloat16)
    own = tiny_pipelines.arguments("sd")
    latents = torch.randn(1, 4, 8, 8, dtype=torch.bfloat16)
    example = compressor.example_inputs(pipe, {"prompt": "a red cat", "latents": latents}, steps=2, **own)
    again = compressor.example_inputs(pipe, "a red cat", steps=2, latents=latents, **own)
    assert example["sample"].dtype == torch.bfloat16 and torch.equal(example["sample"], again["sample"])
    kept = latents.clone()
    example["sample"].zero_()
    assert torch.equal(latents, kept)


class _Pipe:
    """What is asked of a pipeline, around one module."""

    def __init__(self, module: nn.Module) -> None:
        self.unet, self.scheduler = module, None
        self.components = {"unet": module}

    def set_progress_bar_config(self, **_: Any) -> None:
        """There is none."""

    def __call__(self, prompt: str = "") -> Any:
        return SimpleNamespace(images=self.unet(torch.ones(1), scale=torch.ones(2)))


class _Plain(nn.Module):
    def forward(self, x: Tensor, **more: Tensor) -> Tensor:
        return x * more["scale"]


class _Nameless(nn.Module):
    def forward(self, *args: Tensor, scale: Tensor) -> Tensor:
        return args[0] * scale


def test_arguments_that_have_no_name_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(compressor.example_inputs(_Pipe(_Plain()))) == {"x", "scale"}
    with pytest.raises(CompressorError, match=r"unet is called with arguments that have no names \(\*args\)"):
        compressor.example_inputs(_Pipe(_Nameless()))


@pytest.mark.parametrize(
    ("prompt", "arguments", "said"),
    [
        (
            "a cat",
            {"part": "vae"},
            "never called vae\nName the part that is called. A part can be a module inside one: vae.enc",
        ),
        ("a cat", {"part": "decoder"}, "no part 'decoder'"),
        ("a cat", {"stps": 3}, "takes no 'stps'"),
        ("a cat", {"steps": 0}, "example_inputs(): steps"),
        (7, {}, "prompt 0 is a int"),
        (["a cat"], {}, "prompt 0 is a list"),
    ],
)
def test_what_gives_no_example_is_told(prompt: Any, arguments: dict[str, Any], said: str, tmp_path: Path) -> None:
    pipe = tiny_pipelines.made("sd", tmp_path)
    with pytest.raises(CompressorError) as error:
        compressor.example_inputs(pipe, prompt, **{**tiny_pipelines.arguments("sd"), "steps": 2, **arguments})
    assert said in str(error.value)


def test_a_pipeline_in_place_of_a_module_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(CompressorError, match=r"a StableDiffusionPipeline is no module\n.*such as pipe\.unet"):
        compressor.lower(tiny_pipelines.made("sd", tmp_path), torch.ones(1))


def test_tokens_that_were_added_go_with_the_part_that_has_them(tmp_path: Path) -> None:
    """A learned token was looked up in a table without its row."""
    pipe, width = tiny_pipelines.made("sd", tmp_path / "files"), tiny_pipelines.WIDTH
    prompts = [{"prompt": text, **tiny_pipelines.arguments("sd")} for text in ("a <cat>", "a dog")]
    part, few = {"part": "text_encoder"}, {"n": 1, "unseen": 1, "steps": 1}
    records = compressor.record(pipe, prompts, tmp_path / "records", **few, **part)
    sparse = compressor.prune(pipe, Magnitude(), data=records, steps=0, **part)
    compressor.save(tmp_path / "pruned", sparse.model, sparse.masks)

    applied = compressor.apply(pipe, copy.deepcopy(sparse.model), **part)
    pipe.load_textual_inversion({"<cat>": torch.randn(width)})
    rows = len(pipe.tokenizer)
    with pytest.warns(UserWarning, match=f"token_embedding has {rows} rows, and 200 in the part that is put back"):
        applied.remove()
    pipe.text_encoder.resize_token_embeddings(rows)
    with pytest.raises(CompressorError, match=rf"token_embedding has {rows} rows, and 200 .*textual inversion"):
        compressor.apply(pipe, sparse, **part)
    with pytest.raises(CompressorError, match=r"token_embedding\.weight: file has \(200, 32\)"):
        compressor.apply(pipe, tmp_path / "pruned", **part)

    records = compressor.record(pipe, prompts, tmp_path / "again", **few, **part)
    sparse = compressor.prune(pipe, Magnitude(), data=records, steps=0, **part)
    compressor.save(tmp_path / "pruned", sparse.model, sparse.masks)
    for given in (sparse, tmp_path / "pruned"):
        with compressor.apply(pipe, given, **part):
            assert pipe.text_encoder.get_input_embeddings().weight.shape == (rows, width)
