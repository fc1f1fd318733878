"""Additions from a user's own file: the examples of docs/extend.md as they stand there, and whose code runs when."""

import re
import shlex
import shutil
import sys
from importlib.metadata import EntryPoint

import pytest
from judges import server  # noqa: F401
from places import ROOT
from runs import DOORS, SETTINGS, of, recorded, resumed, started, undrawn

from steer_heal import SteerHeal, plugins
from steer_heal.__main__ import main
from steer_heal.errors import UserError
from steer_heal.evals import EVALS
from steer_heal.flags import merged
from steer_heal.presets import FAST_DEV_PRESET, PRESETS
from steer_heal.settings import changed
from steer_heal.sweep.plan import load

PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL))
LINES = re.findall(r"^steer-heal .*", PAGE.replace("\\\n", " "), re.MULTILINE)
COMMANDS = [shlex.split(line)[1:] for line in LINES if "--plugin" in line]
SMALL = ["--n-rounds", "1", "--no-control", *SETTINGS.split(), "--eval.n-vignettes", "3"]
VOWELS = ["--plugin", "my_eval.py", "--eval.evals", "moral_foundations", "vowels"]
HOLDS = {
    "my_eval.py": lambda events: of(events, "measured", "healed")[0]["metrics"]["vowels_lo"] is not None,
    "my_gate.py": lambda events: events[0]["gates"]["calm"]["limit"] == 1,
    "my_method.py": lambda events: events[0]["config"]["steer"]["method"] == "median_diff",
    "my_judge.py": lambda events: of(events, "measured", "healed")[0]["metrics"]["polite"] == 70,
}


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """A folder with the examples, a small preset toy, and tables without additions afterwards."""
    for name, code in EXAMPLES.items():
        (tmp_path / name).write_text(code)
    monkeypatch.setitem(PRESETS, "toy", ("", FAST_DEV_PRESET))
    monkeypatch.chdir(tmp_path)
    with undrawn():
        yield
    plugins.load(FAST_DEV_PRESET)
    assert "vowels" not in EVALS


@pytest.fixture
def run(tmp_path):
    return started(tmp_path / "out", SMALL, *VOWELS)


def refused(capsys, *words) -> str:
    """What a command says in one line."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1, told
    return told


def test_every_example_has_its_command():
    assert EXAMPLES.keys() == HOLDS.keys() == {words[words.index("--plugin") + 1] for words in COMMANDS}


@pytest.mark.parametrize("words", COMMANDS, ids=EXAMPLES)
def test_each_example_of_the_page_runs_as_shown(words, server, tmp_path, capsys):  # noqa: F811
    given = [word.replace("http://localhost:8000/v1", server) for word in words]
    assert main([*given, "--out", str(tmp_path / "out"), *SMALL]) == 0, capsys.readouterr().err
    events = recorded(next(path for path in (tmp_path / "out").iterdir() if path.is_dir()))
    (name,) = events[0]["config"]["plugin"]
    assert len(events[0]["inputs"][f"plugin.{name[:-3]}"]) == 64 and HOLDS[name](events)


def test_the_values_of_a_flag_that_is_repeated_are_all_taken():
    words = ["run", "--plugin", "a.py", "b.py", "--seed", "1", "--plugin=c.py", "--plugin-set", "a.x=-1", "-h"]
    assert merged(words) == [
        "run",
        "--seed",
        "1",
        "-h",
        *("--plugin", "a.py", "b.py", "c.py"),
        "--plugin-set",
        "a.x=-1",
    ]


# --- what is wrong with it ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "flags", "told"),
    [
        ("x = 1", "", "it has no function plugin"),
        ("1 / 0", "", "it raised ZeroDivisionError: division by zero"),
        ("def plugin(:", "", "it raised SyntaxError"),
        ("def plugin(): return 3", "", "returned 3; return a Plugin"),
        ("from steer_heal.plugins import *\ndef plugin(): return Plugin(gates={'a': 1})", "", "must be of type Gate"),
        (EXAMPLES["my_eval.py"], "--plugin-set p.leters=x", "plugin_set has p.leters: did you mean 'letters'?"),
        (EXAMPLES["my_gate.py"], "--plugin-set p.most=x", "error: --plugin-set: p.most is 'x': it must be a number"),
        (EXAMPLES["my_judge.py"], "--plugin-set p.url=x", "error: --plugin-set: p.model is missing"),
        (EXAMPLES["my_method.py"], "--plugin-set p.a=x", "it has no settings (no dataclass Cfg)"),
        (EXAMPLES["my_method.py"], "--plugin-set p", "it must be NAME.KEY=VALUE"),
        (EXAMPLES["my_method.py"], "--plugin-set q.a=x", "no plugin 'q' was given"),
        (EXAMPLES["my_eval.py"].replace('"vowels": Eval', '"drift": Eval'), "", "adds 'drift' to the evals"),
        (EXAMPLES["my_eval.py"].replace('name="vowels"', 'name="kl_base"'), "", "adds 'kl_base' to the metrics"),
        (EXAMPLES["my_eval.py"], "--plugin sub/p.py", "there is another 'p'; rename one of them"),
        (EXAMPLES["my_eval.py"], "--plugin none.py", "there is no such file; give an existing path"),
        (EXAMPLES["my_eval.py"], "--plugin unknown", "no installed package has it"),
    ],
)
def test_a_plugin_that_cannot_be_used_is_told_in_one_line(code, flags, told, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "p.py", tmp_path / "sub" / "p.py"):
        path.write_text(code)
    assert told in refused(capsys, "run", "toy", "--plugin", "p.py", *flags.split(), *SMALL)


RAISING = (
    (
        "my_eval.py",
        "        ",
        "        1 / 0\n        ",
        "eval vowels raised ZeroDivisionError: division by zero (my_eval.py, ",
    ),
    ("my_eval.py", 'return {"vowels"', 'return {"vowel"', "returns the items vowel, and its metrics need vowels"),
    ("my_gate.py", "text.lower", "text.nope", "gate calm raised AttributeError"),
    (
        "my_method.py",
        "(positive - negative)",
        "(positive - negative).nope()",
        "method median_diff raised AttributeError",
    ),
)


@pytest.mark.parametrize(("file", "old", "new", "told"), RAISING)
def test_what_a_plugin_raises_in_a_run_is_told_with_its_line(file, old, new, told, tmp_path, capsys):
    (tmp_path / file).write_text(EXAMPLES[file].replace(old, new, 1))
    (words,) = [words for words in COMMANDS if file in words]
    assert main([*words, "--quiet", "--out", str(tmp_path / "out"), *SMALL]) == 1
    said = capsys.readouterr().err
    assert told in said and "start a new run" in said and "Traceback" not in said and "continue with" not in said


def test_a_stopped_run_is_continued_with_its_plugins(tmp_path, capsys):
    (words,) = [words for words in COMMANDS if "my_judge.py" in words]
    assert main([*words, "--quiet", "--out", str(tmp_path / "out"), *SMALL]) == 1, "nothing answers at its URL"
    assert capsys.readouterr().err.rstrip().endswith("--plugin my_judge.py")


# --- whose code runs ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["resume RUN", "eval --run RUN", "run --config RUN --print-config", "chat RUN"])
def test_a_folder_runs_no_code_by_itself(command, run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_module", lambda source: pytest.fail("its code ran"))
    words = [str(run) if word == "RUN" else word for word in command.split()]
    assert "if you trust them, add --plugin my_eval.py" in refused(capsys, *words)
    with pytest.raises(UserError, match="add --plugin my_eval.py"):
        SteerHeal.open(run)


def test_with_its_plugin_a_run_is_resumed_measured_and_opened(run, capsys, tmp_path):
    moved = tmp_path / "elsewhere" / "my_eval.py"  # its content counts, not where it lies
    moved.parent.mkdir()
    shutil.move("my_eval.py", moved)
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    (run / "events.jsonl").write_bytes(b"".join(lines[:-3]))
    assert "was made without it" in refused(capsys, "resume", run, "--plugin", moved, "my_gate.py")
    resumed(run, "--plugin", str(moved))
    assert main(["eval", "--run", str(run), "--plugin", str(moved), "--quiet"]) == 0
    assert main(["verify", str(run), "--plugin", str(moved)]) == 0
    with SteerHeal.open(run, plugin=(str(moved),)) as sh:
        assert sh.evaluate("base").metrics["vowels"] == of(recorded(run), "measured", "base")[0]["metrics"]["vowels"]


def test_a_plugin_that_was_changed_or_lost_is_told(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_module", lambda source: pytest.fail("its code ran"))
    with (tmp_path / "my_eval.py").open("a") as file:
        file.write("# changed\n")
    told = "plugin my_eval.py was changed since the run began (SHA-256 "
    assert told in refused(capsys, "resume", run, "--plugin", "my_eval.py")
    assert main(["verify", str(run)]) == 1 and f"BROKEN: {told}" in capsys.readouterr().out
    (tmp_path / "my_eval.py").unlink()
    assert "there is no such file" in refused(capsys, "resume", run, "--plugin", "my_eval.py")
    assert main(["verify", str(run)]) == 1 and "BROKEN: plugin my_eval.py cannot be checked" in capsys.readouterr().out


# --- elsewhere ---------------------------------------------------------------------------------------------------
def test_the_runs_of_a_sweep_file_get_its_plugins(tmp_path, capsys):
    fixed = 'plugin = ["my_eval.py"]\neval.evals = ["moral_foundations", "vowels"]'
    grid = 'plugin_set = [["my_eval.letters=a"], ["my_eval.letters=-e"]]'
    (tmp_path / "s.toml").write_text(f'preset = "toy"\nseeds = [1]\n[fixed]\n{fixed}\n[grid]\n{grid}\n')
    jobs = load(tmp_path / "s.toml").jobs
    words = [shlex.join(job.command()) for job in jobs]
    assert all(
        f"--plugin my_eval.py --plugin-set my_eval.letters={each} " in words[i] for i, each in enumerate(["a", "-e"])
    )
    assert len({job.folder for job in jobs}) == 2
    assert main([*jobs[1].command(), *SMALL]) == 0, capsys.readouterr().err
    assert recorded(jobs[1].folder)[0]["config"]["plugin_set"] == ["my_eval.letters=-e"]


def test_two_objects_of_the_library_keep_their_own_plugins():
    few = {"plugin": ("my_eval.py",), "eval.evals": ("contrast", "vowels"), "eval.pairs": None, "gen.prompts": None}
    small = changed(FAST_DEV_PRESET, few)
    none, some = (changed(small, {"plugin_set": (f"my_eval.letters={each}",)}) for each in ("", "abcdefghijklmno"))
    with SteerHeal(trait=DOORS, settings=none) as first, SteerHeal(trait=DOORS, settings=some) as second:
        assert first.base.metrics["vowels"] == 0 < second.base.metrics["vowels"]


def test_an_entry_point_is_found_and_hashed_without_running_its_package(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(EXAMPLES["my_method.py"])
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("mine", "some_package.inner", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry])
    source = plugins.find("mine")
    assert source.file.text == EXAMPLES["my_method.py"] and "some_package" not in sys.modules
    cfg = changed(FAST_DEV_PRESET, {"plugin": ("mine",)})
    assert plugins.load(cfg).sha256 == {"plugin.mine": source.file.sha256}
    assert "did you mean 'mine'" in str(pytest.raises(UserError, plugins.find, "mime").value)
