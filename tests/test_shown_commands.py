"""The commands of docs/first_trait.md, in their order, on the smallest model; a stand-in drafts."""

import re
import shlex
from pathlib import Path

import pytest
from places import ROOT
from runs import undrawn
from test_estimate import SMALL, flag
from test_new_trait import stub

from steer_heal.__main__ import main

BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALLEST = [
    word for name, value in SMALL.items() if name not in ("control", "eval.evals") for word in flag(name, value)
]


def commands() -> list[list[str]]:
    blocks = BLOCK.findall((ROOT / "docs" / "first_trait.md").read_text(encoding="utf-8"))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("steer-heal ")]


def test_the_commands_of_the_guide_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("steer_heal.draft.writer", lambda name, model: stub(100))
    monkeypatch.setattr("builtins.input", lambda *_: (_ for _ in ()).throw(EOFError))
    shown = commands()
    assert [words[0] for words in shown] == ["run", "run", "new-trait", "diag", "run", "run", "run", "chat"]
    for words in shown:
        given = [word for i, word in enumerate(words) if "--model" not in (word, words[i - 1])]
        given = [word.replace("out/<run>", str(next(iter(runs()), ""))) for word in given]
        given += {"run": [*SMALLEST, "--quiet"], "diag": ["--model", "tiny-random", "--short"]}.get(words[0], [])
        n_before = len(runs())
        with undrawn():
            assert main(given) == 0, (words, capsys.readouterr().err)
        assert len(runs()) - n_before == (words[0] == "run" and "--plan" not in words), words


def runs() -> list:
    return [path.parent for path in Path("out").glob("*/events.jsonl")]


@pytest.mark.parametrize("words", [["run", "qwen", "--trait", "blunt", "--plan"], ["run", "chat", "--trait", "care"]])
def test_the_commands_of_the_readme_run(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert " ".join(words[:2]) in (ROOT / "README.md").read_text(encoding="utf-8")
    with undrawn():
        assert main([*words, *SMALLEST, "--quiet"]) == 0


def test_the_file_of_the_readme_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (line,) = re.findall(r"^steer-heal (new-trait .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert main(shlex.split(line)) == 0 and (tmp_path / "mine.toml").is_file()
