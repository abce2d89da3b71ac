"""A whole picture of Stable Diffusion 1.5 on a CPU, its three models lowered, beside the engines that a user would take instead.

    python benchmarks/cpu/whole_picture.py --engines /tmp/engines --write       # the engines' files, which take no quiet machine
    python benchmarks/cpu/whole_picture.py --engines /tmp/engines --out benchmarks/results/whole_picture_cpu.json

Random weights; the UNet and the decoder are pruned by magnitude (8:2:4 in the layers that `--part` takes for each), the text encoder
stays dense. Each form draws the same picture from the same noise by the pipeline's own code; the three models take turns by
themselves, too. Lowered as docs/pipelines.md does it. The dense opponents are PyTorch as it is, OpenVINO in bfloat16 and in int8 (as
NNCF makes it, which looks at four other pictures), and the dense weights by the kernels here in few bits. Errors are root mean square
differences from the picture that the same weights draw in eager float32, in standard deviations of that picture.
"""

from __future__ import annotations

import copy
import inspect
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
import transformers
from diffusers.models.autoencoders.vae import Decoder
from opponents import autoencoder, cells_of, gains, pruned
from torch import Tensor, nn

import compressor
from compressor.adapter import Adapter, with_samples
from compressor.cost.timing import side_by_side
from compressor.environment import environment
from compressor.export.engines import Engine, opened, written
from compressor.lower.forms import dense_forms
from compressor.lower.vnm_kernels import level
from compressor.model_zoo.generic.layers import BLOCK_LAYERS
from compressor.pipelines.opened import part_of

PARTS = {"text_encoder": "", "unet": "8:2:4", "vae.decoder": "8:2:4"}
PROMPT = "a red house by the sea"
EAGER, HERE = "PyTorch", "prepacked, 8 bits"
_PICTURES = 4
"""Drawn for NNCF to look at."""
RIVALS = ("OpenVINO, bfloat16", "OpenVINO, int8")
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@dataclass(frozen=True, eq=False)
class Part(Adapter):
    """A part of a pipeline, asked as the pipeline asks it for its first picture."""

    example: Mapping[str, Any]
    name: str = "part"
    targets: tuple[str, ...] = (BLOCK_LAYERS,)

    def noised(self, batch: Any, rng: torch.Generator) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def predict(self, module: nn.Module, inputs: Any) -> Tensor:
        found = module(**inputs)
        return found if isinstance(found, Tensor) else found[0]  # type: ignore[no-any-return]

    def example_inputs(self, batch_size: int) -> Any:
        return with_samples(dict(self.example), batch_size)


def pipeline(tiny: bool) -> Any:
    """Stable Diffusion 1.5 with the same random weights each time; `tiny`: the same classes, as small as they go."""
    torch.manual_seed(0)
    vae = autoencoder((64,) * 4) if tiny else autoencoder()
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if tiny:
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    unet: dict[str, Any] = {"block_out_channels": (64,) * 4} if tiny else {}
    config = transformers.CLIPTextConfig(vocab_size=49408, **text)
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=transformers.CLIPTextModel(config).eval(),
        tokenizer=tokenizer(),
        unet=diffusers.UNet2DConditionModel(cross_attention_dim=text["hidden_size"], **unet).eval(),
        scheduler=diffusers.DDIMScheduler(**_SCHEDULE, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenizer() -> Any:
    """CLIP's class, with letters in place of words: every prompt is 77 tokens all the same."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


@contextmanager
def having(pipe: Any, models: Mapping[str, nn.Module]) -> Iterator[Any]:
    with ExitStack() as stack:
        for part, model in models.items():
            stack.enter_context(compressor.apply(pipe, model, part=part))
        yield pipe


def by_name(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by their names."""
    found = dict(inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments)
    del found["self"]
    return found | found.pop("kwargs", {})


def asked(pipe: Any, part: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the pipeline asks a part for a few pictures, for engines that are calibrated."""
    found: list[dict[str, Any]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append(by_name(module, args, kwargs))

    handle = part_of(pipe, part).register_forward_pre_hook(keep, with_kwargs=True)
    for seed in range(1, 1 + _PICTURES):  # of other noise than what is measured
        pipe(f"{PROMPT} {seed}", generator=torch.Generator().manual_seed(seed), output_type="pt", **settings)
    handle.remove()
    return found


def in_engine(own: nn.Module, example: Mapping[str, Any], engine: Engine) -> nn.Module:
    """The part `own` with its products in `engine`."""
    made = copy.copy(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = by_name(own, args, kwargs)
        found = engine.run({name: given[name] for name in example})
        return found if isinstance(own, Decoder) else (found,)

    made.forward = forward  # type: ignore[method-assign]
    return made


def drawn(pipe: Any, models: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> Tensor:
    """One picture (1, 3, height, width) in [0, 1]; always from the same noise."""
    with having(pipe, models):
        found = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="pt", **settings)
    return found.images  # type: ignore[no-any-return]


@torch.no_grad()
def sparse_parts(pipe: Any, adapters: Mapping[str, Part]) -> dict[str, nn.Module]:
    """Copies of the parts that are pruned."""
    found = {}
    for part, pattern in PARTS.items():
        if pattern:
            found[part] = copy.deepcopy(part_of(pipe, part))
            click.echo(f"{part}: {pruned(found[part], adapters[part], pattern)} layers pruned to {pattern}")
    return found


def write(pipe: Any, adapter: Part, folder: Path, part: str, settings: Mapping[str, Any]) -> None:
    place = folder / part
    place.mkdir(parents=True, exist_ok=True)
    calls = asked(pipe, part, settings)
    left = written(part_of(pipe, part), adapter, place, openvino=True, calibration=calls)
    (place / "left.json").write_text(json.dumps(left))
    click.echo(f"{part}: written to {place}; left out: {left}")


@torch.no_grad()
def measured(
    pipe: Any,
    adapters: Mapping[str, Part],
    folder: Path,
    settings: Mapping[str, Any],
    rounds: int,
    max_error: float,
    compiled: bool,
) -> dict[str, Any]:
    sparse = sparse_parts(pipe, adapters)
    wanted = {"dense": drawn(pipe, {}, settings), "lowered": drawn(pipe, sparse, settings)}
    forms: dict[str, dict[str, nn.Module]] = {EAGER: {part: part_of(pipe, part) for part in PARTS}, HERE: {}}
    plans, lowered = {}, "lowered, 8 bits"
    forms[lowered] = {}
    for part, adapter in adapters.items():
        dense, example = part_of(pipe, part), adapter.example_inputs(len(next(iter(adapter.example.values()))))
        one = compressor.lower(sparse.pop(part, dense), example, max_error=max_error, compiled=compiled, cache=False)
        plans[part], forms[lowered][part] = one.plan, one.model
        click.echo(f"{part}: {one.plan.choice}, {one.plan.reason}")
        form = one.plan.form("dense, compiled")
        name = "dense, compiled" if form is not None and form.products else "dense"
        same = not PARTS[part]  # it is not pruned: the lowered form is the dense one in few bits
        forms[HERE][part] = one.model if same else dense_forms(dense, example, one.plan.only([name]))[name]
        for engine in opened(folder / part, openvino=True, names=RIVALS)[0]:
            forms.setdefault(engine.name, {})[part] = in_engine(dense, adapter.example, engine)
    errors = {}
    for name, models in forms.items():
        own = wanted["lowered" if name == lowered else "dense"]
        errors[name] = float((drawn(pipe, models, settings) - own).square().mean().sqrt() / own.std())
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "picture": {name: partial(drawn, pipe, models, settings) for name, models in forms.items()}
    }
    for part, adapter in adapters.items():
        calls[part] = {name: partial(models[part], **adapter.example) for name, models in forms.items()}
    times = {what: side_by_side(own, rounds, torch.device("cpu")) for what, own in calls.items()}
    medians = {what: {name: one.median_ms for name, one in own.items()} for what, own in times.items()}
    return {
        **{"patterns": PARTS, "settings": dict(settings), "max_error": max_error, "rounds": rounds, "seed": 0},
        "median_ms": medians,
        "iqr_ms": {what: {name: one.iqr_ms for name, one in own.items()} for what, own in times.items()},
        "error": errors,
        "left_out": {part: json.loads((folder / part / "left.json").read_text()) for part in PARTS},
        "choices": {part: plan.choice for part, plan in plans.items()},
        "layers": {part: dict(Counter(one.choice for one in plan.layers)) for part, plan in plans.items()},
        "speedup": gains(lowered, medians["picture"], errors),
    }


@click.command()
@click.option("--engines", type=click.Path(path_type=Path), required=True, help="Where the engines' files are.")
@click.option("--write", "writes", is_flag=True, help="Write the engines' files, and measure nothing.")
@click.option("--size", default=256, show_default=True, help="Pixels of the picture's sides.")
@click.option("--steps", default=4, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--max-error", default=0.05, show_default=True)
@click.option("--compiled", is_flag=True, help="Forms under torch.compile too; takes minutes.")
@click.option("--tiny", is_flag=True, help="Models of the same classes, as small as they go.")
@click.option("--part", type=click.Choice(list(PARTS)), hidden=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    engines: Path, writes: bool, size: int, steps: int, rounds: int, max_error: float, compiled: bool, tiny: bool,
    part: str | None, out: Path | None,
) -> None:  # fmt: skip
    if writes and part is None:  # each in a process of its own: it takes much memory
        for one in (one for one in PARTS if not (engines / one / "left.json").exists()):
            subprocess.run([sys.executable, *sys.argv, "--part", one], check=True)
        return
    settings = {"height": size, "width": size, "num_inference_steps": steps, "guidance_scale": 7.5}
    pipe = pipeline(tiny)
    pipe.set_progress_bar_config(disable=True)
    shapes = {name: value for name, value in settings.items() if name != "num_inference_steps"}
    adapters = {
        one: Part(compressor.example_inputs(pipe, PROMPT, part=one, steps=steps, **shapes))
        for one in ([part] if part else PARTS)
    }
    if part is not None:
        write(pipe, adapters[part], engines, part, settings)
        return
    facts: dict[str, Any] = environment(torch.device("cpu"))
    facts["versions"] |= {name: version(name) for name in ("onnxruntime", "openvino", "nncf")}
    facts |= {"threads": torch.get_num_threads(), "level": level()}
    facts["cells"] = cells_of(out, facts, ("hardware", "level"))
    cell = f"{size} pixels, {steps} steps"
    facts["cells"][cell] = measured(pipe, adapters, engines, settings, rounds, max_error, compiled)
    click.echo(json.dumps(facts["cells"][cell], indent=1))
    if out is not None:
        out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
