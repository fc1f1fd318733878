"""What people read of a run: console lines, pictures, the page. Made from events alone."""

from __future__ import annotations

from pathlib import Path


def draw(folder: Path) -> Path | None:
    """Draws the pictures, the page and the diary of a run folder; returns the page. None: the run has not started."""
    from steer_heal.events import Run
    from steer_heal.report import page, plot  # matplotlib: a second that the console can do without
    from steer_heal.runs.log import read_events

    run = Run(read_events(folder))
    if not run.events:
        return None
    plot.save(run, folder)
    return page.save(run, folder)
