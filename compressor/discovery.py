"""Plugins, found by entry points, and users' own files. Listing loads nothing; the errors of what is loaded are named."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.machinery import BYTECODE_SUFFIXES, all_suffixes
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from compressor.errors import CompressorError, UsageError, Work, did_you_mean, memory, memory_behind, memory_short

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

_T = TypeVar("_T")

KINDS = ("pruners", "models", "data", "metrics", "backends")
SINGULAR = {
    "pruners": "method",
    "models": "model",
    "data": "data set",
    "metrics": "metric",
    "backends": "backend",
    "scores": "score",
    "patterns": "pattern",
}
_OWN = "compressor_user_"
"""How the modules of users' own files are called."""
_beside: dict[str, ModuleType] = {}
"""The modules beside users' own files that these imported, by name."""
_imported: dict[str, tuple[str, ...]] = {}
"""The files of those, by the own file that imported them when it was loaded last."""


def entry_points(group: str, name: str | None = None) -> EntryPoints:
    """Those of installed packages in `group`. What reads them is imported where it is needed: `compressor --help` asks for none."""
    from importlib.metadata import entry_points

    found = entry_points(group=group)
    return found if name is None else found.select(name=name)


def names(kind: str) -> list[str]:
    """The registered names of a kind (one of `KINDS`), without loading anything."""
    return sorted({entry.name for entry in entry_points(group=f"compressor.{kind}")})


def load(kind: str, name: str) -> Any:
    """The object registered as `name`. Raises UsageError for unknown or doubly registered names, CompressorError where
    the plugin itself fails to import, naming plugin and distribution."""
    entry = entry_point(kind, name)
    try:
        return entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise anything at import, SystemExit too
        raise CompressorError(
            f"{kind} plugin {name!r} of {distribution_of(entry)} failed to load: {type(error).__name__}: {error}",
            "Reinstall or remove that distribution.",
        ) from error


def is_file_reference(name: str) -> bool:
    """Whether `name` is `FILE.py:NAME`, and not a registered name."""
    return name.rpartition(":")[0].endswith(".py")


def from_file(reference: str, option: str) -> Any:
    path_text, colon, name = reference.rpartition(":")
    path = Path(path_text)
    if not colon or not name.isidentifier() or path.suffix != ".py":
        raise UsageError(f"{option} {reference!r}: not FILE.py:NAME", f"Write it like {option} mine.py:Mine")
    if not path.is_file():
        raise UsageError(f"{option} {reference!r}: no such file", f"Looked for {path.absolute()}")
    module = module_of(path)
    if module is None:
        raise UsageError(f"{option} {reference!r}: cannot be imported", "Give a Python source file.")
    if name not in vars(module):
        found = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
        raise UsageError(f"{path} has no {name!r}", did_you_mean(name, found))
    return vars(module)[name]


def module_of(path: Path) -> ModuleType | None:
    """The module in the user's own file at `path`, run anew, with the modules beside it that it imports; None where it is no source.

    Its folder is the last place where modules are looked for, and only while it is loaded: a file beside it cannot take the place of
    a library. Raises CompressorError where it fails.
    """
    module_name = f"{_OWN}{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up there
    try:
        with _folder_importable(path):
            spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise CompressorError(
            f"{path} failed to import: {type(error).__name__}: {error}", "Run it with python."
        ) from error
    return module


@contextmanager
def _folder_importable(path: Path) -> Iterator[None]:
    """Modules in the folder of `path` can be imported, and are noted as imported by it. Those of other own files are not taken for
    them, though they may have their names."""
    folder = os.path.abspath(path.parent)
    set_aside = {name: sys.modules.pop(name) for name in [*_beside] if name in sys.modules}
    before = set(sys.modules)
    importlib.invalidate_caches()
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.reverse()  # the last one of that name is ours
        sys.path.remove(folder)
        sys.path.reverse()
        found = {name: module for name in set(sys.modules) - before if _is_in(module := sys.modules[name], folder)}
        _imported[os.path.abspath(path)] = tuple(
            sorted({file for one in found.values() if (file := getattr(one, "__file__", None)) is not None})
        )
        _beside.update(found)
        for name, module in set_aside.items():
            sys.modules.setdefault(name, module)


def _is_in(module: ModuleType, folder: str) -> bool:
    """Whether the module, or the outermost package that it is in, lies directly in `folder`."""
    name, _, inner = module.__name__.partition(".")
    outer = sys.modules.get(name, module) if inner else module
    places = [*getattr(outer, "__path__", ())] or [getattr(outer, "__file__", None) or ""]
    return any(os.path.dirname(os.path.abspath(place)) == folder for place in places if place)


def sources(reference: str) -> list[Path]:
    """The file that `FILE.py:NAME` names, and those beside it that it imported when it was loaded last, in this process."""
    path = Path(reference.rpartition(":")[0])
    return [path, *map(Path, _imported.get(os.path.abspath(path), ()))]


def code_sha256(kind: str, name: str) -> str | None:
    """A hash of the code of an installed plugin: the version of its distribution, and the files of modules in the outermost package
    that has it (namespaces are none). None for this toolkit's own, whose code versions name, and for what is not registered."""
    entry = next(iter(entry_points(f"compressor.{kind}", name)), None) if name else None
    if entry is None or entry.module.partition(".")[0] == __name__.partition(".")[0]:
        return None
    found = hashlib.sha256((entry.dist.version if entry.dist is not None else "").encode())
    for path, told in _modules_of(entry.module):
        found.update(told.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _modules_of(module: str) -> list[tuple[Path, str]]:
    """The files of modules in the outermost package that `module` is in, with their names in it, in order."""
    parts = module.split(".")
    for outer in (".".join(parts[: count + 1]) for count in range(len(parts))):
        try:
            spec = importlib.util.find_spec(outer)
        except (ImportError, ValueError):
            return []
        if spec is None or spec.origin is None:
            continue
        if spec.submodule_search_locations is None:
            return [(Path(spec.origin), Path(spec.origin).name)]
        kinds = tuple({*all_suffixes()} - {*BYTECODE_SUFFIXES})
        found = [
            (path, path.relative_to(f).as_posix())
            for f in spec.submodule_search_locations
            for path in Path(f).rglob("*")
        ]
        return sorted((one for one in found if one[1].endswith(kinds) and one[0].is_file()), key=lambda one: one[1])
    return []


def file_of(cls: type) -> str | None:
    """The user's own file that `cls` is of, where it came from one by `FILE.py:NAME`."""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None) if cls.__module__.startswith(_OWN) else None


def made(kind: str, name: str, expected: type[_T]) -> _T:
    if is_file_reference(name):
        factory, what = from_file(name, f"--{SINGULAR[kind]}"), name
    else:
        factory, what = load(kind, name), f"{kind} plugin {name!r} of {distribution_of(entry_point(kind, name))}"
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # a plugin may raise anything
        raise CompressorError(
            f"{what} failed: {type(error).__name__}: {error}", "Update, mend or remove that plugin."
        ) from error
    if not isinstance(made, expected):
        raise CompressorError(
            f"{what} gave {type(made).__name__}, not {expected.__name__}", "Update, mend or remove that plugin."
        )
    return made


def entry_point(kind: str, name: str) -> EntryPoint:
    entries = list(entry_points(group=f"compressor.{kind}", name=name))
    singular = SINGULAR[kind]
    if not entries:
        raise UsageError(f"unknown {singular} {name!r}", did_you_mean(name, names(kind)))
    if len({entry.value for entry in entries}) > 1:
        owners = ", ".join(sorted(distribution_of(entry) for entry in entries))
        raise UsageError(f"{singular} {name!r} is registered more than once, by {owners}", "Remove one of them.")
    return entries[0]


def distribution_of(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unnamed distribution"


def blamed(error: BaseException) -> CompressorError:
    """What is to be said of an `error` that nobody foresaw: which plugin's code it comes from, where it is one of others."""
    if (behind := memory_behind(error)) is not None:
        return memory_short(behind)
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, SystemExit):
        what = f"an exit (sys.exit, code {error.code!r}) before the end"
    where = _culprit(error)
    if where is not None:
        return CompressorError(f"{what}, raised {where}", "Update, mend or remove that plugin.")
    return CompressorError(f"unexpected {what}")


@contextmanager
def no_exit(doing: Work | None = None) -> Iterator[None]:
    """A plugin that ends the process is a CompressorError that names it: an exit code of 0 would say that a model was made.

    Where it is told what is being done (`doing`), memory that ends is said as in `memory`.
    """
    try:
        with nullcontext() if doing is None else memory(doing):
            yield
    except SystemExit as error:
        raise blamed(error) from error


def _culprit(error: BaseException) -> str | None:
    """The plugin that raised `error` or called what did, with the function and the line; None where none has part in it."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if (name := _plugin_of(frame.f_globals.get("__name__", ""))) is not None:
            return f"{name}in {frame.f_code.co_name}(), line {line} of {frame.f_code.co_filename}"
    return None


def _plugin_of(module: str) -> str | None:
    """What a module is called that is of a plugin which others than this toolkit register; empty for a user's own file."""
    if module.startswith(_OWN):
        return ""
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return None
    for kind, singular in SINGULAR.items():
        for entry in entry_points(group=f"compressor.{kind}"):
            if module == entry.module or module.startswith(f"{entry.module}."):
                return f"by {singular} {entry.name!r} of {distribution_of(entry)}, "
    return None
