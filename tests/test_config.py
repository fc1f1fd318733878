"""Settings as a file come back as they were; flags give tuples with spaces or commas."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import run_events, write_run

from steer_heal.__main__ import main
from steer_heal.commands.run import parse
from steer_heal.presets import PRESETS
from steer_heal.runs.config import as_toml, read_config
from steer_heal.settings import BacktrackCfg, RunConfig, as_json


def printed(capsys, *argv: str) -> str:
    assert main(["run", *argv, "--print-config"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", PRESETS)
def test_printed_settings_are_read_as_they_were(preset, capsys, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(printed(capsys, preset))
    assert read_config(path) == ("mine", PRESETS[preset][1])
    assert printed(capsys, "--config", str(path)) == path.read_text()


def test_settings_of_any_kind_are_read_as_they_were(tmp_path):
    cfg = replace(
        PRESETS["toy"][1],
        out=Path('a "b"\\c é 😀'),
        temperature=1.0,
        backtrack=BacktrackCfg(limits={"kl_base": 0.2, "a.b c": 1e-9}),
        filter=replace(PRESETS["toy"][1].filter, gates=()),
    )
    (tmp_path / "c.toml").write_text(as_toml(cfg), encoding="utf-8")
    assert read_config(tmp_path / "c.toml")[1] == cfg


def test_what_may_be_none_is_none_by_default():
    """A file cannot say None: it leaves it out."""
    for cfg in [cfg for _, cfg in PRESETS.values()]:
        nones = {key for key, value in flat(as_json(cfg)).items() if value is None}
        assert all(flat(as_json(RunConfig()))[key] is None for key in nones)


def flat(values: dict) -> dict:
    out = {}
    for key, value in values.items():
        out |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return out


def test_flags_replace_what_a_file_says(tmp_path):
    (tmp_path / "c.toml").write_text("n_rounds = 7\n[heal]\nlr = 0.5\ntau = 0.25\n")
    name, cfg, source = parse(["--config", str(tmp_path / "c.toml"), "--heal.lr", "0.125", "--seed", "3"])
    assert (name, source.print_config) == ("c", False)
    assert (cfg.n_rounds, cfg.seed, cfg.heal.lr, cfg.heal.tau) == (7, 3, 0.125, 0.25)
    assert cfg.gen == RunConfig().gen, "a setting that is left out has its default"


def test_an_earlier_run_gives_its_settings(tmp_path):
    start, *rest = run_events(1)
    of_a_sweep = replace(PRESETS["smol"][1], folder=tmp_path / "run", arm="lam=1", share_base=True)
    events = [replace(start, config=of_a_sweep, preset="smol"), *rest]
    assert read_config(write_run(tmp_path / "run", events)) == ("smol", PRESETS["smol"][1])


@pytest.mark.parametrize(
    "text, told",
    [
        ("[heel]\nlam = 3\n", "'heel' is not a known field; did you mean 'heal'?"),
        ("[heal]\ntau = -1.0\n", "heal.tau' is -1.0: it must be >= 0"),
        ("n_rounds =\n", "is not valid TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(text, told, tmp_path, capsys):
    (tmp_path / "c.toml").write_text(text)
    assert main(["run", "--config", str(tmp_path / "c.toml")]) == 2
    err = capsys.readouterr().err
    assert told in err and "c.toml" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--config", "nowhere.toml"], "error: --config is 'nowhere.toml': there is no such file"),
        (["--config", "docs"], "docs has no events.jsonl; give a run folder"),
        (["toy", "--config", "README.md"], "preset 'toy' and --config README.md were given"),
        (["toy", "--plan", "--print-config"], "--plan and --print-config were given; give one of them"),
    ],
)
def test_a_config_that_is_none_is_refused(argv, told, capsys):
    assert main(["run", *argv]) == 2
    assert told in capsys.readouterr().err


TUPLES = {
    "--gen.alphas": ("gen", "alphas", (0.5, 0.75, 1.0)),
    "--steer.layers": ("steer", "layers", (0.25, 0.75)),
    "--adapter.layers": ("adapter", "layers", (0.25, 0.75)),
    "--filter.gates": ("filter", "gates", ("spike", "loop")),
    "--eval.evals": ("eval", "evals", ("drift", "persona")),
    "--track": ("", "track", ("a", "b")),
}


def test_every_tuple_is_given_with_spaces_or_commas():
    default = as_json(RunConfig())
    lists = {key for key, value in flat(default).items() if isinstance(value, list)}
    whole = {"plugin", "plugin_set"}  # a path or a value may hold a comma
    assert lists - whole == {f"{section}.{key}".lstrip(".") for section, key, _ in TUPLES.values()}
    for flag, (section, key, value) in TUPLES.items():
        words = [str(each) for each in value]
        for given in ([flag, *words], [flag, ",".join(words)], [flag, f"{words[0]},", *words[1:]]):
            cfg = parse(["toy", "--seed", "3", *given, "--n-rounds", "2"])[1]
            assert getattr(getattr(cfg, section) if section else cfg, key) == value, given
            assert (cfg.seed, cfg.n_rounds) == (3, 2)
        assert getattr(getattr(cfg, section) if section else cfg, key) == value


@pytest.mark.parametrize("layers", [["0.3"], ["0.3,0.5,0.7"], ["0.7,0.3"], ["a,b"]])
def test_a_band_that_is_none_is_refused(layers, capsys):
    assert main(["run", "toy", "--steer.layers", *layers]) == 2
    assert "error: --steer.layers is" in capsys.readouterr().err
