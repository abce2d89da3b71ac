"""Random jobs for the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer, held against plain arithmetic.

    python tests/fuzz_kernels.py [--seconds 300] [--seed 0] [--only JOB]

Every job is drawn from the seed and its number, so one that fails is repeated with `--only`. The kernels are those of
`tests/levels.py`: every level of x86-64, AVX-512 and AVX-VNNI emulated. Between right jobs come wrong ones: numbers that the kernels
must refuse, whatever else they hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from levels import emulated

CHECKS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-wrapv")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
"""Relative to the sum of magnitudes, in float32 and with bfloat16 on the way."""

ADDRESSES = {1, 2, 13, *range(24, 30), *range(40, 46)}  # the places of addresses among a job's numbers
OUTSIDE = [2**31, -(2**31) - 1, 2**32 + 1, 2**40, 2**63 - 1, -(2**63)]


class Fuzz:
    """Draws jobs and runs them in `extension`."""

    def __init__(self, extension: Any) -> None:
        import test_kernels_bytes as bytes_
        import test_kernels_int8 as int8

        from compressor.lower import vnm, vnm_weight
        from compressor.sparsity.clustered import Clustered
        from compressor.sparsity.pattern import NM

        self.extension, self.int8, self.vnm, self.weights = extension, int8, vnm, vnm_weight
        self.bytes = bytes_
        self.nm, self.clustered = NM, Clustered
        self.counts: Counter[str] = Counter()

    def job(self, rng: random.Random) -> None:
        """One job, right or wrong."""
        torch.manual_seed(rng.getrandbits(60))
        level = rng.choice(self.extension.levels())
        self.extension.set_level(level)
        torch.set_num_threads(rng.randint(1, 4))
        products = [self.linear, self.linear, self.pair, self.convolution]
        kind = rng.choice([*products, self.attention, self.refused, self.refused, self.attention_refused])
        self.counts[f"{kind.__name__} {level}"] += 1
        kind(rng)

    def weight(self, rng: random.Random, shape: tuple[int, ...], lanes: int, v: int, m: int) -> tuple[Any, Tensor, Any]:
        """A packed weight, what it is in full precision, and its bias."""
        pattern = self.nm(2 if lanes else rng.randint(1, m), m, v)
        four = 4 if lanes else m  # channels that the kernels take together
        weight = torch.randn(shape) * 10.0 ** rng.uniform(-3, 3)
        weight = pattern.mask(weight.abs()).apply(weight)
        weight = weight.bfloat16().float() if lanes == self.weights.Lanes.HALVES else weight
        bias = torch.randn(shape[0]) if rng.random() < 0.6 else None
        block = 8 * m * rng.randint(1, 9) if rng.random() < 0.7 else four * rng.randint(1, 30)
        largest = rng.choice([127, 1000, 32_767])
        return (
            self.weights.KernelWeight(
                weight,
                bias,
                pattern,
                block=block,
                lanes=lanes,
                largest=largest,
                tile=rng.randint(1, 24) if rng.random() < 0.9 else rng.randint(25, 64),
            ),
            weight,
            bias,
        )

    def lanes(self, rng: random.Random) -> tuple[int, int]:
        """What lanes hold, and the channels of a group: of pairs four, or two of a dense weight."""
        found = self.weights.Lanes
        kinds = [
            found.FLOATS,
            found.CODES,
            found.BYTES,
            *([found.HALVES] if self.extension.level() == "avx512_bf16" else []),
        ]
        lanes = rng.choice(kinds)
        return lanes, rng.choice([4, 2] if lanes else [1, 2, 3, 4, 5, 8, 16])

    def inputs(self, rng: random.Random, *shape: int, half: bool) -> Tensor:
        """Random inputs, of their own, in the midst of NaN, or with strides."""
        x = torch.randn(shape) * 10.0 ** rng.uniform(-3, 3)
        x = x.bfloat16() if half else x
        where = rng.random()
        if where < 0.3:
            around = torch.full((x.numel() + 64,), torch.nan, dtype=x.dtype)
            start = rng.randint(0, 64)
            around[start : start + x.numel()] = x.flatten()
            return around[start : start + x.numel()].view(shape)
        return x.transpose(0, -1).contiguous().transpose(0, -1) if where < 0.4 else x

    def held(self, module: nn.Module, x: Tensor, wanted: Tensor, magnitude: Tensor) -> None:
        """The result against float64, and the same bits from another number of threads."""
        out = module(x)
        torch.set_num_threads(5 - torch.get_num_threads())
        assert torch.equal(out, module(x)), "other threads, other bits"
        assert out.shape == wanted.shape and out.dtype == x.dtype
        error = float((out.double() - wanted).norm() / magnitude.norm().clamp_min(1e-300))
        assert error < ROUNDING[x.dtype], error

    def linear(self, rng: random.Random) -> None:
        lanes, m = self.lanes(rng)
        v = rng.choice([1, 2, 4, 8])
        rows, inner, tokens = v * rng.randint(1, 40), (4 if lanes else m) * rng.randint(1, 60), rng.randint(1, 150)
        weight, full, bias = self.weight(rng, (rows, inner), lanes, v, m)
        halves = lanes == self.weights.Lanes.HALVES
        x = self.inputs(rng, tokens, inner, half=halves or rng.random() < 0.4)
        module = self.vnm.VNMLinear(weight)
        if lanes == self.weights.Lanes.CODES:
            assert torch.equal(module(x), self.int8.linear(x, full, bias, weight.layout.largest)), "not exact"
            return
        if lanes == self.weights.Lanes.BYTES:
            assert torch.equal(module(x), self.bytes.linear(x, full, bias, weight.layout.block, group=m)), "not exact"
            return
        wide, b = x.double(), None if bias is None else bias.double()
        magnitude = F.linear(wide.abs(), full.double().abs(), None if b is None else b.abs())
        self.held(module, x, F.linear(wide, full.double(), b), magnitude)

    def pair(self, rng: random.Random) -> None:
        lanes, m = self.lanes(rng)
        vs = rng.choices([1, 2, 4, 8], k=2)
        groups = rng.choices([4, 2], k=2) if lanes else [m, m]
        m = 4 if lanes else m
        inner, out, tokens = m * rng.randint(1, 20), vs[1] * rng.randint(1, 20), rng.randint(1, 80)
        hidden = vs[0] * m * rng.randint(1, 60)
        first, full1, bias1 = self.weight(rng, (hidden, inner), lanes, vs[0], groups[0])
        second, full2, bias2 = self.weight(rng, (out, hidden), lanes, vs[1], groups[1])
        tanh = rng.random() < 0.5
        x = self.inputs(rng, tokens, inner, half=lanes == self.weights.Lanes.HALVES or rng.random() < 0.4)
        module = self.vnm.VNMPair(first, second, tanh)
        hidden_at_once = self.int8.HIDDEN if lanes >= self.weights.Lanes.CODES else 512
        chunk = hidden_at_once // second.layout.block * second.layout.block or second.layout.block
        if chunk < hidden and chunk % vs[0]:
            self.refuses(lambda: module(x))
            return
        approximate = "tanh" if tanh else "none"
        if lanes == self.weights.Lanes.CODES:
            first.layout = first.layout._replace(largest=self.int8.largest_of(self.int8.codes_of_weight(full1)[0]))
            second.layout = second.layout._replace(largest=self.int8.largest_of(self.int8.codes_of_weight(full2)[0]))
            layers = [dense(full1, bias1), dense(full2, bias2)]
            with torch.no_grad():
                assert torch.equal(module(x), self.int8.pair(x, *layers, approximate, chunk)), "not exact"
            return
        if lanes == self.weights.Lanes.BYTES:
            layers = [dense(full1, bias1), dense(full2, bias2)]
            with torch.no_grad():
                blocks = first.layout.block, second.layout.block
                found = self.bytes.pair(x, *layers, approximate, blocks, groups=(groups[0], groups[1]))
                assert torch.equal(module(x), found), "not exact"
            return
        wide = x.double()
        b1, b2 = (None if b is None else b.double() for b in (bias1, bias2))
        middle = F.linear(wide, full1.double(), b1)
        large = F.linear(wide.abs(), full1.double().abs(), None if b1 is None else b1.abs())
        magnitude = F.linear(large, full2.double().abs(), None if b2 is None else b2.abs())
        self.held(module, x, F.linear(F.gelu(middle, approximate=approximate), full2.double(), b2), magnitude)

    def convolution(self, rng: random.Random) -> None:
        v, m, side = rng.choice([1, 2, 4, 8]), rng.choice([1, 2, 3, 4, 8]), rng.choice([1, 2, 3, 3, 4, 5, 7])
        stride, padding = (1, side // 2) if rng.random() < 0.5 else (rng.randint(1, side), rng.randint(0, side - 1))
        least = max(1, side - 2 * padding)
        lanes = rng.choice([self.weights.Lanes.FLOATS, self.weights.Lanes.CODES, self.weights.Lanes.BYTES])
        m = rng.choice([4, 2]) if lanes else m
        rows, inner = v * rng.randint(1, 10), (4 if lanes else m) * rng.randint(1, 6)
        weight, full, bias = self.weight(rng, (rows, inner, side, side), lanes, v, m)
        shape = (rng.randint(1, 6), inner, rng.randint(least, 20), rng.randint(least, 40))
        x = self.inputs(rng, *shape, half=rng.random() < 0.4)
        module = self.vnm.VNMConv(weight, side, stride, padding)
        where = {"stride": stride, "padding": padding}
        if lanes:
            wanted = (
                self.bytes.convolution(x, full, bias, weight.layout.block, group=m, **where)
                if lanes == self.weights.Lanes.BYTES
                else self.int8.convolution(x, full, bias, weight.layout.largest, **where)
            )
            assert torch.equal(module(x), wanted), "not exact"
            return
        wide, b = x.double(), None if bias is None else bias.double()
        magnitude = F.conv2d(wide.abs(), full.double().abs(), None if b is None else b.abs(), **where)
        self.held(module, x, F.conv2d(wide, full.double(), b, **where), magnitude)

    def attended(self, rng: random.Random) -> tuple[list[int | float], list[Tensor], Tensor]:
        """The numbers of an attention, its query, key and value, and where its result will be."""
        images, heads, queries, keys = (rng.randint(1, most) for most in (3, 4, 70, 300))
        channels, wide = rng.randint(1, 90), rng.randint(1, 90)
        found = self.weights.Lanes
        lanes = rng.choice(
            [found.FLOATS, found.CODES, *([found.BYTES] if self.extension.level() in self.vnm.VNNI else [])]
        )
        tensors = []
        for tokens, width in ((queries, channels), (keys, channels), (keys, wide)):
            x = self.inputs(rng, images, tokens, heads, width, half=False)
            # heads within tokens, as a projection gives them, or apart; channels follow each other
            x = x.contiguous() if x.stride(3) != 1 else x
            tensors.append(x.transpose(1, 2).contiguous() if rng.random() < 0.3 else x.transpose(1, 2))
        y = torch.full((images, queries, heads, wide), torch.nan)
        block = rng.randint(1, 200) if lanes == found.FLOATS else 2 * rng.randint(1, 64)
        numbers: list[int | float] = [*(x.data_ptr() for x in tensors), y.data_ptr(), images, heads, queries, keys]
        numbers += [channels, wide, block, torch.get_num_threads(), int(lanes), rng.choice([channels**-0.5, 0.01, 2.0])]
        return numbers + [stride for x in tensors for stride in x.stride()[:3]], tensors, y

    def attention(self, rng: random.Random) -> None:
        numbers, (query, key, value), y = self.attended(rng)
        self.extension.attend(*numbers)
        first = y.clone()
        numbers[11] = 5 - int(numbers[11])
        y.fill_(torch.nan)
        self.extension.attend(*numbers)
        assert torch.equal(first, y), "other threads, other bits"
        scores = query.double() @ key.double().transpose(2, 3) * numbers[13]
        wanted = (torch.softmax(scores, -1) @ value.double()).transpose(1, 2)
        assert bool(y.isfinite().all())
        # in codes and with large scores near ties turn over; that sums stay within the values is what is left to say
        if float(scores.abs().max()) < (3 if numbers[12] else 1e4):
            error, lanes = (y.double() - wanted).norm(), int(numbers[12])
            of_values = float(error / value.double().norm().clamp_min(1e-300))
            assert of_values < {0: 1e-4, 2: 2e-2, 3: 0.2}[lanes], of_values
            magnitude = torch.softmax(scores, -1) @ value.double().abs()  # which many keys do not make small
            of_results = float(error / magnitude.norm().clamp_min(1e-300))
            assert of_results < {0: 1e-4, 2: 2e-2, 3: 0.1}[lanes], of_results
        assert float(y.abs().max()) <= 1.01 * float(value.abs().max())

    def attention_refused(self, rng: random.Random) -> None:
        """A right attention with numbers that no size can be."""
        numbers, *held = self.attended(rng)  # buffers live on
        wrong: list[Any] = list(numbers)
        place = rng.randint(4, 11)
        wrong[place] = rng.choice([0, -1, 2**24 + 1, *OUTSIDE])
        self.refuses(lambda: self.extension.attend(*wrong), wrong, (ValueError, OverflowError))
        if numbers[12]:
            wrong = [*numbers[:10], rng.choice([1, 3, 127, 130]), *numbers[11:]]  # pairs of keys, 128 at most
            self.refuses(lambda: self.extension.attend(*wrong), wrong)
        wrong = [
            *numbers[:12],
            rng.choice([-1, 1, 4, *([] if self.extension.level() in self.vnm.VNNI else [3])]),
            *numbers[13:],
        ]
        self.refuses(lambda: self.extension.attend(*wrong), wrong)
        few = numbers[: rng.randint(0, len(numbers) - 1)]
        self.refuses(lambda: self.extension.attend(*few), "too few", (TypeError,))
        wrong = list(numbers)
        place = rng.randint(4, len(wrong) - 1)
        wrong[place] = rng.choice([None, "1"] if place == 13 else [2**64, -(2**70), None, "1"])  # any number is a scale
        self.refuses(lambda: self.extension.attend(*wrong), "no number", (TypeError, OverflowError, ValueError))
        assert held

    def refused(self, rng: random.Random) -> None:
        """A right job with one number made wrong, and at times others that no size can be."""
        kind = rng.randint(0, 2)
        lanes, m = (0, 4) if kind == 2 else self.lanes(rng)
        side, v = (rng.choice([1, 2, 3, 5, 7]) if kind == 2 else 1), rng.choice([1, 2, 4, 8])
        stride, padding = (rng.randint(1, side), rng.randint(side // 2, side - 1)) if kind == 2 else (1, 0)
        shapes = [(32, 2 * m, side, side)] if kind == 2 else [(32, 2 * m)]
        shapes += [(16, 32)] if kind == 1 and 32 % m == 0 else []
        kind = 0 if kind == 1 and len(shapes) == 1 else kind
        held = [self.weight(rng, shape, lanes, v, m)[0] for shape in shapes]
        x = torch.randn(2, 2 * m, 6, 7) if kind == 2 else torch.randn(14, 2 * m).bfloat16()
        y = torch.zeros(2 * 12 * 13 * 32)  # of the largest padding
        area = x.shape[2:] if kind == 2 else (1, 1)
        numbers = [kind, x.data_ptr(), y.data_ptr(), int(kind != 2), 0, side, stride, padding, *area, len(x), 3, 2, 0]
        for one in held:
            buffers = [None if b is None else b.data_ptr() for b in one.arguments[:-1]]
            numbers += [*one.layout, *(b or 0 for b in buffers)]
        place, value = rng.choice(wrong_numbers(numbers, kind, lanes))
        numbers[place] = value
        for place in rng.sample(sorted(set(range(len(numbers))) - ADDRESSES - {10}), rng.choice([0, 0, 0, 1, 3])):
            numbers[place] = rng.choice(OUTSIDE)
        self.refuses(lambda: self.extension.run(*numbers), numbers)
        self.refuses(
            lambda: self.extension.run(*numbers[: rng.randint(0, len(numbers) - 1)]), "too few", (TypeError, ValueError)
        )
        numbers[rng.randrange(len(numbers))] = rng.choice([2**64, -(2**70), 1.5, None, "1"])  # type: ignore[call-overload]
        self.refuses(lambda: self.extension.run(*numbers), "no number", (TypeError, OverflowError, ValueError))

    def refuses(
        self, call: Callable[[], object], what: object = "", kinds: tuple[type[Exception], ...] = (ValueError,)
    ) -> None:
        try:
            call()
        except kinds:
            return
        raise AssertionError(f"not refused: {what}")


def dense(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    layer.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
    return layer


def wrong_numbers(numbers: Sequence[int], kind: int, lanes: int) -> list[tuple[int, int]]:
    """Places of a right job with numbers that make it wrong, each for itself."""
    wrong = {
        0: [-1, 3, 7],
        1: [0],
        2: [0],
        10: [0, -1, 2**61, 2**63 - 1, -(2**63)],
        11: [0, -1, 65, 2**30],
        12: [0, -1, 4097],
    }
    if kind == 2:
        wrong |= {
            5: [0, 4, 9, -numbers[5], 46_341, 65_536],
            6: [0, -1, numbers[5] + 1, 2**31 - 1],
            7: [-1, numbers[5], 2**31 - 1],
        }
        wrong |= {8: [0, -1, 2**28 + 1], 9: [0, -1, 2**28 + 1, 2**31 - 1]}
    for at in range(14, len(numbers), 16):
        rows, inner, v, _, block, group, kept, planes = numbers[at : at + 8]
        half = [2] if lanes and group == 2 else []  # of the four channels that are taken together
        wrong |= {
            at: [0, -v, 2**24 + v, 2**31 - v, *([rows + 1] if v > 1 else [])],
            at + 1: [
                0,
                -group,
                (2**24 // group + 1) * group,
                *([inner + 1] if group > 1 else []),
                *(inner + n for n in half),
            ],
            at + 2: [0, -1, 3, 5, 16, -8, 2**31 - 1],
            at + 3: [0, -1, 2, 50, 65_536],
            at + 4: [
                0,
                -group,
                (2**24 // group + 1) * group,
                *([block + 1] if group > 1 else []),
                *(block + n for n in half),
            ],
            at + 5: [0, -1, -group, inner + 1, 2**31 - 1],
            at + 6: [0, -1, group + 1, *([kept + 1] if lanes else [])],
            at + 7: [n for n in (0, -1, group - 1, group + 1, 2**31 - 1) if n != planes],
            # in whole numbers an image needs its largest ones, whose address is 0 here
            at + 8: [-1, 4, *([1, 2, 3] if kind == 2 else [])],
            at + 10: [0],
            at + 11: [0],
        }
        if lanes >= 2:
            wrong |= {at + 9: [0, -1, 32_768, 2**31 - 1], at + 14: [0]}
        if lanes == 3:
            wrong |= {at + 15: [0]}
    wrong = {place: [*values, *([] if place in ADDRESSES | {10} else OUTSIDE)] for place, values in wrong.items()}
    return [(place, value) for place, values in wrong.items() for value in values]


def child(file: str, seconds: float, seed: int, only: int | None) -> None:
    """Draw jobs, with the kernels of `file` in place of those that are installed."""
    spec = importlib.util.spec_from_file_location("compressor.lower._vnm", file)
    assert spec is not None and spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    sys.modules["compressor.lower._vnm"] = extension
    fuzz = Fuzz(extension)
    from compressor.lower.vnm_kernels import kernels

    assert kernels() == (extension, None), kernels()
    start, number = time.monotonic(), only or 0
    trace = Path(file).with_name("job")
    while number == only if only is not None else time.monotonic() - start < seconds:
        trace.write_text(str(number))
        fuzz.job(random.Random(f"{seed}/{number}"))
        number += 1
    for name, count in sorted(fuzz.counts.items()):
        print(f"{count:7d} {name}")
    print(
        f"{sum(fuzz.counts.values())} jobs of seed {seed} in {time.monotonic() - start:.0f} s: nothing found",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--kernels", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.kernels:
        child(given.kernels, given.seconds, given.seed, given.only)
        return 0
    with tempfile.TemporaryDirectory() as name:
        file = emulated(Path(name), *CHECKS)
        # ASan's has to come first, and finds C++'s exceptions, which torch uses, only where they are there already
        finding = ["gcc", "-print-file-name=libasan.so", "-print-file-name=libstdc++.so"]
        libraries = [
            subprocess.run([finding[0], one], check=True, capture_output=True, text=True) for one in finding[1:]
        ]
        environment = {
            **os.environ,
            "LD_PRELOAD": " ".join(one.stdout.strip() for one in libraries),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        run = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--kernels", str(file)], env=environment, check=False
        )
        if run.returncode:
            print(f"found by job {(Path(name) / 'job').read_text()} of seed {given.seed}: repeat it with --only")
    return int(bool(run.returncode))


if __name__ == "__main__":
    sys.exit(main())
