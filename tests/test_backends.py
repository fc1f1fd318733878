"""The optional packages agree with what is built in, and are refused before the model loads where they would not."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import make_dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from places import ROOT
from test_moral_foundations import ask

from steer_heal.__main__ import main
from steer_heal.backends import steering_lite, tinymfv
from steer_heal.check import check
from steer_heal.errors import UserError
from steer_heal.events import Measured
from steer_heal.inputs.files import read_file
from steer_heal.inputs.instruments import FOUNDATIONS, Vignette, parse_instrument
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import METHODS, Condition, Contrast, Vector, mean_diff
from steer_heal.model.student import Student
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import AdapterCfg, EvalCfg, RunConfig, SteerCfg
from steer_heal.stages.vector import last_token_states

PUBLISHED = ROOT.parent / "shared" / "data" / "mfv" / "instrument.toml"

SCENES = [
    Vignette("a", "care", "A woman laughs at a man who fell on the ice."),
    Vignette("b", "authority", "A soldier walks off while the captain is still giving orders.", "loyalty"),
    Vignette("c", "liberty", "A father tells his grown daughter whom she may marry and whom she may not see."),
    Vignette("d", "social", "A man eats his soup with a fork."),
    Vignette("e", "care", "A woman laughs at a man who fell on the road."),
]
"""Of different lengths, which the package would pad in one batch. The first and the last are of one length."""


# --- steering-lite ---------------------------------------------------------------------------------------------
def test_steering_lite_extracts_the_mean_difference(toy: LM):
    pytest.importorskip("steering_lite", reason="the package is not installed")
    personas, band = ("You obey.", "You do as you like, whoever gives the orders."), range(1, 3)
    positive, negative = ([toy.chat(scene.text, persona) for scene in SCENES] for persona in personas)
    theirs = steering_lite.extract(toy, positive, negative, band)
    assert theirs.keys() == set(band)
    for layer, states in last_token_states(toy, [*positive, *negative], band).items():
        ours = mean_diff(states[: len(SCENES)], states[len(SCENES) :])
        assert torch.allclose(theirs[layer], ours, atol=1e-4)


def test_a_run_with_pca_is_refused_before_its_model_is_loaded(tmp_path):
    told = "steer.method is 'pca' and steer.backend 'steering-lite'.*arbitrary sign.*one of the methods mean_diff"
    with pytest.raises(UserError, match=told):
        check(RunConfig(out=tmp_path, steer=SteerCfg(backend="steering-lite", method="pca")))


def test_each_method_is_served_or_refused():
    assert {*steering_lite.SERVED, *steering_lite.REFUSED} == METHODS.keys()


def test_the_reason_for_refusing_pca_holds(toy: LM):
    package = pytest.importorskip("steering_lite", reason="the package is not installed")
    personas = ("You obey.", "You do as you like.")
    positive, negative = ([toy.chat(scene.text, persona) for scene in SCENES] for persona in personas)
    texts = [[toy.tokenizer.decode(ids) for ids in side] for side in (positive, negative)]
    config = package.PCAC(layers=(1,), normalize=False, dtype=torch.float32)
    theirs = package.Vector.train(toy.model, toy.tokenizer, *texts, config, max_length=1024).state[1]["v"].reshape(-1)
    states = last_token_states(toy, [*positive, *negative], range(1, 2))[1]
    differences = states[: len(SCENES)] - states[len(SCENES) :]
    _, _, centred = torch.linalg.svd(differences - differences.mean(0), full_matrices=False)
    assert abs(theirs @ centred[0]) == pytest.approx(1.0, abs=1e-3) and theirs.norm() == pytest.approx(1.0, abs=1e-4)
    _, _, uncentred = torch.linalg.svd(differences, full_matrices=False)
    assert abs(theirs @ uncentred[0]) < 0.9


@pytest.mark.parametrize("method", steering_lite.SERVED)
def test_steering_lite_is_asked_for_where_it_is_missing(monkeypatch, method: str):
    monkeypatch.setitem(sys.modules, "steering_lite", None)
    with pytest.raises(UserError, match="not installed; pip install 'git"):
        steering_lite.check(method)
    monkeypatch.setitem(sys.modules, "steering_lite", _module("steering_lite"))
    steering_lite.check(method)


# --- tinymfv ---------------------------------------------------------------------------------------------------
def test_moral_maps_reads_the_same_probabilities_at_the_default_batch_size(toy: LM):
    """Batches of rows that differ in length once moved authority by 0.35 nats."""
    _require_tinymfv()
    if not PUBLISHED.exists():
        pytest.skip("the published instrument is not beside this checkout")
    instrument = parse_instrument(read_file(PUBLISHED))
    vector = Vector({1: 0.5 * torch.randn(toy.width, generator=torch.Generator().manual_seed(0))})
    for condition in (Condition(), Condition("", vector, 1.0)):
        # the package's cache ends before the last thinking token (docs/decisions.md): 16 of its tokens are 15 of ours
        ours = ask(toy, SCENES, instrument, condition, 15, 0)
        theirs = tinymfv.ask(toy, SCENES, condition, 16)
        assert theirs.keys() == ours.keys()
        for name, values in theirs.items():
            assert ours[name] == pytest.approx(values, abs=1e-4), name


def test_moral_maps_reads_a_row_in_a_batch_as_it_reads_it_alone(toy: LM):
    _require_tinymfv()
    together = tinymfv.ask(toy, SCENES, Condition("You obey."), 4)
    for i, scene in enumerate(SCENES):
        for name, [value] in tinymfv.ask(toy, [scene], Condition("You obey."), 4).items():
            assert together[name][i] == pytest.approx(value, abs=1e-5), name


def test_rows_reach_the_package_in_batches_of_one_length(toy: LM, monkeypatch):
    seen: list[list[str]] = []

    def rollout(model, tok, user_prompts: list[str], *, max_think_tokens: int = 64):
        seen.append(user_prompts)
        p = dict.fromkeys(FOUNDATIONS, 0.1)
        nll = [math.nan if "soup" in text else 2.0 for text in user_prompts]
        return [SimpleNamespace(p=p, top1="loyalty", pmass_allowed=0.7, nll_prefill=value) for value in nll]

    package = _stand_in(monkeypatch, "moralmaps")
    package.guided.guided_rollout_forced_choice = rollout
    items = tinymfv.ask(toy, SCENES * 20, Condition("You obey."), 4)
    assert sorted(text for batch in seen for text in batch) == sorted(f"You obey.\n\n{v.text}" for v in SCENES * 20)
    assert all(len({len(toy.chat(text)) for text in batch}) == 1 for batch in seen)
    assert 1 < max(map(len, seen)) <= tinymfv.ROWS_AT_ONCE
    assert items.pop("unscorable") == [0, 0, 0, 1, 0] * 20
    assert items["top1"][:3] == [0, 1, 0] and all(math.isnan(values[3]) for values in items.values())


def test_a_teacher_that_is_a_contrast_is_refused(toy: LM):
    with pytest.raises(UserError, match="contrast; use --eval.backend builtin"):
        tinymfv.ask(toy, SCENES, Condition(contrast=Contrast("You obey.", "You rebel.")), 4)


def test_a_batch_with_padding_on_the_left_is_refused(toy: LM, monkeypatch):
    _stand_in(monkeypatch, "moralmaps")
    short, long = toy.chat("No."), toy.chat("Never ever.")
    padded = torch.tensor([[toy.pad_id] * (len(long) - len(short)) + [*short], [*long]])
    mask = (padded != toy.pad_id).long()
    with tinymfv.unpadded(toy):
        toy.model(input_ids=padded[1:], attention_mask=mask[1:])
        with pytest.raises(UserError, match="results for padded prompts are wrong; use builtin"):
            toy.model(input_ids=padded, attention_mask=mask)
    toy.model(input_ids=padded, attention_mask=mask)


def test_a_padding_token_that_the_template_writes_is_refused(tiny: LM, monkeypatch):
    _stand_in(monkeypatch, "moralmaps")
    tiny.tokenizer.pad_token = tiny.tokenizer.eos_token
    with pytest.raises(UserError, match=r"masks each '<\|im_end\|>' as padding"):
        tinymfv.ask(tiny, SCENES, Condition(), 4)


@pytest.mark.parametrize(
    ("fields", "lacking"),
    [
        (None, "guided.guided_rollout_forced_choice.user_prompts"),
        (["p", "top1"], "guided.ForcedChoiceResult.pmass_allowed"),
        (["p", "top1", "pmass_allowed", "nll_json"], "guided.ForcedChoiceResult.nll_prefill"),
        (["p", "top1", "pmass_allowed", "nll_prefill"], "EvalResult.frac_unscorable"),
    ],
    ids=["30 April 2026", "8 May 2026", "23 June 2026", "25 June 2026"],
)
def test_an_older_interface_is_refused_by_name_before_the_model_is_loaded(monkeypatch, tmp_path, fields, lacking):
    _stand_in(monkeypatch, "tinymfv", fields, marked=False)
    told = f"the installed tinymfv .*lacks .*{lacking}.*since 26 June 2026.*pip uninstall tiny-mfv, then"
    with pytest.raises(UserError, match=f"eval.backend is 'tinymfv': .*{told}"):
        check(RunConfig(out=tmp_path, eval=EvalCfg(backend="tinymfv")))


@pytest.mark.parametrize("name", list(tinymfv.DISTRIBUTIONS))
def test_the_present_interface_is_taken_under_either_name(monkeypatch, name: str):
    _stand_in(monkeypatch, name)
    tinymfv.check()


def test_a_missing_and_a_broken_package_are_told_apart(monkeypatch, tmp_path):
    for name in tinymfv.DISTRIBUTIONS:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="its package is not installed; pip install 'git"):
        tinymfv.check()
    (tmp_path / "tinymfv.py").write_text("import a_package_that_nobody_has")
    monkeypatch.delitem(sys.modules, "tinymfv")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"tinymfv .*cannot be imported \(ModuleNotFoundError: .*'a_package"):
        tinymfv.check()


def test_checks_load_no_model():
    """They run before the model is loaded: importing them brings in no torch."""
    words = "import sys; from steer_heal.backends import steering_lite, tinymfv; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", words], check=True, timeout=60)


def _module(name: str, **contents: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(contents)
    return module


NOW = ["p", "top1", "pmass_allowed", "nll_prefill"]


def _stand_in(monkeypatch, name: str, fields: list[str] | None = NOW, marked: bool = True) -> ModuleType:
    """Puts in place of the package a module whose rows have these fields; None: no rows at all, as in the oldest."""

    def guided_rollout_forced_choice(model, tok, user_prompts: list[str], *, max_think_tokens: int = 64) -> list: ...

    guided = _module(f"{name}.guided")
    if fields is not None:
        guided.guided_rollout_forced_choice = guided_rollout_forced_choice
        guided.ForcedChoiceResult = make_dataclass("ForcedChoiceResult", fields)
    result = make_dataclass("EvalResult", ["table", *["frac_unscorable"] * marked])
    package = _module(name, guided=guided, EvalResult=result, evaluate=lambda model, tokenizer, vignettes=None: {})
    for other in tinymfv.DISTRIBUTIONS:
        monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, f"{name}.guided", guided)
    return package


def _require_tinymfv() -> None:
    try:
        tinymfv.check()
    except UserError as missing:
        pytest.skip(str(missing))


# --- bitsandbytes ----------------------------------------------------------------------------------------------
def test_a_round_runs_on_4_bit_weights(tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="pip install 'steer-heal[quantize]'")
    plain = load("tiny-random")
    plain.model.save_pretrained(tmp_path / "model")
    plain.tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--quantize", "nf4", "--out", str(tmp_path / "out"), "--n-rounds", "2", "--no-control"]
    command = ["run", "fast-dev", "--model", str(tmp_path / "model"), *flags]
    assert main(command) == 0, capsys.readouterr().err
    assert "quantize nf4: decoding is about three times slower" in capsys.readouterr().err
    run_folder = next(p for p in (tmp_path / "out").iterdir() if (p / "events.jsonl").exists())
    assert len([m for m in FolderRun.read(run_folder).each(Measured) if m.state == "healed"]) == 2
    with pytest.warns(UserWarning):
        lm = load(str(tmp_path / "model"), quantize="nf4")
    codes = {name: p.clone() for name, p in lm.model.named_parameters() if p.dtype == torch.uint8}
    assert len(codes) == 7 * len(lm.blocks) and lm.quantized and not plain.quantized
    student, prompt = Student(lm, AdapterCfg(rank=4, alpha=8.0, layers=(0.0, 1.0))), lm.chat("What do you do?")
    read = {}
    student.restore(run_folder / "ckpt" / "r1", 2)
    for gate in ("base", "full", "base"):
        with student.using(gate), torch.no_grad():
            read.setdefault(gate, []).append(lm.hidden([prompt]))
    assert torch.equal(*read["base"]) and not torch.allclose(read["base"][0], read["full"][0], atol=1e-4)
    after = {name.replace("base_layer.", ""): p for name, p in lm.model.named_parameters()}
    assert all(torch.equal(code, after[name]) for name, code in codes.items())
    given = torch.randn(3, 64, requires_grad=True)
    lm.blocks[0].mlp.down_proj(given).sum().backward()
    assert given.grad is not None, "a weight that was read without a gradient passes one on"
    with pytest.raises(UserError, match="quantized"):
        student.export(tmp_path / "merged")
