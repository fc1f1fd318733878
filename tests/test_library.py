"""The library gives the command's figures, leaves the caller's model and process alone, and refuses what is wrong."""

import copy
import itertools
import json
import logging
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from compare import VARIES
from runs import DOORS, PROMPTS, of, recorded, started, undrawn

import steer_heal
from steer_heal import SteerHeal, UserError, define_trait
from steer_heal.__main__ import main
from steer_heal.commands.run import parse
from steer_heal.events import Dropped, HealStepped, RoundDone, Trained, encode
from steer_heal.model.lm import _tiny_random
from steer_heal.presets import CHAT_PRESET
from steer_heal.runs.stored import FolderRun

SMALL = {
    "steer.n_contexts": 4,
    "gen.max_new_tokens": 6,
    "eval.evals": ("text_quality", "drift", "persona", "contrast"),
    "eval.n_texts": 2,
    "eval.n_prompts": 2,
    "eval.max_new_tokens": 6,
    "eval.n_bootstrap": 10,
    "control": False,
}


def small(model=None, tokenizer=None, trait=DOORS, **more):
    return SteerHeal(model, tokenizer, trait, preset="fast-dev", settings={**SMALL, **more})


@pytest.fixture
def sh():
    with small() as made:
        yield made


def comparable(events):
    """What the command and the library both say of each step."""
    left_out = {*VARIES, "files", "checkpoint"}
    start = {"event", "round", "trait", "metrics", "gates", "wording"}  # the others are of the folder and the process
    rows = [encode(event, "") for event in events]
    return [
        {k: v for k, v in row.items() if (k in start if row["event"] == "run_start" else k not in left_out)}
        for row in rows
    ]


def assert_same(sh, steps, run):
    """Every event but the last, every step, and the last adapter, byte for byte."""
    wanted = FolderRun.read(run)
    got, want = (comparable(e) for e in (sh.events, wanted.events[:-1]))
    assert [(e["event"], e["round"]) for e in got] == [(e["event"], e["round"]) for e in want]
    for here, there in zip(got, want, strict=True):
        assert here == there, here["event"]
    assert steps == [(event["round"], event["step"]) for event in of(recorded(run), "heal_step")]
    assert sh.verdict() == wanted.end.verdict


def assert_saved_as(sh, folder, tmp_path):
    for path in sh.save(tmp_path / "saved").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def settings_of(flags):
    return parse(["fast-dev", *flags])[1]


# --- the figures of the command ----------------------------------------------------------------------------------
def test_the_loop_gives_the_figures_and_the_adapter_of_the_command(one, settings, tmp_path):
    steps, rounds = [], []
    with SteerHeal(settings=settings_of([*settings, "--n-rounds", "1"])) as sh:
        table = sh.loop(
            on_step=lambda r, step: steps.append((r, asdict(step))), on_round=lambda event: rounds.append(event.round)
        )
        assert_same(sh, steps, one)
        assert_saved_as(sh, one / "ckpt" / "r0", tmp_path)
        sh.vector.save(tmp_path / "v.safetensors")
    assert (tmp_path / "v.safetensors").read_bytes() == (one / "vectors" / "r0.safetensors").read_bytes()
    assert rounds == [0]
    assert json.loads(json.dumps(table.to_dicts())) == recorded(one)[-1]["table"]


def test_a_loaded_model_and_a_second_call_give_them_too(two, settings, tmp_path):
    cfg, steps = settings_of([*settings, "--n-rounds", "2", "--no-control"]), []

    def told(r, step):
        steps.append((r, asdict(step)))

    model, tokenizer = _tiny_random()
    with SteerHeal(model, tokenizer, settings=cfg) as sh:
        sh.loop(1, on_step=told)
        sh.write("What do you do?", dose=0.5)  # nothing that is asked in between changes a figure
        sh.evaluate("prompted")
        sh.loop(2, on_step=told)
        assert_same(sh, steps, two)
        assert_saved_as(sh, two / "ckpt" / "r1", tmp_path)


def test_a_round_that_is_dropped_is_dropped_alike(settings, tmp_path):
    flags = [*settings, "--n-rounds", "2", "--no-control", "--backtrack.retries", "1", "--heal.lr", "1e-2"]
    with undrawn():  # the second round is past this limit, the first is not
        free = started(tmp_path / "free", flags)
    kl = [event["metrics"]["kl_base"] for event in of(recorded(free), "measured", "healed")]
    assert kl[0] < kl[1]
    flags += ["--backtrack.limits", "kl_base", str((kl[0] + kl[1]) / 2), "degenerate_frac", "1", "coherence", "0"]
    with undrawn():
        run = started(tmp_path / "run", flags)
    steps = []
    assert of(recorded(run), "dropped")
    with SteerHeal(settings=settings_of(flags)) as sh:
        sh.loop(on_step=lambda r, step: steps.append((r, asdict(step))))
        assert_same(sh, steps, run)
        last = FolderRun.read(run).each(RoundDone)[-1].round
        assert_saved_as(sh, run / "ckpt" / f"r{last}", tmp_path)


def test_a_round_by_hand_is_a_round_of_the_loop(tmp_path):
    with small() as by_loop, small() as by_hand:
        by_loop.loop(1)
        by_hand.extract()
        by_hand.collect()
        by_hand.heal()
        by_hand.bake()
        assert by_hand.evaluate("healed").metrics == by_loop.events[-2].metrics
        assert_saved_as(by_hand, by_loop.save(tmp_path / "by_loop"), tmp_path)


def test_text_is_written_without_what_was_healed_and_not_baked(sh):
    sh.bench.cfg = replace(sh.cfg, heal=replace(sh.cfg.heal, lr=0.05))
    before = sh.collect(kappa=1.0)
    sh.heal()
    assert sh.student.is_open and sh.collect(kappa=1.0) == before and not sh.student.is_open


def test_a_stopped_loop_goes_on(tmp_path):
    def stop(r, step):
        if step.step == 3:
            raise KeyboardInterrupt

    with small() as whole, small() as stopped:
        whole.loop(1)
        with pytest.raises(KeyboardInterrupt):
            stopped.loop(1, on_step=stop)
        stopped.loop(1)
        assert comparable(stopped.events) == comparable(whole.events)
        assert_saved_as(stopped, whole.save(tmp_path / "whole"), tmp_path)


def test_a_loop_that_is_stopped_at_every_event_goes_on_from_the_rounds_that_are_kept(monkeypatch):
    """Of the rounds here none is kept: the control is healed, then two attempts that are dropped."""
    dropping = {"control": True, "backtrack.retries": 1, "backtrack.limits": {"kl_base": 1e-9}}
    with small(**dropping) as whole, small(**dropping) as stopped:
        whole.loop(1)
        assert whole.n_rounds == 0 and [type(event) for event in whole.events].count(Dropped) == 2
        run, n_stops = stopped._run, 0
        keep, add, bake = run.keep_student, run.add, stopped.student.bake

        def stopped_before(work):
            calls = itertools.count(1)

            def stops(*args):
                if next(calls) % 2:
                    raise KeyboardInterrupt
                return work(*args)

            return stops

        def stopped_after(event):
            add(event)
            if not isinstance(event, HealStepped):
                raise KeyboardInterrupt

        monkeypatch.setattr(run, "keep_student", stopped_before(keep))
        monkeypatch.setattr(stopped.student, "bake", stopped_before(bake))
        monkeypatch.setattr(run, "add", stopped_after)
        while sum(isinstance(event, Dropped) for event in stopped.events) < 2:
            with pytest.raises(KeyboardInterrupt):
                stopped.loop(1)
            n_stops += 1
            healed = [event for event in stopped.events if isinstance(event, Trained) and event.round is not None]
            assert stopped.n_rounds == len(healed), "the control is no round, and what was dropped is none"
            assert not stopped.student.is_open, "a factor that is not baked acts in no answer"
        assert comparable(stopped.events) == comparable(whole.events)
        assert n_stops > 18 and stopped.loop(1).equals(whole.table())
        assert stopped.n_rounds == 0


# --- the caller's model and process ------------------------------------------------------------------------------
def test_a_loaded_model_answers_as_before_between_calls_and_is_as_it_was_after_close(tmp_path):
    model, tokenizer = _tiny_random()
    model.train()
    ids, modules = torch.arange(8)[None], [name for name, _ in model.named_modules()]
    weights, (before,) = {n: p.clone() for n, p in model.named_parameters()}, [model.eval()(ids).logits]
    model.train()
    facts = lambda: (model.config._attn_implementation, model.generation_config.to_dict(), dict(vars(tokenizer)).keys())
    known, generation = facts(), model.generation_config
    sh = small(model, tokenizer, temperature=0.5)
    sh.loop(1)
    sh.heal()
    assert torch.equal(model(ids).logits, before), "between calls the adapters are off"
    with pytest.raises(UserError, match=r"held by another SteerHeal; call close\(\) of that one first"):
        small(model, tokenizer)
    sh.close()
    sh.close()
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert facts() == known and model.generation_config is generation and not hasattr(model, "peft_config")
    assert [name for name, _ in model.named_modules()] == modules
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(model.eval()(ids).logits, before)
    with small(model, tokenizer) as again:  # it can be used again
        again.extract()


def test_4_bit_weights_are_packed_by_bitsandbytes_only_while_the_model_is_the_callers():
    model, tokenizer = _tiny_random()
    layer = model.model.layers[0].mlp.down_proj
    layer.support_avx512bf16_for_cpu = True
    with small(model, tokenizer):
        assert not layer.support_avx512bf16_for_cpu
    assert layer.support_avx512bf16_for_cpu
    layer.weight.quant_state = SimpleNamespace(packing_format_for_cpu=True)
    with pytest.raises(UserError, match="packed its 4-bit weights"):
        small(model, tokenizer)
    assert layer.support_avx512bf16_for_cpu


def test_nothing_is_printed_and_logging_and_warnings_are_left_alone(sh, capfd, recwarn):
    from loguru import logger

    state = lambda: (
        list(warnings.filters),
        warnings.showwarning,
        logging.root.handlers[:],
        dict(logger._core.handlers),
    )
    before = state()
    sh.loop(2)
    sh.evaluate()
    sh.reset()
    assert state() == before
    assert capfd.readouterr() == ("", "") and not recwarn.list


def test_importing_the_package_imports_no_torch():
    code = "import sys, steer_heal; assert 'torch' not in sys.modules; from steer_heal import RunConfig; RunConfig()"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(steer_heal, name) for name in steer_heal.__all__)


def test_the_public_names_and_the_version_are_told(capsys):
    assert {*steer_heal.__all__, "__version__"} == {*dir(steer_heal)}
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == steer_heal.__version__ == version("steer-heal")


# --- what comes back ---------------------------------------------------------------------------------------------
def test_a_dose_and_a_system_prompt_change_the_text_and_base_has_no_rounds(sh):
    plain = sh.write(PROMPTS[:3])
    assert plain.columns == ["prompt", "text", "dose", "n_tokens"] and plain["prompt"].to_list() == PROMPTS[:3]
    assert plain.equals(sh.write(PROMPTS[:3]))
    assert not plain["text"].equals(sh.write(PROMPTS[:3], dose=3.0)["text"])
    assert not plain["text"].equals(sh.write(PROMPTS[:3], system="You shout.")["text"])
    sh.bench.cfg = replace(sh.cfg, heal=replace(sh.cfg.heal, lr=0.05))
    sh.heal()
    assert not plain["text"].equals(sh.write(PROMPTS[:3])["text"])
    assert plain.equals(sh.write(PROMPTS[:3], adapters="base"))


def test_states_are_measured_against_the_base(sh):
    base, prompted, steered = sh.evaluate("base"), sh.evaluate("prompted"), sh.evaluate("steered", dose=1.0)
    assert sh.evaluate("base") == base
    assert base.metrics["kl_base"] == 0 < min(prompted.metrics["kl_base"], steered.metrics["kl_base"])
    assert {"contrast_nats_lo", "contrast_nats_hi"} < steered.metrics.keys()
    assert sh.evaluate("healed").metrics["contrast_nats"] == base.metrics["contrast_nats"]


def test_a_vector_or_a_dose_is_refused_where_the_teacher_uses_none():
    contrast = {"heal.teacher": "contrast", "heal.contrast": 2.0, "heal.target": "distribution", "heal.text": "own"}
    with small("tiny-random", **contrast) as sh:
        vector = sh.extract()
        for call in (
            lambda: sh.evaluate("steered", dose=5.0),
            lambda: sh.evaluate("steered", vector=vector),
            lambda: sh.collect(vector),
            lambda: sh.collect(kappa=1.0),
            lambda: sh.heal(vector=vector),
        ):
            with pytest.raises(UserError, match="heal.teacher is 'contrast', which uses no vector; leave it out"):
                call()
        assert sh.evaluate("steered").metrics["kl_base"] > 0


def test_what_is_not_baked_is_not_exported_and_a_baked_round_has_no_teacher(tmp_path, capfd):
    how = {"heal.teacher": "contrast", "heal.contrast_kl": 0.1, "heal.target": "distribution", "heal.text": "own"}
    with small("tiny-random", **how) as sh:
        sh.heal()
        assert sh.evaluate("steered").metrics["kl_base"] > 0
        with pytest.raises(UserError, match="a round is healed and not baked"):
            sh.export(tmp_path / "open")
        sh.bake()
        with pytest.raises(UserError, match="collect first"):
            sh.evaluate("steered")
        capfd.readouterr()
        sh.export(tmp_path / "baked")
        assert capfd.readouterr() == ("", "")


def test_an_export_is_a_model_that_loads(sh, tmp_path, capsys):
    sh.loop(1, bar=True)
    drawn = capsys.readouterr().err
    assert "round 1 of 1" in drawn and "healing" in drawn
    shown = (sh, sh.vector, sh.evaluate("healed"), sh.collect(kappa=1.0))
    assert all(len(repr(each)) < 400 and "tensor" not in repr(each) for each in shown), shown
    page = sh.report(tmp_path / "mine.html").read_text(encoding="utf-8")
    assert "healed round 1" in page and "steer-heal chat" not in page, "no command can take a run in memory"
    assert "<b>in memory</b>: 1 of 1 round<" in page and "Started" not in page
    with small(str(sh.export(tmp_path / "merged"))) as merged:
        got, want = merged.evaluate("base").metrics, sh.evaluate("healed").metrics
    assert got["contrast_nats"] == pytest.approx(want["contrast_nats"], abs=1e-4)
    assert isinstance(sh.table(), pl.DataFrame) and sh.table()["state"][-1] == "healed round 1"
    with small(str(sh.export(tmp_path / "nothing", adapter_scale=0))) as nothing:
        assert nothing.base.metrics["contrast_nats"] == sh.base.metrics["contrast_nats"] != want["contrast_nats"]
    assert sh.evaluate("healed").metrics == want, "the student itself is not scaled"


def test_a_run_of_the_command_is_opened_after_any_round_and_goes_on_with_its_figures(two, tmp_path):
    """Two rounds of the command: opened after the first, the second is the same."""
    run = FolderRun.read(two)
    before = {path.name: path.read_bytes() for path in two.iterdir() if path.is_file()}
    with SteerHeal.open(two, round=1) as sh:
        assert sh.n_rounds == 1 and sh.base == run.measured("base").result
        assert [m["round"] for m in map(asdict, sh.events) if m["event"] == "trained"] == [0]
        sh.loop(2)
        assert comparable(sh.events) == comparable(run.events[:-1]) and sh.verdict() == run.end.verdict
        sh.save(tmp_path / "last")
    with SteerHeal.open(str(two)) as sh:
        assert sh.n_rounds == 2 and sh.evaluate("healed").metrics == run.measured("healed", 1).metrics
        sh.save(tmp_path / "again")
        sh.export(tmp_path / "peft", "peft", rank=2)
    for name in ("adapter_model.safetensors", "round.safetensors"):
        saved = [(folder / name).read_bytes() for folder in (tmp_path / "last", tmp_path / "again", two / "ckpt/r1")]
        assert saved[0] == saved[1] == saved[2]
    assert before == {path.name: path.read_bytes() for path in two.iterdir() if path.is_file()}
    for folder, how, told in ((two, {"round": 5}, "round 5 does not exist"), (tmp_path, {}, "has no events.jsonl")):
        with pytest.raises(UserError, match=told):
            SteerHeal.open(folder, **how)


# --- errors ------------------------------------------------------------------------------------------------------
def test_what_a_person_can_fix_is_a_user_error(sh, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    model, tokenizer = _tiny_random()
    wrong = {
        "did you mean 'toy'": lambda: SteerHeal(preset="toi"),
        "did you mean 'epochs'": lambda: small(**{"heal.epoch": 2}),
        "heal.epochs is 0": lambda: small(**{"heal.epochs": 0}),
        "tokenizer is None": lambda: small(model),
        "tokenizer is 'data/toylm'": lambda: small(model, "data/toylm"),
        "no head over the vocabulary": lambda: small(model.model, tokenizer),
        "spread over devices": lambda: small(copy.deepcopy(model).to("meta"), tokenizer),
        "torch.float64: they must be one of float32": lambda: small(copy.deepcopy(model).double(), tokenizer),
        "Linear": lambda: small(torch.nn.Linear(2, 2), tokenizer),
        "positive and negative": lambda: define_trait("a", "a", PROMPTS),
        "sign": lambda: define_trait("a", "b", PROMPTS, sign=2),
        "has no pairs": lambda: small(trait=define_trait("a", "b", PROMPTS)),
        "no round is baked": lambda: sh.save(tmp_path / "new"),
        "not empty": lambda: sh.export(tmp_path / "full"),
        "nothing was healed": sh.bake,
        "state is 'heeled'": lambda: sh.evaluate("heeled"),
        "dose is None": lambda: sh.evaluate("steered"),
    }
    for words, call in wrong.items():
        with pytest.raises(UserError, match=words):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_loop_after_rounds_by_hand_is_refused(sh):
    sh.heal()
    sh.bake()
    with pytest.raises(UserError, match="reset"):
        sh.loop(2)
    sh.reset()
    assert sh.n_rounds == 0


@pytest.mark.parametrize("loaded", [True, False])
def test_the_preset_is_chat_by_default_and_the_log_says_so(tiny, caplog, capsys, loaded):
    given = (tiny.model, tiny.tokenizer) if loaded else ("tiny-random", None)
    small = {"steer.layers": (0.3, 0.7), "gen.n_prompts": 4, "eval.n_prompts": 2}
    with caplog.at_level("INFO", logger="steer_heal"), SteerHeal(*given, trait=DOORS, settings=small) as sh:
        assert sh.cfg.heal == CHAT_PRESET.heal and sh.cfg.model == "tiny-random"
    assert "preset chat: Any instruction-tuned model" in caplog.text
    assert capsys.readouterr().out == ""
