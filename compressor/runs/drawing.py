"""Samples of a saved model as files: PNGs, a sheet of them, and what is needed to draw them again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import files, saving
from compressor.adapter import Adapter, Sampling
from compressor.data.latents import Autoencoder
from compressor.environment import resolve_device
from compressor.errors import CompressorError, UsageError, memory
from compressor.processes import safe_path, team
from compressor.progress import Progress
from compressor.runs.pictures import save_grid, save_image
from compressor.runs.saved import learned_from_calls, saved_adapter, saved_model
from compressor.seeds import generator
from compressor.weights import in_float32

FILE = "samples.json"


@dataclass(frozen=True)
class Draw:
    """What to draw from the model saved at `source`: `n` images in batches of `batch_size`.

    Each batch's noise is a pure function of `seed` and its place, so that the images do not depend on `processes`.
    """

    source: str
    n: int
    steps: int
    batch_size: int
    seed: int
    how: Sampling
    device: str = "auto"
    vae: str | None = None


def draw(wanted: Draw, out: Path, processes: int = 1, overwrite: bool = False) -> Generator[Progress, None, None]:
    """Write `out`: NNNNNN.png for each image, or `latents.npz` where the model gives latents and no autoencoder is named;
    `sheet.png`, and `samples.json`. Yields progress.

    The processes of a launch share the batches, and the first one writes.

    Raises UsageError where `out` is not empty, and for the run of a pipeline; CompressorError where the model cannot be loaded or
    cannot sample; LockedError where
    another process works on `out`, or in the directory of the run around it.
    """
    leads = team().leads
    if leads:
        _refuse_used(out, overwrite)
    folder = saving.model_folder(Path(wanted.source))
    if learned_from_calls(Path(wanted.source)):
        raise UsageError(
            f"{wanted.source} is the run of a pipeline, which draws its pictures itself",
            f'With diffusers: DiffusionPipeline.from_pretrained("{Path(wanted.source, "pipeline")}").',
        )
    adapter = saved_adapter(Path(wanted.source)).sampling(wanted.how)
    with files.claimed(out) if leads else nullcontext():
        if leads:
            _refuse_used(out, overwrite)  # again: another process may have been faster
        yield from _drawn(wanted, out, processes, folder, adapter)


def _drawn(wanted: Draw, out: Path, processes: int, folder: Path, adapter: Adapter) -> Generator[Progress, None, None]:
    """As `draw`, by who holds `out`."""
    starts = range(0, wanted.n, wanted.batch_size)
    found: dict[int, Tensor] = {}
    yield Progress("sample", 0, wanted.n, adapter.sampler)
    for first, images in _batches(wanted, starts, processes):
        found[first] = images
        yield Progress("sample", sum(map(len, found.values())), wanted.n)
    here = team()
    every = here.in_turn([found[first] for first in starts[here.rank :: here.size]])
    if not here.leads:
        return
    images = torch.cat(every)
    pictures = images.shape[1] in (1, 3)
    facts = {
        **asdict(wanted),
        "how": adapter.sampler,
        "source": str(folder),
        "weights_sha256": saving.read_config(folder).weights_sha256,
        "shape": list(images.shape),
    }
    sizes = {first: min(wanted.batch_size, wanted.n - first) for first in starts}
    labels = [adapter.drawn_labels(sizes[first], _noise_of(wanted, first)) for first in starts]
    facts["labels"] = [label for batch in labels if batch is not None for label in batch.tolist()] or None

    def write(target: Path) -> None:
        if pictures:
            for index, image in enumerate(images):
                save_image(image, target / f"{index:06d}.png")
            save_grid(images[:64], target / "sheet.png")
        else:
            import numpy as np

            np.savez(target / "latents.npz", images=images.numpy())
        (target / FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    files.commit(out, write)


def _refuse_used(out: Path, overwrite: bool) -> None:
    """Raise UsageError unless `out` is empty, not there, or holds former samples, which may be overwritten, and nothing else."""
    if not out.exists():
        return
    names = [path.name for path in out.iterdir()] if out.is_dir() else [out.name]
    foreign = [
        name
        for name in names
        if not re.fullmatch(r"\d{6}\.png|sheet\.png|latents\.npz|samples\.json|manifest\.json", name)
    ]
    if foreign:
        raise UsageError(f"{out} has files of others: {sorted(foreign)[0]}", "Choose another --out.")
    if names and not overwrite:
        raise UsageError(f"{out} has samples already", "Choose another --out, or replace them with --overwrite.")


def _batches(wanted: Draw, starts: range, processes: int) -> Iterator[tuple[int, Tensor]]:
    here = team()
    if processes > 1 and here.size > 1:
        raise UsageError(
            f"--processes {processes} in each of {here.size} processes",
            "Leave --processes out: those of the launch share the batches.",
        )
    if processes == 1:
        worker = _Worker(wanted)
        yield from ((first, worker(first)) for first in starts[here.rank :: here.size])
        return
    context = get_context("spawn")  # a fork after torch has used threads may hang
    count = min(processes, len(starts))
    others = active_children()
    with ExitStack() as stack:
        stack.enter_context(safe_path())  # the first semaphore starts a process, too
        ranks = context.SimpleQueue()
        for rank in range(count):
            ranks.put(rank)
        pool = stack.enter_context(ProcessPoolExecutor(count, context, _start, (wanted, count, ranks)))
        futures = {pool.submit(_work, first): first for first in starts}
        try:
            for future in as_completed(futures):
                yield futures[future], torch.from_numpy(future.result())
        except BrokenProcessPool as error:
            raise CompressorError(
                "a sampling process died", "It may have run out of memory: fewer --processes."
            ) from error
        except BaseException:  # stopped: nobody waits for batches that are being drawn
            for child in set(active_children()) - set(others):
                child.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _noise_of(wanted: Draw, first: int) -> torch.Generator:
    """What the batch draws from whose first image has this number."""
    return generator(wanted.seed, "sample", first)


class _Worker:
    """The model, loaded once, drawing one batch after another."""

    def __init__(self, wanted: Draw, rank: int = 0) -> None:
        adapter, model = saved_model(Path(wanted.source))
        self.wanted, self.adapter = wanted, adapter.sampling(wanted.how)
        device = resolve_device(wanted.device)
        if device.type == "cuda" and wanted.device in ("auto", "cuda"):
            device = torch.device("cuda", rank % torch.cuda.device_count())
        self.model = in_float32(model).to(device)
        self.autoencoder = Autoencoder(wanted.vae, device) if wanted.vae is not None else None

    @memory("sampling")
    def __call__(self, first: int) -> Tensor:
        n = min(self.wanted.batch_size, self.wanted.n - first)
        images = self.adapter.sample(self.model, n, _noise_of(self.wanted, first), self.wanted.steps).float().cpu()
        return images if self.autoencoder is None else self.autoencoder.decode(images)


_here: list[_Worker] = []
"""The worker of this process, where it is one of a pool."""


def _start(wanted: Draw, processes: int, ranks: Any) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    _here.append(_Worker(wanted, ranks.get()))


def _work(first: int) -> Any:
    return _here[0](first).numpy()  # arrays travel by value; tensors would hold a file open each
