"""The worker that tries cuSPARSELt's algorithms for `cusparselt_tuning`: it may die of one, and only it.

python -m compressor.lower.cusparselt_worker < request.json
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CompressorError, first_line
from compressor.lower.cusparselt_tuning import (
    KEPT,
    Algorithm,
    Product,
    candidates,
    mixed_dtype,
    multiply,
)
from compressor.lower.graphs import Captured
from compressor.sparsity.pattern import NM

_ERROR = 1e-2  # relative; bfloat16 rounds to 4e-3
NO_LIMIT = 64  # algorithms to try where the library does not say how many it has


class Poisoned(Exception):
    """The GPU can do nothing more in this process."""


def search(
    trial: Trial, seconds: float, limit: int, skip: Collection[str], found: bool, winner: Algorithm | None = None
) -> Iterator[dict[str, str | float]]:
    """Try the first `limit` algorithms of a product: one line before and one after each, and the fastest once more.

    The `winner` of the library's own search comes first: time may be short. `skip` are those that an earlier worker tried, and
    `found` whether it found one that is right.
    """
    end = time.monotonic() + seconds
    times: dict[Algorithm, float] = {}
    for transposed in (True, False):
        every = candidates(limit, transposed, trial.major)
        if winner is not None:
            every.insert(0, replace(winner, transposed=transposed))
        for algorithm in dict.fromkeys(every):
            if str(algorithm) in skip:
                continue
            if time.monotonic() > end:
                break
            yield {"event": "trying", "algorithm": str(algorithm)}
            try:
                times[algorithm] = trial.milliseconds([algorithm], replays=3)[0]
                yield {"event": "timed", "algorithm": str(algorithm), "ms": times[algorithm]}
            except Exception as error:  # not supported, or wrong: the next one may be right
                trial.still_alive()  # otherwise the last line remains "trying", and names the culprit
                why = f"{type(error).__name__}: {first_line(error)}"
                yield {"event": "failed", "algorithm": str(algorithm), "why": why}
        if times or found:
            break  # a copy of the result is only for where the library cannot lay it out
    best = sorted(times, key=times.__getitem__)[:KEPT]
    if best:
        for algorithm, ms in zip(best, trial.milliseconds(best, replays=15), strict=True):
            yield {"event": "final", "algorithm": str(algorithm), "ms": ms}


class Trial:
    """One product with random data and a reference for some of its rows. Needs a GPU."""

    _SETS = 3  # inputs and weights that take turns, so that a cache does not hold them as it never does in a model
    _CALLS = 9

    def __init__(self, product: Product, device: torch.device) -> None:
        self.product, self.device = product, device
        self.recordable = True  # until a recording fails
        rng = torch.Generator(device).manual_seed(0)
        sets = [_random(product, device, rng) for _ in range(self._SETS)]
        self.bias = (
            torch.randn(product.out, generator=rng, device=device).to(product.out_dtype) if product.bias else None
        )
        self.inputs = [x for x, _ in sets]
        self.packed = [torch._cslt_compress(weight) for _, weight in sets]
        step = max(1, product.tokens // 512)
        self.rows = torch.arange(0, product.tokens, step, device=device)
        self.wanted = self.inputs[0][self.rows].float() @ sets[0][1].float().t()
        if self.bias is not None:
            self.wanted += self.bias.float()

    @property
    def major(self) -> int:
        """The generation of the GPU, 9 for Hopper; 0 elsewhere."""
        return torch.cuda.get_device_capability(self.device)[0] if self.device.type == "cuda" else 0

    def suggested(self) -> tuple[int, Algorithm | None]:
        """How many algorithms the library has for this product, and the one that its own search takes, as far as it says."""
        names: Any = torch._C
        try:
            mixed = mixed_dtype(self.product.torch_dtype)
            found = names._cusparselt.mm_search(self.packed[0], self.inputs[0].t(), self.bias, None, mixed, True)
            alg_id, split_k, split_k_mode, limit = map(int, found)
            return max(1, min(limit, 1000)), Algorithm(alg_id, split_k, split_k_mode if split_k != 1 else -1)
        except Exception:  # private to torch, and not in every version
            self.still_alive()
            return NO_LIMIT, None

    def check(self, algorithm: Algorithm) -> None:
        """Raise ArithmeticError where the result is wrong."""
        product = self.product
        # The allocator gives freed memory back as it was: without this, an algorithm that writes nothing could look right.
        for shape in ((product.tokens, product.out), (product.out, product.tokens)):
            torch.full(shape, math.nan, dtype=product.out_dtype, device=self.device)
        out = multiply(self.packed[0], self.inputs[0], self.bias, algorithm)
        error = float((out[self.rows].float() - self.wanted).norm() / self.wanted.norm())
        if not error <= _ERROR or not bool(out.isfinite().all()):
            raise ArithmeticError(f"its error is {error:.1e}")

    def milliseconds(self, algorithms: Sequence[Algorithm], replays: int) -> list[float]:
        """Median milliseconds of a call of each, taking turns. They are checked first."""
        events: Any = torch.cuda  # its classes have no annotations
        graphs = []
        for algorithm in algorithms:
            self.check(algorithm)
            graphs.append(self._repeated(algorithm))
        times: list[list[float]] = [[] for _ in graphs]
        for _ in range(replays):
            for graph, mine in zip(graphs, times, strict=True):
                begin, end = (events.Event(enable_timing=True) for _ in range(2))
                begin.record()
                graph()
                end.record()
                end.synchronize()
                mine.append(begin.elapsed_time(end) / self._CALLS)
        return [median(mine) for mine in times]

    def _repeated(self, algorithm: Algorithm) -> Callable[[], object]:
        def calls() -> None:
            for turn in range(self._CALLS):
                at = turn % self._SETS
                multiply(self.packed[at], self.inputs[at], self.bias, algorithm)

        if self.recordable:
            try:
                # Planning a call takes the host longer than many a product takes the GPU, and a model runs as a graph.
                return Captured(lambda _: calls(), self.inputs[0][:1], warm_up=1).replay
            except CompressorError:
                self.still_alive()
                self.recordable = False
        calls()
        return calls

    def still_alive(self) -> None:
        """Raise Poisoned where the GPU no longer answers this process."""
        try:
            torch.cuda.synchronize(self.device)
        except Exception as error:
            raise Poisoned(first_line(error)) from error


def _random(product: Product, device: torch.device, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """x (tokens, inner) and a 2:4 weight (out, inner)."""
    x = torch.randn(product.tokens, product.inner, generator=rng, device=device)
    weight = torch.randn(product.out, product.inner, generator=rng, device=device)
    weight = NM(2, 4).mask(weight.abs()).apply(weight)
    if product.dtype == "int8":
        return (x * 32).round().clamp(-127, 127).to(torch.int8), (weight * 32).round().clamp(-127, 127).to(torch.int8)
    return x.to(product.torch_dtype), weight.to(product.torch_dtype)


def main() -> None:
    """Read a request from stdin, and write a line of JSON to stdout for every event of the search."""
    request = json.load(sys.stdin)
    if not torch.cuda.is_available():
        sys.exit("torch finds no CUDA GPU in the worker's process")
    torch.cuda.set_device(request["device"])
    device = torch.device("cuda", request["device"])
    try:
        with torch.no_grad():
            for at, product in enumerate(request["products"]):
                print(json.dumps({"event": "product", "at": at}), flush=True)
                trial = Trial(Product(**product), device)
                limit, winner = trial.suggested() if request["ask"] else (NO_LIMIT, None)
                gc.freeze()  # torch may collect garbage before every recording
                for line in search(trial, request["seconds"], limit, request["skip"], request["found"], winner):
                    print(json.dumps(line), flush=True)
                del trial
                torch.cuda.empty_cache()
    except Poisoned as poisoned:
        # The line about the algorithm has been written; what is left is to say that this process is of no more use.
        print(poisoned, file=sys.stderr, flush=True)
        os._exit(3)


if __name__ == "__main__":
    main()
