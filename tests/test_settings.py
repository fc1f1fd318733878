"""Settings say what is wrong with them, come back from JSON as they were, and cost no torch."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from steer_heal.__main__ import COMMANDS, main
from steer_heal.commands.run import Source
from steer_heal.errors import UserError, validated, validated_json
from steer_heal.flags import EXAMPLES
from steer_heal.presets import FAST_DEV_PRESET, PRESETS
from steer_heal.settings import (
    RUN_ONLY,
    AdapterCfg,
    DoseCfg,
    FilterCfg,
    GenCfg,
    HealCfg,
    RunConfig,
    SteerCfg,
    as_json,
    changed,
    leaves,
    settings,
)

NAN, INF = math.nan, math.inf
BAD = [
    (HealCfg, {"tau": -1.0}, ["heal.tau is -1.0: it must be >= 0"]),
    (HealCfg, {"lam": INF}, ["heal.lam is inf: it must be a finite number"]),
    (HealCfg, {"divergence": 3}, ["heal.divergence is 3: it must be a string"]),
    (HealCfg, {"aggregate": "rmsd"}, ["heal.aggregate is 'rmsd': did you mean 'rmse'?"]),
    (HealCfg, {"lamb": 1.0}, ["heal.lamb is not a known field; did you mean 'lam'?"]),
    (
        HealCfg,
        {"lam": NAN, "tau": -1.0, "epochs": 0, "checkpoint": "maybe"},
        [
            "heal.lam is nan: it must be a finite number",
            "heal.tau is -1.0: it must be >= 0",
            "heal.epochs is 0: it must be >= 1",
            "heal.checkpoint is 'maybe': choose from auto, on, off",
        ],
    ),
    (SteerCfg, {"layers": (0.5, 0.4)}, ["steer.layers is 0.5 0.4: it must be LO HI with 0 <= LO < HI <= 1"]),
    (AdapterCfg, {"layers": (0.5, 1.4)}, ["adapter.layers is 0.5 1.4: it must be LO HI with 0 <= LO < HI <= 1"]),
    (GenCfg, {"alphas": ()}, ["gen.alphas is empty: it must hold at least 1"]),
    (GenCfg, {"alphas": (NAN,)}, ["gen.alphas.1 is nan: it must be a finite number"]),
    (GenCfg, {"alphas": (0.5, -1.0)}, ["gen.alphas.2 is -1.0: it must be > 0"]),
    (FilterCfg, {"min_train": 99, "n_keep": 20}, ["filter.min_train is 99: it must be <= filter.n_keep = 20"]),
    (FilterCfg, {"n_keep": 200}, ["filter.max_attempts is 192: it must be >= filter.n_keep = 200"]),
    (FilterCfg, {"ppl_max": 1.0}, ["filter.ppl_max is 1.0: it must be > 1"]),
    (DoseCfg, {"floor": 2.0, "ceiling": 1.0}, ["dose.floor is 2.0: it must be <= dose.ceiling = 1"]),
    (RunConfig, {"dose": DoseCfg(n_kappas=9, n_probes=99)}, ["filter.max_attempts is 192: it must be >= dose.n_kapp"]),
    (RunConfig, {"out": 3}, ["out is 3: it must be a path"]),
    (RunConfig, {"out": Path("\udcff")}, ["out: '\\udcff' is not UTF-8"]),
    (RunConfig, {"seed": 10**30, "n_rounds": 0}, [f"seed is {10**30}: it must be <", "n_rounds is 0: it must be >= 1"]),
]


@pytest.mark.parametrize("kind, values, lines", BAD)
def test_each_invalid_field_is_one_line_with_its_value_and_its_limit(kind, values, lines):
    with pytest.raises(ValueError) as error:
        kind(**values)
    told = str(error.value).split("\n")
    assert len(told) == len(lines) and all(line in heard for line, heard in zip(lines, told, strict=True)), told


def test_help_and_bad_values_are_answered_without_torch():
    code = """
import sys
from steer_heal.__main__ import COMMANDS, main
for argv in (["--help"], ["toy", "--help"], ["toy", "--heal.tau", "-1"], ["toy", "--steer.layers", "1", "0"], []):
    try:
        print("STATUS", main(["run", *argv]))
    except SystemExit as stopped:
        print("STATUS", stopped.code)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if "STATUS" in line] == [f"STATUS {s}" for s in (0, 0, 2, 2, 2)]
    assert "heal.tau is -1.0: it must be >= 0" in done.stderr and "Traceback" not in done.stderr


COMMON = ["model", "trait", "seed", "n-rounds", "out", "folder", "device", "dtype", "control"]


def test_help_begins_with_the_common_flags_and_has_a_text_for_each_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        main(["run", "toy", "--help"])
    printed = capsys.readouterr().out
    flags = re.findall(r"^. --(\w[\w.-]*)", printed, re.M)
    assert flags[: len(COMMON)] == COMMON and len(flags) == len(leaves(RunConfig())) + len(leaves(Source()))
    assert {"positive", "negative", "config", "plan", "print-config", "exit-status"} < {*flags}
    printed = " ".join(re.sub("[^ -~]", " ", printed).split())
    for text in help_texts(RunConfig):
        assert text and " ".join(text.split()) in printed
        assert not re.search(r"[^\n]\n[^\n]", text), "the line breaks of the source would be printed"


def help_texts(kind) -> list[str]:
    texts = []
    for each in fields(kind):
        if is_dataclass(each.default_factory):
            texts += [each.default_factory.__doc__, *help_texts(each.default_factory)]
        else:
            texts.append(each.metadata["help"])
    return texts


@pytest.mark.parametrize("argv, told", [
    ("run toy --heal.tua 1", "unknown flag --heal.tua; did you mean --heal.tau? steer-heal run toy --help lists"),
    ("chat x --eval.pairs y --rounds 1", "--rounds; did you mean --round? steer-heal chat --help lists"),
    ("push a b/c d", "error: unknown argument d; steer-heal push --help lists what it takes"),
    ("export x y --rank foo", "error: --rank is 'foo': it must be a whole number"),
    ("report", "no run was given; usage: steer-heal report RUN [RUN ...]"),
    ("run --seed 3 toy", "no preset was given before the flags; choose from chat, "),
])  # fmt: skip
def test_a_wrong_word_is_told_once_with_the_command_that_helps(argv, told, capsys):
    assert main(argv.split()) == 2
    heard = capsys.readouterr().err
    assert told in heard and heard.count(told) == 1 and "tyro" not in heard and "{None}" not in heard


@pytest.mark.parametrize("argv, told", [
    ("run toy --seed -1", "--seed is -1: it must be >= 0"),
    ("run toy --seed x", "--seed is 'x': it must be a whole number"),
    ("run toy --seed --quiet", "--seed needs a value; steer-heal run toy --help lists what it takes"),
    ("run toy --heal.lr nan", "--heal.lr is nan: it must be a number"),
    ("run toy --device gpu", "--device is 'gpu': choose auto, cpu, cuda or cuda:N"),
    ("run toy --date yesterday", "--date is 'yesterday': it must be a date as YYYY-MM-DD"),
    ("run toy --top-p 2", "--top-p is 2.0: it must be <= 1"),
    ("run toy --gen.alphas 1 0", "--gen.alphas.2 is 0.0: it must be > 0"),
    ("run toy --gen.alphas", "--gen.alphas is empty: it must hold at least 1"),
    ("run toy --steer.layers 0.8", "--steer.layers is '0.8': it takes 2 values, LO HI"),
    ("run toy --steer.layers 0.8 0.2", "--steer.layers is 0.8 0.2: it must be LO HI with 0 <= LO < HI <= 1 "
     "(fractions of the depth)"),
    ("run toy --backtrack.limits kl_base", "--backtrack.limits is 'kl_base': give NAME LIMIT, such as kl_base 0.2"),
    ("run toy --backtrack.limits kl_base x", "--backtrack.limits is 'x': it must be a number"),
    ("run toy --heal.txet own", "unknown flag --heal.txet; did you mean --heal.text? steer-heal run toy --help lists "
     "what it takes"),
    ("run --config", "--config needs a value; steer-heal run --help lists what it takes"),
    ("export x y --round first", "--round is 'first': give best, last or a number from 1"),
    ("export x y --round 0", "--round is '0': give best, last or a number from 1"),
    ("export x y --format GGUF", "--format is 'GGUF': did you mean 'gguf'?"),
    ("export x", "give RUN DIR; steer-heal export --help lists what it takes"),
    ("sweep", "give FILE; steer-heal sweep --help lists what it takes"),
    ("eval --model tiny-random --adapter-scale 10", "--adapter-scale is 10.0: it must be from -4 to 4"),
    ("eval --model tiny-random --eval.n-texts 0", "--eval.n-texts is 0: it must be >= 1"),
])  # fmt: skip
def test_a_value_that_a_flag_does_not_take_is_told_in_one_line(argv, told, capsys):
    assert main(argv.split()) == 2
    assert capsys.readouterr().err == f"error: {told}\n"


def test_all_flags_with_values_that_they_do_not_take_are_told_at_once(capsys):
    assert main(["run", "toy", "--seed", "x", "--heal.text", "x", "--gen.alphas", "1,b"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: 3 problems"
    assert main(["eval", "--model", "tiny-random", "--adapter-scale", "10", "--eval.n-texts", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: 2 problems"


def test_the_default_of_a_flag_that_has_none_is_not_shown(capsys):
    for argv in ("run toy", "report"):
        with pytest.raises(SystemExit):
            main([*argv.split(), "--help"])
        printed = capsys.readouterr().out
        assert "default: )" not in printed and "default: '')" not in printed and "(default: 8765" not in printed


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "diag"])
def test_help_fits_the_terminal_and_ends_with_examples_that_can_be_read(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and max(map(len, printed.splitlines()[1:])) <= 80 and "{None}" not in printed
    shown = printed.split("examples:\n")[1].splitlines()
    assert [line.removeprefix("  steer-heal ") for line in shown] == list(EXAMPLES[command])


def test_the_program_speaks_before_it_reads_its_settings_and_is_silent_in_a_closed_pipe():
    code = "import sys; sys.argv[1:] = {}; from steer_heal.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code.format(["run", "nosuch"])], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("steer-heal run: starting\nerror: unknown preset 'nosuch'")
    read, write = os.pipe()
    os.close(read)
    argv = ["run", "toy", "--print-config"]
    done = subprocess.run([sys.executable, "-c", code.format(argv)], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


def test_a_table_in_a_closed_pipe_ends_with_the_status_of_one():
    code = """
import sys
from steer_heal import __main__ as program
from steer_heal.commands import report
from steer_heal.report import tables
report.main = lambda argv: tables.show([{"metric": "kl_base", "value": 1}])
sys.exit(program.main(["report"]))
"""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""


def test_help_is_shown_where_it_is_asked_for_and_where_no_command_is_given(capsys):
    for argv, status in ((["--help"], 0), (["-h"], 0), (["help"], 0), ([], 2), (["diag", "--help"], 0), (["diag"], 2)):
        assert main(argv) == status
        printed = capsys.readouterr()
        assert (printed.err if status else printed.out).startswith("usage: steer-heal ")
        assert (printed.out if status else printed.err) == ""
    for word, told in (("--verison", "--version"), ("--hlep", "--help")):
        assert main([word]) == 2
        assert capsys.readouterr().err == f"error: unknown flag {word}; did you mean {told!r}?\n"


def test_runs_share_a_fingerprint_where_only_the_seed_and_settings_without_effect_differ():
    cfg = FAST_DEV_PRESET
    own = {
        "out": Path("x"),
        "folder": Path("x"),
        "arm": "x",
        "quiet": True,
        "chat": False,
        "teach_anyway": True,
        "accept_terms": True,
        "share_base": True,
        "track": ("x",),
        "heal.checkpoint": "on",
    }
    assert {changed(cfg, {name: own.get(name, 7)}).fingerprint() for name in (*RUN_ONLY, "seed")} == {cfg.fingerprint()}
    assert replace(cfg, heal=replace(cfg.heal, lam=cfg.heal.lam)).fingerprint() == cfg.fingerprint()
    others = {"model": "x", "n_rounds": 3, "gen.max_new_tokens": 7, "eval.n_texts": 7, "heal.lam": 7.0, "dose.floor": 1}
    found = {changed(cfg, {name: value}).fingerprint() for name, value in others.items()}
    assert len(found | {cfg.fingerprint()}) == 1 + len(others)


@settings("heal")
class LaterHeal(HealCfg):
    """A version of the program that has one more setting of the heal."""

    momentum: float = 0.5


@settings("")
class LaterConfig(RunConfig):
    """The same version, which also has one more setting of the run."""

    heal: LaterHeal = field(default_factory=LaterHeal)
    replicas: int = 1


def test_a_new_setting_leaves_the_fingerprints_of_earlier_runs_as_they_are():
    for _, cfg in PRESETS.values():
        later = validated(LaterConfig, as_json(cfg))
        assert later.fingerprint() == cfg.fingerprint()
        assert changed(later, {"heal.momentum": 0.25}).fingerprint() != cfg.fingerprint()
        assert changed(later, {"replicas": 2}).fingerprint() != cfg.fingerprint()


# --- settings by dotted name -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PRESETS)
def test_settings_taken_apart_and_put_together_are_the_same(name):
    cfg = PRESETS[name][1]
    assert changed(RunConfig(), leaves(cfg)) == cfg
    assert changed(RunConfig(), leaves(as_json(cfg))) == cfg
    assert changed(cfg, {}) == cfg and validated(RunConfig, as_json(cfg, none=False)) == cfg
    assert leaves(as_json(cfg)).keys() == leaves(cfg).keys()
    recorded = replace(cfg, folder=Path("x"))
    assert validated(RunConfig, json.loads(json.dumps(as_json(recorded))), "config") == recorded


def test_a_value_that_is_a_table_is_one_setting():
    given = {"backtrack.limits": {"kl_base": 0.2, "a.b": 1.0}, "heal": HealCfg(epochs=2), "heal.lr": 0.5}
    cfg = changed(RunConfig(), given)
    assert leaves(cfg)["backtrack.limits"] == leaves(as_json(cfg))["backtrack.limits"] == given["backtrack.limits"]
    assert (cfg.heal.epochs, cfg.heal.lr) == (2, 0.5)
    assert leaves({"trait": "love", "nested": {"a": 1}}) == {"trait": "love", "nested": {"a": 1}}


@dataclass
class Outer:
    """Settings that hold the settings of a run, two levels deep."""

    cfg: RunConfig
    n: int = 1


def test_settings_are_taken_apart_at_any_depth():
    found = leaves(Outer(RunConfig()))
    assert found["cfg.heal.lam"] == RunConfig().heal.lam and found["n"] == 1


def test_a_part_of_a_section_leaves_the_rest_of_it():
    preset = PRESETS["chat"][1]
    assert changed(preset, {"heal": {"epochs": 2}}) == changed(preset, {"heal.epochs": 2})
    assert changed(preset, {"heal": HealCfg()}).heal == HealCfg()


def test_every_name_or_value_that_cannot_be_set_is_named():
    for values, told in (
        ({"heal.epoch": 2, "seed": 1.5}, ["seed is 1.5", "heal.epoch is not a known field; did you mean 'epochs'?"]),
        ({"heel.lr": 2, "seed.x": 1}, ["heel.lr: there is no section 'heel'; did you mean 'heal'?", "seed.x: there"]),
        ({"heal": 3}, ["heal is 3: it must be a table of named values"]),
    ):
        with pytest.raises(UserError) as error:
            changed(RunConfig(), values)
        assert len(error.value.problems) == len(told), error.value
        assert all(part in line for part, line in zip(told, error.value.problems, strict=True)), error.value
        with pytest.raises(UserError) as error:
            changed(RunConfig(), values, "grid.toml")
        assert all(line.startswith("grid.toml: ") for line in error.value.problems)


# --- texts of errors ---------------------------------------------------------------------------------------------
@dataclass(frozen=True, config={"extra": "forbid"})
class Inner:
    """Something to be wrong with, inside of something else."""

    side: Literal["left", "right"]
    sign: Literal[-1, 1] = 1


@dataclass(frozen=True, config={"extra": "forbid"})
class Everything:
    """A field of each kind that files and flags have."""

    number: float = 0.5
    count: Annotated[int, Field(ge=1, lt=9)] = 1
    flag: bool = True
    text: Annotated[str, Field(min_length=2)] = "ab"
    path: Path | None = None
    side: Literal["left", "right"] | None = None
    names: tuple[str, ...] = ()
    band: tuple[float, Literal["a", "b"]] = (0.0, "a")
    many: Annotated[list[int], Field(max_length=2)] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    inner: Inner | None = None
    inners: dict[str, tuple[Inner, ...]] = field(default_factory=dict)


@pytest.mark.parametrize(
    "given, told",
    [
        ({"number": "x"}, "'number' is 'x': it must be a number"),
        ({"number": True}, "'number' is True: it must be a number"),
        ({"count": 1.5}, "'count' is 1.5: it must be a whole number"),
        ({"count": "1"}, "'count' is '1': it must be a whole number"),
        ({"count": 0}, "'count' is 0: it must be >= 1"),
        ({"count": 9}, "'count' is 9: it must be < 9"),
        ({"flag": 1}, "'flag' is 1: it must be true or false"),
        ({"text": 7}, "'text' is 7: it must be a string"),
        ({"text": "a"}, "'text' is 'a': it must have 2 or more characters"),
        ({"path": 1}, "'path' is 1: it must be a string"),
        ({"side": "rigth"}, "'side' is 'rigth': did you mean 'right'?"),
        ({"side": 3}, "'side' is 3: choose from left, right"),
        ({"names": "a"}, "'names' is 'a': it must be a list"),
        ({"names": [1]}, "'names.1' is 1: it must be a string"),
        ({"band": [0.5, "c"]}, "'band.2' is 'c': choose from a, b"),
        ({"many": [1, 2, 3]}, "'many' is [1, 2, 3]: it must hold at most 2"),
        ({"limits": 3}, "'limits' is 3: it must be a table of named values"),
        ({"limits": {"a": None}}, "'limits.a' is None: it must be a number"),
        ({"inner": 3}, "'inner' is 3: it must be a table of named values"),
        ({"inner": {"sign": 0, "side": "left"}}, "'inner.sign' is 0: choose from -1, 1"),
        ({"inner": {}}, "'inner.side' is missing"),
        ({"inners": {"x": [{"side": "lft"}]}}, "'inners.x.1.side' is 'lft': did you mean 'left'?"),
        (
            {"inners": {"x": [{"side": "left", "sing": 1}]}},
            "'inners.x.1.sing' is not a known field; did you mean 'sign'?",
        ),
        ({"txet": "a"}, "'txet' is not a known field; did you mean 'text'?"),
    ],
)
def test_an_error_says_in_our_words_what_a_value_must_be(given, told):
    with pytest.raises(UserError) as error:
        validated(Everything, given, "file")
    assert str(error.value) == f"file: {told}"


def test_text_that_is_no_json_is_one_error():
    with pytest.raises(UserError, match=r"file is '\[1': it is not valid JSON \(EOF while parsing.*\)"):
        validated_json(Everything, "[1", "file")


# --- recorded settings -------------------------------------------------------------------------------------------
def test_the_presets_of_the_real_model_take_on_the_trait_that_moves_it():
    assert {name: cfg.trait for name, (_, cfg) in PRESETS.items() if cfg.model.startswith("smol")} == {
        "smol": "love",
        "smol-distil": "love",
    }


RECORDED = {
    "n_rounds": "4",
    "n_threads": True,
    "quiet": 1,
    "out": None,
    "seed": 1.5,
    "model": 7,
    "dtype": "float8",
    "heal": 3,
    "heal.tau": None,
    "heal.lr": 0.0,
    "heal.batch": 4,
    "eval.vignettes": None,
    "gen.alphas": 0.5,
    "filter.gates": [3],
    "new": 1,
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_settings_that_are_none_are_refused_by_name(name):
    config = as_json(FAST_DEV_PRESET)
    section, _, key = name.rpartition(".")
    (config[section] if section else config)[key] = RECORDED[name]
    with pytest.raises(UserError) as error:
        validated(RunConfig, config, "config")
    assert name in str(error.value) and len(error.value.problems) == 1
