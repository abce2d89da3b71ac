"""The files that GPU benchmarks write: a line as soon as something is measured, after a line that says where, and by which code.

A file is of one GPU (`lowering_h100-80gb-hbm3.jsonl`). Sessions add to it: with the same torch, CUDA and libraries, and whatever code
and operating system, as each session's first line has these, and what follows is of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch

import compressor
from compressor.environment import environment
from compressor.errors import first_line
from compressor.lower import cusparselt_library

HERE = Path(__file__).parent
LIBRARIES = ("torch", "cuda", "cusparselt", "torchao")
"""What times are compared within. torch's version without its build, which older lines do not have."""

Line = dict[str, Any]
out_option = click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=HERE,
    show_default=True,
    help="A file, or a folder for one of this GPU.",
)


def about(device: torch.device, imitation: bool) -> Line:
    """Where and with what something is measured."""
    found = environment(device)
    found["versions"] |= {"cuda": torch.version.cuda, "cusparselt": cusparselt_library.described()}
    return {**found, "code": code(), "imitation": imitation}


@cache
def code() -> str:
    """A digest of the package's sources and of these scripts: a machine that measures may have no repository."""
    found = hashlib.sha256()
    for folder in (Path(compressor.__file__).parent, HERE):
        for path in sorted(folder.rglob("*.py")):
            found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def file_of(folder: Path, what: str, device: torch.device) -> Path:
    """The file in `folder` of what is measured on this GPU, by its name: `lowering_h200.jsonl`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "imitated"
    return folder / f"{what}_{re.sub('[^a-z0-9]+', '-', name.lower().removeprefix('nvidia '))}.jsonl"


def compared(about: Line) -> dict[str, Any]:
    """Of where something was measured, what others must have alike to be compared with it."""
    versions = {name: (about["versions"].get(name) or "none").split("+")[0] for name in LIBRARIES}
    return {"hardware": about["hardware"].split(",")[0], "imitation": about["imitation"], **versions}


class Lines:
    """Those of a file, each with the `about` of its session; a line that is added is on the disk at once."""

    def __init__(self, path: Path, about: Line) -> None:
        """Raises ClickException where the file's lines are of another GPU or of other libraries."""
        self.path, self.about = path, about
        self.all = read(path)
        for line in self.all:
            if compared(line["about"]) != compared(about):
                raise click.ClickException(
                    f"{path} was measured elsewhere, or with other versions: {compared(line['about'])}, and here "
                    f"{compared(about)}. Give another --out"
                )
        if not self.all or self.all[-1]["about"] != about:
            self._write({"about": about})

    def add(self, line: Line) -> None:
        """Write a line, at once."""
        self.all.append({**line, "about": self.about})
        self._write(line)

    def _write(self, line: Line) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", encoding="utf-8") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut = file.read() not in ("", "\n")  # it ended in a line
            file.write("\n" * cut + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def done(self, cell: str) -> dict[str, Line]:
        """The lines of a cell's forms, the last of each; what failed by other code is to be tried again."""
        own = [line for line in self.all if line.get("cell") == cell and "form" in line]
        return {
            line["form"]: line
            for line in own
            if "failed" not in line or line["about"].get("code") == self.about["code"]
        }

    def _by_this_code(self, cell: str) -> list[Line]:
        return [one for one in self.all if one.get("cell") == cell and one["about"].get("code") == self.about["code"]]

    def ended(self, cell: str, form: str) -> bool:
        """Whether the process ended twice while this code tried a form, which then is not tried again. Where it was told to end, as
        its time was over, that says nothing of the form."""
        own = self._by_this_code(cell)
        tries = sum((line.get("begun") == form) - (line.get("stopped") == form) for line in own)
        return form not in self.done(cell) and tries > 1

    def complete(self, cell: str, asked: Line) -> bool:
        """Whether this code was once asked for that much of a cell, or more, and had the time for it."""
        return any(
            set(asked["backends"]) <= set(one["backends"])
            and asked["autotune"] <= one["autotune"]
            and asked["alone"] <= one["alone"]
            and one["forms"] in ("", asked["forms"])
            for one in (line["complete"] for line in self._by_this_code(cell) if "complete" in line)
        )


def lines_of(what: str, out: Path, device: torch.device, imitation: bool = False) -> Lines:
    """Those of what is measured on this GPU: of the file `out`, or of its own in the folder `out`."""
    return Lines(file_of(out, what, device) if out.is_dir() else out, about(device, imitation))


def read(path: Path) -> list[Line]:
    """The lines of a file, each with where it was measured; none where there is no file. A last line that was cut off is left out."""
    found, where = [], None
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            click.echo(f"{path}: a line was cut off: {text[:60]}", err=True)
            continue
        where = line.get("about", where)
        if set(line) != {"about"}:
            found.append({**line, "about": where})
    return found


def why(where: str, failure: Exception, device: torch.device) -> str:
    """What a form that failed says. Ends the process with 3 where the GPU answers no more, as after some faults until the process has
    ended: what failed may not have been what was tried, and another process tries it anew."""
    said = f"{type(failure).__name__}: {first_line(failure)}"
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        click.echo(f"the GPU answers no more: {where}: {said}", err=True)
        raise SystemExit(3) from failure
    return said


@dataclass
class Session:
    """Where forms are measured, until when, and the lines that are written."""

    device: torch.device
    lines: Lines
    end: float
    sustained_s: float = 0.0
    """How long a form runs alone."""

    @property
    def over(self) -> bool:
        """Whether nothing more shall be begun."""
        return time.monotonic() > self.end

    def add(self, cell: str, form: str, **line: Any) -> None:
        """Write a form's line, and say it."""
        self.lines.add({"cell": cell, "form": form, **line})
        said = f"{line['median_ms']:9.3f} ms" if "median_ms" in line else line.get("failed", "")
        ratios = "".join(f"  {one['ratio']:5.2f}x {name}" for name, one in line.get("against", {}).items())
        click.echo(f"  {cell:18} {form:42} {said}{ratios}")

    def failed(self, cell: str, form: str, failure: Exception) -> None:
        """The same of one that does not run. Ends the process where the GPU answers no more."""
        self.add(cell, form, failed=why(f"{cell}, {form}", failure, self.device))
