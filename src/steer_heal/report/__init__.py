"""What people read of a run: console lines, pictures, the page. Made from events alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def draw(folder: Path) -> Path | None:
    """Draws the pictures, the page and the diary of a run folder. The page, or None where the run did not start yet."""
    from steer_heal.report import page, plot  # matplotlib: a second that the console can do without

    plot.plot(folder)
    return page.report(folder)


def side_by_side(folders: Sequence[Path], file: Path) -> Path:
    """Writes a page of several runs into the file."""
    from steer_heal.report.compare import compare

    return compare(folders, file)
