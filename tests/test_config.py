import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from steer_heal.config import FAST_DEV_PRESET, PRESETS, RunConfig, check, from_dict
from steer_heal.events import jsonable
from steer_heal.run import main

BAD = {
    "--heal.tau -1": "heal.tau is -1.0: it must be >= 0 nats",
    "--steer.layers 0.5 0.4": "steer.layers is (0.5, 0.4)",
    "--steer.layers 0.5 1.4": "steer.layers is (0.5, 1.4)",
    "--gen.alphas nan": "gen.alphas is (nan,)",
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
}


@pytest.mark.parametrize("flags", BAD)
def test_a_wrong_value_names_the_field_the_value_and_the_limit(flags, capsys, tmp_path):
    try:
        status = main(["fast-dev", "--out", str(tmp_path), *flags.split()])
    except SystemExit as stopped:
        status = stopped.code
    printed = " ".join("".join(capsys.readouterr()).replace("│", " ").split())
    assert BAD[flags] in printed
    assert status in (1, 2) and "Traceback" not in printed


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
