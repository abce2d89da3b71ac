"""Choices on a busy machine, from a cache made elsewhere, and by plans of another machine: never slower. Times are given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from math import comb
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_lower import Copy, Fake
from torch import Tensor, nn

import compressor
from compressor import NM, CompressorError, Plan
from compressor.cost.contention import Cores
from compressor.environment import give_back, usable_cores
from compressor.lower import contest, job, vnm_kernels
from compressor.lower.contest import Contest
from compressor.lower.forms import dense_forms
from compressor.lower.plan import Setting

CPU = torch.device("cpu")


class Busy:
    """Times of a machine that does something else in bursts, which meet neighbouring turns alike and slow them by a heavy tail:
    `share` of the time, `length` turns at a time in the mean. Takes the place of `interleaved`; a call gives its true milliseconds."""

    def __init__(self, share: float, length: float, seed: int) -> None:
        self.share, self.length, self.rng = share, length, np.random.default_rng(seed)
        self.turns = 0

    def __call__(self, calls: Sequence[Callable[[], float]], rounds: int, *_: object) -> list[list[float]]:
        count = rounds * len(calls)
        self.turns += count
        draws = self.rng.random(count)
        slow, jitter = 0.5 * self.rng.pareto(1.2, count), np.exp(0.03 * self.rng.standard_normal(count))
        ends, begins = 1 / self.length, self.share / (1 - self.share) / self.length
        busy, at = self.rng.random() < self.share, 0
        times: list[list[float]] = [[] for _ in calls]
        for turn in range(rounds):
            order = range(len(calls))
            for index in order if turn % 2 else reversed(order):
                busy = draws[at] >= ends if busy else draws[at] < begins
                factor = float(jitter[at]) * (1 + float(slow[at]) * bool(busy))
                times[index].append(1e-3 * calls[index]() * factor)
                at += 1
        return times


NOISE = {"quiet": (0.01, 4.0), "half": (0.5, 4.0), "long": (0.3, 30.0), "most": (0.8, 8.0)}
LAYER, MODEL = 25, 11


@dataclass
class Rates:
    """Of the choices made: how many were sparse, and slower than the dense form as it is; what medians of the first rounds would
    have taken with a margin of 3%, as layers did, and without one, as models did; and rounds in the mean."""

    sparse: float
    worse: float
    margin: float
    smallest: float
    rounds: float


def rates(monkeypatch: pytest.MonkeyPatch, true: Mapping[str, float], rounds: int, noise: str, lowerings: int) -> Rates:
    """Choices among forms that truly take `true` milliseconds; sparse are those whose name says so."""
    monkeypatch.setattr("compressor.lower.contest.interleaved", Busy(*NOISE[noise], seed=0))
    calls = {name: lambda ms=ms: ms for name, ms in true.items()}
    sparse = {name for name in true if name.startswith("sparse")}
    found = []
    for _ in range(lowerings):
        times = contest.timed(calls, rounds, CPU, sparse)
        choice = Contest.of(times, sparse).verdict().choice
        first = {name: median(own[:rounds]) for name, own in times.items()}
        old = min(first[name] for name in first if name not in sparse) / min(first[name] for name in sparse)
        found.append((choice in sparse, true[choice] > true["eager"], old >= 1.03, old > 1, len(times["eager"])))
    return Rates(*(sum(column) / lowerings for column in zip(*found, strict=True)))


SLOWER = {"eager": 1.0, "onednn": 0.9, "sparse": 0.91}
EQUAL = {"eager": 1.0, "onednn": 1.01, "sparse": 1.01, "sparse too": 1.02}
FASTER = {"eager": 1.0, "onednn": 0.9, "sparse": 0.75}


@pytest.mark.parametrize("noise", ["half", "long", "most"])
def test_slower_forms_are_not_taken_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch, noise: str) -> None:
    """4,800 lowerings of forms that are a hundredth slower than the best dense one; medians took 5 to 50%."""
    for true in (SLOWER, EQUAL):
        for rounds in (LAYER, MODEL):
            found = rates(monkeypatch, true, rounds, noise, 400)
            assert found.sparse < 0.01 and found.worse < 0.01, (true, found)
            assert found.margin > 0.03 and found.smallest > 0.15, (true, found)


def test_faster_forms_are_found_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for noise in ("half", "long"):
        for rounds in (LAYER, MODEL):
            found = rates(monkeypatch, FASTER, rounds, noise, 300)
            assert found.sparse > 0.97 and found.sparse > found.margin, found


def test_a_quiet_machine_measures_no_longer_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for true in (SLOWER, EQUAL, FASTER):
        for rounds in (LAYER, MODEL):
            found = rates(monkeypatch, true, rounds, "quiet", 200)
            assert found.rounds < 1.2 * rounds and found.sparse == (true is FASTER), found


@pytest.mark.parametrize("rounds", [1, 9, 10, 11, 22, 25, 88, 200])
@pytest.mark.parametrize("chance", [0.001, 0.05])
def test_so_many_wins_are_no_chance(rounds: int, chance: float) -> None:
    at_least = [sum(comb(rounds, k) for k in range(wins, rounds + 1)) / 2**rounds for wins in range(rounds + 2)]
    wins = contest.needed(rounds, chance)
    assert at_least[wins] <= chance < at_least[wins - 1]


# --- What is said. ---


def rounds_of(counts: int, **ratios: float) -> dict[str, tuple[float, ...]]:
    """Rounds in which each form has this speed over eager, but for the last `counts`, which others won."""
    slow = {name: tuple([1 / ratio] * (25 - counts) + [2.0] * counts) for name, ratio in ratios.items()}
    return {"eager": (1.0,) * 25, **slow}


def test_what_could_not_be_told_is_not_taken_and_the_reason_says_so() -> None:
    doubtful = rounds_of(5, sparse=1.2)
    verdict = Contest.of(doubtful, ["sparse"]).verdict()
    assert verdict.choice == "eager" and not contest.decided(doubtful, ["sparse"])
    assert verdict.reason().startswith(
        "sparse has 1.20x the speed of eager; sparse could not be told apart from eager in 25 rounds"
    )
    assert "of which it won 20: lower again when the machine does nothing else" in verdict.reason()
    clear = rounds_of(4, sparse=1.2)
    assert Contest.of(clear, ["sparse"]).verdict().choice == "sparse" and contest.decided(clear, ["sparse"])


def test_a_dense_form_that_could_not_be_told_from_the_layer_is_not_taken_either() -> None:
    doubtful = rounds_of(5, onednn=1.2)
    verdict = Contest.of(doubtful, []).verdict()
    assert verdict.choice == "eager" and "onednn could not be told apart" in verdict.reason()
    assert Contest.of(rounds_of(4, onednn=1.2), []).verdict().choice == "onednn"


def test_a_sparse_form_has_to_gain_on_every_dense_one() -> None:
    times = {"eager": (1.0,) * 25, "onednn": (0.98,) * 25, "sparse": (0.96,) * 25}
    verdict = Contest.of(times, ["sparse"]).verdict()
    assert (verdict.choice, verdict.opponent) == ("eager", "onednn") and "less than the 1.03x" in verdict.reason()


def test_of_two_the_sure_one_is_taken() -> None:
    times = {**rounds_of(5, coarse=2.0), "sparse": (0.8,) * 25}
    assert Contest.of(times, ["coarse", "sparse"]).verdict().choice == "sparse"


def test_rounds_are_bounded_and_their_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def never_clear(calls: Sequence[object], rounds: int, *_: object) -> list[list[float]]:
        asked.append(rounds)
        return [
            [1e-3] * rounds,
            [0.8e-3 if at % 3 else 1.4e-3 for at in range(min(rounds, 25))] + [2e-3] * (rounds - 25),
        ]

    monkeypatch.setattr("compressor.lower.contest.interleaved", never_clear)
    found = contest.timed({"eager": lambda: None, "sparse": lambda: None}, 25, CPU, ["sparse"])
    assert asked[:2] == [25, 25] and len(found["eager"]) == len(found["sparse"]) == sum(asked) <= 8 * 25


# --- A whole model. ---


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=bias) for bias in (True, False, True))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(NM(2, 4, 4).mask(layer.weight.abs()).apply(layer.weight))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            Copy.clock.passes(2e-3 if type(layer) is nn.Linear else 0.0)  # as `SLOW` has it
            x = layer(x)
        return x


X = torch.zeros(3, 16)


@pytest.fixture(autouse=True)
def _by_this_clock(clock: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Copy, "clock", clock)
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))


def spoil(folder: Path, **ms: float) -> int:
    """Let every file of times under `folder` say `ms`."""
    files = list(folder.rglob("timings/*.json"))
    for file in files:
        found = json.loads(file.read_text())
        assert set(ms) == set(found["rounds_ms"])
        file.write_text(json.dumps({**found, "rounds_ms": {name: [one] * 25 for name, one in ms.items()}}))
    return len(files)


SLOW = (
    Fake("eager", seconds=2e-3, skips_zeros=False),
    Fake("packed", seconds=1e-3, skips_zeros=False),
    Fake("sparse", seconds=3e-3),
)


def test_a_false_cache_that_prefers_the_slow_kernel_everywhere_is_found_out(tmp_path: Path) -> None:
    first = compressor.lower(Model(), X, SLOW).plan
    assert {layer.choice for layer in first.layers} == {"packed"} and first.choice == "dense"
    assert spoil(tmp_path, eager=9.0, packed=8.0, sparse=1.0) == 2
    plan = compressor.lower(Model(), X, SLOW).plan
    assert {layer.choice for layer in plan.layers} == {"sparse"}  # the lie is believed
    assert plan.choice == "dense" and not plan.lowered and "not taken" in plan.reason
    assert any("`--fresh`" in note for note in plan.notes)


def test_a_false_cache_cannot_hide_the_best_dense_form(tmp_path: Path) -> None:
    """Kernels between the two dense forms, the better of which the cache calls slow."""
    between = (*SLOW[:2], Fake("sparse", seconds=1.5e-3))
    assert compressor.lower(Model(), X, between).plan.choice == "dense"
    spoil(tmp_path, eager=2.0, packed=9.0, sparse=1.5)
    lowered = compressor.lower(Model(), X, between)
    plan = lowered.plan
    assert {layer.choice for layer in plan.layers} == {"sparse"} and not plan.lowered
    assert plan.choice == "dense, packed", plan.reason
    again = compressor.lower(Model(), X, between, plan=plan).model
    assert torch.equal(again(X + 1), lowered.model(X + 1))
    seconds = [[layer.seconds for layer in model.layers] for model in (lowered.model, again)]  # type: ignore[union-attr]
    assert seconds == [[1e-3] * 3] * 2
    forms = dense_forms(Model(), X, plan.model_copy(update={"layers": _of_installed(plan)}))
    assert set(forms) == {"eager", "dense", "dense, packed"}


def _of_installed(plan: Plan) -> tuple[Any, ...]:
    """The layers of `plan` as if only eager had been tried."""
    return tuple(
        one.model_copy(
            update={"candidates": tuple(c for c in one.candidates if c.backend == "eager"), "choice": "eager"}
        )
        for one in plan.layers
    )


def test_a_whole_model_has_to_gain_as_much_as_a_layer() -> None:
    nearly = (SLOW[0], Fake("sparse", seconds=1.9e-3))

    class Padded(Model):
        def forward(self, x: Tensor) -> Tensor:
            Copy.clock.passes(8e-3)
            return super().forward(x)

    plan = compressor.lower(Padded(), X, nearly, cache=False).plan
    form = plan.form("lowered")
    assert {layer.choice for layer in plan.layers} == {"sparse"} and form is not None and 1 < form.speedup < 1.03
    assert plan.choice == "eager" and plan.reason.endswith("less than the 1.03x that are asked: not taken")


@pytest.mark.parametrize(("ratio", "said"), [(1.0299, "1.02x"), (1.024, "1.02x"), (0.956, "0.96x")])
def test_a_gain_that_is_too_small_is_not_rounded_up_to_what_is_asked(ratio: float, said: str) -> None:
    reason = contest.Verdict("eager", "vnm", "onednn", ratio).reason()
    assert reason == f"vnm has {said} the speed of onednn, less than the 1.03x that are asked"


def test_what_is_still_open_is_not_stored_and_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = contest.interleaved

    def torn(calls: Sequence[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
        """As it is, but every third round of the last form is slow."""
        *others, last = real(calls, rounds, device)
        return [*others, [one * (9 if at % 3 == 0 else 1) for at, one in enumerate(last)]]

    backends = (SLOW[0], Fake("sparse", seconds=1.5e-3))
    monkeypatch.setattr("compressor.lower.contest.interleaved", torn)
    monkeypatch.setattr("compressor.lower.contest.needed", lambda rounds, chance=0: rounds)
    plan = compressor.lower(Model(), X, backends).plan
    assert all("could not be told apart from eager in 200 rounds" in layer.reason for layer in plan.layers)
    assert not list(tmp_path.rglob("timings/*.json"))


def test_memory_that_lowering_needed_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed by the process, it would be kept by the C library; elsewhere than with glibc there is no call for it."""
    given: list[str] = []
    monkeypatch.setattr(import_module("compressor.lower.lowering"), "give_back", lambda: given.append("back"))
    plan = compressor.lower(Model(), X, SLOW, cache=False).plan
    compressor.lower(Model(), X, SLOW, plan=plan)
    assert given == ["back", "back"]
    give_back()
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace())
    give_back()


# --- Cores that others have. ---


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """Lets other programs have this share of the time of the cores, of a process of so many threads."""

    def share(value: float, threads: int = 2) -> None:
        counted = iter(Cores({"1": (float(at), value / (1 - value) * at)}) for at in range(1000))
        monkeypatch.setattr(Cores, "now", lambda: next(counted))
        monkeypatch.setattr(contest, "usable_cores", lambda: 2.0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    return share


GAINING = (SLOW[0], Fake("sparse", seconds=2e-3 / 1.4))


def test_on_a_busy_machine_more_has_to_be_gained(taken: Callable[..., None], tmp_path: Path) -> None:
    taken(0.45)
    plan = compressor.lower(Model(), X, GAINING).plan
    assert plan.choice == "eager" and plan.taken == pytest.approx(0.45)
    assert plan.reason.startswith("the lowered model has 1.") and plan.reason.endswith(
        "less than the 1.50x that are asked while other programs have the cores for 45% of the time: lower again when the machine "
        "does nothing else: not taken"
    )
    assert not list(tmp_path.rglob("timings/*.json"))  # these times are of no other use
    gains = compressor.lower(Model(), X, (SLOW[0], Fake("sparse", seconds=1e-3))).plan
    assert gains.choice == "lowered"
    for one in (plan, gains):
        assert [note for note in one.notes if note.startswith("other programs had the cores for up to 45% of the time")]


@pytest.mark.parametrize(("share", "threads", "told"), [(0.05, 2, 0.05), (0.45, 1, None), (0.45, 3, None)])
def test_cores_that_others_have_count_for_threads_that_wait_for_each_other(
    taken: Callable[..., None], tmp_path: Path, share: float, threads: int, told: float | None
) -> None:
    """Not for a single thread, and not where the process has more threads than cores and takes them from itself."""
    taken(share, threads)
    plan = compressor.lower(Model(), X, GAINING).plan
    assert plan.choice == "lowered" and plan.taken == (told and pytest.approx(told)) and not plan.notes
    assert list(tmp_path.rglob("timings/*.json"))


def test_the_time_that_threads_wait_for_a_core_is_read_as_the_kernel_counts_it(tmp_path: Path) -> None:
    assert Cores.now(tmp_path) is None
    for thread, text in (("1", "1000000000 3000000000 12\n"), ("2", "2000000000 0 1\n"), ("3", "gone"), ("4", "")):
        (tmp_path / "proc/self/task" / thread).mkdir(parents=True)
        (tmp_path / "proc/self/task" / thread / "schedstat").write_text(text)
    found = Cores.now(tmp_path)
    assert found is not None and found.threads == {"1": pytest.approx((1.0, 3.0)), "2": pytest.approx((2.0, 0.0))}
    assert found.taken_since(Cores({"1": (0.0, 2.5), "2": (2.0, 0.0)})) == pytest.approx(1 / 3)
    # the fifth has ended, the second is new
    assert found.taken_since(Cores({"1": (1.0, 3.0), "5": (500.0, 9.0)})) == 0.0


def test_a_dense_form_that_a_busy_machine_passes_over_is_named_and_no_doubt_is_told_of_what_has_lost() -> None:
    verdict = Contest.of({"eager": (1.0,) * 25, "onednn": (0.8,) * 25}, [], 0.5).verdict()
    assert verdict.choice == "eager" and verdict.reason() == (
        "no sparse kernel takes this layer; onednn has 1.25x the speed of eager, less than the 1.50x that are asked while other "
        "programs have the cores for 50% of the time: lower again when the machine does nothing else"
    )
    lost = {"eager": (1.0,) * 25, "onednn": (0.8,) * 25, "sparse": (0.84,) * 13 + (1.1,) * 12}
    verdict = Contest.of(lost, ["sparse"]).verdict()
    assert verdict.choice == "onednn" and verdict.reason().endswith("less than the 1.03x that are asked")


# --- Plans and caches of elsewhere. ---


@dataclass(frozen=True)
class Kernel(Fake):
    name: str = "kernel"
    version: str = "avx2 0123"


def lowered_plan(version: str = "avx2 0123") -> Plan:
    plan = compressor.lower(Model(), X, (SLOW[0], Kernel(seconds=1e-3, version=version)), cache=False).plan
    assert plan.choice == "lowered" and plan.backends == ({"kernel": version} if version else {})
    return plan


def apply(plan: Plan, version: str = "avx2 0123") -> compressor.Lowered:
    return compressor.lower(Model(), X, (SLOW[0], Kernel(seconds=1e-3, version=version)), plan=plan)


def test_a_plan_of_other_kernels_or_another_instruction_set_is_refused() -> None:
    plan = lowered_plan()
    assert apply(Plan.model_validate_json(plan.model_dump_json())).plan == plan
    for other in ("avx512 0123", "avx2 4567"):
        with pytest.raises(CompressorError, match=f"with 'avx2 0123' of the kernels of kernel, this is '{other}'"):
            apply(plan, other)


def test_a_plan_from_before_versions_were_written_is_read_but_its_kernels_are_not_taken_on_trust() -> None:
    text = json.loads(lowered_plan().model_dump_json())
    del text["backends"], text["setting"]["cores"]
    for part in (*text["forms"], *(c for layer in text["layers"] for c in layer["candidates"])):
        del part["against"]
    old = Plan.model_validate_json(json.dumps(text))
    with pytest.raises(CompressorError, match="with an unknown version of the kernels of kernel"):
        apply(old)
    for choice in ("eager", "dense"):  # runs none of them: as fast as it was
        apply(old.model_copy(update={"choice": choice}))
    unnamed = lowered_plan("").model_copy(update={"backends": {}})
    apply(unnamed, "")


@pytest.mark.parametrize(
    ("update", "said"),
    [
        ({"threads": 99}, "with threads 99, this is"),
        ({"cores": 0.25}, r"with cores 0\.25, this is"),
        ({"hardware": "abacus"}, "with hardware abacus, this is"),
        ({"device": "cuda"}, "with device cuda, this is cpu"),
        ({"versions": {"torch": "1.0"}}, "with torch 1.0, this is 2"),
        ({"versions": {"gone": "1.0"}}, "with gone 1.0, this is None"),
    ],
)
def test_a_plan_of_another_setting_is_refused(update: dict[str, Any], said: str) -> None:
    plan = lowered_plan()
    with pytest.raises(CompressorError, match=said):
        apply(plan.model_copy(update={"setting": plan.setting.model_copy(update=update)}))


def test_what_an_old_plan_does_not_say_is_not_compared() -> None:
    now = Setting(
        device="cpu", hardware="it", threads=1, versions={"torch": "2", "instruction set of torch": "AVX2"}, cores=2
    )
    assert now.model_copy(update={"cores": None, "versions": {"torch": "2"}}).other_than(now) is None
    assert now.other_than(now.model_copy(update={"cores": 1.0})) == ("cores", 2.0, 1.0)


def test_a_plan_whose_kernels_are_missing_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = lowered_plan()
    monkeypatch.setattr(Kernel, "unavailable", lambda self, device: "not installed")
    with pytest.raises(CompressorError, match="kernel does not run it here: not installed"):
        apply(plan)


# --- What times depend on. ---


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_what_restricts_torch_is_part_of_the_setting(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    before = job._setting(CPU)
    monkeypatch.setenv(variable, "SSE41")
    assert before.other_than(job._setting(CPU)) == ("instruction set of oneDNN", "any", "sse41")
    monkeypatch.delenv(variable)
    torch.set_float32_matmul_precision("medium")
    try:
        assert before.other_than(job._setting(CPU)) == ("float32 products", "highest", "medium")
    finally:
        torch.set_float32_matmul_precision("highest")


def test_cores_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert usable_cores(tmp_path) == 3

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/self/cgroup", "12:pids:/a\n4:cpu,cpuacct:/b\n0::/pod/box\n")
    assert usable_cores(tmp_path) == 3
    write("sys/fs/cgroup/pod/box/cpu.max", "max 100000\n")
    assert usable_cores(tmp_path) == 3
    write("sys/fs/cgroup/pod/cpu.max", "150000 100000\n")  # of the group around it
    assert usable_cores(tmp_path) == 1.5
    write("sys/fs/cgroup/cpu,cpuacct/b/cpu.cfs_quota_us", "-1\n")
    write("sys/fs/cgroup/cpu,cpuacct/b/cpu.cfs_period_us", "100000\n")
    assert usable_cores(tmp_path) == 1.5
    write("sys/fs/cgroup/cpu,cpuacct/b/cpu.cfs_quota_us", "50000\n")
    assert usable_cores(tmp_path) == 0.5


@pytest.fixture
def _new_digest() -> Iterator[None]:
    vnm_kernels._digest.cache_clear()
    yield
    vnm_kernels._digest.cache_clear()


@pytest.mark.usefixtures("_new_digest")
def test_kernels_are_told_apart_by_their_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "_vnm.so"
    extension = SimpleNamespace(level=lambda: "avx2", __file__=str(file))
    monkeypatch.setattr(vnm_kernels, "kernels", lambda: (extension, None))
    versions = set()
    for content in (b"one", b"another", b"one"):
        file.write_bytes(content)
        vnm_kernels._digest.cache_clear()
        versions.add(vnm_kernels.version())
    shaping = tmp_path / "vnm.py"
    shaping.write_text("blocks")
    monkeypatch.setattr(vnm_kernels, "_SHAPING", (str(shaping),))
    vnm_kernels._digest.cache_clear()
    versions.add(vnm_kernels.version())
    assert len(versions) == 3 and all(one.startswith("avx2 ") for one in versions)
