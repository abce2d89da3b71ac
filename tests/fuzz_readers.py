"""Hostile files for every reader: each is refused by a CompressorError, or read, in a second, and nothing in it is run.

    python tests/fuzz_readers.py [--inputs 20000 | --seconds 300] [--seed 0] [--only READER/NUMBER] [--log FILE]

An input is drawn from the seed, the reader's name and a number, so one that fails is repeated with `--only`. It counts as a failure
if anything but success or the project's own error comes out; if it takes more than a second of computing; if more than 4 GiB of
memory are asked for; or if, while it is read, a process is started, code is compiled to be run, a network is asked for, a module is
imported that no honest file needs, or a file is written. Seeds are valid files, made here, and tests/before.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import os
import pickle
import platform
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import mutations as change

from compressor.errors import CompressorError

LIMIT = 1.0
"""Seconds of computing that an input may take."""
_MEMORY = 4 * 2**30
_STUCK = 60
WEIGHTS = {
    **dict.fromkeys(("safetensors", "cifar-pickle"), 4.0),
    **dict.fromkeys(("manifest", "arrays", "npy", "npz"), 3.0),
    **dict.fromkeys(("plan", "captions", "prompts", "metrics", "png", "pth-old", "state", "records"), 2.0),
    **dict.fromkeys(("model-packed", "model-config", "records-index"), 0.5),
    **dict.fromkeys(("recipe", "scheduler", "model-surgery", "comparison"), 0.3),
    **dict.fromkeys(("diffusers-config", "arrow-json-state", "arrow-json-datas", "arrow-arrow-data-"), 0.05),
}
"""More for those that take little time."""
BEFORE = Path(__file__).parent / "before"


class TooSlow(BaseException):
    """Raised by the clock; no reader catches it."""


@dataclass
class Reader:
    """One reader: valid files, how they are changed, and how they are read."""

    name: str
    seeds: Sequence[bytes]
    mutator: change.Mutator
    read: Callable[[bytes], object]

    @property
    def weight(self) -> float:
        """How many of all inputs it gets, beside others."""
        return WEIGHTS.get(self.name, 1.0)

    def draw(self, rng: random.Random) -> bytes:
        """One of the seeds, changed; now and then it is left as it is."""
        seed = rng.choice(self.seeds)
        return seed if rng.random() < 0.01 else self.mutator(seed, rng)


@dataclass
class Count:
    """What came of a reader's inputs."""

    accepted: int = 0
    refused: int = 0
    slowest: float = 0.0
    seconds: float = 0.0

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused


@dataclass
class Fuzz:
    """Draws inputs and reads them. `failures` has, of each kind, the first: the reader, the number, and what happened."""

    folder: Path
    made: Iterable[Reader]
    seed: int = 0
    counts: dict[str, Count] = field(default_factory=dict)
    failures: dict[str, tuple[str, int, str]] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.readers = {reader.name: reader for reader in self.made}
        for reader in self.readers.values():  # what is imported when it is first needed is imported now
            for content in (*reader.seeds, b"{}", b""):
                with contextlib.suppress(Exception):
                    reader.read(content)

    def one(self, name: str, number: int) -> None:
        """The input of that number for the reader of that name."""
        reader, count = self.readers[name], self.counts.setdefault(name, Count())
        content = reader.draw(random.Random(f"{self.seed}/{name}/{number}"))
        _events.clear()
        began = time.process_time()
        try:
            with _watched():
                reader.read(content)
            count.accepted += 1
        except CompressorError:
            count.refused += 1
        except TooSlow:
            self._failed(name, number, f"{name}: more than {LIMIT} s", content)
            count.refused += 1
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{name}: {type(error).__name__} in {Path(where.filename).name}:{where.name}"
            self._failed(name, number, kind, content, "".join(traceback.format_exception(error)[-4:]))
            count.refused += 1
        took = time.process_time() - began
        count.slowest, count.seconds = max(count.slowest, took), count.seconds + took
        if took > 2 * LIMIT:  # where Python never came to look at the clock
            self._failed(name, number, f"{name}: {took:.1f} s", content)
        for event in dict.fromkeys(_events):
            self._failed(name, number, f"{name}: {event}", content)

    def _failed(self, name: str, number: int, kind: str, content: bytes, more: str = "") -> None:
        self.failed[kind] += 1
        if kind not in self.failures:
            self.failures[kind] = (name, number, more)
            print(f"FAILED {kind}: --seed {self.seed} --only {name}/{number}\n{more}", flush=True)
            (self.folder / f"failed-{len(self.failures)}-{name}").write_bytes(content)


# --- What may not happen while a file is read. ---

_state = {"armed": False, "stuck": False}
_events: list[str] = []
_NEVER = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "os.startfile",
    "subprocess.Popen",
)
_NEVER += (
    "socket.",
    "pty.spawn",
    "ctypes.dlopen",
    "webbrowser.open",
    "urllib.Request",
    "shutil.",
    "os.remove",
    "os.rename",
    "os.rmdir",
)
_HOMES = tuple(os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, Path(__file__).parent.parent))
_LOADED = (
    "encodings",
    "PIL",
    "numpy",
    "torch",
    "diffusers",
    "ruamel",
    "json",
    "compressor",
    "zipfile",
    "_",
    "unicodedata",
    "linecache",
)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _state["armed"]:
        return
    if event.startswith(_NEVER):
        _events.append(f"{event} {str(arguments)[:80]}")
    elif event == "exec" and not str(getattr(arguments[0], "co_filename", "")).startswith(_HOMES):
        if getattr(arguments[0], "co_filename", "").startswith("<frozen"):
            return
        _events.append(f"exec {arguments[0].co_name} of {arguments[0].co_filename}")
    elif event == "import" and not str(arguments[0]).startswith(_LOADED):
        _events.append(f"import {arguments[0]}")
    elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        _events.append(f"open {str(arguments[0])[:80]} {arguments[1]}")
    elif event == "pickle.find_class":
        _events.append(f"pickle.find_class {arguments}")


sys.addaudithook(_audit)


def _clock(*_: object) -> None:
    raise TooSlow


@contextlib.contextmanager
def _watched() -> Iterator[None]:
    if _state["stuck"]:
        faulthandler.dump_traceback_later(_STUCK, exit=True)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    _state["armed"] = True
    try:
        yield
    finally:
        _state["armed"] = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        if _state["stuck"]:
            faulthandler.cancel_dump_traceback_later()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """The clock's signal and the bound on memory, as they were again afterwards."""
    before = signal.signal(signal.SIGPROF, _clock)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGPROF, before)


# --- Readers and their seeds. ---


MARKER = "executed"


class Evil:
    """Unpickled by who runs what is in a pickle, it makes a file in the current folder."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Reads a content as the file `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def reading(content: bytes) -> object:
        path.write_bytes(content)
        _rearm()
        return read(path)

    return reading


def _rearm() -> None:
    """What was written so far is the fuzzer's own."""
    _events.clear()


def _disarm() -> None:
    """What comes now is the fuzzer's own again."""
    _state["armed"] = False


def _saved(made: Callable[[Any], object]) -> bytes:
    out = io.BytesIO()
    made(out)
    return out.getvalue()


def _named(content: bytes) -> bytes:
    """A file of the format before torch 1.6 whose storages, which have addresses of 14 or 15 digits for names, are numbered: so it is
    always the same."""
    names: dict[bytes, int] = {}

    def numbered(found: re.Match[bytes]) -> bytes:
        return b"X\x0f\0\0\0%015d" % names.setdefault(found[1], len(names))

    return re.sub(rb"X[\x09-\x14]\0\0\0(\d{9,20})", numbered, content)


def _tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "0.weight": torch.randn(8, 8, generator=rng),
        "0.bias": torch.zeros(8),
        "1.weight": torch.randn(4, 8, generator=rng).half(),
        "steps": torch.tensor(3),
        "codes": torch.arange(4, dtype=torch.int8),
    }


def readers(folder: Path) -> Iterator[Reader]:
    """Every reader of the project, with valid files as seeds."""
    yield from quick_readers(folder)
    yield from _of_diffusers(folder)
    yield from _arrow(folder)


def quick_readers(folder: Path) -> Iterator[Reader]:
    """Those that need no library which takes seconds to import."""
    yield from _settings(folder)
    yield from _weights(folder)
    yield from _models(folder)
    yield from _data(folder)
    yield from _runs(folder)


def _settings(folder: Path) -> Iterator[Reader]:
    from compressor import recipe
    from compressor.pipelines.prompts import read_prompts
    from compressor.validation import validated

    def resolved(path: Path) -> object:
        return validated(recipe.Recipe, recipe.merged(recipe.read(path)), str(path))

    small = b"method: magnitude\npattern: 2:4\nlr: 1e-4\ntrain:\n  betas: [0.9, 0.99]\nsettings: {a: [1, {b: c}]}\n"
    seeds = [(BEFORE / "run" / "recipe.yaml").read_bytes(), small, small]
    yield Reader("recipe", seeds, change.of_yaml, _file(folder / "recipe.yaml", resolved))
    lines = b'{"prompt": "a cat", "guidance_scale": 3.5}\n{"prompt": "a dog"}\n'
    yield Reader("prompts", [lines], change.of_lines, _file(folder / "p.jsonl", read_prompts))
    text = b"a cat\n\na dog on a \xc3\xa9toile\n"
    listed = json.dumps(["a cat", {"prompt": "a", "height": 8}]).encode()
    yield Reader("prompts-list", [listed], change.of_json, _file(folder / "p.json", read_prompts))
    yield Reader("prompts-text", [text], change.of_bytes, _file(folder / "p.txt", read_prompts))


def _weights(folder: Path) -> Iterator[Reader]:
    from compressor.weights import read_outline, read_weights

    def both(path: Path) -> object:
        with contextlib.suppress(CompressorError):
            read_outline(path)
        return read_weights(path)

    tensors = _tensors()
    plain = save(tensors, {"format": "pt"})
    yield Reader("safetensors", [plain], change.of_safetensors, _file(folder / "w.safetensors", both))
    nested = {"epoch": 3, "ema": tensors, "optimizer": {"state": {0: {"step": 1.0}}, "groups": [{"lr": 0.1}]}}
    evil = {"weight": Evil()}
    zipped = [_saved(lambda out, one=one: torch.save(one, out)) for one in (tensors, nested, evil)]
    whole = torch.arange(72.0)  # one storage: those of that format are in the order of their addresses
    parts = {"0.weight": whole[:64].view(8, 8), "0.bias": whole[64:]}
    held = (parts, {"epoch": 3, "ema": parts}, evil)
    old = [_named(_saved(partial(torch.save, one, _use_new_zipfile_serialization=False))) for one in held]
    doubled = b"".join(b"r%cj%c\x86".replace(b"%c", n.to_bytes(4, "little")) for n in range(60))
    old += [pickle.dumps(evil), b"\x80\x02})" + doubled + b"K\x01s.", b"\x80\x02})" + b"\x85" * 3000 + b"K\x01s."]
    packed = change.of_zip(lambda name: change.of_pickle if name.endswith(".pkl") else change.of_bytes)
    yield Reader("pth-zip", zipped, packed, _file(folder / "w.pth", both))
    yield Reader("pth-old", old, change.of_pickle, _file(folder / "old.pth", both))


class _Pair(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def _sealed(folder: Path) -> None:
    """A manifest of what is in `folder` now, so that only its files are wrong and not their hashes."""
    entries = {}
    for path in folder.iterdir():
        if path.name != "manifest.json":
            content = path.read_bytes()
            entries[path.name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    (folder / "manifest.json").write_text(json.dumps({"schema_version": 1, "files": entries}))


def _models(folder: Path) -> Iterator[Reader]:
    from compressor import saving
    from compressor.files import verify
    from compressor.sparsity.notation import parse
    from compressor.sparsity.surgery import Surgery

    torch.manual_seed(0)
    model, pattern = _Pair(), parse("2:4")
    masks = {name: pattern.mask(model.get_parameter(name).detach().abs()) for name in ("0.weight", "2.weight")}
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).copy_(mask.apply(model.get_parameter(name)))
    saving.save(folder / "model", model, masks)
    whole = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    surgery = Surgery(
        {"0.weight": {0: (0, 1, 2, 5)}, "0.bias": {0: (0, 1, 2, 5)}, "2.weight": {1: (0, 1, 2, 5)}}, {}, ()
    )
    surgery.apply(smaller := _Pair())
    saving.save(folder / "smaller", smaller, {})
    cut = {path.name: path.read_bytes() for path in (folder / "smaller").iterdir()}
    names = {
        "config.json": ("model-config", change.of_json),
        "model.safetensors": ("model-packed", change.of_safetensors),
        "surgery.json": ("model-surgery", change.of_json),
    }

    def loading(files: dict[str, bytes], file: str, home: Path) -> Callable[[bytes], object]:
        home.mkdir()
        for name, content in files.items():
            (home / name).write_bytes(content)

        def reading(content: bytes) -> object:
            (home / file).write_bytes(content)
            _sealed(home)
            _rearm()
            return saving.load(home, _Pair())

        return reading

    for file, (name, mutator) in names.items():
        files = cut if file == "surgery.json" else whole
        yield Reader(name, [files[file]], mutator, loading(files, file, folder / name))
    seed = whole["manifest.json"]
    yield Reader(
        "manifest",
        [seed],
        change.of_json,
        _file(folder / "model" / "manifest.json", lambda p: verify(p.parent)),
    )
    home = folder / "state"
    home.mkdir()
    saving.save_state(home, {"run": {"step": 3, "list": [1, {"a": torch.ones(3)}]}, "x": torch.zeros(2)})
    seed = (home / "state.json").read_bytes()
    yield Reader(
        "state",
        [seed],
        change.of_json,
        _file(home / "state.json", lambda p: saving.load_state(p.parent)),
    )


def _data(folder: Path) -> Iterator[Reader]:
    from compressor.data.reading import read_data
    from compressor.data.reading.captions import read_captioned

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 8, 8), np.uint8)
    records = {
        "hidden_states": rng.normal(size=(4, 2, 3)).astype(np.float32),
        "target": rng.normal(size=(4, 2)),
        "places[shared]": images[0],
    }
    npz = [
        _saved(lambda out: np.savez(out, images=images, labels=np.arange(4))),
        _saved(lambda out: np.savez_compressed(out, **records)),
    ]
    in_npz = change.of_zip(lambda name: change.of_npy)
    yield Reader("npz", npz, in_npz, _file(folder / "d.npz", read_data))
    npy = [
        _saved(lambda out: np.save(out, images)),
        _saved(lambda out: np.save(out, np.array([Evil()]), allow_pickle=True)),
    ]
    yield Reader("npy", npy, change.of_npy, _file(folder / "d.npy", read_data))
    arrays = save({name: torch.from_numpy(np.ascontiguousarray(one)) for name, one in records.items()})
    yield Reader("arrays", [arrays], change.of_safetensors, _file(folder / "d.safetensors", read_data))
    batch = {
        b"data": images.repeat(48, 1).repeat(1, 2).reshape(-1, 3072)[:2],
        b"fine_labels": [3, 99],
        b"filenames": [b"a", b"b"],
    }
    pickles = [pickle.dumps(batch, protocol) for protocol in (2, 3, 4)] + [pickle.dumps(Evil(), 2)]
    yield Reader(
        "cifar-pickle",
        pickles,
        change.of_pickle,
        _file(folder / "cifar" / "train", lambda p: read_data(p.parent)),
    )
    yield Reader(
        "cifar-bin",
        [bytes([3]) + bytes(3072)],
        change.of_bytes,
        _file(folder / "c.bin", read_data),
    )
    picture = Image.fromarray(rng.integers(0, 256, (12, 10, 3), np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        yield _picture(folder, picture, kind, change.of_png if kind == "PNG" else change.of_bytes)
    home = folder / "captioned"
    home.mkdir()
    for name in ("a.png", "b.png"):
        picture.save(home / name)
    lines = b'{"file_name": "a.png", "text": "one"}\n{"file_name": "b.png", "text": "two"}\n'
    yield Reader(
        "captions",
        [lines],
        change.of_lines,
        _file(home / "metadata.jsonl", lambda p: read_captioned(p.parent)),
    )


def _arrow(folder: Path) -> Iterator[Reader]:
    """A folder of save_to_disk, where the extra is installed."""
    from compressor.data.reading import read_data

    try:
        import datasets
    except ImportError:
        return
    home, picture = folder / "saved", Image.new("RGB", (10, 12), "red")
    table = {"image": [{"bytes": _saved(lambda out: picture.save(out, "PNG")), "path": None}] * 2, "label": [0, 1]}
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(table, features=kinds).save_to_disk(home)
    for name, mutator in (
        ("state.json", change.of_json),
        ("dataset_info.json", change.of_json),
        ("data-00000-of-00001.arrow", change.of_bytes),
    ):
        path = home / name
        whole = path.read_bytes()

        def reading(content: bytes, path: Path = path, whole: bytes = whole) -> object:
            path.write_bytes(content)
            _rearm()
            try:
                return read_data(home, (3, 8, 8), workers=0)
            finally:
                _disarm()
                path.write_bytes(whole)

        yield Reader(f"arrow-{path.suffix[1:]}-{path.stem[:5]}", [whole], mutator, reading)


def _picture(folder: Path, picture: Image.Image, kind: str, mutator: change.Mutator) -> Reader:
    from compressor.data.reading import read_data

    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [_saved(lambda out: picture.save(out, kind)), _saved(lambda out: picture.convert("L").save(out, kind))]
    if kind in ("PNG", "JPEG", "WEBP", "TIFF"):
        seeds.append(_saved(lambda out: picture.save(out, kind, exif=exif)))
    if kind in ("PNG", "GIF"):
        seeds.append(_saved(lambda out: picture.convert("P").save(out, kind, transparency=3)))
    path = folder / f"pictures-{kind.lower()}" / "a.png"
    return Reader(
        kind.lower(),
        seeds,
        mutator,
        _file(path, lambda p: read_data(p.parent, (3, 8, 8), workers=0)),
    )


UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [8, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
CROSS = {
    **UNET,
    "_class_name": "UNet2DConditionModel",
    "cross_attention_dim": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 1,
    "num_class_embeds": None,
    "time_embedding_type": "positional",
    "addition_embed_type": None,
}
JOINT = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
}
OTHERS = [
    CROSS,
    {"_class_name": "SD3Transformer2DModel", **JOINT, "sample_size": 8, "patch_size": 2, "pos_embed_max_size": 8},
    {
        "_class_name": "FluxTransformer2DModel",
        **JOINT,
        "num_single_layers": 1,
        "in_channels": 4,
        "axes_dims_rope": [2, 2, 4],
    },
    {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "sample_size": 8,
    },
    {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [4],
        "norm_num_groups": 2,
        "layers_per_block": 1,
        "latent_channels": 4,
    },
]
"""Configurations of other classes, which the weights do not fit: what is built to see that must be bounded."""
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "trained_betas": None,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "beta_start": 0.0001,
    "beta_end": 0.02,
}


def _of_diffusers(folder: Path) -> Iterator[Reader]:
    from compressor import registry
    from compressor.model_zoo.generic import pretrained
    from compressor.model_zoo.generic.noise import Noise

    adapter = registry.adapter("diffusers")
    home = folder / "pipeline"
    model = pretrained.build(UNET)
    (home / "unet").mkdir(parents=True)
    (home / "scheduler").mkdir()
    save_file(model.state_dict(), home / "unet" / "diffusion_pytorch_model.safetensors")
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    files = {"model_index.json": index, "unet/config.json": UNET, "scheduler/scheduler_config.json": SCHEDULER}
    for name, content in files.items():
        (home / name).write_text(json.dumps(content))

    def found(path: Path) -> object:
        return adapter.opened(str(home))

    def noise(path: Path) -> object:
        return Noise.of(pretrained.find(str(home)).scheduler or {})

    def loaded(path: Path) -> object:
        return adapter.opened(str(home)).load(str(home))

    def restoring(content: str) -> Callable[[bytes], object]:
        path = home / content
        whole = path.read_bytes()
        read = {"model_index.json": found, "unet/config.json": loaded, "scheduler/scheduler_config.json": noise}[
            content
        ]

        def reading(changed: bytes) -> object:
            path.write_bytes(changed)
            _rearm()
            try:
                return read(path)
            finally:
                _disarm()
                path.write_bytes(whole)

        return reading

    for name, reader in (
        ("model_index.json", "pipeline-index"),
        ("scheduler/scheduler_config.json", "scheduler"),
        ("unet/config.json", "diffusers-config"),
    ):
        seeds = [files[name], *(OTHERS if reader == "diffusers-config" else [])]
        yield Reader(reader, [json.dumps(one).encode() for one in seeds], change.of_json, restoring(name))


def _runs(folder: Path) -> Iterator[Reader]:
    from compressor.data import calls
    from compressor.lower.plan import Plan
    from compressor.report import read_comparison, read_metrics, read_report

    report, comparison, lowered = (
        (BEFORE / name / "report.json").read_bytes() for name in ("run", "comparison", "lowered")
    )
    small = {**json.loads(report)}
    small = {key: value[:2] if isinstance(value, list) else value for key, value in small.items()}
    seeds = [json.dumps(small).encode()] * 3 + [report, lowered]
    yield Reader("report", seeds, change.of_json, _file(folder / "report.json", read_report))
    yield Reader(
        "comparison",
        [comparison],
        change.of_json,
        _file(folder / "comparison.json", read_comparison),
    )
    plan = json.dumps(_plan()).encode()
    yield Reader("plan", [plan], change.of_json, _file(folder / "lowering.json", Plan.read))
    metrics = (BEFORE / "run" / "metrics.jsonl").read_bytes()
    yield Reader("metrics", [metrics], change.of_lines, _file(folder / "metrics.jsonl", read_metrics))
    home = folder / "records"
    call = calls.Call(
        (torch.ones(1, 2),),
        {"t": torch.tensor(3), "d": {"a": [1, None, (2.5, "x")]}, "k": torch.float16},
        torch.zeros(1, 2),
    )
    calls.write(calls.shard(home, 0), [call, call], set())
    picture = calls.Picture(arguments={"prompt": "a cat"}, seed=3)
    facts = {"pipeline": "P", "part": "unet", "module": "M", "weights_sha256": "0" * 64, "dtype": "float32", "steps": 2}
    index = calls.Index(**facts, components={"scheduler": "0" * 64}, pictures=[picture]).model_dump_json().encode()
    (home / calls.INDEX).write_bytes(index)

    def recording(path: Path) -> object:
        found = calls.Recording.opened(home)
        return found.near(0.5), found.sha256, found.take(torch.arange(len(found)))

    def shard(content: bytes) -> object:
        calls.shard(home, 0).write_bytes(content)
        (home / calls.INDEX).write_bytes(index)
        _rearm()
        return recording(home)

    whole = calls.shard(home, 0).read_bytes()

    def listed(content: bytes) -> object:
        calls.shard(home, 0).write_bytes(whole)
        (home / calls.INDEX).write_bytes(content)
        _rearm()
        return recording(home)

    yield Reader("records-index", [index], change.of_json, listed)
    yield Reader("records", [whole], _of_records, shard)


def _of_records(content: bytes, rng: random.Random) -> bytes:
    """The calls in a file of records changed as a tree; or its header, or bytes."""
    if rng.random() < 0.4:
        return change.of_safetensors(content, rng)
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    calls = change.of_tree(json.loads(header["__metadata__"]["calls"]), rng)
    header["__metadata__"]["calls"] = change.written(calls).decode()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _plan() -> dict[str, Any]:
    against = {"ratio": 1.2, "wins": 3, "rounds": 5}
    layer = {
        "name": "0",
        "kind": "linear",
        "weights": ["0.weight"],
        "shapes": [[4, 8, 16]],
        "patterns": ["2:4", None],
        "dtype": "float32",
        "gflop": 0.1,
        "candidates": [{"backend": "eager", "median_ms": 1.0, "error": 0.0, "against": {"onednn": against}}],
        "choice": "eager",
        "reason": "the fastest",
        "skips_zeros": False,
    }
    form = {
        "name": "dense",
        "dense": True,
        "median_ms": 1.0,
        "iqr_ms": 0.1,
        "speedup": 1.0,
        "against": {"lowered": against},
    }
    setting = {"device": "cpu", "hardware": "x", "threads": 2, "versions": {"torch": "2"}, "cores": 2.0}
    return {
        "schema_version": 1,
        "weights_sha256": "0" * 64,
        "dtype": "float32",
        "input_shapes": [[4, 16]],
        "setting": setting,
        "layers": [layer],
        "left_out": {"1": "ReLU"},
        "forms": [form],
        "choice": "dense",
        "reason": "the fastest",
        "search": {"max_error": 0.1, "free": 0.2, "error": None, "alone": {"0": 0.1}},
        "backends": {"eager": "2"},
    }


# --- The command. ---


def run(fuzz: Fuzz, inputs: int, seconds: float, first: int = 0, names: list[str] | None = None) -> int:
    """Read so many `inputs`, shared out by weight, or as many as fit into the `seconds`. Returns how many it were."""
    chosen = [reader for reader in fuzz.readers.values() if names is None or reader.name in names]
    rate = max(reader.weight for reader in chosen)
    began, done, turn = time.monotonic(), 0, first
    while done < inputs and time.monotonic() - began < seconds:
        for reader in chosen:
            # a reader of half the weight has its turn every other time
            if int((turn + 1) * reader.weight / rate) > int(turn * reader.weight / rate):
                fuzz.one(reader.name, turn)
                done += 1
        turn += 1
    return done


def summary(fuzz: Fuzz, seconds: float) -> dict[str, Any]:
    """What is logged of a run."""
    packages = ("torch", "safetensors", "numpy", "pillow", "diffusers", "pydantic", "ruamel.yaml")
    counts = {
        name: {
            "inputs": count.inputs,
            "accepted": count.accepted,
            "refused": count.refused,
            "seconds": round(count.seconds, 1),
            "slowest_s": round(count.slowest, 3),
        }
        for name, count in sorted(fuzz.counts.items())
    }
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seed": fuzz.seed,
        "inputs": sum(count.inputs for count in fuzz.counts.values()),
        "seconds": round(seconds),
        "failures": dict(fuzz.failed),
        "readers": counts,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--inputs", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first inputs")
    parser.add_argument("--readers", help="some of the readers, with commas between")
    parser.add_argument("--only", help="READER/NUMBER of one input")
    parser.add_argument("--log", type=Path, help="a file that gets a line of JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.enable()
    log = given.log.absolute() if given.log is not None else None
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        os.chdir(name)
        fuzz = Fuzz(Path(name), readers(Path(name)), given.seed)
        _state["stuck"] = True
        began = time.monotonic()
        with guarded():
            if given.only:
                reader, _, number = given.only.partition("/")
                fuzz.one(reader, int(number))
            else:
                run(fuzz, given.inputs, given.seconds, given.first, given.readers.split(",") if given.readers else None)
        if Path(MARKER).exists():
            fuzz.failed["a pickle was executed"] += 1
        found = summary(fuzz, time.monotonic() - began)
        os.chdir("/")
    for name, count in found["readers"].items():
        print(f"{count['inputs']:8d} {name:18} {count['accepted']:8d} read, slowest {count['slowest_s']:.2f} s")
    print(
        f"{found['inputs']} inputs of seed {given.seed} in {found['seconds']} s: {dict(fuzz.failed) or 'nothing found'}"
    )
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    return int(bool(fuzz.failed))


if __name__ == "__main__":
    sys.exit(main())
