"""Looks at pages in Chromium as readers do: wide and narrow, light and dark.

    python docs/screens.py [--out build/screens] [--shot FILE.png] PAGE.html …      # or folders of pages: build/site

Each page is opened at 1280 and 390 pixels in both colour schemes and written as a picture into `--out`; one that is wider than its
window, or cuts off text in a cell, is named, and the exit code is 1. `--shot` keeps the first page's first screen, wide and light,
for the documentation. Needs playwright (`pip install -c constraints.txt playwright`) and an installed Chromium.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Literal

import click
from playwright.sync_api import Page, sync_playwright

WIDTHS = (1280, 390)
SCHEMES: tuple[Literal["light"], Literal["dark"]] = ("light", "dark")
_HEIGHT = 900
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_TOO_WIDE = """() => {
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  const cut = [...document.querySelectorAll("td, th, dd, p, li, h1, h2")].filter(one =>
    one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).overflowX === "hidden");
  const told = cut.map(one => `cut off: ${one.textContent.trim().slice(0, 60)}`);
  return wide > 0 ? [`${wide} pixels wider than the window`, ...told] : told;
}"""


def found(places: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    """Every page under `places`, with a name for its pictures."""
    for place in places:
        for page in sorted(place.rglob("*.html")) if place.is_dir() else [place]:
            name = page.relative_to(place).with_suffix("") if place.is_dir() else Path(place.parent.name, place.stem)
            yield "-".join(name.parts), page.resolve()


def looked_at(page: Page, file: Path, picture: Path) -> list[str]:
    """The faults of one page; it is drawn as `picture`."""
    page.goto(file.as_uri())
    page.screenshot(path=picture, full_page=True)
    return [f"{picture.stem}: {fault}" for fault in page.evaluate(_TOO_WIDE)]


@click.command()
@click.argument("pages", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/screens"), show_default=True)
@click.option("--shot", type=click.Path(path_type=Path))
def main(pages: tuple[Path, ...], out: Path, shot: Path | None) -> None:
    if (program := next(filter(None, map(shutil.which, _PROGRAMS)), None)) is None:
        raise click.ClickException("no Chromium is installed; on Debian: apt-get install chromium")
    out.mkdir(parents=True, exist_ok=True)
    faults: list[str] = []
    with sync_playwright() as players:
        browser = players.chromium.launch(executable_path=program, args=["--no-sandbox"])
        names = list(found(pages))
        for width, scheme in product(WIDTHS, SCHEMES):
            # a reader of its own: the site remembers which scheme it was first seen in
            page = browser.new_page(viewport={"width": width, "height": _HEIGHT}, color_scheme=scheme)
            for name, file in names:
                faults += looked_at(page, file, out / f"{name}-{width}-{scheme}.png")
            if shot is not None and (width, scheme) == (WIDTHS[0], SCHEMES[0]):
                page.goto(names[0][1].as_uri())
                page.screenshot(path=shot)
            page.close()
        browser.close()
    click.echo(f"{len(names)} pages in {out}, each at {' and '.join(map(str, WIDTHS))} pixels, {' and '.join(SCHEMES)}")
    if faults:
        click.echo("\n".join(faults), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
