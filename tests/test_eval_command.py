"""The command `eval`: a round of a run measured again, other settings refused, and what is shown on the way."""

import json

import pytest
import torch
from runs import of, rewritten

from steer_heal.__main__ import main
from steer_heal.commands.eval import agreement, differing
from steer_heal.runs.stored import FolderRun

pytestmark = pytest.mark.usefixtures("quick")


def recorded(run, state, r):
    return FolderRun.read(run).measured(state, r).metrics


def measured(run, capsys, *flags):
    """The readings of a state, which are the recorded ones."""
    capsys.readouterr()  # a run that was made just now printed its table
    assert main(["eval", "--run", str(run), *flags, "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_the_last_round_of_a_run_is_measured_again_to_the_last_digit(two, capsys):
    metrics, told = measured(two, capsys)
    assert metrics == recorded(two, "healed", 1) != recorded(two, "healed", 0)
    assert "are the recorded ones to the last digit" in told and any(name.endswith("_lo") for name in metrics)
    told = " ".join(told.split())
    assert "model tiny-random" in told and "seed 42" in told and "healed round 2: drift (3 of 6)" in told


@pytest.mark.parametrize(
    ("run", "flags", "state", "r"),
    [
        ("two", "--state steered", "steered", 1),
        ("one", "--state steered --round 1", "steered", 0),
        ("one", "--state prompted", "prompted", None),
        ("one", "--state control", "control", None),
    ],
)
def test_so_is_any_other_state(run, flags, state, r, request, capsys):
    folder = request.getfixturevalue(run)
    metrics, logged = measured(folder, capsys, *flags.split())
    assert metrics == recorded(folder, state, r)
    assert f"{state}: drift" in logged if r is None else f"{state} round {r + 1}: drift" in logged


def test_the_recorded_numbers_stand_beside_the_new_ones_and_one_that_differs_is_told(copy, capsys):

    def change(events):
        of(events, "measured", "healed")[-1]["metrics"]["kl_base"] += 0.5
        events[0]["versions"]["torch"] = "0.1"
        events[0]["device"] = "NVIDIA H100"

    rewritten(copy, change)
    assert main(["eval", "--run", str(copy), "--quiet", "--eval.batch-size", "1"]) == 1
    printed = capsys.readouterr()
    name, value, then, *_ = next(line for line in printed.out.splitlines() if "kl_base" in line).split()
    assert name == "kl_base" and float(then) - float(value) == pytest.approx(0.5, abs=1e-3)
    assert "numbers differ from the recorded ones: kl_base (0.5 away)" in printed.out and printed.err == ""
    assert "another device, processor, number of threads, batch size or version" in printed.out
    assert f"torch 0.1 then, {torch.__version__} now" in printed.out and "python" not in printed.out
    assert "device NVIDIA H100 then, " in printed.out


def test_a_number_that_one_side_lacks_differs():
    assert differing({"a": 1.0, "b": None}, {"a": 1.0, "b": None}) == []
    assert differing({"a": 1.0, "b": None}, {"a": 1.0, "c": 2.0}) == ["c", "b"]
    nan = float("nan")
    assert differing({"a": nan, "b": nan, "c": 0.0}, {"a": nan, "b": 0.0, "c": nan}) == ["b", "c"]
    assert "b (no value)" in agreement({"b": nan}, {"b": 0.0})
    assert differing({"a": None}, {"a": 0.0}) == ["a"] and "1 of 1" in agreement({"a": None}, {"a": 0.0})
    told = agreement({f"m{i}": float(i) for i in range(10)} | {"none": None}, {f"m{i}": 0.0 for i in range(10)})
    assert "10 of 10" in told and "none (no value), m9 (9 away), m8" in told and "m3 (3 away), and 2 more" in told
    assert "m2 " not in told and told.endswith("versions and device are the recorded ones")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ("--trait", "love", "--eval.n-texts", "9", "--adapter", "x"),
            ("3 problems", "--trait is love, but authority in", "--eval.n-texts is 9, but 2 in", "--adapter is x"),
        ),
        (("--filter.gates", "loop"), ("error: --filter.gates is loop, but perplexity ",)),
        (("--eval.evals", "persona", "drift"), ("error: --eval.evals is persona drift, but moral_foundations ",)),
        (("--round", "8"), ("round 8 does not exist", "the run has rounds 1 to 2")),
        (
            ("--state", "base", "--round", "1"),
            ("--round is 1: base is measured once per run", "leave out --round or --state"),
        ),
        (("--state", "control"), ("did not measure control", "give another --round or --state")),
    ],
)
def test_what_is_not_the_run_s_is_refused(flags, told, two, capsys):
    assert main(["eval", "--run", str(two), *flags]) == 2
    printed = capsys.readouterr().err
    assert all(words in printed for words in ("error: ", *told)), printed


def test_a_setting_that_is_the_run_s_own_may_be_repeated(two, capsys):
    flags = ("--seed", "42", "--model", "tiny-random", "--accept-terms")
    assert measured(two, capsys, *flags)[0] == recorded(two, "healed", 1)


def test_a_round_that_was_dropped_or_damaged_is_named(copy, capsys):
    (copy / "ckpt" / "r1" / "adapter_model.safetensors").write_bytes(b"")
    assert main(["eval", "--run", str(copy), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert "r1/adapter_model.safetensors is damaged" in told and "delete" not in told, "resume leaves a whole run alone"

    def drop(events):
        last = of(events, "round_done")[-1]
        limits = {
            "past": ["kl_base 3 > 0.1"],
            "dose": 1.0,
            "lr": 1.0,
            "metrics": {},
            "next_kappa": 1,
            "next_lr_share": 1,
        }
        facts = {name: last[name] for name in ("schema", "t", "wall_s", "prev", "round")}
        events[events.index(last)] = {**facts, "event": "dropped", **limits}

    rewritten(copy, drop)
    assert main(["eval", "--run", str(copy), "--round", "2"]) == 2
    told = capsys.readouterr().err
    assert "round 2 was dropped (kl_base 3 > 0.1); the run has round 1" in told


def test_no_run_and_no_model_are_refused(tmp_path, capsys):
    for flags, told in (
        (["--run", str(tmp_path)], "has no events.jsonl; give a run folder"),
        ([], "--run out/<run>"),
        (["--model", "tiny-random", "--round", "2"], "give --run too"),
        (["--model", "tiny-random", "--state", "base"], "--state was given without a run"),
        (["--model", "tiny-random", "--prompts", "gone.jsonl"], "error: --prompts is 'gone.jsonl': there is no such"),
        (["--model", "tiny-random", "--eval.pairs", "gone"], "error: --eval.pairs is 'gone': there is no such"),
    ):
        assert main(["eval", *flags]) == 2
        assert told in capsys.readouterr().err


def test_without_a_run_the_settings_and_the_stages_are_shown(capsys):
    data = "--eval.vignettes data/toylm/vignettes.jsonl --eval.instrument data/toylm/instrument.toml"
    flags = f"{data} --eval.n-vignettes 2 --eval.n-prompts 1 --eval.n-texts 1 --eval.max-new-tokens 4"
    evals = "--eval.evals moral_foundations drift --eval.think-tokens 1 --dtype float32 --json"
    assert main(["eval", "--model", "tiny-random", *flags.split(), *evals.split()]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["kl_base"] == pytest.approx(0.0, abs=1e-6)
    shown = ("model tiny-random", "dtype float32", "2 of data/toylm/vignettes.jsonl", "trait authority")
    assert all(words in printed.err for words in (*shown, "base: drift (2 of 2)"))


# --- the scale of the adapter ------------------------------------------------------------------------------------
def scaled(capsys, *flags) -> tuple[dict, str]:
    capsys.readouterr()
    assert main(["eval", *flags, "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def test_a_scaled_state_of_a_run_is_told_by_its_scale_and_not_compared(one, capsys):
    base, healed = recorded(one, "base", None), recorded(one, "healed", 0)
    found = {}
    for scale in (0.0, -1.0):
        metrics, told = scaled(capsys, "--run", str(one), "--adapter-scale", str(scale))
        assert metrics.pop("adapter_scale") == scale and f"adapter scale: {scale:g}" in told
        assert "recorded ones" not in told
        found[scale] = metrics
    assert {name: found[0.0][name] for name in base} == base != {name: healed[name] for name in base}
    assert found[-1.0].keys() == healed.keys() and found[-1.0] != healed
    assert main(["eval", "--run", str(one), "--adapter-scale", "0.5", "--quiet"]) == 0
    assert "adapter_scale" in (table := capsys.readouterr().out) and "recorded" in table and "0.5000" in table


def test_a_scaled_adapter_of_a_model_is_measured_too(one, capsys):
    data = "--eval.vignettes data/toylm/vignettes.jsonl --eval.instrument data/toylm/instrument.toml"
    asked = f"--eval.n-vignettes 2 --eval.evals moral_foundations --eval.think-tokens 1 --dtype float32 {data}".split()
    of_adapter = ("--model", "tiny-random", "--adapter", str(one / "ckpt/r0"), *asked)
    whole, none = (scaled(capsys, *of_adapter, *more)[0] for more in ((), ("--adapter-scale", "0")))
    base = scaled(capsys, "--model", "tiny-random", *asked)[0]
    assert none.pop("adapter_scale") == 0 and "adapter_scale" not in whole
    assert {name: none[name] for name in base} == base != {name: whole[name] for name in base}


def test_a_scale_without_an_adapter_or_past_the_limit_is_refused(one, capsys):
    for flags, told in (
        (("--model", "tiny-random"), "no adapter was given; give --adapter"),
        (("--run", str(one), "--state", "base"), "the state base of this round has no adapter"),
        (("--run", str(one), "--state", "steered"), "the state steered of this round has no adapter"),
        (("--run", str(one)), "--adapter-scale is 5.0: it must be from -4 to 4"),
    ):
        scale = "5" if "to 4" in told else "-1"
        assert main(["eval", *flags, "--adapter-scale", scale]) == 2
        assert told in capsys.readouterr().err


def test_an_eval_that_does_not_report_the_trait_can_be_asked_alone(capsys):
    assert main(["eval", "--model", "tiny-random", "--n-threads", "1", "--eval.evals", "everyday", "--json"]) == 0
    told = {f"everyday_{name}" for name in ("right", "nats", "lost", "gained")}
    assert set(json.loads(capsys.readouterr().out)) == told
