"""The search for the algorithm of a 2:4 product: in another process, which may die, and kept on disk."""

from __future__ import annotations

import gc
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compressor import CompressorError
from compressor.errors import UsageError
from compressor.lower import cusparselt_tuning
from compressor.lower import cusparselt_worker as worker
from compressor.lower.cusparselt_tuning import (
    Algorithm,
    Product,
    Tuned,
    candidates,
    search_together,
    searched,
    tuned,
)

# --- Algorithms. ---


@pytest.fixture
def unsplit(monkeypatch):
    """Algorithms that do not split, so that a search is short."""
    monkeypatch.setattr(worker, "candidates", lambda limit, transposed, major: candidates(limit, transposed, 1)[:limit])


def test_the_operator_of_this_torch_has_the_arguments_that_are_given():
    its = {a.name for a in torch.ops.aten._cslt_sparse_mm.default._schema.arguments}
    assert {"bias", "out_dtype", "transpose_result", "alg_id", "split_k", "split_k_mode"} <= its
    assert [a.name for a in torch.ops.aten._cslt_compress.default._schema.arguments] == ["input"]


def test_candidates_are_all_different_and_begin_with_the_default():
    found = candidates(5)
    assert found[0] == Algorithm() and len(set(found)) == len(found) == 40
    assert all(Algorithm.parse(str(algorithm)) == algorithm for algorithm in found)
    assert [a.split_k for a in found[:5]] == [1] * 5


@pytest.mark.parametrize(
    ("major", "splits"), [(8, {1, 2, 4, 8}), (9, {1, -1}), (10, {1, -1, 2, 4, 8}), (0, {1, -1, 2, 4, 8})]
)
def test_splits_that_a_generation_refuses_are_not_tried(major, splits):
    found = candidates(5, major=major)
    assert {algorithm.split_k for algorithm in found} == splits and found[0] == Algorithm()


# --- The search in another process. ---

PRODUCT = Product(24, 32, 64, "bfloat16", True)
A, B, C = "0,1,-1,1", "1,1,-1,1", "2,2,1,1"


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """`act(script)`: workers run `script`, in which `say` writes an event, `request` is what was asked, `runs` how often before."""
    tuned.cache_clear()
    monkeypatch.setenv("COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cusparselt_tuning, "_START", 120.0)
    setting = cusparselt_tuning.Setting(device="cuda", hardware="a GPU", threads=1, versions={"torch": "2.13.0"})
    monkeypatch.setattr(cusparselt_tuning, "_setting", lambda index: setting)
    log = tmp_path / "log"

    def acted(script: str) -> Path:
        log.write_text("")
        head = (
            "import json, os, sys, time\n"
            "request = json.load(sys.stdin)\n"
            f"runs = len(open({str(log)!r}).readlines())\n"
            f"open({str(log)!r}, 'a').write(json.dumps(request) + '\\n')\n"
            "def say(event, algorithm, **more): print(json.dumps(dict(event=event, algorithm=algorithm, **more)), flush=True)\n"
            "def right(algorithm, ms): say('trying', algorithm); say('timed', algorithm, ms=ms)\n"
        )
        monkeypatch.setattr(cusparselt_tuning, "_command", lambda: [sys.executable, "-c", head + script])
        return log

    yield acted
    tuned.cache_clear()


def requests(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_the_fastest_right_algorithm_is_taken_and_kept_on_disk(act):
    log = act(f"right({A!r}, 2.0); right({B!r}, 1.0); say('trying', {C!r}); say('failed', {C!r}, why='wrong')")
    found = tuned(PRODUCT, 0)
    assert found == Tuned(Algorithm(1), Algorithm(), 1.0)
    (request,) = requests(log)
    assert (
        [Product(**one) for one in request["products"]] == [PRODUCT]
        and request["skip"] == []
        and request["device"] == 0
    )
    tuned.cache_clear()
    assert tuned(PRODUCT, 0) == found and len(requests(log)) == 1
    assert tuned(Product(32, 32, 64, "bfloat16", True), 0) == found and len(requests(log)) == 2


def test_the_last_timing_side_by_side_counts(act):
    act(f"right({A!r}, 2.0); right({B!r}, 1.0); say('final', {B!r}, ms=3.0); say('final', {A!r}, ms=2.5)")
    assert tuned(PRODUCT, 0) == Tuned(Algorithm(), Algorithm(), 2.5)


def test_what_an_earlier_worker_timed_counts_too(act):
    act(
        f"if runs == 0: right({A!r}, 1.0); say('trying', {B!r}); sys.exit(3)\nright({C!r}, 2.0); say('final', {C!r}, ms=2.0)"
    )
    assert tuned(PRODUCT, 0).algorithm == Algorithm()


def test_a_default_that_is_wrong_runs_for_no_tokens(act):
    act(f"say('trying', {A!r}); say('failed', {A!r}, why='wrong'); right({B!r}, 1.0)")
    assert tuned(PRODUCT, 0) == Tuned(Algorithm(1), Algorithm(1), 1.0)


def test_what_else_is_printed_does_not_count(act):
    act(
        "print('loading...'); print('[1, 2]'); print('{\"event\": ')\n"
        f"right({A!r}, 2.0); right('; rm', 0.1); right('1,2', 0.1)\n"
        f"say('timed', {B!r}, ms=float('nan')); say('timed', {B!r}, ms=-1.0); say('timed', {B!r}, ms='fast')\n"
        f'say(\'timed\', 7, ms=0.1); sys.stdout.write(\'{{"event": "timed", "algorithm"\')'
    )
    assert searched(PRODUCT, 0) == ({A: 2.0}, None)


def test_an_algorithm_that_kills_the_worker_is_stepped_over(act):
    log = act(
        f"if runs == 0: right({A!r}, 2.0); say('trying', {B!r}); sys.exit('illegal instruction')\nright({C!r}, 1.0)"
    )
    times, note = searched(PRODUCT, 0)
    assert times == {A: 2.0, C: 1.0}
    assert note is not None and B in note and "illegal instruction" in note
    first, second = requests(log)
    assert (first["skip"], first["found"]) == ([], False) and (second["skip"], second["found"]) == ([A, B], True)


def test_a_worker_killed_by_a_signal_names_its_algorithm(act):
    act(f"if runs == 0: say('trying', {A!r}); os.kill(os.getpid(), 9)\nright({B!r}, 1.0)")
    found = tuned(PRODUCT, 0)
    assert found.algorithm == found.otherwise == Algorithm(1) and "code -9" in str(found.note)


def test_workers_that_always_die_end_the_search(act):
    log = act("say('trying', f'{runs},1,-1,1'); sys.exit(3)")
    with pytest.raises(
        CompressorError, match=r"no algorithm of cuSPARSELt gives \(24, 64\) x \(64, 32\) in bfloat16 right"
    ):
        tuned(PRODUCT, 0)
    assert len(requests(log)) == cusparselt_tuning._WORKERS


def test_nothing_right_is_an_error_that_says_why(act):
    act(f"say('trying', {A!r}); say('failed', {A!r}, why='ArithmeticError: its error is 0.5')")
    with pytest.raises(CompressorError, match=r"its error is 0\.5"):
        tuned(PRODUCT, 0)


def test_a_search_in_which_all_failed_is_not_repeated(act, tmp_path):
    log = act(f"say('trying', {A!r}); say('failed', {A!r}, why='wrong')")
    for _ in range(2):
        tuned.cache_clear()
        with pytest.raises(CompressorError, match="no algorithm of cuSPARSELt"):
            tuned(PRODUCT, 0)
    assert len(requests(log)) == 1


def test_a_search_that_does_not_start_leaves_the_default_and_a_note(act, monkeypatch):
    log = act("sys.exit('no CUDA-capable device is detected')")
    found = tuned(PRODUCT, 0)
    assert found.algorithm == Algorithm() and found.median_ms is None
    assert "not tuned" in str(found.note) and "no CUDA-capable device" in str(found.note)
    assert [request["ask"] for request in requests(log)] == [True, False]
    monkeypatch.setattr(cusparselt_tuning, "_command", lambda: ["/nowhere/python"])
    tuned.cache_clear()
    assert "could not be started" in str(tuned(PRODUCT, 0).note)  # and nothing was kept on disk


def test_a_worker_that_hangs_is_ended_and_what_it_said_counts(act, monkeypatch):
    monkeypatch.setattr(cusparselt_tuning, "_START", 6.0)  # in which a busy machine has started Python
    monkeypatch.setenv(cusparselt_tuning.SECONDS_VARIABLE, "0.5")
    log = act(f"right({A!r}, 2.0); say('trying', {B!r}); time.sleep(60)")
    times, note = searched(PRODUCT, 0)
    assert times == {A: 2.0} and note is not None and "took more than" in note and len(requests(log)) == 1


def test_a_damaged_file_is_searched_again(act, tmp_path):
    log = act(f"right({A!r}, 2.0)")
    tuned(PRODUCT, 0)
    (file,) = (tmp_path / "cache").rglob("*.json")
    for text in ("{", json.dumps({**json.loads(file.read_text()), "rounds_ms": {"fastest": [1.0]}})):
        file.write_text(text)
        tuned.cache_clear()
        assert tuned(PRODUCT, 0).algorithm == Algorithm()
    assert len(requests(log)) == 3


PRODUCTS = [Product(tokens, 32, 64, "bfloat16", True) for tokens in (24, 32, 40)]
EACH = "for at, product in enumerate(request['products']):\n    say('product', None, at=at)\n"


def test_all_products_are_searched_by_one_process(act):
    log = act(EACH + f"    right({A!r}, 2.0); right({B!r}, 1.0 + product['tokens'])")
    search_together([*PRODUCTS, PRODUCTS[0]], 0)
    (request,) = requests(log)
    assert [Product(**one) for one in request["products"]] == PRODUCTS
    assert [tuned(product, 0).median_ms for product in PRODUCTS] == [2.0] * 3 and len(requests(log)) == 1
    search_together(PRODUCTS, 0)  # all are on disk
    assert len(requests(log)) == 1


def test_a_product_that_ends_the_common_search_is_left_to_its_own(act):
    log = act(
        EACH
        + f"    right({A!r}, 2.0)\n    if product['tokens'] == 32 and not request['skip']: say('trying', {B!r}); sys.exit(3)"
    )
    search_together([*PRODUCTS, Product(48, 32, 64, "bfloat16", True)], 0)
    assert [[one["tokens"] for one in request["products"]] for request in requests(log)] == [[24, 32, 40, 48], [40, 48]]
    assert [tuned(PRODUCTS[at], 0).note for at in (0, 2)] == [None, None] and len(requests(log)) == 2
    assert B in str(tuned(PRODUCTS[1], 0).note) and len(requests(log)) == 4


def test_a_common_search_that_does_not_start_leaves_all_to_their_own(act):
    log = act("sys.exit('no CUDA-capable device is detected')")
    search_together(PRODUCTS, 0)
    search_together(PRODUCTS[:1], 0)
    assert len(requests(log)) == 1
    act(EACH + f"    say('trying', {A!r}); say('failed', {A!r}, why='wrong')")
    search_together(PRODUCTS, 0)
    with pytest.raises(CompressorError, match="no algorithm of cuSPARSELt"):
        tuned(PRODUCTS[0], 0)


def test_the_worker_takes_one_product_after_the_other(monkeypatch, capsys, unsplit):
    made = []

    class Named(Trial):
        def __init__(self, product: Product, device: torch.device) -> None:
            super().__init__(deadly=2 if product.tokens == 40 else None)
            made.append((product, device))

        def suggested(self) -> tuple[int, None]:
            return 3, None

    class Ended(Exception):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    request = {
        "products": [vars(one) for one in PRODUCTS],
        "device": 0,
        "seconds": 9.0,
        "skip": [],
        "found": False,
        "ask": True,
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    monkeypatch.setattr(worker, "Trial", Named)
    monkeypatch.setattr(worker.os, "_exit", end)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(Ended, match="3"):
        worker.main()
    gc.unfreeze()
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["at"] for line in said if line["event"] == "product"] == [0, 1, 2]
    assert said[-1] == {"event": "trying", "algorithm": "2,1,-1,1"} and [one for one, _ in made] == PRODUCTS


@pytest.mark.parametrize("text", ["soon", "-1", "0", "inf"])
def test_seconds_are_a_number(act, monkeypatch, text):
    monkeypatch.setenv(cusparselt_tuning.SECONDS_VARIABLE, text)
    with pytest.raises(UsageError, match="COMPRESSOR_SEARCH_SECONDS"):
        searched(PRODUCT, 0)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_the_real_worker_starts_and_says_that_there_is_no_gpu():
    request = {"products": [vars(PRODUCT)], "device": 0, "seconds": 1.0, "skip": [], "found": False, "ask": True}
    lines, ended = cusparselt_tuning._worker(request, 120.0)
    assert lines == [] and ended is not None and "no CUDA GPU" in ended


class Trial:
    """A trial in which algorithm 1 is wrong, 2 is fastest, and `deadly` kills the GPU."""

    def __init__(self, deadly: int | None = None, transposed: bool = True) -> None:
        self.deadly, self.transposed, self.alive, self.major = deadly, transposed, True, 8

    def milliseconds(self, algorithms: list[Algorithm], replays: int) -> list[float]:
        for algorithm in algorithms:
            if algorithm.alg_id == self.deadly:
                self.alive = False
                raise RuntimeError("CUDA error: an illegal instruction was encountered")
            if algorithm.alg_id == 1 or (algorithm.transposed and not self.transposed):
                raise ArithmeticError("its error is 0.5\nmore")
        return [float(algorithm.split_k + 4 - algorithm.alg_id) for algorithm in algorithms]

    def still_alive(self) -> None:
        if not self.alive:
            raise worker.Poisoned("gone")


def events(trial: Any, **more: Any) -> list[tuple[Any, Any]]:
    given = {"seconds": 60.0, "limit": 3, "skip": [], "found": False, **more}
    return [(line["event"], line["algorithm"]) for line in worker.search(trial, **given)]


def test_the_worker_announces_tries_and_times_the_best_again(unsplit):
    assert events(Trial()) == [
        *[("trying", "0,1,-1,1"), ("timed", "0,1,-1,1")],
        *[("trying", "1,1,-1,1"), ("failed", "1,1,-1,1")],
        *[("trying", "2,1,-1,1"), ("timed", "2,1,-1,1")],
        *[("final", "2,1,-1,1"), ("final", "0,1,-1,1")],
    ]
    assert events(Trial(), skip=["0,1,-1,1", "2,1,-1,1"], found=True) == [
        ("trying", "1,1,-1,1"),
        ("failed", "1,1,-1,1"),
    ]
    assert events(Trial(), seconds=-1.0) == []


def test_the_librarys_own_winner_is_tried_first_and_once():
    said = events(Trial(), winner=Algorithm(2, 4, 2))
    tried = [algorithm for event, algorithm in said if event == "trying"]
    assert tried[:2] == ["2,4,2,1", "0,1,-1,1"] and len(set(tried)) == len(tried) == len(candidates(3, True, 8))


def test_the_worker_copies_results_only_where_nothing_else_is_right(unsplit):
    said = events(Trial(transposed=False))
    assert [algorithm for event, algorithm in said if event == "timed"] == ["0,1,-1,0", "2,1,-1,0"]


def test_the_worker_dies_with_the_culprit_as_its_last_word(unsplit):
    search = worker.search(Trial(deadly=2), 60.0, 3, [], False)  # type: ignore[arg-type]
    said = [next(search) for _ in range(5)]
    with pytest.raises(worker.Poisoned):
        next(search)
    assert said[-1] == {"event": "trying", "algorithm": "2,1,-1,1"}


def test_the_trial_finds_wrong_results_and_stale_memory(library):
    trial = worker.Trial(PRODUCT, torch.device("cpu"))
    trial.check(Algorithm())
    for fault in (lambda out: out * 1.02, lambda out: out.index_fill(0, torch.tensor([5]), torch.nan)):
        library.fault = fault
        with pytest.raises(ArithmeticError, match="its error is"):
            trial.check(Algorithm())


@pytest.mark.parametrize(("dtype", "sides"), [("bfloat16", 16), ("int8", 32), ("float8_e4m3fn", 32)])
def test_the_trial_is_right_for_every_dtype(library, dtype, sides):
    product = Product(16, sides, 2 * sides, dtype, dtype == "bfloat16")
    worker.Trial(product, torch.device("cpu")).check(Algorithm(transposed=False))


# --- What a trial does on a GPU, with its clock, its graphs and torch's private names imitated. ---


class Event:
    """A clock that goes by a millisecond with every product."""

    products: Any = None

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(self.products)

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Any) -> float:
        return float(end.at - self.at)


def test_a_trial_times_products_by_the_gpus_own_clock(library, monkeypatch):
    monkeypatch.setattr(Event, "products", library.calls)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def unrecorded(forward: Any, inputs: Any, warm_up: int) -> Any:
        raise CompressorError("this is not recorded")

    monkeypatch.setattr(worker, "Captured", unrecorded)
    trial = worker.Trial(PRODUCT, torch.device("cpu"))
    assert trial.milliseconds([Algorithm(), Algorithm(2)], replays=3) == [1.0, 1.0]
    assert not trial.recordable and {call["alg_id"] for call in library.calls} == {0, 2}
    monkeypatch.setattr(
        worker, "Captured", lambda forward, inputs, warm_up: SimpleNamespace(replay=lambda: forward(inputs))
    )
    trial = worker.Trial(PRODUCT, torch.device("cpu"))
    assert trial.milliseconds([Algorithm()], replays=1) == [1.0] and trial.recordable


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ((3, 1, 2, 12), (12, Algorithm(3))),
        ((3, 4, 2, 12), (12, Algorithm(3, 4, 2))),
        ((0, 1, -1, 0), (1, Algorithm())),
        ((0, 1, -1, 10**6), (1000, Algorithm())),
        (None, (worker.NO_LIMIT, None)),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_librarys_own_search_is_asked(library, monkeypatch, said, wanted, dtype):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    asked = []

    def mm_search(packed, right, bias, alpha, out_dtype, transposed):
        asked.append((right.shape, out_dtype, transposed))
        if said is None:
            raise RuntimeError("not in this version")
        return said

    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=mm_search), raising=False)
    product = Product(32, 32, 64, dtype, False)
    assert worker.Trial(product, torch.device("cpu")).suggested() == wanted
    assert asked == [((64, 32), torch.bfloat16 if dtype == "int8" else None, True)]


def test_a_gpu_that_answers_no_more_ends_the_trial(library, monkeypatch):
    def gone(device: Any) -> None:
        raise RuntimeError("CUDA error: an illegal instruction was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    trial = worker.Trial(PRODUCT, torch.device("cpu"))
    with pytest.raises(worker.Poisoned, match="illegal instruction"):
        trial.still_alive()
    assert trial.major == 0
    trial.device = torch.device("cuda", 0)
    assert trial.major == 9


def test_times_are_kept_for_a_gpu_and_these_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(cusparselt_tuning.cusparselt_library, "described", lambda: "0.8.1")
    found = cusparselt_tuning._setting(1)
    assert (found.device, found.hardware) == ("cuda", "GPU 1")
    assert found.versions["cusparselt"] == "0.8.1" and {"torch", "cuda", "diffusion-compressor"} <= set(found.versions)
