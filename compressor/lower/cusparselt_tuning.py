"""Which of cuSPARSELt's algorithms is fastest for a product: tried in another process, one by one, each checked before it counts.

The library's default is rarely the best, and some algorithms have been seen to end in an illegal instruction, after which a
process can do nothing more on its GPU. So a worker tries them (`cusparselt_worker`). It says what it is about to try before
it does; where it dies, the next worker goes on behind that. What was found is kept on disk, for this GPU, these versions and
this product.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compressor.environment import versions_of
from compressor.errors import CompressorError, UsageError
from compressor.lower import cusparselt_library
from compressor.lower.plan import Cache, Setting
from compressor.processes import python

SECONDS_VARIABLE = "COMPRESSOR_SEARCH_SECONDS"
_SECONDS = 20.0  # of search; loading torch and the GPU's libraries comes on top
_START = 120.0  # seconds that a worker may take besides searching
_WORKERS = 5  # each but the first because the one before it died
_NONE = "none"  # in place of algorithms, on disk: all that were tried failed
KEPT = 8  # the fastest are timed again, side by side


@dataclass(frozen=True)
class Algorithm:
    """How cuSPARSELt runs a product; as it is, the library's default.

    `split_k` -1 is Segment-K (Hopper); `split_k_mode` 1 adds up in one kernel, 2 in two, -1 leaves it to the library.
    `transposed`: the library writes (tokens, out) itself; otherwise a copy does.
    """

    alg_id: int = 0
    split_k: int = 1
    split_k_mode: int = -1
    transposed: bool = True

    def __str__(self) -> str:
        return ",".join(map(str, self.numbers))

    @property
    def numbers(self) -> list[int]:
        """The four numbers, for an operator's argument."""
        return [self.alg_id, self.split_k, self.split_k_mode, int(self.transposed)]

    @property
    def default(self) -> bool:
        """Whether it is the library's own choice."""
        return (self.alg_id, self.split_k) == (0, 1)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> Algorithm:
        """The inverse of `numbers`. Raises ValueError where they are not four."""
        alg_id, split_k, split_k_mode, transposed = numbers
        return cls(alg_id, split_k, split_k_mode, bool(transposed))

    @classmethod
    def parse(cls, text: str) -> Algorithm:
        """The inverse of `str`. Raises ValueError."""
        return cls.of(int(part) for part in text.split(","))


@dataclass(frozen=True)
class Product:
    """x (tokens, inner) times a 2:4 weight (out, inner). `dtype` is that of both, `bias` whether one is added by the library."""

    tokens: int
    out: int
    inner: int
    dtype: str
    bias: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch's."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def out_dtype(self) -> torch.dtype:
        """What the library writes."""
        return mixed_dtype(self.torch_dtype) or self.torch_dtype


@dataclass(frozen=True)
class Tuned:
    """The algorithm to take, the one for other numbers of tokens, the first one's time, and a note on the search."""

    algorithm: Algorithm
    otherwise: Algorithm = Algorithm()
    median_ms: float | None = None
    note: str | None = None


# --- The library's operator. ---


def mixed_dtype(dtype: torch.dtype) -> torch.dtype | None:
    """What the library is told to write where it reads 8 bits; None of 16, for which torch refuses to be told."""
    return torch.bfloat16 if dtype.itemsize == 1 else None


def multiply(packed: Tensor, x: Tensor, bias: Tensor | None, algorithm: Algorithm) -> Tensor:
    """x (tokens, inner), contiguous, times the packed weight (out, inner): (tokens, out), contiguous, plus `bias` (out,).

    8-bit inputs give bfloat16. `bias` is of the output's dtype.
    """
    # torch takes a product's right side that is not contiguous for the transpose of one that is: x.t() is.
    split: dict[str, Any] = {"split_k": algorithm.split_k, "split_k_mode": algorithm.split_k_mode}
    result = torch._cslt_sparse_mm(
        packed,
        x.t(),
        bias=bias,
        out_dtype=mixed_dtype(x.dtype),
        transpose_result=algorithm.transposed,
        alg_id=algorithm.alg_id,
        **(split if algorithm.split_k != 1 else {}),
    )
    return result if algorithm.transposed else result.t().contiguous()


def candidates(limit: int, transposed: bool = True, major: int = 0) -> list[Algorithm]:
    """All algorithms there are to try, those that do not split first. The very first is the default.

    `major` is the GPU's compute capability: Hopper (9) splits by segments or not at all, those before it never by segments, and those
    after it may do both (0 as well). By the library's error messages.
    """
    splits = [(1, -1)]
    if major >= 9 or not major:
        splits += [(-1, -1)]
    if major != 9:
        splits += [(k, mode) for k in (2, 4, 8) for mode in (1, 2)]
    return [Algorithm(alg_id, k, mode, transposed) for k, mode in splits for alg_id in range(limit)]


# --- The caller's side. ---


@cache
def tuned(product: Product, index: int) -> Tuned:
    """The fastest algorithm for `product` on GPU `index`, from the disk or by a search.

    Raises CompressorError where the library was tried and none of its algorithms was right.
    """
    store = Cache(_setting(index))
    key = _key(product)
    found = store.get(key)
    if found is not None and set(found) == {_NONE}:
        raise CompressorError(
            f"no algorithm of cuSPARSELt gave {_named(product)} right when all were tried",
            f"To try again, remove {store.folder}.",
        )
    times = {} if found is None else {name: ms for name, (ms, *_) in found.items() if _is_algorithm(name)}
    note = None
    if not times:
        _make_room()
        try:
            times, note = searched(product, index)
        except UsageError:
            raise
        except CompressorError:
            store.put(key, {_NONE: (1.0,)})
            raise
        if times:
            store.put(key, {name: (ms,) for name, ms in times.items()})
    if not times:
        return Tuned(Algorithm(), note=note)
    best = min(times, key=times.__getitem__)
    chosen = Algorithm.parse(best)
    default = Algorithm(transposed=chosen.transposed)
    return Tuned(chosen, default if str(default) in times else chosen, times[best], note)


def _make_room() -> None:
    """Give back what this process keeps of the GPU's memory for later: the search in another one has need of it now."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _is_algorithm(text: str) -> bool:
    try:
        return str(Algorithm.parse(text)) == text
    except ValueError:
        return False


def _setting(index: int) -> Setting:
    versions = versions_of(("torch", "diffusion-compressor"))
    versions |= {"cuda": str(torch.version.cuda), "cusparselt": cusparselt_library.described()}
    return Setting(device="cuda", hardware=torch.cuda.get_device_name(index), threads=1, versions=versions)


def searched(product: Product, index: int) -> tuple[dict[str, float], str | None]:
    """The milliseconds of each algorithm that gave right results, and what went wrong on the way (None: nothing).

    No algorithm at all: the search did not start, and the text says why. Raises CompressorError where algorithms were tried
    and all failed.
    """
    seconds = _seconds()
    end = time.monotonic() + seconds
    said, died, ask = _Said(), list[str](), True
    for _ in range(_WORKERS):
        request = {
            "products": [asdict(product)],
            "device": index,
            "seconds": max(1.0, end - time.monotonic()),
            "skip": said.tried,
            "found": bool(said.times),
            "ask": ask,  # the library how many algorithms it has, which it answers by trying some
        }
        lines, ended = _worker(request, seconds + _START)
        said.pending = None
        for line in lines:
            said.hear(line)
        if ended is None:
            break
        said.why = ended
        if ask and not said.tried:
            ask = False
            continue
        if said.pending is None:
            break  # it ended for another reason than an algorithm
        died.append(said.pending)
        if time.monotonic() > end:
            break
    kept = said.kept()
    if not kept and said.tried:
        raise CompressorError(f"no algorithm of cuSPARSELt gives {_named(product)} right: {said.why}")
    if died:
        return kept, f"{len(died)} algorithm(s) ended the process that tried them: {' '.join(died)} ({said.why})"
    return kept, None if kept else f"not tuned, the library's default is used: {said.why}"


def search_together(products: Iterable[Product], index: int) -> None:
    """Search algorithms for all `products` that have none on disk in one process, which loads torch and the GPU's libraries once.

    What it finds is kept on disk, where `tuned` looks. A product on which the process dies is left to `tuned`, and another process
    goes on behind it.
    """
    store, seconds = Cache(_setting(index)), _seconds()
    left = [product for product in dict.fromkeys(products) if store.get(_key(product)) is None]
    if len(left) > 1:
        _make_room()
    for _ in range(_WORKERS):
        if len(left) < 2:
            return
        request = {"products": [asdict(product) for product in left], "device": index, "seconds": seconds}
        lines, ended = _worker({**request, "skip": [], "found": False, "ask": True}, _START + seconds * len(left))
        heard: list[_Said] = []
        for line in lines:
            if line.get("event") == "product":
                heard.append(_Said())
            elif heard:
                heard[-1].hear(line)
        done = len(heard) if ended is None else len(heard) - 1
        for product, said in zip(left[: max(0, done)], heard, strict=False):
            if times := said.kept():
                store.put(_key(product), {name: (ms,) for name, ms in times.items()})
        if ended is None or not heard:
            return
        left = left[len(heard) :]


def _key(product: Product) -> str:
    return f"cusparselt algorithms 1: {json.dumps(asdict(product))}"


@dataclass
class _Said:
    """What workers said of a product: the milliseconds of each algorithm, alone and side by side, and which they tried."""

    times: dict[str, float] = field(default_factory=dict)
    final: dict[str, float] = field(default_factory=dict)
    tried: list[str] = field(default_factory=list)
    pending: str | None = None
    why: str = "no algorithm was tried"

    def hear(self, line: dict[str, Any]) -> None:
        """Take in an event."""
        name, ms, event = line.get("algorithm"), line.get("ms"), line.get("event")
        if not isinstance(name, str) or not _is_algorithm(name):
            return
        if event == "trying":
            self.pending = name
            self.tried.append(name)
        elif event == "failed":
            self.pending, self.why = None, str(line.get("why"))
        elif isinstance(ms, float) and math.isfinite(ms) and ms > 0:
            self.pending = None
            (self.final if event == "final" else self.times)[name] = ms

    def kept(self) -> dict[str, float]:
        """The fastest, and the library's default."""
        merged = self.times | self.final
        best = sorted(merged, key=merged.__getitem__)[:KEPT]
        return {name: merged[name] for name in merged if name in best or Algorithm.parse(name).default}


def _seconds() -> float:
    text = os.environ.get(SECONDS_VARIABLE, str(_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UsageError(f"{SECONDS_VARIABLE} is {text!r}", "It is a number of seconds, above 0.")
    return seconds


def _named(product: Product) -> str:
    return f"({product.tokens}, {product.inner}) x ({product.inner}, {product.out}) in {product.dtype}"


def _command() -> list[str]:
    return python("-m", "compressor.lower.cusparselt_worker")


def _worker(request: dict[str, Any], seconds: float) -> tuple[list[dict[str, Any]], str | None]:
    """What a worker said, and how it ended where it did not end well."""
    ended: str | None = None
    try:
        text = json.dumps(request).encode()
        done = subprocess.run(_command(), input=text, capture_output=True, timeout=seconds, check=False)
        output = done.stdout
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            ended = f"the search ended with code {done.returncode}" + (f": {said[-1][:200]}" if said else "")
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"the search took more than {seconds:.0f} s"
    except OSError as error:
        return [], f"the search could not be started: {error}"
    lines = []
    for written in output.decode(errors="replace").splitlines():
        try:
            line = json.loads(written)
        except ValueError:
            continue  # libraries print too, and a worker may die in the middle of a line
        if isinstance(line, dict):
            lines.append(line)
    return lines, ended
