"""Random `kill -9`, again and again: what is continued must end bit for bit as what was left alone.

    python tests/soak.py [--rounds 50] [--seconds 3600] [--seed 0] [--only KIND] [--keep]

A round is drawn from the seed and its number: a kind, and up to three kills, each at a random moment or at a random file operation
(`tests/faults.py`). After each kill the same command, or `resume`, goes on; the last time it is left alone. Then weights, masks and
metrics are held against those of a command that was never killed. Exit code 1 where a round differs; its folder is kept.

Kinds: `run` (checkpoints far apart), `rotation` (a checkpoint after each step), `overwrite` (over a finished run), `compare`
(its processes must die with it), `record` (a pipeline's calls), `save` (the API, one model over another).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import torch
from faults import DONE, KILLED, Fault

torch.set_num_threads(1)
FEW = Path(__file__).with_name("few_digits.npz")
WEIGHTS = {"run": 4, "rotation": 4, "overwrite": 3, "compare": 1, "record": 4, "save": 4}
"""How often each kind is drawn: a comparison starts processes, each of which loads everything anew."""
LIMIT = 600.0
"""Seconds after which a command is taken to hang."""


def settings(text: str) -> list[str]:
    return [part for setting in text.split() for part in ("--set", setting)]


SMALL = [
    *("--data", str(FEW)),
    *settings("train.batch_size=4 train.warmup=0 evaluate.samples=4 evaluate.sampler_steps=1"),
    *settings("evaluate.bootstrap=2 evaluate.latency_rounds=0 evaluate.measures=[]"),
]


def main_of(arguments: Sequence[object]) -> Callable[[], None]:
    """The command, as an action for a process of its own."""

    def action() -> None:
        from compressor.cli import main

        sys.argv = ["compressor", *map(str, arguments)]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"exit code {ended.code}: {' '.join(sys.argv)}") from ended

    return action


@dataclass
class Kill:
    """When a process is killed: after a share of the time that the whole takes, or at a file operation."""

    share: float | None = None
    at: int | None = None


@dataclass
class Work:
    """A kind of work: its command for a folder, how it is continued there, and what must be the same in the end."""

    start: Callable[[Path], list[object]]
    again: Callable[[Path], list[object]]
    result: Callable[[Path], dict[str, Any]]
    prepare: Callable[[Path], None] = lambda folder: None
    seconds: float = 0.0
    operations: int = 150
    expected: dict[str, Any] = field(default_factory=dict)


def run_result(out: Path) -> dict[str, Any]:
    """What must not depend on kills: weights and masks, metrics, and what was measured of quality."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    for row in report["rows"]:
        row["train"].pop("seconds")
        row["latency"] = None
    kept = {name: report[name] for name in ("rows", "layers", "metric", "data", "settings")}
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith(".lock"))
    return {
        "model": (out / "model" / "model.safetensors").read_bytes(),
        "metrics": (out / "metrics.jsonl").read_bytes(),
        "report": json.dumps(kept, sort_keys=True),
        "files": names,
    }


def comparison_result(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cell in sorted((out / "cells").iterdir()):
        found[f"{cell.name} model"] = (cell / "run" / "model" / "model.safetensors").read_bytes()
        found[f"{cell.name} metrics"] = (cell / "run" / "metrics.jsonl").read_bytes()
        row = json.loads((cell / "row.json").read_text(encoding="utf-8"))
        row["row"]["train"].pop("seconds")
        found[f"{cell.name} row"] = json.dumps(row, sort_keys=True)
    return found


def records_result(out: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def continued(out: Path, start: list[object]) -> list[object]:
    """What a user types: `resume` where a run has begun, else the same command."""
    return ["resume", out, "--quiet"] if (out / "recipe.yaml").is_file() else start


def works(base: Path) -> dict[str, Work]:
    """Every kind of work but `save`."""

    def run(every: int, steps: int, *more: object) -> Callable[[Path], list[object]]:
        own = [*("--steps", steps, "--quiet"), *settings(f"checkpoint_every={every}"), *more]
        return lambda folder: ["run", "--out", folder / "out", *SMALL, *own]

    def of_run(every: int, steps: int) -> Work:
        start = run(every, steps)
        return Work(start, lambda f: continued(f / "out", start(f)), lambda f: run_result(f / "out"))

    compare = ["compare", "--methods", "magnitude", "--seeds", "1", "--steps", "4", "--quiet", *SMALL]
    overwrite = run(3, 6, "--overwrite")
    found = {
        "run": of_run(5, 14),
        "rotation": of_run(1, 8),
        "overwrite": Work(
            overwrite,
            overwrite,
            lambda f: run_result(f / "out"),
            lambda f: _copied(base / "run" / "out", f / "out"),
        ),
        "compare": Work(
            lambda f: [*compare, "--out", f / "out", *settings("checkpoint_every=1")],
            lambda f: [*compare, "--out", f / "out", *settings("checkpoint_every=1")],
            lambda f: comparison_result(f / "out"),
        ),
    }
    if _pipeline(base):
        record = [
            "record",
            base / "sd",
            "--prompts",
            base / "sd.jsonl",
            "--n",
            3,
            "--unseen",
            1,
            "--steps",
            2,
        ]
        found["record"] = Work(
            lambda f: [*record, "--out", f / "out", "--quiet"],
            lambda f: [*record, "--out", f / "out", "--quiet"],
            lambda f: records_result(f / "out"),
            operations=25,
        )
    return found


def _copied(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _pipeline(base: Path) -> bool:
    """Make a tiny pipeline; whether what it needs is installed."""
    try:
        import tiny_pipelines
    except ImportError:
        return False
    tiny_pipelines.saved("sd", base)
    return True


def process(action: Callable[[], None], folder: Path, kill: Kill | None, seconds: float) -> int:
    """Do `action` in a process of its own and kill it; how it ended (`faults`: DONE, KILLED, else something is wrong)."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if kill is not None and kill.at is not None:
                Fault("killed", kill.at).install(folder)
            action()
            code = DONE
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    ends = time.monotonic() + (LIMIT if kill is None or kill.share is None else kill.share * seconds)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return KILLED if code == -signal.SIGKILL else code
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return KILLED if kill is not None else 1
        time.sleep(0.002)


def orphans(folder: Path) -> list[int]:
    """The processes that still work on something in `folder`: who reads or writes there, or was told of it."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(link) for link in (place / "fd").iterdir()]
        except OSError:
            continue
        if int(place.name) != os.getpid() and any(link.startswith(f"{folder}/") for link in links):
            found.append(int(place.name))
    return found


def wait_for_orphans(folder: Path, seconds: float = 60.0) -> list[int]:
    """Those that are there after so many seconds."""
    ends = time.monotonic() + seconds
    while (left := orphans(folder)) and time.monotonic() < ends:
        time.sleep(0.1)
    return left


class Soak:
    """Draws rounds and plays them in folders of `base`."""

    def __init__(self, base: Path, only: str | None) -> None:
        self.base, self.kills, self.rounds = base, Counter[str](), Counter[str]()
        self.works = {kind: work for kind, work in works(base).items() if only in (None, kind)}
        if only == "overwrite":
            self.works = {"run": works(base)["run"], **self.works}
        self.only = only
        for kind, work in self.works.items():
            folder = base / kind
            folder.mkdir()
            work.prepare(folder)
            began = time.monotonic()
            code = process(main_of(work.start(folder)), folder, None, 0)
            if code != DONE:
                raise SystemExit(f"{kind}: cannot be done: see {folder / 'log.txt'}")
            work.seconds, work.expected = time.monotonic() - began, work.result(folder)
            print(f"{kind}: {work.seconds:.1f} s left alone", flush=True)

    def round(self, number: int, seed: int) -> str | None:
        """Play one; what is wrong, or None."""
        rng = random.Random(f"{seed} {number}")
        kinds = [*self.works, "save"] if self.only is None else [self.only]
        kind = rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        self.rounds[kind] += 1
        folder = Path(tempfile.mkdtemp(prefix=f"{number}-{kind}-", dir=self.base))
        wrong = self._saves(rng, folder) if kind == "save" else self._works(rng, folder, kind)
        if wrong is None:
            shutil.rmtree(folder)
            return None
        return f"round {number}, {kind}: {wrong}; see {folder}"

    def _works(self, rng: random.Random, folder: Path, kind: str) -> str | None:
        work = self.works[kind]
        work.prepare(folder)
        arguments = work.start(folder)
        for _ in range(rng.randint(1, 3)):
            # of a comparison, most is done by other processes: file operations are counted in the first
            kill = Kill(share=rng.random()) if rng.random() < 0.5 else Kill(at=rng.randrange(work.operations))
            code = process(main_of(arguments), folder, kill, work.seconds)
            if code not in (DONE, KILLED):
                return f"ended with {code} instead of going on"
            if left := wait_for_orphans(folder):
                return f"processes {left} work on without the one that started them"
            self.kills[kind] += code == KILLED
            arguments = work.again(folder)
            if code == DONE:  # it was over before
                work.operations = min(work.operations, kill.at or work.operations)
                break
        if (code := process(main_of(arguments), folder, None, 0)) != DONE:
            return f"ended with {code} instead of going on to the end"
        found = work.result(folder)
        different = sorted(name for name in {*found, *work.expected} if found.get(name) != work.expected.get(name))
        return f"other {', '.join(different)}" if different else None

    def _saves(self, rng: random.Random, folder: Path) -> str | None:
        """Models over one another, killed; at every moment one of them is there and whole."""
        import compressor
        from compressor import NM

        def made(seed: int) -> tuple[Any, Any]:
            torch.manual_seed(seed)
            model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Linear(256, 64))
            masks = {f"{n}.weight": NM(2, 4).mask(model[n].weight.detach().abs()) for n in range(2)}
            for name, mask in masks.items():
                model.get_parameter(name).data = mask.apply(model.get_parameter(name).data)
            return model, masks

        models = [made(seed) for seed in range(3)]
        compressor.save(folder / "model", *models[0])
        may_be = {0}
        for _ in range(rng.randint(1, 4)):
            which = rng.randrange(3)
            kill = Kill(share=rng.random()) if rng.random() < 0.3 else Kill(at=rng.randrange(40))
            code = process(lambda which=which: compressor.save(folder / "model", *models[which]), folder, kill, 0.03)
            if code not in (DONE, KILLED):
                return f"a save ended with {code}"
            self.kills["save"] += code == KILLED
            loaded = compressor.load(folder / "model", made(9)[0]).state_dict()
            may_be = {which} if code == DONE else may_be | {which}
            same = {n for n in may_be if all(torch.equal(loaded[k], v) for k, v in models[n][0].state_dict().items())}
            if not same:
                return "another model than any that was saved"
            may_be = same
        compressor.save(folder / "model", *models[0])
        rest = sorted(path.name for path in folder.iterdir() if path.name != "log.txt")
        return None if rest == ["model"] else f"left behind: {rest}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Random kill -9 rounds.")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no round begins later than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["run", "rotation", "overwrite", "compare", "record", "save"])
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="soak-")).resolve()
    os.environ["COMPRESSOR_CACHE"] = str(base / "cache")
    began = time.monotonic()
    soak = Soak(base, given.only)
    wrong = []
    for number in range(given.rounds):
        if time.monotonic() - began > given.seconds:
            break
        if found := soak.round(number, given.seed):
            wrong.append(found)
            print(found, flush=True)
    kills = ", ".join(f"{kind} {soak.rounds[kind]} ({soak.kills[kind]})" for kind in sorted(soak.rounds))
    total = f"{sum(soak.rounds.values())} rounds, {sum(soak.kills.values())} kills"
    print(
        f"seed {given.seed}: {total} in {time.monotonic() - began:.0f} s; rounds (kills): {kills}; {len(wrong)} wrong"
    )
    if not wrong and not given.keep:
        shutil.rmtree(base)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
