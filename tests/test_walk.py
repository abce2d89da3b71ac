"""The README, walked through as a new user does."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import readme_walk


def test_every_command_of_the_readme_is_known_to_the_walk() -> None:
    lines = [shlex.split(line) for line in readme_walk.commands()]
    assert len(lines) > 12
    assert {words[1] for words in lines if words[0] == "compressor"} <= set(readme_walk.SHORTER)
    assert {words[0] for words in lines} == {"compressor", "torchrun"}
    for words in lines:
        short = readme_walk.shorter(words)
        changed = {words[at - 1] for at, word in enumerate(words) if short[at] != word}
        assert words[0] == "torchrun" or changed <= {"--batches"}, "what is written is changed"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_of_the_readme_works_as_written(tmp_path: Path) -> None:
    readme_walk.walk(Path(sys.executable), tmp_path, tmp_path / "walk.log")
