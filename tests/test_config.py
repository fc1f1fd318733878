import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from steer_heal.config import FAST_DEV_PRESET, PRESETS, RunConfig, _check_pool, check, from_dict
from steer_heal.events import jsonable
from steer_heal.records import UserError
from steer_heal.run import main
from steer_heal.stages.cfg import HealCfg
from steer_heal.traits import load_trait

BAD = {
    "--heal.tau -1": "heal.tau is -1.0: it must be >= 0 nats",
    "--steer.layers 0.5 0.4": "steer.layers is (0.5, 0.4)",
    "--steer.layers 0.5 1.4": "steer.layers is (0.5, 1.4)",
    "--gen.alphas nan": "gen.alphas is (nan,)",
    "--gen.alphas": "gen.alphas is (): it must be one or more finite numbers > 0",
    "--gen.alphas 0.5 -1": "gen.alphas is (0.5, -1.0)",
    "--filter.min-train 99 --filter.n-keep 20": "filter.min_train is 99: it must be <= filter.n_keep = 20",
    "--n-rounds 0": "n_rounds is 0",
    "--filter.gates": "without a gate for broken text every dose survives",
    "--trait nobody": "trait is 'nobody': it must be one of authority",
    "--eval.vignettes nowhere.jsonl": "eval.vignettes is 'nowhere.jsonl': there is no such file",
    "--eval.instrument nowhere.toml": "eval.instrument is 'nowhere.toml'",
    "--gen.prompts nowhere.jsonl": "gen.prompts is 'nowhere.jsonl'",
    "--steer.contexts nowhere.jsonl": "steer.contexts is 'nowhere.jsonl'",
    "--steer.n-contexts 100000": "steer.n_contexts is 100000",
    "--gen.n-prompts 1000": "evaluation prompts are never trained on",
    "--device cuda:7": "device is 'cuda:7'",
    "--steer.backend steering-lite": "pip install -e '.[steering-lite]'",
    "--quantize nf4": "pip install -e '.[quantize]'",
    "--eval.backend tinymfv": "pip install -e '.[tinymfv]'",
    "--out README.md/x": "out is 'README.md/x': no folder can be made there",
    f"--out {'x' * 300}": "no folder can be made there",
    f"--eval.vignettes {'x' * 5000}": "there is no such file",
    "--export README.md": "export is 'README.md': no folder can be made there",
    f"--seed {10**30}": "it must be within 64 bits",
    f"--n-threads {10**12}": "n_threads is 1000000000000",
    "--heal.lam inf": "heal.lam is inf: it must be >= 0 and finite",
    "--heal.tau inf": "heal.tau is inf",
    "--heal.weight-decay inf": "heal.weight_decay is inf",
    "--heal.lora-alpha inf": "heal.lora_alpha is inf",
    "--filter.ppl-max inf": "filter.ppl_max is inf",
}


@pytest.mark.parametrize("flags", BAD)
def test_a_wrong_value_names_the_field_the_value_and_the_limit(flags, capsys, tmp_path):
    try:
        status = main(["fast-dev", "--out", str(tmp_path), *flags.split(" ")])
    except SystemExit as stopped:
        status = stopped.code
    printed = " ".join("".join(capsys.readouterr()).replace("│", " ").split())
    assert BAD[flags] in printed
    assert status in (1, 2) and "Traceback" not in printed


def test_all_that_is_wrong_is_said_at_once(capsys, tmp_path):
    (tmp_path / "v.jsonl").write_text('{"id": "a", "foundation_coarse": "Cares", "text": "x"}\n{"id": "a"\n\n[]\n')
    (tmp_path / "i.toml").write_text(
        Path("data/toylm/instrument.toml").read_text().replace("nudge", "nugde").replace("{index}", "")
    )
    flags = (
        "--trait nobody --steer.contexts nowhere.jsonl --eval.backend tinymfv --steer.backend steering-lite --export README.md "
        f"--out {tmp_path}/v.jsonl/out --eval.vignettes {tmp_path}/v.jsonl --eval.instrument {tmp_path}/i.toml"
    )
    assert main(["fast-dev", *flags.split()]) == 2
    first, *problems = capsys.readouterr().err.splitlines()
    assert first == "error: 10 problems" and all(line.startswith("- ") for line in problems) and len(problems) == 10
    wanted = (
        "trait is 'nobody'",
        "steer.contexts is",
        "v.jsonl line 2 is not JSON",
        "v.jsonl line 4 is list",
        "'nugde' is not a field here; did you mean 'nudge'?",
        "'nudge' is None",
        "steer.backend is",
        "eval.backend is",
        "out is",
        "export is",
    )
    assert all(word in line for word, line in zip(wanted, problems, strict=True)), problems


def test_one_stage_s_settings_say_all_that_is_wrong_with_them():
    with pytest.raises(ValueError) as error:
        HealCfg(tau=-1.0, lam=math.nan, epochs=0, layers=(0.5, 0.5))
    assert [line.split(" is ")[0] for line in str(error.value).split("\n")] == [
        "heal.lam",
        "heal.tau",
        "heal.epochs",
        "heal.layers",
    ]


def test_a_prompt_that_comes_twice_would_be_trained_on_and_evaluated(tmp_path, capsys):
    rows = [json.dumps({"text": f"prompt {i % 40}"}) + "\n" for i in range(41)]
    (tmp_path / "p.jsonl").write_text("".join(rows))
    assert main(["fast-dev", "--out", str(tmp_path / "out"), "--gen.prompts", str(tmp_path / "p.jsonl")]) == 2
    assert "holds 'prompt 0' 2 times" in capsys.readouterr().err


def test_a_trait_without_a_prompt_is_one_problem():
    trait = replace(load_trait("authority"), prompts=())
    with pytest.raises(UserError, match="the pool of trait 'authority' holds 0"):
        _check_pool(FAST_DEV_PRESET, trait)


def test_many_problems_are_counted(tmp_path, capsys):
    (tmp_path / "v.jsonl").write_text("{\n" * 100)
    assert main(["fast-dev", "--out", str(tmp_path), "--eval.vignettes", str(tmp_path / "v.jsonl")]) == 2
    printed = capsys.readouterr().err
    assert "line 20 is not JSON" in printed and "line 21" not in printed and "and 80 more" in printed


def test_nothing_is_imported_or_written_before_the_configuration_holds(tmp_path):
    code = (
        "import sys; from steer_heal.run import main\n"
        f"status = main(['toy', '--trait', 'nobody', '--out', {str(tmp_path / 'out')!r}])\n"
        "assert status == 2 and 'torch' not in sys.modules, status"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not (tmp_path / "out").exists()


def test_every_preset_passes_its_own_checks():
    for _, cfg in PRESETS.values():
        assert check(cfg).name == "authority"


def test_evaluation_prompts_are_never_trained_on():
    cfg, trait = FAST_DEV_PRESET, check(FAST_DEV_PRESET)
    assert not set(trait.prompts[: cfg.gen.n_prompts]) & set(trait.prompts[-cfg.eval.n_prompts :])


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_comes_back_from_the_json_of_its_events(name):
    cfg = replace(PRESETS[name][1], export=Path("x"))
    assert from_dict(RunConfig, json.loads(json.dumps(jsonable(cfg)[0]))) == cfg


@pytest.mark.parametrize(
    "change",
    [
        {"n_rounds": "4"},
        {"n_rounds": True},
        {"quiet": 1},
        {"out": None},
        {"eval": {"vignettes": None}},
        {"seed": None},
        {"seed": 1.5},
        {"model": 7},
        {"dtype": "float8"},
        {"heal": {"divergence": "kl"}},
        {"heal": {"tau": None}},
        {"heal": 3},
        {"gen": {"alphas": 0.5}},
        {"gen": {"alphas": ["x"]}},
        {"filter": {"gates": ["none"]}},
        {"new": 1},
    ],
)
def test_a_configuration_of_another_version_is_not_taken(change):
    config = jsonable(FAST_DEV_PRESET)[0]
    changed = {k: {**config.get(k, {}), **v} if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises((TypeError, ValueError, AttributeError, KeyError)):
        from_dict(RunConfig, config | changed)
