"""What a run is of and was made with: `run.json`, and the same beside the state in each checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor import files
from compressor.environment import CODE, environment, resolve_device
from compressor.errors import CompressorError
from compressor.processes import ranks
from compressor.runs.inputs import Inputs
from compressor.training.arithmetic import described

FILE = files.RUN
_SEAL = "sealed"
_CALLED = {
    "architecture_sha256": "configuration of the model, or of its scheduler",
    **{f"{what}_plugin_sha256": f"code of the {what}'s plugin" for what in ("model", "method", "pattern")},
}
_CIRCUMSTANCES = ("versions", "hardware", "platform", "arithmetic")


def facts_of(inputs: Inputs) -> dict[str, Any]:
    """What the run of `inputs` is here and now: versions, hardware with the number of threads, platform, what a step computes in,
    hashes and seed."""
    recipe = inputs.recipe
    device = resolve_device(recipe.train.device)
    here = environment(device)
    if (count := ranks()[1]) > 1:
        here["hardware"] += f", {count} processes"
    return {
        **here,
        "arithmetic": described(recipe.train, device),
        **inputs.identity(),
        "method": inputs.method,
        "seed": recipe.train.seed,
    }


def write(out: Path, facts: Mapping[str, Any]) -> None:
    """Write `run.json`, with a hash of what is in it: what was changed by hand is not reported as if it had been found."""
    files.write_json(out / FILE, {**facts, _SEAL: _seal(facts)})


def read(out: Path) -> dict[str, Any]:
    """What `write` wrote. Raises CompressorError where it was changed since, or is damaged. Runs of earlier versions have no hash."""
    facts = files.read_json(out / FILE)
    seal = facts.pop(_SEAL, None)
    if seal is not None and seal != _seal(facts):
        raise CompressorError(
            f"{out / FILE} was changed since the run wrote it",
            "Its facts would stand beside new numbers: put the original back, or start anew with --overwrite.",
        )
    return facts


def begun(out: Path) -> dict[str, Any] | None:
    """The facts of the run in `out`; None where it has not written any yet."""
    return read(out) if (out / FILE).is_file() else None


def refuse_other(before: Mapping[str, Any], inputs: Inputs, where: Path) -> None:
    """Raise CompressorError where what `where` says of its run is not that of `inputs`."""
    former = inputs.identity(evaluated=True)
    for key, value in inputs.identity().items():
        name = _CALLED.get(key, key.removesuffix("_sha256"))
        if before.get(key) not in (value, former.get(key)):
            raise CompressorError(
                f"{where}: the {name} changed: its hash was {before.get(key)}, and is now {value}",
                "Resume with the same files and settings, or start a new run.",
            )


def refuse_other_checkpoint(made: Any, inputs: Inputs, folder: Path) -> None:
    """Raise CompressorError unless the checkpoint in `folder`, which says that it was `made` so, is one of the run of `inputs`."""
    hint = f"Remove {folder} to go on without it, or resume the run that it is of."
    if not isinstance(made, Mapping):
        raise CompressorError(f"{folder} does not say which run it is of", hint)
    former = {**inputs.identity(evaluated=True), "method": inputs.method}
    for key, value in {**inputs.identity(), "method": inputs.method}.items():
        if made.get(key) not in (value, former.get(key)):
            name = _CALLED.get(key, key.removesuffix("_sha256"))
            whose = f" ({made['method']}, not {inputs.method})" if made.get("method") != inputs.method else ""
            raise CompressorError(
                f"{folder} is of a run with another {name}{whose}: {made.get(key)}, not {value}", hint
            )


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of the versions and the machine differs, a line each."""
    found = []
    for name in _CIRCUMSTANCES:
        was, is_now = before.get(name), now.get(name)
        if name == "arithmetic" and was is None:  # runs of earlier versions do not say
            continue
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            names = sorted({*was, *is_now} - ({CODE} - was.keys()))
            found += [
                f"{one} {was.get(one)}, now {is_now.get(one)}" for one in names if was.get(one) != is_now.get(one)
            ]
        elif was != is_now:
            found.append(f"{name} {was}, now {is_now}")
    return found


def resumed(facts: dict[str, Any], now: Mapping[str, Any], step: int) -> list[str]:
    """Record in `facts` that the run goes on from `step` in other circumstances, where they are others; what changed, a line each."""
    last = facts.get("resumed", [])
    lines = changed(last[-1] if last else facts, now)
    if lines:
        facts["resumed"] = [*last, {"step": step, **{name: now[name] for name in _CIRCUMSTANCES}}]
    return lines


def _seal(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
