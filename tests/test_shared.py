"""A run takes what the untouched model was measured as from another run that reads it alike, and from no other."""

from dataclasses import replace

import pytest
from made_runs import run_events, with_config, write_run
from runs import SETTINGS, undrawn

from steer_heal.__main__ import main
from steer_heal.bench import Bench
from steer_heal.events import Measured, Preflight, Run, Weights
from steer_heal.records import Teachable
from steer_heal.runs.log import read_events
from steer_heal.runs.shared import with_base

PREFLIGHT = Preflight(found=Teachable(verdict="teachable", reason="", band=0.1, personas=(), contrasts=(), null=()))


@pytest.fixture
def beside(tmp_path):
    """A finished run with a pre-flight."""
    start, *rest = run_events(1)
    start = replace(start, weights=Weights(sha256="1", dtype="float32"), inputs={"eval.pairs": "1", "heal.x": "1"})
    write_run(tmp_path / "a", [start, PREFLIGHT, *rest])
    return start


def taken(start, tmp_path) -> tuple[str, list[str]]:
    named, events = with_base(start, tmp_path / "b")
    return named.base_from, [event.state if isinstance(event, Measured) else event.event for event in events]


def test_a_run_that_reads_the_untouched_model_alike_gives_its_readings(beside, tmp_path):
    own = replace(
        beside, folder="b", preset="x", command=("y",), adapter="z", inputs={"eval.pairs": "1", "heal.x": "2"}
    )
    cfg = beside.config
    (own,) = with_config([own], heal=replace(cfg.heal, lr=0.5), dose=replace(cfg.dose, floor=0.01), n_rounds=7)
    assert taken(own, tmp_path) == ("a", ["preflight", "base", "prompted"])


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": Weights(sha256="2", dtype="float32")},
        {"inputs": {"eval.pairs": "2"}},
        {"device": "another"},
        {"git_commit": "another"},
        {"versions": {"torch": "another"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_of_another_model_data_device_or_version_gives_none(beside, tmp_path, changes):
    assert taken(replace(beside, **changes), tmp_path) == ("", [])


def test_a_run_of_another_seed_trait_or_eval_gives_none(beside, tmp_path):
    cfg = beside.config
    for changes in ({"seed": 7}, {"temperature": 0.5}, {"eval": replace(cfg.eval, n_texts=3)}):
        assert taken(with_config([beside], **changes)[0], tmp_path) == ("", [])
    assert taken(replace(beside, trait=replace(beside.trait, positive="You sing.")), tmp_path) == ("", [])


def test_what_is_no_run_beside_it_is_passed_over(beside, tmp_path):
    for name, text in (("0", '{"schema": 1}\n'), ("1", ""), ("2", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "events.jsonl").write_text(text)
    assert taken(beside, tmp_path)[0] == "a"


def test_the_runs_of_a_sweep_measure_the_base_once(tmp_path, monkeypatch):
    measured, subject = [], Bench.subject

    def counted(bench, state, *more):
        measured.append(state.name)
        return subject(bench, state, *more)

    monkeypatch.setattr(Bench, "subject", counted)
    flags = [*SETTINGS.split(), "--n-rounds", "1", "--no-control", "--share-base", "--eval.n-vignettes", "3"]
    with undrawn():
        for name, lr in (("a", "0.001"), ("b", "0.002")):
            assert main(["run", "fast-dev", "--folder", str(tmp_path / name), *flags, "--heal.lr", lr]) == 0
    assert measured == ["base", "prompted", "steered", "healed", "steered", "healed"]
    one, other = (Run(read_events(tmp_path / name)) for name in "ab")
    assert (one.start.base_from, other.start.base_from) == ("", "a")
    for state in ("base", "prompted"):
        a, b = one.measured(state), other.measured(state)
        assert (a.metrics, a.texts) == (b.metrics, b.texts) and str(a.items) == str(b.items)
    assert main(["verify", str(tmp_path / "b")]) == 0
