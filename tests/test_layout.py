"""How the code is laid out: rooms on floors, imports that lead down only, no circles, and sizes that a reader can hold.

A room is a file or a folder directly under `compressor/`. An import inside a function counts as one at the top does: it is only
later. Imports for type checkers alone may lead anywhere but up.

`python tests/test_layout.py` draws the rooms and their arrows anew, in docs/design.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"compressor": "compressor", "plugins": "compressor.plugins", "model_zoo": "compressor.model_zoo"}
"""The folders of the code, and what they are called when installed."""

FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "seeds", "progress"}),
    frozenset({"foreign"}),
    frozenset({"environment", "files", "weights", "adapter", "discovery", "processes"}),
    frozenset({"validation"}),
    frozenset({"sparsity", "data", "report"}),
    frozenset({"training", "saving", "quality"}),
    # `calibration` forwards, for documents of 0.1.0
    frozenset({"cost", "recipe", "model_zoo", "pipelines", "calibration"}),
    frozenset({"lower", "plugins"}),
    frozenset({"export", "registry"}),
    frozenset({"runs", "testing"}),
    frozenset({"comparison"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
"""From the ground up. Rooms of one floor do not import each other."""
FRONT = "__init__"
"""The package itself: it offers names of every floor, and no room reads more than its version."""

MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_ROOMS = 400, 60, 30

# What breaks a rule today. An entry that is no longer needed fails its test: take it out.
UPWARD: dict[tuple[str, str], str] = {}
"""Pairs of rooms, with the reason."""
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}
CIRCLES: dict[frozenset[str], str] = {}
"""Modules that need each other, with the reason."""
DEFERRED_CIRCLES: dict[tuple[str, str], str] = {}
"""Imports inside functions without which there would be a circle, with the reason."""


@dataclass(frozen=True)
class Arrow:
    """One import: the module that imports, what it imports, and when: `top`, `deferred` or `typing`."""

    source: str
    target: str
    when: str


def modules(root: Path = ROOT, packages: Mapping[str, str] = PACKAGES) -> dict[str, Path]:
    """Every module by its installed name."""
    found = {}
    for folder, package in packages.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def arrows(name: str, source: str, is_package: bool, known: Iterable[str]) -> Iterator[Arrow]:
    """What the Python `source` of the module `name` imports of the `known` modules."""
    package = name if is_package else name.rpartition(".")[0]
    known = set(known)

    def walk(node: ast.AST, when: str) -> Iterator[Arrow]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Arrow(name, alias.name, when) for alias in child.names if alias.name in known)
            elif isinstance(child, ast.ImportFrom):
                base = resolve_name("." * child.level + (child.module or ""), package)
                for alias in child.names:
                    inner = f"{base}.{alias.name}"
                    if inner in known or base in known:
                        yield Arrow(name, inner if inner in known else base, when)
            else:
                yield from walk(child, _when(child, when))

    yield from walk(ast.parse(source), "top")


def _when(node: ast.AST, outer: str) -> str:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
        return "deferred"
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return "typing"
    return outer


def room(module: str) -> str:
    return [*module.split("."), FRONT][1]


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS, 1) if name in rooms)


def not_downward(every: Iterable[Arrow]) -> set[tuple[str, str]]:
    """The pairs of rooms of which one imports another that does not lie on a lower floor."""
    pairs = {(room(arrow.source), room(arrow.target)) for arrow in every}
    return {
        (source, target)
        for source, target in pairs
        if FRONT not in (source, target) and source != target and floor(target) >= floor(source)
    }


def circles(every: Iterable[Arrow]) -> set[frozenset[str]]:
    """The sets of modules each of which needs every other, by Tarjan's algorithm."""
    edges: dict[str, set[str]] = {}
    for arrow in every:
        edges.setdefault(arrow.source, set()).add(arrow.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges.get(module, set()):
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.add(frozenset(group))

    for module in list(edges):
        if module not in index:
            visit(module)
    return found


MODULES = modules()
ARROWS = [
    arrow
    for name, path in MODULES.items()
    for arrow in arrows(name, path.read_text(encoding="utf-8"), path.name == "__init__.py", MODULES)
    if arrow.source != arrow.target
]
RUN = [arrow for arrow in ARROWS if arrow.when != "typing"]


def test_every_room_has_a_floor_and_every_floor_has_rooms() -> None:
    rooms = {room(name) for name in MODULES} - {FRONT}
    expected = {name for floor_rooms in FLOORS for name in floor_rooms}
    assert rooms == expected  # a new room: say in FLOORS where it belongs


def test_imports_lead_down() -> None:
    assert not_downward(ARROWS) == set(UPWARD)


def test_only_the_front_offers_names_of_every_floor() -> None:
    """Rooms import what they need from where it is; of the package itself they read the version at most."""
    through = [arrow for arrow in RUN if arrow.target == "compressor" and arrow.source != "compressor"]
    for arrow in through:
        tree = ast.parse(MODULES[arrow.source].read_text(encoding="utf-8"))
        names = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "compressor" and not node.level
            for alias in node.names
            if f"compressor.{alias.name}" not in MODULES
        }
        assert names <= {"__version__"}, arrow.source


def test_no_modules_need_each_other() -> None:
    inside = [arrow for arrow in RUN if arrow.target != "compressor"]
    assert circles(arrow for arrow in inside if arrow.when == "top") == set()
    assert circles(inside) == set(CIRCLES)


def test_no_deferred_import_only_hides_a_circle() -> None:
    """Put at the top, each one leaves the modules without circles."""
    top = [arrow for arrow in RUN if arrow.when == "top" and arrow.target != "compressor"]
    deferred = {(a.source, a.target) for a in RUN if a.when == "deferred" and a.target != "compressor"}
    hiding = {(s, t) for s, t in deferred if circles([*top, Arrow(s, t, "top")])}
    assert hiding == set(DEFERRED_CIRCLES)


def _ours() -> list[Path]:
    folders = (*PACKAGES, "benchmarks")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in _ours()}
    assert {name for name, count in lines.items() if count > MOST_LINES} == set(LONG_FILES)


def long_functions(source: str, most: int = MOST_LINES_OF_A_FUNCTION) -> set[str]:
    """The names of the functions in `source` that have more than `most` lines, from `def` to their last."""
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    return {node.name for node in functions if (node.end_lineno or node.lineno) - node.lineno + 1 > most}


def test_no_function_is_longer_than_a_screen() -> None:
    assert {
        (path.relative_to(ROOT).as_posix(), name)
        for path in _ours()
        for name in long_functions(path.read_text(encoding="utf-8"))
    } == set(LONG_FUNCTIONS)


def test_the_house_has_few_doors() -> None:
    folder = ROOT / "compressor"
    doors = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert len(doors) <= MOST_ROOMS


DESIGN = ROOT / "docs" / "design.md"
BEGINS, ENDS = "<!-- not run: drawn by tests/test_layout.py -->\n```text\n", "```"


def drawing() -> str:
    """Every room on its floor, from the top, with the rooms that it imports at run time, the nearest floors first.

    What `errors` gives, everybody needs: it is left out.
    """
    leads = {(room(arrow.source), room(arrow.target)) for arrow in RUN}
    width = max(len(name) for rooms in FLOORS for name in rooms)
    lines = []
    for number, rooms in reversed(list(enumerate(FLOORS, 1))):
        for place, name in enumerate(sorted(rooms)):
            below = {target for source, target in leads if source == name} - {name, FRONT, "errors"}
            targets = ", ".join(sorted(below, key=lambda other: (-floor(other), other)))
            lines.append(f"{'' if place else number:>2}  {name:{width}}{f'  -> {targets}' if targets else ''}".rstrip())
    return "\n".join(lines) + "\n"


def drawn(page: str, picture: str) -> str:
    """`page` with `picture` in the place of the one that it has."""
    start = page.index(BEGINS) + len(BEGINS)
    return page[:start] + picture + page[page.index(ENDS, start) :]


def test_the_drawing_of_the_rooms_is_that_of_the_imports() -> None:
    page = DESIGN.read_text(encoding="utf-8")
    assert page == drawn(page, drawing()), "python tests/test_layout.py draws it anew"


# --- The checks can fail. ---


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import compressor.runs.run", ("compressor.runs.run", "top")),
        ("from compressor.runs import run", ("compressor.runs.run", "top")),
        ("from ..runs.run import execute", ("compressor.runs.run", "top")),
        ("def f():\n    from compressor.runs import run", ("compressor.runs.run", "deferred")),
        ("class A:\n    def f(self):\n        import compressor.runs.run", ("compressor.runs.run", "deferred")),
        ("if TYPE_CHECKING:\n    from compressor.runs.run import execute", ("compressor.runs.run", "typing")),
        ("try:\n    import compressor.runs.run\nexcept ImportError:\n    pass", ("compressor.runs.run", "top")),
    ],
)
def test_imports_are_found_wherever_they_are(source: str, expected: tuple[str, str]) -> None:
    (arrow,) = arrows("compressor.quality.metric", source, False, MODULES)
    assert (arrow.target, arrow.when) == expected
    assert not_downward([arrow]) == {("quality", "runs")}


def test_arrows_to_the_same_floor_and_inside_a_room() -> None:
    assert not_downward([Arrow("compressor.data.sets", "compressor.sparsity.pattern", "top")]) == {("data", "sparsity")}
    assert not_downward([Arrow("compressor.data.sets", "compressor.data.batches", "top")]) == set()
    assert not_downward([Arrow("compressor.data.sets", "compressor.errors", "top")]) == set()


def test_circles_are_found() -> None:
    round_trip = [Arrow("a", "b", "top"), Arrow("b", "c", "top"), Arrow("c", "a", "top"), Arrow("c", "d", "top")]
    assert circles(round_trip) == {frozenset("abc")}
    assert circles(round_trip[:2]) == set()


def test_long_functions_are_found() -> None:
    assert long_functions("def f():\n    pass\n\n\ndef g():\n    a = 1\n    return a\n", most=2) == {"g"}


if __name__ == "__main__":
    DESIGN.write_text(drawn(DESIGN.read_text(encoding="utf-8"), drawing()), encoding="utf-8")
