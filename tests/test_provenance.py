"""The chain of digests holds for what a run wrote, and names the first link of what was changed since."""

import json
import shutil

import pytest
import torch
from runs import undrawn
from torch import nn

from steer_heal.events import of_stage, read_events
from steer_heal.files import ROOT
from steer_heal.provenance import LINKS, check, of_round, weights_digest
from steer_heal.run import main

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def copy(two, tmp_path):
    run = tmp_path / two.name
    shutil.copytree(two, run)
    return run


def rewrite(run, stage, r, change):
    """Changes one event of a run in place."""
    events = read_events(run)
    change(next(e for e in events if (e["stage"], e["round"]) == (stage, r)))
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def broken(run, capsys):
    """(round, link) at which --verify says that the chain breaks, and all that it printed."""
    assert main(["--verify", str(run)]) == 1
    printed = capsys.readouterr().out
    bad = next(link for link in check(run) if link.broken)
    assert f"the chain breaks at the {bad.name} of round {bad.round}: {bad.broken}" in printed
    return (bad.round, bad.name), printed


def test_the_chain_of_a_run_holds_and_ends_in_its_last_evaluation(two, capsys):
    assert main(["--verify", str(two)]) == 0
    last = of_stage(read_events(two), "round")[-1]["provenance"]
    assert f"holds over 2 rounds and ends in {last['evaluation']}" in capsys.readouterr().out
    assert [(link.round, link.name) for link in check(two)] == [(r, name) for r in (0, 1) for name in LINKS]
    assert len({link.digest for link in check(two)}) == 10


@pytest.mark.parametrize(
    "name, link", [("vectors/r1.safetensors", (1, "vector")), ("ckpt/r0/round.safetensors", (0, "adapter"))]
)
def test_a_changed_and_a_missing_file_are_named(name, link, copy, capsys):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    where, printed = broken(copy, capsys)
    assert where == link and f"{path} is not the file that was recorded" in printed
    path.unlink()
    where, printed = broken(copy, capsys)
    assert where == link and f"{path} is missing" in printed


@pytest.mark.parametrize(
    "stage, change, link",
    [
        ("gen", lambda e: next(row for row in e["completions"] if row["train"])["completion_ids"].append(5), "kept"),
        (
            "gen",
            lambda e: next(row for row in e["completions"] if row["train_order"] == 0).update(train_order=1.5),
            "kept",
        ),
        ("healed", lambda e: next(iter(e["items"].values())).__setitem__(0, 0.125), "evaluation"),
        ("healed", lambda e: e["metrics"].update(auth_nats=-9.0), "evaluation"),
        ("heal", lambda e: e["files"].pop("ckpt/r1/round.safetensors"), "adapter"),
        ("round", lambda e: e["provenance"].update(kept="0" * 64), "kept"),
        ("round", lambda e: e.pop("provenance"), "base"),
    ],
)
def test_a_changed_event_breaks_its_link(stage, change, link, copy, capsys):
    rewrite(copy, stage, 1, change)
    assert broken(copy, capsys)[0] == (1, link)


def test_what_was_changed_upstream_and_hidden_breaks_the_next_link(copy, capsys):
    """Another training text with a link made for it: the adapter was not trained on that."""
    rewrite(copy, "gen", 0, lambda e: next(row for row in e["completions"] if row["train"])["completion_ids"].append(5))
    hidden = of_round(read_events(copy), 0)
    rewrite(copy, "round", 0, lambda e: e["provenance"].update(kept=hidden["kept"]))
    assert broken(copy, capsys)[0] == (0, "adapter")


def test_another_or_no_model_is_the_base_s_fault(copy, capsys, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # a missing hub id is not looked for through retries
    rewrite(copy, "run_start", None, lambda e: e["weights"].update(sha256="0" * 64))
    where, printed = broken(copy, capsys)
    assert where == (0, "base") and "weights of model 'tiny-random' were changed since the run began" in printed
    rewrite(copy, "run_start", None, lambda e: e["config"].update(model="nowhere/at-all"))
    where, printed = broken(copy, capsys)
    assert where == (0, "base") and "it cannot be checked: model 'nowhere/at-all' could not be loaded" in printed
    assert "vector holds, kept holds" in printed


def test_a_folder_without_a_run_is_no_chain(tmp_path, capsys):
    assert main(["--verify", str(tmp_path)]) == 2
    (tmp_path / "events.jsonl").write_text('{"stage": "base", "round": -1}\n')
    assert main(["--verify", str(tmp_path)]) == 2
    assert "does not begin with a run_start" in capsys.readouterr().err


def test_the_digest_of_weights_sees_name_type_shape_and_every_bit():
    def state(weight, name="weight"):
        module = nn.Module()
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
        return weights_digest(module)["sha256"]

    weight = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    nudged = weight.clone()
    nudged.view(torch.int16)[0, 1] ^= 1
    others = [weight.reshape(3, 2), weight.view(torch.float16), weight.float(), nudged]
    assert len({state(weight), state(weight, "other"), *map(state, others)}) == 6
    assert state(weight) == state(torch.arange(6, dtype=torch.bfloat16).reshape(3, 2).T.contiguous().T.reshape(2, 3))
    assert weights_digest(nn.Linear(2, 2, dtype=torch.bfloat16))["dtype"] == "bfloat16"


@pytest.mark.parametrize("setting", ["steer.contexts", "eval.vignettes", "eval.instrument", "gen.prompts"])
def test_a_run_does_not_go_on_with_another_file(setting, after_round_0, capsys):
    before = (after_round_0 / "events.jsonl").read_bytes()
    rewrite(after_round_0, "run_start", None, lambda e: e["inputs"].update({setting: "0" * 64}))
    assert main(["--resume", str(after_round_0)]) == 2
    assert (
        f"the file of {setting} was changed since the run began (SHA-256 000000000000 then" in capsys.readouterr().err
    )
    assert (after_round_0 / "events.jsonl").read_bytes()[-1000:] == before[-1000:]


def test_a_vignette_file_that_was_edited_is_refused_and_then_put_back(settings, tmp_path, capsys):
    vignettes = tmp_path / "vignettes.jsonl"
    whole = (ROOT / "data/toylm/vignettes.jsonl").read_text().splitlines(keepends=True)[:3]
    vignettes.write_text("".join(whole))
    with pytest.MonkeyPatch.context() as patch, undrawn():
        patch.setattr(
            "steer_heal.session.Session.teacher_vec", lambda self, r: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert main(["fast-dev", "--out", str(tmp_path / "out"), *settings[:-1], str(vignettes), "--no-control"]) == 130
    run = next(path for path in (tmp_path / "out").iterdir() if (path / "events.jsonl").exists())
    vignettes.write_text("".join(whole[:2]))
    assert main(["--resume", str(run), "--quiet"]) == 2
    assert "the file of eval.vignettes was changed" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_weights(after_round_0, capsys):
    rewrite(after_round_0, "run_start", None, lambda e: e["weights"].update(sha256="0" * 64))
    before = (after_round_0 / "events.jsonl").read_bytes()
    assert main(["--resume", str(after_round_0), "--quiet"]) == 1
    assert "the weights of model 'tiny-random' were changed since the run began" in capsys.readouterr().err
    rewrite(after_round_0, "run_start", None, lambda e: e["weights"].update(dtype="float16"))
    assert main(["--resume", str(after_round_0), "--quiet"]) == 1
    assert "was in float16 and is now in float32 (--dtype and --device decide)" in capsys.readouterr().err
    assert len((after_round_0 / "events.jsonl").read_bytes().splitlines()) == len(before.splitlines())
