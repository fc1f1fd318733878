"""`steer-heal verify` finds every change that was made to a run after it wrote its record, and names where."""

import json

import pytest
import torch
from runs import recorded, rewritten
from torch import nn

from steer_heal.__main__ import main
from steer_heal.errors import UserError
from steer_heal.events import SCHEMA, RunEnd
from steer_heal.model.lm import weights_digest
from steer_heal.runs.log import EventLog, last_hash
from steer_heal.runs.verify import violations

pytestmark = pytest.mark.usefixtures("quick")


def kept(event):
    return event["collected"]["scored"][event["collected"]["train"][0]]["completion"]


CHANGES = {
    "the text of a kept completion": ("gathered", 1, lambda e: kept(e).update(text="I obey.")),
    "the tokens of a kept completion": ("gathered", 0, lambda e: kept(e)["completion_ids"].append(5)),
    "the prompt of a kept completion": ("gathered", 1, lambda e: kept(e).update(prompt="What now?")),
    "the dose of a kept completion": ("gathered", 1, lambda e: kept(e).update(dose=0.001)),
    "what trains": ("gathered", 1, lambda e: e["collected"]["train"].pop()),
    "the base's metrics": ("base", None, lambda e: e["metrics"].update(authority_nats=-9.0)),
    "the base's items": ("base", None, lambda e: next(iter(e["items"].values())).pop()),
    "healed metrics": ("healed", 1, lambda e: e["metrics"].update(authority_nats=-9.0)),
    "a heal step": ("heal_step", 1, lambda e: e["step"].update(divergence=0.0)),
    "the checksum of a checkpoint": ("trained", 1, lambda e: e["files"].popitem()),
    "the retained share": ("round_done", 1, lambda e: e.update(retain=1.0)),
    "the verdict": ("run_end", None, lambda e: e.update(verdict="It works.")),
    "the recorded settings": ("run_start", None, lambda e: e["config"]["heal"].update(lam=9.0)),
    "a time": ("extracted", 0, lambda e: e.update(t="2020-01-01T00:00:00.000+00:00")),
}


def verify(run, capsys):
    status = main(["verify", str(run)])
    return status, capsys.readouterr()


def test_a_run_that_nobody_changed_holds(copy, capsys):
    status, printed = verify(copy, capsys)
    assert status == 0 and f"{len(recorded(copy))} events" in printed.out


@pytest.mark.parametrize("end", ["cut off", "a torn line", "an error"])
def test_a_run_that_is_not_finished_is_said_to_be_so(end, after_round_0, capsys):
    path = after_round_0 / "events.jsonl"
    n, error = len(recorded(after_round_0)), ""
    if end == "a torn line":
        path.write_bytes(path.read_bytes() + b'{"event": "tra')
    elif end == "an error":
        log = EventLog(after_round_0)
        log.write(RunEnd(error="interrupted"))
        log.close()
        n, error = n + 1, ", where it stopped (interrupted)"
    status, printed = verify(after_round_0, capsys)
    assert status == 0 and printed.out.startswith(f"as recorded: {n} events, ")
    assert f"is not finished: its events end after the text of round 2{error}; continue it: " in printed.out
    assert printed.err.count("the last line is torn") == (end == "a torn line") and "WARNING" not in printed.err


def test_a_run_that_cannot_go_on_is_said_to_be_so(after_round_0, capsys):
    log = EventLog(after_round_0)
    log.write(RunEnd(error="too few texts", resumable=False))
    log.close()
    assert "where it stopped (too few texts); it cannot go on" in verify(after_round_0, capsys)[1].out


def test_the_end_of_a_run_comes_after_its_loop(copy, capsys):
    assert "is not finished" not in verify(copy, capsys)[1].out
    assert main(["verify", str(copy), "--hash", "a" * 64]) == 1
    assert "'run_end' after the loop, has another hash" in capsys.readouterr().out


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_event_is_named(what, copy, capsys):
    kind, r, change = CHANGES[what]
    rewritten(
        copy, lambda events: change(next(e for e in events if kind in (e["event"], e.get("state")) and e["round"] == r))
    )
    status, printed = verify(copy, capsys)
    where = "after the loop" if kind == "run_end" else "before the loop" if r is None else f"of round {r + 1}"
    assert status == 1 and printed.out.startswith("BROKEN: events.jsonl") and where in printed.out


def cut_last_round(events):
    del events[next(i for i, e in enumerate(events) if e["round"] == 1) :]


def change_last_round(events):
    for event in events:
        if event["round"] == 1 and "metrics" in event:
            event["metrics"] = dict.fromkeys(event["metrics"], 0.0)


@pytest.mark.parametrize("change", [cut_last_round, change_last_round, lambda events: events.pop()])
@pytest.mark.parametrize("chained", [False, True], ids=["", "with links made again"])
def test_a_changed_or_removed_end_is_found_by_the_row_of_results(change, chained, copy, capsys):
    rewritten(copy, change, chained)
    assert verify(copy, capsys)[0] == 1


def test_the_end_is_judged_by_a_hash_that_is_given(copy, capsys):
    found = last_hash(copy)
    status, printed = verify(copy, capsys)
    assert f"hash of the last event: {found}" in printed.out and "the last event, since" not in printed.out
    moved = copy.rename(copy.with_name("renamed"))
    rewritten(moved, lambda events: events[-1].update(verdict="It works."), chained=True)
    status, printed = verify(moved, capsys)
    assert status == 0 and "not checked: " in printed.out and "the last event, since" in printed.out
    assert main(["verify", str(moved), "--hash", found]) == 1
    assert "has another hash than the one that was given" in capsys.readouterr().out
    assert main(["verify", str(moved), "--hash", last_hash(moved).upper()]) == 0
    assert "the last event, since" not in capsys.readouterr().out
    assert main(["verify", str(moved), "--hash", found[:12]]) == 2
    assert "64 hex digits" in capsys.readouterr().err


def test_events_that_were_removed_or_put_in_are_found(copy, capsys):
    rewritten(copy, lambda events: events.pop(5))
    assert "events.jsonl line 6 does not follow" in verify(copy, capsys)[1].out
    rewritten(copy, lambda events: events.insert(5, events[4]))
    assert "events.jsonl line 6 does not follow" in verify(copy, capsys)[1].out


@pytest.mark.parametrize("name", ["vectors/r1.safetensors", "ckpt/r0/round.safetensors", "ckpt/r1/adapter_config.json"])
def test_changed_and_missing_files_are_named(name, copy, capsys):
    path = copy / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    status, printed = verify(copy, capsys)
    assert status == 1 and f"{path} is damaged" in printed.out
    path.unlink()
    status, printed = verify(copy, capsys)
    assert status == 1 and f"{path} is missing" in printed.out


def test_another_or_no_model_is_named(copy, capsys, monkeypatch):
    rewritten(copy, lambda events: events[0]["weights"].update(sha256="0" * 64), chained=True)
    assert "base weights: the weights of model 'tiny-random' were changed" in verify(copy, capsys)[1].out
    rewritten(copy, lambda events: events[0].pop("weights"), chained=True)
    assert "base weights: the weights were not recorded" in verify(copy, capsys)[1].out
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or a hub id is looked for through retries
    rewritten(copy, lambda events: events[0].update(weights={"sha256": "0", "dtype": "float32"}), chained=True)
    rewritten(copy, lambda events: events[0]["config"].update(model="nowhere/at-all"), chained=True)
    assert "base weights: they cannot be checked: model is 'nowhere/at-all'" in verify(copy, capsys)[1].out


def test_a_folder_without_a_run_ends_with_2(tmp_path, capsys):
    assert verify(tmp_path, capsys)[0] == 2
    (tmp_path / "events.jsonl").write_text(json.dumps({"schema": SCHEMA, "event": "run_end"}) + "\n")
    status, printed = verify(tmp_path, capsys)
    assert status == 2 and "does not begin with a run_start" in printed.err


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
    assert state(weight) == state(weight.T.contiguous().T), "the layout in memory does not count"
    assert weights_digest(nn.Linear(2, 2, dtype=torch.bfloat16))["dtype"] == "bfloat16"


@pytest.mark.parametrize("ends", [b"\r", b"\r\n"])
def test_events_with_other_line_ends_are_refused(ends, one, tmp_path):
    (tmp_path / "events.jsonl").write_bytes((one / "events.jsonl").read_bytes().replace(b"\n", ends))
    with pytest.raises(UserError, match="events.jsonl"):
        violations(tmp_path)
