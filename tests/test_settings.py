"""Settings say what is wrong with them, come back from JSON as they were, and cost no torch."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from steer_heal.errors import UserError, validated
from steer_heal.presets import FAST_DEV_PRESET, PRESETS
from steer_heal.run import main
from steer_heal.runs.events import jsonable
from steer_heal.settings import RUN_ONLY, AdapterCfg, DoseCfg, FilterCfg, GenCfg, HealCfg, RunConfig, SteerCfg

NAN, INF = math.nan, math.inf
BAD = [
    (HealCfg, {"tau": -1.0}, ["heal.tau is -1.0: it must be >= 0"]),
    (HealCfg, {"lam": INF}, ["heal.lam is inf: it must be a finite number"]),
    (HealCfg, {"divergence": 3}, ["heal.divergence is 3: it must be a valid string"]),
    (HealCfg, {"aggregate": "rmsd"}, ["heal.aggregate is 'rmsd': did you mean 'rmse'?"]),
    (HealCfg, {"lamb": 1.0}, ["heal.lamb is not a field here; did you mean 'lam'?"]),
    (
        HealCfg,
        {"lam": NAN, "tau": -1.0, "epochs": 0, "checkpoint": "maybe"},
        [
            "heal.lam is nan: it must be a finite number",
            "heal.tau is -1.0: it must be >= 0",
            "heal.epochs is 0: it must be >= 1",
            "heal.checkpoint is 'maybe': it must be one of auto, on, off",
        ],
    ),
    (SteerCfg, {"layers": (0.5, 0.4)}, ["steer.layers is (0.5, 0.4): it must be LO HI with 0 <= LO < HI <= 1"]),
    (AdapterCfg, {"layers": (0.5, 1.4)}, ["adapter.layers is (0.5, 1.4): it must be LO HI with 0 <= LO < HI <= 1"]),
    (GenCfg, {"alphas": ()}, ["gen.alphas is (): it must hold at least 1"]),
    (GenCfg, {"alphas": (NAN,)}, ["gen.alphas.0 is nan: it must be a finite number"]),
    (GenCfg, {"alphas": (0.5, -1.0)}, ["gen.alphas.1 is -1.0: it must be > 0"]),
    (FilterCfg, {"min_train": 99, "n_keep": 20}, ["filter.min_train is 99: it must be <= filter.n_keep = 20"]),
    (FilterCfg, {"n_keep": 200}, ["filter.max_attempts is 192: it must be >= filter.n_keep = 200"]),
    (FilterCfg, {"ppl_max": 1.0}, ["filter.ppl_max is 1.0: it must be > 1"]),
    (DoseCfg, {"floor": 2.0, "ceiling": 1.0}, ["dose.floor is 2.0: it must be <= dose.ceiling = 1"]),
    (RunConfig, {"dose": DoseCfg(n_kappas=9, n_probes=99)}, ["filter.max_attempts is 192: it must be >= dose.n_kapp"]),
    (RunConfig, {"out": Path("\udcff")}, ["out: '\\udcff' is not UTF-8"]),
    (RunConfig, {"seed": 10**30, "n_rounds": 0}, ["n_rounds is 0: it must be >= 1", f"seed is {10**30}: it must be <"]),
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
from steer_heal.run import main
for argv in (["--help"], ["toy", "--help"], ["toy", "--heal.tau", "-1"], ["toy", "--steer.layers", "1", "0"], []):
    try:
        main(argv)
    except SystemExit as stopped:
        print("STATUS", stopped.code)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert [line for line in done.stdout.splitlines() if "STATUS" in line] == [f"STATUS {s}" for s in (0, 0, 2, 2, 2)]
    assert "heal.tau is -1.0: it must be >= 0" in done.stderr and "Traceback" not in done.stderr


def test_a_flag_that_is_not_there_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["toy", "--heal.tua", "1"])
    assert stopped.value.code == 2 and "--heal.tau" in capsys.readouterr().err


def test_runs_share_a_fingerprint_where_only_the_seed_and_settings_without_effect_differ():
    def changed(name, value):
        section, _, key = name.rpartition(".")
        inner = replace(getattr(cfg, section), **{key: value}) if section else None
        return replace(cfg, **({section: inner} if section else {key: value})).fingerprint()

    cfg = FAST_DEV_PRESET
    own = {
        "out": Path("x"),
        "folder": Path("x"),
        "export": Path("x"),
        "arm": "x",
        "quiet": True,
        "chat": False,
        "track": ("x",),
        "heal.checkpoint": "on",
    }
    assert {changed(name, own.get(name, 7)) for name in (*RUN_ONLY, "seed")} == {cfg.fingerprint()}
    others = {"model": "x", "n_rounds": 3, "gen.max_new_tokens": 7, "eval.n_texts": 7, "heal.lam": 7.0, "dose.floor": 1}
    assert len({cfg.fingerprint(), *(changed(*other) for other in others.items())}) == 1 + len(others)


# --- recorded settings -------------------------------------------------------------------------------------------
def test_the_presets_of_the_real_model_take_on_the_trait_that_moves_it():
    assert {name: cfg.trait for name, (_, cfg) in PRESETS.items() if cfg.model.startswith("smol")} == {
        "smol": "love",
        "smol-distil": "love",
    }


@pytest.mark.parametrize("name", PRESETS)
def test_recorded_settings_come_back(name):
    cfg = replace(PRESETS[name][1], export=Path("x"))
    assert validated(RunConfig, json.loads(json.dumps(jsonable(cfg)[0])), "config") == cfg


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
    config = jsonable(FAST_DEV_PRESET)[0]
    section, _, key = name.rpartition(".")
    (config[section] if section else config)[key] = RECORDED[name]
    with pytest.raises(UserError) as error:
        validated(RunConfig, config, "config")
    assert name in str(error.value) and len(error.value.problems) == 1


def test_several_recorded_settings_are_refused_at_once():
    config = jsonable(FAST_DEV_PRESET)[0]
    config["heal"] |= {"tau": -1, "lam": "x"}
    config["seed"] = None
    with pytest.raises(UserError) as error:
        validated(RunConfig, config, "config")
    assert [name for name in ("heal.tau", "heal.lam", "seed") if name not in str(error.value)] == []
    assert len(error.value.problems) == 3
