"""What a pruner answers in a process of its own: with another seed of Python's hashes, and after another model."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from compressor import discovery
from compressor.errors import first_line
from compressor.processes import python
from compressor.testing.trial import BrokenError, Trial, families
from compressor.training.pruner import Pruner

_PROGRAM = "import sys; from compressor.testing.elsewhere import answer; answer(sys.argv[1])"
_REQUEST, _PRUNER, _ANSWER = "request.json", "pruner", "answer.json"


class NotTriedError(Exception):
    """Why a pruner cannot be tried in a process of its own."""


class Elsewhere:
    """A pruner in a process of its own, which is started where it is first asked."""

    def __init__(self, pruner: Pruner, names: Sequence[str]) -> None:
        self._pruner, self._names = pruner, list(names)
        self._answers: Mapping[str, Mapping[str, str]] | None = None
        self._failure: Exception | None = None

    def answer(self, family: str) -> Mapping[str, str]:
        """What the pruner says of `family` there, as `Trial.answer`. Raises BrokenError where it fails there, and NotTriedError
        where its class is not of a file that another process can import."""
        if self._answers is None and self._failure is None:
            try:
                self._answers = self._asked()
            except (BrokenError, NotTriedError) as error:
                self._failure = error
        if self._failure is not None:
            raise self._failure
        assert self._answers is not None
        return self._answers[family]

    def _asked(self) -> dict[str, dict[str, str]]:
        cls = type(self._pruner)
        if cls.__module__ == "__main__":
            raise NotTriedError(f"{cls.__name__} is not in a file that can be imported")
        try:
            pickled = pickle.dumps(self._pruner)
        except Exception as error:  # whatever cannot be sent
            raise NotTriedError(first_line(error)) from error
        request = {
            "file": discovery.file_of(cls),
            "path": sys.path,
            "threads": torch.get_num_threads(),
            "families": self._names,
        }
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
            (folder / _PRUNER).write_bytes(pickled)
            seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
            ended = subprocess.run(
                python("-c", _PROGRAM, name),
                env={**os.environ, "PYTHONHASHSEED": seed},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
            if ended.returncode or not (folder / _ANSWER).is_file():
                lines = ended.stderr.decode(errors="replace").strip().splitlines()
                raise BrokenError(
                    f"fails in a process of its own: {lines[-1] if lines else f'it ended with {ended.returncode}'}"
                )
            found: dict[str, dict[str, str]] = json.loads((folder / _ANSWER).read_text(encoding="utf-8"))
            return found


def answer(name: str) -> None:
    """Answer the request in the folder `name`. It is this program's own, and so is its pickle."""
    folder = Path(name)
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    sys.path[:] = request["path"]
    torch.set_num_threads(request["threads"])
    if request["file"] is not None:
        discovery.module_of(Path(request["file"]))
    pruner: Pruner = pickle.loads((folder / _PRUNER).read_bytes())
    models, answers = families(), {}
    for family in request["families"]:
        adapter, model = models[family]
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.data.mul_(-0.5).add_(0.01)
        Trial(pruner, adapter, other).answer()  # what a module keeps of it must not reach the next model
        answers[family] = Trial(pruner, adapter, model).answer()
    (folder / _ANSWER).write_text(json.dumps(answers), encoding="utf-8")
