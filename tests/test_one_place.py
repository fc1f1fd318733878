"""A new divergence, steering method, gate, eval and trait: each is one object or file, and shows up everywhere."""

import json
import re

import pytest
from runs import of, recorded, undrawn

from steer_heal.__main__ import main
from steer_heal.evals import EVALS
from steer_heal.evals.base import Eval
from steer_heal.events import Run
from steer_heal.inputs import traits
from steer_heal.inputs.files import DATA
from steer_heal.model.divergence import DIVERGENCES, Divergence
from steer_heal.model.steering import METHODS, Method
from steer_heal.records import Metric
from steer_heal.report import page
from steer_heal.runs.stored import FolderRun
from steer_heal.stages.filter import GATES, Gate
from steer_heal.verdict import verdict

PROMPTS = [{"text": f"Shall I open door {i}?"} for i in range(12)]


@pytest.fixture
def additions(monkeypatch, tmp_path):
    """A divergence without a hand-written gradient, a flipped mean, a gate, an eval with a metric, a trait."""
    half_variation = Divergence(lambda logp, logp_ref: (logp.exp() - logp_ref.exp()).abs().sum(-1) / 4)
    monkeypatch.setitem(DIVERGENCES, "half_variation", half_variation)
    monkeypatch.setitem(METHODS, "flipped", Method(lambda positive, negative: (negative - positive).mean(0)))
    # the first completion of a prompt that ends in an odd number of characters is dropped: some are, some are not
    monkeypatch.setitem(
        GATES, "odd_length", Gate("odd lengths", lambda text: len(text.lower) % 2, 0.5, degenerate=True)
    )
    vowels = lambda subject: {"vowels": [sum(c in "aeiou" for c in text.text) / 10 for text in subject.texts]}
    metric = Metric(name="vowel_count", item="vowels", title="tens of vowels", unit="tens", moved=0.01, form="+.3f")
    monkeypatch.setitem(EVALS, "vowels", Eval(vowels, (metric,), of="text"))
    known = (DATA / "traits/authority.toml").read_text(encoding="utf-8")
    changed = re.sub(r"^target = .*$", 'target = "vowel_count"', known, flags=re.M)
    own = changed.replace("off_targets = [", 'off_targets = ["authority_nats", ')
    (tmp_path / "traits").mkdir()
    (tmp_path / "traits" / "vowels.toml").write_text(own, encoding="utf-8")
    monkeypatch.setattr(traits, "TRAITS", tmp_path / "traits")


def test_each_addition_shows_in_events_console_page_and_verdict(additions, settings, tmp_path, capsys, monkeypatch):
    pool = tmp_path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    names = {
        "--trait": ["vowels"],
        "--gen.prompts": [str(pool)],
        "--heal.divergence": ["half_variation"],
        "--steer.method": ["flipped"],
        "--filter.gates": ["odd_length"],
        "--eval.evals": ["moral_foundations", "vowels"],
    }
    flags = [word for flag, values in names.items() for word in (flag, *values)]
    with undrawn():
        own = ["--n-rounds", "1", "--no-control", *flags]
        status = main(["run", "fast-dev", "--out", str(tmp_path / "out"), *settings, *own])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    folder = next(path for path in (tmp_path / "out").iterdir() if path.is_dir())
    events = recorded(folder)
    rows = of(events, "gathered")[0]["collected"]["scored"]
    assert {not row["reasons"] for row in rows} == {True, False}
    odd = [len(row["completion"]["text"].lower()) % 2 for row in rows]
    assert all(bool(row["reasons"]) == bool(n) for row, n in zip(rows, odd, strict=True)), "the gate decides"
    assert any(e["step"]["divergence"] > 0 for e in of(events, "heal_step")), "autograd gives its gradient"
    healed = of(events, "measured", "healed")[0]["metrics"]
    assert healed["vowel_count"] is not None and healed["vowel_count_lo"] is not None
    monkeypatch.setattr(Run, "untrained", False)  # an untrained model has no grade
    assert "vowel_count" in verdict(FolderRun.read(folder))
    assert "healed round 1" in printed.out and "vowels" in printed.out
    page.save(FolderRun.read(folder), folder)
    shown = (folder / "report.html").read_text(encoding="utf-8")
    for word in ("half_variation", "flipped", "odd lengths", "tens of vowels", "vowels"):
        assert word in shown, word
