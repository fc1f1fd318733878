"""Trackers get the curves of a run, go on where it goes on, and never stop it."""

import importlib.util
import sys
import types
from dataclasses import replace

import pytest
from compare import differences
from made_runs import run_events
from runs import Killed, killing, resumed, started

from steer_heal.__main__ import main
from steer_heal.backends import track
from steer_heal.backends.track import TRACKERS, Tracking, scalars
from steer_heal.events import Dropped, HealStepped, Measured, Run
from steer_heal.settings import as_json
from steer_heal.stages import heal as heal_module

EVENTS = run_events(n_rounds=2)
N_STEPS = sum(isinstance(event, HealStepped) for event in EVENTS)


def tracked(names, folder, events=EVENTS, past=EVENTS[:1]):
    """Trackers that have followed the run from where its `past` ends."""
    run = Run(past)
    tracking = Tracking(names, run, folder)
    run.subscribers.append(tracking.see)
    for event in events[len(past) :]:
        run.add(event)
    return tracking


@pytest.fixture
def stub(monkeypatch):
    """A tracker that only remembers, under the name `stub`."""
    calls = []

    class Stub:
        package = "json"

        def __init__(self, folder, config, step):
            calls.append(("init", folder.name, step))

        def log(self, values, step):
            calls.append(("log", dict(values), step))

        def picture(self, path, step):
            calls.append(("picture", path.name, step))

        def close(self):
            calls.append(("close",))

    monkeypatch.setitem(TRACKERS, "stub", Stub)
    return calls


def test_each_number_of_a_state_is_logged_at_the_optimiser_step_it_was_measured_at(tmp_path, stub):
    tracked(["stub"], tmp_path / "run")
    logged = [(values, step) for what, *rest in stub if what == "log" for values, step in [rest]]
    steps = [step for _, step in logged]
    assert steps == sorted(steps) and steps[-1] == N_STEPS
    at = {name: [step for values, step in logged if name in values] for values, _ in logged for name in values}
    assert at["heal/fit"] == list(range(N_STEPS // 3 + 1, N_STEPS + 1))
    assert at["control_heal/fit"] == list(range(1, N_STEPS // 3 + 1))
    assert at["base/coherence"] == at["prompted/coherence"] == [0]
    assert at["healed/authority_nats"] == [N_STEPS // 3 * 2, N_STEPS]
    assert not any(name.endswith("_lo") for name in at)
    healed = [values for values, _ in logged if "healed/authority_nats" in values]
    assert [values["round"] for values in healed] == [0, 1]


def test_a_value_that_is_missing_is_left_out():
    values = {"a": None, "b": 0.5, "b_lo": 0.1, "c": float("nan"), "d": float("inf")}
    event = Measured(round=0, state="healed", metrics=values, items={})
    assert scalars(event) == {"healed/b": 0.5, "round": 0.0}


def test_the_steps_of_a_dropped_round_still_count(tmp_path, stub):
    """The next attempt at a round is drawn to the right of the first, not on top of it."""
    steps = [event for event in EVENTS if isinstance(event, HealStepped) and event.round == 0]
    dropped = Dropped(round=0, past=(), dose=1.0, lr=1.0, metrics={}, next_kappa=0.5, next_lr_share=1.0)
    events = [EVENTS[0], *steps, dropped, *steps]

    def at():
        return [rest[1] for what, *rest in stub if what == "log"]

    tracked(["stub"], tmp_path, events)
    assert at() == list(range(1, 2 * len(steps) + 1))
    stub.clear()
    tracked(["stub"], tmp_path, events, past=events[: len(steps) + 2])
    assert stub[0] == ("init", tmp_path.name, len(steps)) and at()[0] == len(steps) + 1, "resumed after the drop"


def tags(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found = {name: [(each.step, each.value) for each in read.Scalars(name)] for name in read.Tags()["scalars"]}
    return found | {name: [(each.step, 0.0) for each in read.Images(name)] for name in read.Tags()["images"]}


def test_tensorboard_files_hold_the_curves_and_pictures_also_of_a_run_that_went_on(tmp_path):
    pytest.importorskip("tensorboard", reason="its package is not installed")
    import matplotlib.pyplot as plt
    import numpy as np

    for name, cuts in (("whole", [len(EVENTS)]), ("resumed", [len(EVENTS) // 2, len(EVENTS)])):
        folder, done = tmp_path / name, 0
        folder.mkdir()
        plt.imsave(folder / "map.png", np.zeros((4, 4)))
        for cut in cuts:
            tracking = tracked(["tensorboard"], folder, EVENTS[:cut], past=EVENTS[: max(done, 1)])
            if cut < len(EVENTS):  # steps that were lost, and are done again
                for event in EVENTS[cut : cut + 5]:
                    assert isinstance(event, HealStepped)
                    tracking.run.add(replace(event, step=replace(event.step, fit=99.0)))
            done = cut
        tracking.pictures([folder / "trajectory.png", folder / "map.png"])
        tracking.close()
    whole, again = tags(tmp_path / "whole"), tags(tmp_path / "resumed")
    assert whole == again and [step for step, _ in whole["map"]] == [N_STEPS]
    assert len(whole["heal/fit"]) == N_STEPS * 2 // 3 and whole["heal/fit"][0] == (N_STEPS // 3 + 1, 1.0)


def test_a_run_that_was_killed_goes_on_in_its_curves(quick, settings, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="its package is not installed")
    flags = ("--n-rounds", "1", "--no-control", "--track", "tensorboard")
    whole = started(tmp_path / "whole", settings, *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, heal_module, "schedule", 2)
        main(["run", "fast-dev", "--out", str(tmp_path / "killed"), *settings, *flags])
    run = next(path for path in (tmp_path / "killed").iterdir() if (path / "events.jsonl").exists())
    assert tags(resumed(run)) == tags(whole)


class Module(types.ModuleType):
    """Stands for the package of a tracker: remembers what it is called with."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.__spec__ = importlib.util.spec_from_loader(name, None)

    def init(self, **how):
        self.calls.append(("init", how))
        return self

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))

    @staticmethod
    def Image(path):
        return f"image of {path}"


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_of_services_gets_one_named_run_that_can_go_on(name, tmp_path, monkeypatch):
    module = Module(name)
    monkeypatch.setitem(sys.modules, name, module)
    track.check([name])
    (tmp_path / "map.png").touch()
    tracking = tracked([name], tmp_path)
    tracking.pictures([tmp_path / "map.png", tmp_path / "nowhere.png"])
    tracking.close()
    (_, how), *logged, last = module.calls
    assert how["name"] == tmp_path.name and how["resume"] == "allow"
    assert how["config"] == as_json(EVENTS[0].config)
    assert how["project"] == "steer-heal" and last == ("finish",)
    assert len([1 for _, values, _ in logged if "heal/fit" in values]) == N_STEPS * 2 // 3
    assert logged[-1] == ("log", {"map": f"image of {tmp_path / 'map.png'}"}, N_STEPS)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_real_packages_take_it_without_a_network(name, tmp_path, monkeypatch):
    pytest.importorskip(name, reason="its package is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tracking = tracked([name], tmp_path, EVENTS[:20])
        assert list(tracking.running) == [name]
        tracking.close()
    assert not [each for each in said if "continues without" in str(each.message)]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, stub, monkeypatch):
    class Failing:
        package = "json"

        def __init__(self, *_):
            pass

        def log(self, *_):
            raise ConnectionError("no network")

    class Refusing:
        package = "json"

        def __init__(self, *_):
            raise RuntimeError("no login")

    monkeypatch.setitem(TRACKERS, "failing", Failing)
    monkeypatch.setitem(TRACKERS, "refusing", Refusing)
    with pytest.warns(UserWarning) as said:
        tracked(["refusing", "failing", "stub"], tmp_path).close()
    assert [str(each.message).split(" ")[0] for each in said] == ["refusing", "failing"], "each says so once"
    assert "no login" in str(said[0].message) and "ConnectionError: no network" in str(said[1].message)
    assert stub[-1] == ("close",) and sum(call[0] == "log" for call in stub) > N_STEPS


def test_a_run_whose_tracker_fails_ends_as_one_without(quick, settings, one, tmp_path, stub, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(TRACKERS["stub"], "log", fail)
    run = started(tmp_path, settings, "--n-rounds", "1", "--track", "stub")
    assert [line for line in differences(run, one) if "run_start" not in line] == []
    assert stub == [("init", run.name, 0)]


@pytest.mark.parametrize(
    "name, told", [("wnadb", "did you mean 'wandb'?"), ("absent", "pip install 'steer-heal[no_such_package]'")]
)
def test_a_tracker_that_is_not_there_is_refused_before_the_model_loads(name, told, tmp_path, capsys, monkeypatch):
    absent = type("Absent", (), {"package": "no_such_package"})
    monkeypatch.setitem(TRACKERS, "absent", absent)
    monkeypatch.setattr("steer_heal.bench.load", None)
    assert main(["run", "fast-dev", "--out", str(tmp_path / "out"), "--track", name]) == 2
    printed = capsys.readouterr().err
    assert f"track is {name!r}" in printed and told in printed
    assert not (tmp_path / "out").exists()
