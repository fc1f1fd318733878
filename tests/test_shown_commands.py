"""The commands of README, docs/first_trait.md and docs/transcript.md on the smallest model; a stand-in drafts."""

import re
import shlex
from io import StringIO
from pathlib import Path

import pytest
from places import ROOT
from runs import undrawn
from test_estimate import SMALL
from test_new_trait import stub

from steer_heal.__main__ import main
from steer_heal.presets import CHAT_PRESET, PRESETS
from steer_heal.settings import changed

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRANSCRIPT = (ROOT / "docs" / "transcript.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "first_trait.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of each command of a page, without a model."""
    lines = "\n".join(BLOCK.findall(page)).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("steer-heal ")]
    return [[word for i, word in enumerate(words) if "--model" not in (word, words[i - 1])] for words in found]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The presets, small; an empty folder to work in."""
    for name in ("chat", "qwen", "smol-distil"):
        own = {"quiet": True, "eval.evals": ("contrast", "text_quality"), "heal.rehearsal": 4}
        monkeypatch.setitem(PRESETS, name, ("", changed(CHAT_PRESET, {**SMALL, **own})))
    monkeypatch.setattr("steer_heal.estimate.LONG_ENOUGH", 1e-9)
    monkeypatch.setattr("steer_heal.teachable.N_RANDOM", 2)
    monkeypatch.setattr("steer_heal.draft.writer", lambda *_, **__: stub(100))
    monkeypatch.chdir(tmp_path)


def runs() -> list[Path]:
    return [path.parent for path in Path("out").glob("*/events.jsonl")]


@pytest.mark.parametrize(
    "page, names",
    [
        (GUIDE, "run run new-trait diag diag run run run chat export export"),
        (TRANSCRIPT, "new-trait diag run chat export"),
    ],
    ids=["guide", "transcript"],
)
def test_the_commands_of_the_page_run_one_after_the_other(page, names, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", StringIO())
    shown = commands(page)
    assert [words[0] for words in shown] == names.split()
    for words in shown:
        given = [word.replace("out/<run>", str(next(iter(runs()), ""))) for word in words]
        n_before = len(runs())
        with undrawn():
            assert main(given) == 0, (given, capsys.readouterr().err)
        assert len(runs()) - n_before == (words[0] == "run" and "--plan" not in words), words


def test_the_commands_of_the_readme_run(capsys):
    shown = [words for words in commands(README) if {"new-trait", "qwen", "chat"} & {*words[:2]}]
    assert len(shown) == 3
    for words in shown:
        with undrawn():
            assert main(words) == 0, (words, capsys.readouterr().err)
    assert Path("mine.toml").is_file() and len(runs()) == 1
