"""A few of the hostile files that `make fuzz-readers` draws by the thousand; and that the fuzzer finds what it looks for."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_readers import MARKER, Fuzz, Reader, guarded, quick_readers, run

from compressor.errors import CompressorError

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the fuzzer's guards are those of Linux")


@pytest.fixture
def guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), guarded():
        warnings.simplefilter("ignore")
        yield


def test_hostile_files_are_read_or_refused(tmp_path: Path, guards: None) -> None:
    fuzz = Fuzz(tmp_path, quick_readers(tmp_path), seed=0)
    assert run(fuzz, inputs=900, seconds=60) >= 900
    assert not fuzz.failed, fuzz.failures
    assert not (tmp_path / MARKER).exists()
    assert {name for name, count in fuzz.counts.items() if count.refused} >= {
        "recipe",
        "safetensors",
        "pth-zip",
        "npz",
        "png",
    }
    assert sum(count.accepted for count in fuzz.counts.values()) > 90  # it is not refused whatever comes


def _raises(content: bytes) -> None:
    raise KeyError("raw")


def _writes(content: bytes) -> None:
    with open(os.devnull, "w", encoding="ascii"):
        pass


def _runs(content: bytes) -> None:
    exec(compile("1", "<string>", "exec"), {})


def _starts(content: bytes) -> None:
    os.system("true")


def _never_ends(content: bytes) -> None:
    while True:
        pass


def _fills(content: bytes) -> None:
    bytearray(64 * 2**30)


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (_raises, "KeyError in test_fuzz_readers.py:_raises"),
        (_writes, "open"),
        (_runs, "exec"),
        (_starts, "os.system"),
        (_never_ends, "more than"),
        (_fills, "MemoryError"),
    ],
)
def test_the_fuzzer_finds_what_may_not_happen(
    tmp_path: Path, guards: None, read: Callable[[bytes], Any], found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fuzz = Fuzz(tmp_path, [])
    fuzz.readers["odd"] = Reader("odd", [b"x"], lambda content, rng: content, read)
    fuzz.one("odd", 3)
    assert any(found in kind for kind in fuzz.failed), fuzz.failed
    assert "--only odd/3" in capsys.readouterr().out


def test_an_error_of_the_project_is_an_answer(tmp_path: Path, guards: None) -> None:
    def read(content: bytes) -> None:
        raise CompressorError("refused")

    fuzz = Fuzz(tmp_path, [Reader("odd", [b"x"], lambda content, rng: content, read)])
    fuzz.one("odd", 0)
    assert not fuzz.failed and fuzz.counts["odd"].refused == 1


def test_an_input_is_drawn_again_by_its_number(tmp_path: Path, guards: None) -> None:
    first, again = ({reader.name: reader for reader in quick_readers(tmp_path / name)} for name in ("a", "b"))
    for name, reader in first.items():
        for number in range(5):
            key = f"0/{name}/{number}"
            assert reader.draw(random.Random(key)) == again[name].draw(random.Random(key)), name
