"""The pages of the documentation site, into build/pages: what lies in docs/, the pages that lie beside their code, and the source
files that pages link to.

Markdown in the repository links to files as they lie there, so that it can be read there too. Here each such link is led to
the page that shows the file, so that the site needs no address of a repository.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "build" / "pages"
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/README.md": "examples.md",
}
"""The page of the site that a file is, for those outside of docs/, beside the method cards."""
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)]*)?(?=\))")
_LANGUAGES = {".py": "python", ".c": "c", ".h": "c", ".json": "json", ".toml": "toml", ".yml": "yaml"}
_LARGEST = 100_000
"""Characters of a source file that are shown."""


def sources(root: Path = ROOT) -> dict[str, str]:
    """The page of each Markdown file that is one, both relative: to the repository and to the site."""
    inner = {f"docs/{page.name}": page.name for page in root.glob("docs/*.md")}
    cards = {
        f"plugins/{card.parent.name}/README.md": f"methods/{card.parent.name}.md"
        for card in root.glob("plugins/*/README.md")
    }
    return dict(sorted((inner | OUTSIDE | cards).items()))


def gathered(root: Path = ROOT) -> dict[str, str]:
    """The text of every page by its place in the site. Raises FileNotFoundError for a link that leads nowhere."""
    known, drawn = sources(root), pictures(root)
    made: dict[str, str] = {}
    linked: set[str] = set()
    for name, page in known.items():

        def led(match: re.Match[str], name: str = name, page: str = page) -> str:
            target = match[1]
            if is_outer(target):
                return match[0]
            target = normal(name, target)
            place = known.get("docs/index.md" if target == "README.md" else target)
            if target in drawn:
                place = posixpath.basename(target)
            elif place is None:
                linked.add(target)
                place = f"source/{target}.md"
            return posixpath.relpath(place, posixpath.dirname(page) or ".") + (match[2] or "")

        made[page] = LINK.sub(led, (root / name).read_text(encoding="utf-8"))
    return made | {f"source/{target}.md": shown(root, target) for target in sorted(linked)}


def pictures(root: Path = ROOT) -> set[str]:
    """The pictures that lie in docs/, relative to the repository: the site has them as they are."""
    return {f"docs/{picture.name}" for picture in root.glob("docs/*.png")}


def is_outer(target: str) -> bool:
    """Whether a link leads out of the repository."""
    return "://" in target or target.startswith("mailto:")


def normal(name: str, target: str) -> str:
    """The file that the page `name` calls `target`, relative to the repository, as `name` is."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(name), target))


def shown(root: Path, target: str) -> str:
    """A page that shows the file, or the names in the folder, `target`."""
    path = root / target
    title = f"# {path.name}\n\n`{target}`\n\n"
    if path.is_dir():
        return title + "\n".join(f"- `{inner.name}`" for inner in sorted(path.iterdir()) if inner.suffix != ".pyc")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":  # a note beside data or benchmarks, whose own links are not followed
        return LINK.sub("#", text)
    cut = f"\n\nThe first {_LARGEST:,} of {len(text):,} characters.\n" if len(text) > _LARGEST else ""
    return f"{title}````{_LANGUAGES.get(path.suffix, 'text')}\n{text[:_LARGEST].rstrip()}\n````\n{cut}"


def main() -> None:
    """Write the pages anew."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for page, text in gathered().items():
        path = PAGES / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for file in ("docs/site.css", *pictures()):
        shutil.copy(ROOT / file, PAGES)


if __name__ == "__main__":
    main()
