"""Whatever is wrong with a command is said at once, before a model is loaded and without leaving a folder behind."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from steer_heal import plugins
from steer_heal.__main__ import main
from steer_heal.check import check
from steer_heal.commands.run import parse
from steer_heal.errors import UserError
from steer_heal.evals import EVALS, metrics_of
from steer_heal.inputs.files import DATA
from steer_heal.model import hub
from steer_heal.model.divergence import DIVERGENCES
from steer_heal.model.gguf import PACKAGED
from steer_heal.model.lm import load
from steer_heal.model.steering import METHODS
from steer_heal.model.student import ADAPTERS
from steer_heal.presets import FAST_DEV_PRESET, PRESETS
from steer_heal.settings import BUILT_IN, MODELS, changed
from steer_heal.stages.filter import GATES


def problems(*flags: str) -> list[str]:
    with pytest.raises(UserError) as error:
        check(parse(["fast-dev", *flags])[1])
    return error.value.problems


LONG = "x" * 300


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--heal.divergence kl_revv", "heal.divergence is 'kl_revv': did you mean 'kl_rev'?"),
        ("--steer.method mean", "steer.method is 'mean': did you mean 'mean_diff'?"),
        ("--filter.gates perplexity nothing", "filter.gates is 'nothing': choose from perplexity"),
        ("--filter.gates short", "filter.gates is ('short',): without a gate for incoherent text"),
        ("--eval.evals drft", "eval.evals is 'drft': did you mean 'drift'?"),
        ("--eval.evals drift", "the target of trait 'authority' needs moral_foundations or likelihood or contrast"),
        ("--steer.backend steering-lite", "pip install 'git+https://github.com/wassname/steering-lite.git'"),
        ("--eval.backend tinymfv", "pip install 'git+https://github.com/wassname/tinymfv.git'"),
        ("--quantize nf4", "pip install 'steer-heal[quantize]'"),
        ("--eval.vignettes nowhere.jsonl", "eval.vignettes is 'nowhere.jsonl': there is no such file"),
        (f"--eval.instrument {LONG}", f"eval.instrument is '{LONG}': there is no such file"),
        ("--out README.md/x", "out is 'README.md/x': this folder cannot be created"),
        (f"--out {LONG}", f"out is '{LONG}': this folder cannot be created"),
        ("--out /proc/x", "out is '/proc/x': this folder cannot be created (/proc is not writable: "),
        ("--device cuda:99", "device is 'cuda:99': "),
    ],
)
def test_a_wrong_value_is_named_with_its_setting_and_the_fix(flags, told, tmp_path):
    found = problems("--out", str(tmp_path / "out"), *flags.split())
    assert told in found[0] and not (tmp_path / "out").exists()


def test_all_that_is_wrong_is_said_at_once(capsys, tmp_path):
    (tmp_path / "v.jsonl").write_text('{"id": "a", "foundation_coarse": "Cares", "text": "x"}\n{"id": "a"\n\n[]\n')
    instrument = (DATA / "toylm/instrument.toml").read_text()
    (tmp_path / "i.toml").write_text(instrument.replace("nudge", "nugde"))
    files = (
        f"--trait nobody --steer.contexts nowhere.jsonl --eval.vignettes {tmp_path}/v.jsonl "
        f"--eval.instrument {tmp_path}/i.toml --quantize nf4 --out {tmp_path}/v.jsonl/out"
    )
    names = "--heal.divergence kl --steer.method mean --eval.evals drft"
    of_files = [
        "trait is 'nobody'",
        "steer.contexts is 'nowhere.jsonl'",
        "v.jsonl line 1",
        "v.jsonl line 2",
        "v.jsonl line 4",
        "'nudge' is missing",
        "'nugde' is not a known field; did you mean 'nudge'?",
        "quantize is 'nf4'",
        "out is",
    ]
    of_names = ["heal.divergence is 'kl'", "steer.method is 'mean'", "eval.evals is 'drft'"]
    for flags, expected in ((f"{files} {names}", of_files), (f"--out {tmp_path}/out {names}", of_names)):
        assert main(["run", "fast-dev", *flags.split()]) == 2
        first, *listed = capsys.readouterr().err.splitlines()
        assert first == f"error: {len(expected)} problems" and len(listed) == len(expected), listed
        assert all(line.startswith("- ") and part in line for line, part in zip(listed, expected, strict=True)), listed


def test_what_needs_no_model_is_refused_without_torch(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for folder, name in (("bare", "notes.txt"), ("unweighed", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    (tmp_path / "mine.toml").touch()
    code = """
import sys
from steer_heal.__main__ import main
commands = (
    "run fast-dev --trait autority", "run fast-dev --eval.vignettes nowhere.jsonl", "run fast-dev --out file",
    "run fast-dev --folder .", "run fas-dev", "run --config nowhere", "resume nowhere", "chat nowhere",
    "run fast-dev --model ./nowhere", "run fast-dev --model out/nowhere/export", "run fast-dev --model nowhere.gguf",
    "eval --model ./gone --trait autority", "eval --model data/toylm --eval.vignettes nowhere.jsonl",
    "eval --run nowhere", "verify nowhere", "report nowhere", "push nowhere a/b", "sweep nowhere", "export nowhere x",
    "inspect nowhere", "run fast-dev --filter.gates perplexty", "run fast-dev --eval.evals perssona",
    "run fast-dev --steer.method meandiff", "run fast-dev --adapter.kind lorra", "run fast-dev --heal.divergence kl",
    "run fast-dev --model smollm2-135m-instrct", "run fast-dev --model empty", "run fast-dev --model file",
    "run fast-dev --model bare", "run fast-dev --model unweighed", "run fast-dev --trait ./mine",
)
for command in commands:
    assert main(command.split()) in (1, 2), command
    print(f"REFUSED {command}", file=sys.stderr)
    for heavy in ("torch", "transformers", "matplotlib"):
        assert heavy not in sys.modules, (command, heavy)
"""
    env = os.environ | {"BEARTYPE": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for told in (
        "model is './gone': there is no such folder or file",
        "filter.gates is 'perplexty': did you mean 'perplexity'?",
        "model is 'smollm2-135m-instrct': did you mean 'smollm2-135m-instruct'?",
        "model is 'empty': this folder is empty",
        "model is 'file': it is neither a folder nor a GGUF file (.gguf)",
        "model is 'bare': this folder has no config.json",
        "model is 'unweighed': this folder holds no weights (*.safetensors)",
        "trait is './mine': the name of a trait file ends in .toml; did you mean './mine.toml'?",
    ):
        assert told in done.stderr, told
    assert done.stderr.count("error: ") == done.stderr.count("REFUSED ") == 31


def test_the_names_that_need_no_torch_are_those_of_the_tables():
    plugins.load(FAST_DEV_PRESET)  # takes out of the tables what another test has put there
    tables = {
        "heal.divergence": DIVERGENCES,
        "steer.method": METHODS,
        "adapter.kind": ADAPTERS,
        "filter.gates": GATES,
        "eval.evals": EVALS,
    }
    assert {setting: tuple(table) for setting, table in tables.items()} == BUILT_IN
    assert tuple(PACKAGED) == MODELS


def test_many_problems_are_counted(tmp_path, capsys):
    (tmp_path / "v.jsonl").write_text("{\n" * 100)
    assert main(["run", "fast-dev", "--out", str(tmp_path), "--eval.vignettes", str(tmp_path / "v.jsonl")]) == 2
    printed = capsys.readouterr().err
    assert "line 20 " in printed and "line 21 " not in printed and "and 80 more" in printed


def test_every_preset_passes(tmp_path):
    for _, cfg in PRESETS.values():
        found = check(replace(cfg, out=tmp_path))
        assert found.trait.name == cfg.trait and found.pairs


OWN = """
description = "Says what is true."
target = TARGET
sign = 1
off_targets = ["care_nats", "kl_base"]
narration = []
prompts = [PROMPTS]
[persona]
positive = "You are honest."
negative = "You are flattering."
[system]
steered = ""
plain = ""
"""
PAIR = """
[[pairs]]
prompt = "Is my cake good?"
positive = "It is dry."
negative = "It is perfect."
"""


def own_trait(folder: Path, target: str, pairs: str = PAIR) -> str:
    """The path of a trait file that needs no other file."""
    prompts = ", ".join(f'"How is cake {i}?"' for i in range(100))
    (folder / "mine.toml").write_text(OWN.replace("TARGET", target).replace("PROMPTS", prompts) + pairs)
    return str(folder / "mine.toml")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_trait_by_path_needs_no_other_file(preset, tmp_path, monkeypatch):
    path = own_trait(tmp_path, '"contrast_nats"')
    monkeypatch.chdir(tmp_path)
    for given in (path, "mine.toml"):
        found = check(parse([preset, "--out", str(tmp_path / "out"), "--trait", given])[1])
        assert found.trait.name == "mine" and found.trait.target == "contrast_nats"
        assert found.prompts[0] == "How is cake 0?" and found.pairs[0].positive == "It is dry."


@pytest.mark.parametrize(
    "target, evals, chosen, others",
    [
        ('"contrast_nats"', "contrast drift", "contrast_nats", ("kl_base",)),
        ('"contrast_nats"', "contrast panel drift", "contrast_nats", ("kl_base",)),
        ('"contrast_nats"', "contrast panel", "contrast_nats", ("panel_rms_nats",)),
        ('"persona_log_odds"', "persona panel", "persona_log_odds", ()),
        ('["contrast_nats", "authority_nats"]', "moral_foundations", "authority_nats", ("care_nats",)),
        ('["contrast_nats", "authority_nats"]', "moral_foundations contrast", "contrast_nats", ("care_nats",)),
        ('["authority_nats", "contrast_nats"]', "moral_foundations contrast", "authority_nats", ("care_nats",)),
    ],
)
def test_the_first_target_that_is_reported_is_chosen_and_others_are_left_out(target, evals, chosen, others, tmp_path):
    flags = ["--trait", own_trait(tmp_path, target), "--out", str(tmp_path / "out"), "--eval.evals", *evals.split()]
    trait = check(parse(["fast-dev", *flags])[1]).trait
    assert (trait.target, trait.off_targets) == (chosen, others)


@pytest.mark.parametrize(
    "target, pairs, evals, told",
    [
        ('["authority_nats", "persona_log_odds"]', PAIR, "drift", ["needs moral_foundations or persona; add it"]),
        ('["contrast_nats", "authority_nat"]', PAIR, "contrast", ["'authority_nat': did you mean 'authority_nats'?"]),
        ('["authority_nats", "coherence"]', PAIR, "moral_foundations", ["target is 'coherence': choose from"]),
        ('"authority_nats"', "", "moral_foundations contrast", ["trait 'mine' has no pairs; add [[pairs]]"]),
    ],
)
def test_a_trait_without_a_target_or_its_data_names_what_is_missing(target, pairs, evals, told, tmp_path):
    flags = ["--trait", own_trait(tmp_path, target, pairs), "--eval.evals", *evals.split()]
    found = problems("--out", str(tmp_path / "out"), *flags)
    assert len(found) == len(told) and all(part in line for part, line in zip(told, found, strict=True)), found


def test_an_off_target_that_is_no_metric_is_named(tmp_path):
    path = Path(own_trait(tmp_path, '"contrast_nats"'))
    path.write_text(path.read_text().replace("care_nats", "care_nat"))
    found = problems("--out", str(tmp_path / "out"), "--trait", str(path), "--eval.evals", "contrast")
    assert "off_targets is 'care_nat': did you mean 'care_nats'?" in found[0]


def test_pairs_are_asked_for_only_by_the_eval_that_reads_them(tmp_path):
    flags = ["--trait", own_trait(tmp_path, '"persona_log_odds"', ""), "--eval.evals", "persona"]
    found = check(parse(["fast-dev", "--out", str(tmp_path / "out"), *flags])[1])
    assert not found.pairs and "eval.pairs" not in found.sha256


def test_without_a_gate_for_broken_text_another_way_to_a_dose_passes(tmp_path):
    for mode in ("fixed", "iso_kl"):
        check(parse(["fast-dev", "--out", str(tmp_path), "--filter.gates", "short", "--dose.mode", mode])[1])


def test_a_hub_model_is_refused_within_seconds_where_there_is_no_hub(monkeypatch, tmp_path):
    def unreachable(url, timeout):
        assert timeout <= 5 and url.endswith("nobody/nothing/resolve/main/config.json")
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(UserError) as error:
        load("nobody/nothing")
    told = str(error.value)
    assert "model is 'nobody/nothing'" in told and "no route" in told and "HF_HUB_OFFLINE" in told
    assert hub.HF_HUB_CACHE in told
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    assert hub.from_cache_alone("nobody/nothing"), "what is cached can be read"


def test_a_model_that_the_hub_knows_is_read_from_it(monkeypatch):
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url, timeout: None)
    assert not hub.from_cache_alone("nobody/nothing")


def test_an_unknown_preset_gets_the_nearest_name(capsys):
    assert main(["run", "tyo"]) == 2
    assert capsys.readouterr().err == "error: unknown preset 'tyo'; did you mean 'toy'?\n"


def test_limits_of_rounds_that_are_never_dropped_are_refused():
    cfg = changed(FAST_DEV_PRESET, {"backtrack.limits": {"kl_base": 0.2}})
    with pytest.raises(UserError, match="with backtrack.retries 0 no round is dropped; give --backtrack.retries"):
        check(cfg)
    check(changed(cfg, {"backtrack.retries": 1}))


def test_a_target_that_rises_towards_the_persona_has_no_other_sign(tmp_path):
    """Authority is a foundation that should fall. The likelihood of the replies of its positive side should rise."""
    for preset, target, sign in (("toy", "authority_nats", -1), ("smol-distil", "contrast_nats", 1)):
        trait = check(parse([preset, "--out", str(tmp_path / "out"), "--trait", "authority"])[1]).trait
        assert (trait.target, trait.sign) == (target, sign)
    upwards = {metric.name for metric in metrics_of(tuple(EVALS)) if metric.towards_persona}
    assert upwards == {"contrast_nats", "persona_log_odds", "judge_trait", "classifier_trait"}
