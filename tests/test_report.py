"""The page, the diary and the console: what they show of finished and of partial runs, no outside references, size."""

import io
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_runs import (
    GATES,
    METRICS,
    PROMPT,
    Page,
    changed,
    completion,
    read,
    renamed,
    run_events,
    until,
    with_config,
    with_metrics,
    with_trait,
    write_run,
)

from steer_heal.__main__ import main
from steer_heal.commands import run as run_command
from steer_heal.events import (
    AnyEvent,
    Calibrated,
    Chat,
    Dropped,
    Extended,
    Extracted,
    Gathered,
    HealRetried,
    HealStepped,
    Measured,
    RoundDone,
    Run,
    RunEnd,
    RunStart,
    Trained,
    Weights,
)
from steer_heal.inputs import evenly
from steer_heal.inputs.files import OWN_CONFIG_FILE
from steer_heal.records import Calibration, DoseProbe, KlProbe, Metric, Scored
from steer_heal.report import compare, console, draw, page, plot, tables
from steer_heal.report.page import command_of, next_steps, save, settings_of
from steer_heal.report.texts import Written, borderline, survival, word_diff
from steer_heal.report.view import event_words, table_columns
from steer_heal.settings import TINY_RANDOM
from steer_heal.verdict import ended_early, title, verdict


@pytest.fixture
def rendered():
    """Asked for by a test whose pages need their pictures."""


@pytest.fixture(autouse=True)
def unrendered(request, monkeypatch):
    """An empty picture for each of a page, which take most of its time. Fixtures of the module have theirs."""
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(plot, "data_uri", lambda figure: "data:image/svg+xml;base64,")
        monkeypatch.setattr(plot, "_place_labels", lambda figure, labels: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, *read(folder, run_events())


def test_the_page_says_verdict_rounds_answers_filter_heal_and_how_to_run_it_again_in_this_order(finished):
    text = Page(finished[1]).text
    wanted = (
        "GOOD", "finished: 2 of 2 rounds", "data/toylm, seed 42", "healed round 2", f"{PROMPT} 0",
        "tail perplexity 2.1", "dose against divergence", "0.9 nats", "just kept", "just dropped", "held-out prompts",
        "git checkout 0123abc", "toy --out 'a folder'", "heal.tau",
    )  # fmt: skip
    places = [text.index(word) for word in wanted[:3]] + [text.rindex(word) for word in wanted[-4:]]
    assert all(word in text for word in wanted) and places == sorted(places)


def test_every_metric_and_its_interval_is_on_the_page(finished):
    text = Page(finished[1]).text
    for metric in METRICS:
        assert metric.name in text and metric.title in text
    assert "\u22120.700 to \u22120.500" in text, "authority: the healed shift"
    assert "\u22125% to +8%" in text, "broken texts"
    cells = re.findall('<tr class="target">(.*?)</tr>', finished[1])
    assert len(cells) == 1 and cells[0].count("<small>") == 1 + 6, "the metric, and every state but base"
    for low, high in (("\u22122.100", "\u22121.900"), ("\u22120.050", "+0.150"), ("\u22120.600", "\u22120.400")):
        assert f"<small>{low} to {high}</small>" in cells[0]
    headings = ['<h2 id="metrics">', "Metrics of vignettes", "Metrics of free answers", '<h2 id="items">']
    places = [finished[1].index(heading) for heading in headings]
    assert places == sorted(places) and "Other metrics" not in text


def test_the_trait_s_metric_is_read_item_by_item_with_the_wanted_change_first(finished):
    text = " ".join(Page(finished[1]).text.split())
    assert "1 of 2 went down, as wanted, from base to healed round 2. 1 more have no value" in text
    assert "Each scene is shown with its answer." in text
    first, second = (
        f"I let them in. Scene {i}.authority{values}" for i, values in ((2, "0.3 to 0.28"), (1, "0.3 to 0.32"))
    )
    assert first + second in text, text[text.index("item by item") :][:900]


def test_items_without_wording_are_told_by_their_number(finished, tmp_path):
    """As in a run whose events hold none, and where its list is too short."""
    for wording, seen in (({"vignette": [["A scene."]]}, "A scene."), ({}, "vignette 1")):
        text = " ".join(Page(read(tmp_path, changed(run_events(), RunStart, wording=wording))[0]).text.split())
        assert f"vignette 20.3 to 0.28{seen}0.3 to 0.32" in text
        assert ("Each scene is shown" in text) is bool(wording)


def test_texts_and_pairs_are_shown_by_their_prompt(tmp_path):
    rows = [["Is it open?", "It is <b>open</b>.", "It is shut."]] * 3
    pairs = {"pair": rows, "question": rows}
    for of, shown in (
        ("pair", "Is it open?It is <b>open</b>.It is shut.0.3 to 0.28"),
        ("question", "Is it open?It is <b>open</b>.It is shut.0.3 to 0.28"),
        ("text", f"{PROMPT} 10.3 to 0.28"),
    ):
        metrics = tuple(replace(m, of=of) if m.name == "authority_nats" else m for m in METRICS)
        events = changed(run_events(n_texts=3), RunStart, metrics=metrics, wording=pairs)
        html = read(tmp_path / of, events)[0]
        assert shown in " ".join(Page(html).text.split()) and "<b>open" not in html


def test_every_answer_has_its_own_scores(finished):
    answers = re.findall("<article.*?</article>", finished[1], re.S)
    healed = [a for a in answers if "<b>healed</b>round 2" in a]
    assert [re.findall("KL to base ([^<]*)", a) for a in healed] == [["0.320"], ["0.240"], ["0.280"], ["\u2013"]]
    assert all("tail perplexity 2.1" in a and "broken texts" not in a for a in answers)


def test_a_word_diff_holds_both_texts_and_marks_what_is_only_in_one():
    old, new = "I lock the gate & leave <b>now</b>.", "I open the gate and leave <b>now</b>."
    words = word_diff(old, new)
    assert "<del>lock</del> <ins>open</ins>" in words and "&lt;b&gt;now" in words and "<b>" not in words

    def without(tag):
        return Page(" ".join(re.sub(f"<{tag}>.*?</{tag}>", "", words).split())).text

    assert without("ins") == old and without("del") == new
    assert word_diff("a b c d e f", "a x c y e f") == "a <del>b c d</del> <ins>x c y</ins> e f", "one piece"
    assert word_diff("", "") == "" and word_diff("a  b", "a b") == "a b"


def test_what_changed_from_base_is_shown_for_the_best_and_the_last_round(finished, tmp_path):
    assert finished[1].count("<del>Yes.</del> <ins>No.</ins>") == 4
    html, _ = read(tmp_path, with_metrics(run_events(), {"degenerate_frac": 0.9}, ["healed"], 1))
    assert "best round: 1" in html and "healed round 1 (best)" in html
    assert html.count("word by word</h4>") == 2 * 4 and html.count("base to healed, round 1, word") == 4


def test_each_choice_of_a_filter_has_its_rule_and_each_rule_its_choice(finished):
    style = finished[1][finished[1].index("<style>") : finished[1].index("</style>")]
    ids = dict.fromkeys(re.findall(r'<input type="\w+"(?: name="[\w-]+")? id="([\w-]+)"', finished[1]))
    ruled = set(re.findall(r":has\(#([\w-]+):(?:checked|not\(:checked\))\)", style))
    assert ruled == {name for name in ids if not name.endswith(("-all", "-any"))} and len(ruled) >= 15
    used = set(" ".join(re.findall('class="([^"]*)"', finished[1])).split())
    assert set(re.findall(r"\.((?:why|round)-[\w-]+)", style)) <= used


def test_texts_are_evenly_spaced():
    assert evenly(range(10), 3) == (0, 3, 6) and evenly([1, 2], 3) == (1, 2) and evenly([], 3) == ()


def test_steered_stands_beside_healed_in_every_round_and_prompt(finished):
    html = finished[1]
    assert Page(html).tags["article"] == 4 * (3 + 2 * 2)
    assert html.count("<details open>") == 3, "the first metrics, the first prompt, the last round's filter"


def test_each_heal_has_its_curves_and_the_control_s_come_first(finished):
    found = re.findall('alt="Curves of the heal of ([^"]*)" src="data:image/svg', finished[1])
    assert found == ["control", "round 1", "round 2"]


def test_a_run_drawn_again_is_the_same_and_no_file_is_left_behind(rendered, tmp_path):
    files = []
    for _ in range(2):
        assert draw(write_run(tmp_path, run_events(1))) == tmp_path / "report.html"
        files.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert files[0] == files[1]
    assert sorted(files[0]) == ["diary.md", "events.jsonl", "map.png", "report.html", "trajectory.png"]


def test_pictures_are_drawn_at_the_end_of_a_round_alone(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(run_command, "draw", drawn.append)
    run = Run()
    run.folder = tmp_path
    for event in run_events():
        before = len(drawn)
        run.add(event)
        run_command._draw_after(event, run)
        assert len(drawn) - before == (isinstance(event, RoundDone | Dropped) and event.round == 0), event.event
    assert drawn, "the end of the run draws the last round"


def test_no_metric_and_no_gate_is_known_by_name(finished, tmp_path):
    names = {name: f"x{i}x" for i, name in enumerate([*(metric.name for metric in METRICS), *GATES])}
    for drawn, before in zip(
        read(tmp_path / finished[0].name, renamed(run_events(), names)), finished[1:], strict=True
    ):
        drawn, before = (
            re.sub('data:image[^"]*|<wbr>|<pre>steer-heal .*', "", text).replace("\\_", "_") for text in (drawn, before)
        )
        for old, new in names.items():
            drawn, before = (re.sub(rf"{new}|\b{old}\b", "?", text) for text in (drawn, before))
        assert drawn == before


def test_the_diary_goes_round_by_round_and_ends_with_the_verdict(finished):
    diary = finished[2]
    parts = "The untouched model:", "## Round 1", "Steered:", "Healed, without steering:", "## Round 2", "## Verdict"
    places = [diary.index(line) for line in parts]
    assert places == sorted(places) and diary.count("I let them in.") == 2 * (3 + 2 * 2), "both prompts"
    assert diary.rstrip().splitlines()[-1].startswith("GOOD: ")


def test_a_round_that_was_dropped_is_named_and_its_figures_are_gone(tmp_path):
    events = run_events()
    last = max(i for i, event in enumerate(events) if event.round == 1)
    dropped = Dropped(
        round=1,
        wall_s=1e6,
        past=("<i>texts are 31%",),
        dose=0.5,
        lr=1e-3,
        metrics={},
        next_kappa=1.0,
        next_lr_share=1.0,
    )
    events[last + 1 : last + 1] = [dropped, dropped]  # after the one retry of the settings
    html, _ = read(tmp_path / "run", events)
    text = " ".join(Page(html).text.split())
    assert text.count("An attempt at round 2 was dropped (dose 0.5, learning rate 0.001): <i>texts are 31%.") == 2
    assert "healed round 1" in text and "healed round 2" not in text
    assert "the last intact round is 1: round 2 was dropped" in text


def test_a_heal_that_was_tried_twice_is_named(tmp_path):
    events: list[AnyEvent] = []
    for event in run_events():
        events.append(event)
        if isinstance(event, Gathered) and event.round in (None, 0):
            again = HealRetried(round=event.round, step=7, prompt_index=3, text="<i>I let", lr=2.5e-4, error="...")
            events.append(again)
    html, diary = read(tmp_path / "run", events)
    text = " ".join(Page(html).text.split())
    for who in ("The control", "Round 1"):
        told = text[text.index(f"{who} was healed again") :][:250]
        assert all(word in told for word in ("0.00025", "step 7", "prompt 3", "\u201c<i>I let\u201d"))
    assert "Round 2 was healed again" not in text
    parts = "## Before the loop", "The control's heal", "The untouched model:", "## Round 1", "Its heal", "## Round 2"
    places = [diary.index(line) for line in parts]
    assert places == sorted(places) and diary.count("0.00025") == 2


NOTHING = ("running: 0 of 2 rounds", "No answers are written yet", "No state is measured yet", "No heal has")


@pytest.mark.parametrize("last, words", [
    ((RunStart,), NOTHING),
    ((Measured, None, "base"), ("the measurement of base at 2026-01-02 03:04:05", "No text to train on", "no healed")),
    ((Gathered, 1), ("its last event is the text of round 2", "of 24 kept", "2 of the base rehearsed")),
    ((Measured, 1, "steered"), ("its last event is the measurement of steered round 2",)),
    ((HealStepped, 1), ("its last event is step 95 of the heal of round 2", "not finished", "96 steps")),
    ((Trained, 1), ("on 14 texts, 2 held out",)),
])  # fmt: skip
def test_a_run_that_died_shows_what_it_had(tmp_path, last, words):
    html, diary = read(tmp_path / "run", until(run_events(), *last))
    text = " ".join(Page(html).text.split())
    assert [word for word in words if word not in text] == []
    assert "## Verdict" in diary


def test_a_starved_run_says_so_and_shows_what_the_filter_dropped(tmp_path):
    events = until(run_events(), Gathered, 0)
    starved = replace(events[-1], collected=replace(events[-1].collected, train=(0, 1, 2)))
    error = "the filter starved: 3 of 24 kept; lower --dose.floor"
    html, diary = read(tmp_path, [*events[:-1], starved, RunEnd(error=error, wall_s=1e6)])
    text = Page(html).text
    assert "stopped: 0 of 2 rounds" in text and error in text and "3 to train on, 2 of the base rehearsed" in text
    assert "the filter starved" in diary


def test_metrics_and_scores_without_a_value_do_not_stop_the_page(tmp_path):
    nan = float("nan")
    events = changed(run_events(), Extracted, cosine_to_first=nan)
    lost = {"retain": None, "slope": None, "cosine_student_teacher": nan, "cosine_student_first": nan}
    events = changed(events, RoundDone, **lost)
    unread = []
    for event in events:
        if isinstance(event, Measured):
            texts = tuple(replace(row, scores=dict.fromkeys(row.scores, nan)) for row in event.texts)
            event = replace(event, metrics=dict.fromkeys(event.metrics), texts=texts)
        if isinstance(event, Gathered):
            rows = tuple(replace(row, scores=dict.fromkeys(row.scores, nan)) for row in event.collected.scored)
            event = replace(event, collected=replace(event.collected, scored=rows))
        unread.append(event)
    html, diary = read(tmp_path, [event for event in unread if not isinstance(event, Calibrated)])
    assert "UNREADABLE" in Page(html).text and "UNREADABLE" in diary


@pytest.mark.parametrize("note", ["", "4-bit (Q4_1) weights, <b>unpacked</b>"])
def test_the_first_line_that_names_the_model_says_what_its_weights_are(note, tmp_path):
    events = changed(run_events(1), RunStart, weights=Weights(sha256="7" * 64, dtype="float32", note=note))
    model = ", ".join(filter(None, ("data/toylm", note)))
    html, diary = read(tmp_path / "run", events)
    assert f"{model}, seed 42" in Page(html).text and "<b>unpacked" not in html
    assert diary.splitlines()[2].startswith("The model data/toylm" + (", 4-bit" if note else " is to"))
    run = Run(events)
    assert f"into {model}, seed 42" in " ".join(plot.trajectory(run).get_suptitle().split())
    assert console._words(run.start, run).startswith(f"{model} | ")


def row(dose: float = 0.0, score: float = 0.0, *reasons: str) -> Written:
    scored = Scored(completion("", dose=dose), {"rep": score}, reasons, reasons)
    return Written(round=0, scored=scored, trains=False)


def test_survival_counts_every_row_once_and_falls_with_the_dose():
    rows = [
        row(dose, 0.0, *([] if dose < 1 else ["rep"])).scored for dose in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 1.6, 2.0)
    ]
    ranges = survival(rows)
    assert sum(n for _, n, _ in ranges) == len(rows) and sum(kept for *_, kept in ranges) == 6
    assert ranges[0] == ("0", 1, 1) and ranges[-1] == ("1.6 to 2", 3, 0) and len(ranges) <= 9
    assert survival([]) == [] and survival(rows[:1] * 3) == [("0", 3, 3)]
    assert survival(rows[4:5] * 2) == [("0.4", 2, 2)]


@pytest.mark.parametrize("side", [1, -1])
def test_borderline_rows_are_the_closest_on_both_sides_of_the_limit(side):
    """For a gate whose limit is a maximum, and for one whose limit is a minimum."""
    rows = [row(0.0, side * score) for score in (0.1, 0.29, 0.2, 0.28)]
    rows += [row(0.0, side * score, "rep") for score in (float("nan"), float("inf"), 0.9, 0.31, 0.5)]
    kept, dropped = borderline([*rows, row(0.0, side * 0.3, "short")], "rep", side * 0.3)
    assert [side * found.scored.scores["rep"] for found in kept] == [0.29, 0.28, 0.2]
    assert [side * found.scored.scores["rep"] for found in dropped] == [0.31, 0.5, 0.9]


def test_borderline_rows_are_shown_for_gates_of_degenerate_text_that_are_on_and_have_a_limit(finished):
    assert re.findall("<h3>At the (.*) limit", finished[1]) == ["perplexity", "repetition"] * 3


def test_the_page_of_eight_rounds_stays_under_5_mb_and_says_what_it_leaves_out(rendered, tmp_path):
    text = ("I let the tenants in & tell the warden that <nobody> sleeps in the rain. " * 9)[:600]
    html, _ = read(tmp_path, run_events(8, 64, 64, 384, text))
    assert len(html.encode()) < 5_000_000
    assert Page(html).tags["article"] == 64 * (3 + 8 * 2)
    assert Page(html).text.count("All texts are in events.jsonl") == 1
    more, _ = read(tmp_path, run_events(1, 200, 100))
    assert "Not shown: 36 prompts and 136 answers a state" in Page(more).text


def test_the_command_draws_everything_and_names_a_folder_without_events(tmp_path, capsys):
    folder = write_run(tmp_path / "run", run_events(1))
    assert main(["report", str(folder)]) == 0 and "report.html" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} >= {"trajectory.png", "map.png", "report.html", "diary.md"}
    assert main(["report"]) == 2 and "no run was given" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2 and "no events.jsonl" in capsys.readouterr().err
    assert main(["report", str(write_run(tmp_path / "headless", run_events()[1:]))]) == 2
    assert "no event RunStart" in capsys.readouterr().err
    broken = write_run(tmp_path / "broken", with_trait(run_events(1), target="unknown"))
    assert main(["report", str(broken)]) == 2 and str(broken) in capsys.readouterr().err
    assert main(["report", str(write_run(tmp_path / "empty", []))]) == 0
    assert "has not started yet" in capsys.readouterr().out


def test_pictures_of_the_page_are_drawn_at_a_width_that_a_phone_can_read():
    run = Run(run_events())
    for figure in (plot.rounds(run), plot.plane(run), *plot.heal_curves(run).values()):
        assert figure.get_figwidth() * 72 <= 400


# --- several runs -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two runs that differ in a setting, in the number of rounds and in what the healed students wrote."""
    out = tmp_path_factory.mktemp("compared")
    other = run_events(1, text="I keep them out.")
    other = with_config(other, heal=replace(other[0].config.heal, lam=0.7), model="<b>other</b>")
    folders = [write_run(out / "one", run_events(2)), write_run(out / "other", other)]
    assert main(["report", *map(str, folders), "--compare", str(out / "both.html")]) == 0
    return folders, (out / "both.html").read_text(encoding="utf-8")


def test_runs_stand_side_by_side_with_verdicts_states_settings_and_answers(compared):
    folders, html = compared
    text = " ".join(Page(html).text.split())
    assert html.count('class="badge') == 2 and "one" in text and "<b>other</b>" in text and "<b>other" not in html
    rows = dict(
        re.findall(r'<tr class="healed"><td>(healed round \d)</td>(.*?)</tr>', html.split('id="settings"')[0], re.S)
    )
    assert set(rows) == {"healed round 1", "healed round 2"}
    table = html[html.index("authority (authority_nats, nats)") :]
    cells = re.findall(r"<td>healed round (\d)</td><td>(.*?)</td><td>(.*?)</td>", table[: table.index("</table>")])
    interval = "<small>\u22120.600 to \u22120.400</small>"
    assert cells[0] == ("1", f"\u22122.000{interval}", f"\u22122.000{interval}") and cells[1][2] == "\u2013"
    settings = text[text.rindex("Settings that differ") : text.rindex("Answers to the same prompts")]
    for row in ("heal.lam ?0.3 ?0.7", "n_rounds ?2 ?1", "model ?data/toylm ?<b>other</b>"):
        assert re.search(row, settings), settings
    assert "heal.tau" not in settings
    for name in ("base of A", "base of B", "A healed round 2", "B healed round 1"):
        assert text.count(name) == 2, "one for each of two prompts"
    assert all([path.name for path in folder.iterdir()] == ["events.jsonl"] for folder in folders), "no run is drawn"


def test_compared_runs_that_go_on_are_marked_and_each_target_has_an_axis_of_its_own(tmp_path):
    going_on = until(run_events(2), RoundDone, 0)
    other = with_trait(run_events(1), name="liberty", target="liberty_nats")
    folders = [write_run(tmp_path / f"{i}", events) for i, events in enumerate((run_events(1), going_on, other))]
    html = compare.compare(folders, tmp_path / "x.html").read_text(encoding="utf-8")
    assert html.count('<b class="finished">') == 2 and html.count('<b class="running">') == 1
    assert re.findall("<figcaption>(.*?)</figcaption>", html) == ["authority", "liberty"]


def test_the_difference_of_two_runs_is_paired_over_their_items():
    def cell(a: list[AnyEvent], b: list[AnyEvent], name: str = "authority_nats") -> str:
        (first, *_), rows = compare.differences({"A": Run(a), "B": Run(b)})
        metric = Run(a).metrics[name]
        assert first == "metric"
        return next((row[1] for _, row in rows if row[0] == f"{title(metric)}, nats"), "")

    def given(items: list[float], base: list[float], *, moved: float) -> list[AnyEvent]:
        events = with_metrics(run_events(1), {"authority_nats": -1.5 + moved}, ["healed"])
        name = Run(events).metrics["authority_nats"].item
        return [
            replace(e, items=e.items | {name: items if e.state == "healed" else base}) if isinstance(e, Measured) else e
            for e in events
        ]

    x = np.exp(np.random.default_rng(0).normal(size=40))  # the metric is the log of the mean
    one = given([*(x * math.exp(1))], [*x], moved=1.0)
    far = given([*(x * math.exp(0.25) * np.linspace(0.98, 1.02, 40))], [*x], moved=0.25)
    value, low, high = map(float, re.findall(r"(\+0\.\d+)", cell(one, far)))
    assert 0.7 < low < value < high < 0.8, "the spread of x is paired away"
    for others in (given([*x[:5]], [*x[:5]], moved=0.25), given([*(2 * x)], [*(2 * x)], moved=0.25)):
        assert cell(one, others) == "+0.750", "other items, or another base"


def test_the_difference_of_two_panels_has_an_interval_only_if_they_are_of_the_same_traits_and_pairs():
    metric = Metric(name="panel_rms_nats", item="panel", of="trait", how="rms")

    def panel(**digests: str) -> Run:
        events = with_metrics(run_events(1), {metric.name: 0.1}, ["base", "healed"])
        moved = {"base": [0.0] * 4, "healed": [0.1, 0.2, 0.1, 0.3]}
        changed = [
            replace(e, items=e.items | {"panel": moved.get(e.state, [])}) if isinstance(e, Measured) else e
            for e in events
        ]
        inputs = {f"panel.{name}": digest for name, digest in digests.items()}
        return Run([replace(changed[0], metrics=(*changed[0].metrics, metric), inputs=inputs), *changed[1:]])

    def cell(a: Run, b: Run) -> str:
        return compare.differences({"A": a, "B": b})[1][-1][1][1]

    love = panel(formal="1", honesty="2")
    assert "<small>" in cell(love, panel(formal="1", honesty="2"))
    for other in (panel(love="3", honesty="2"), panel(formal="9", honesty="2"), panel()):
        assert "<small>" not in cell(love, other) and cell(love, other) != "?"
    assert "<small>" not in cell(panel(), panel()), "nothing is known of the items"


def test_a_base_that_breaks_or_does_not_answer_is_told_at_once_and_is_not_blamed_on_a_round(capsys):
    events = with_metrics(run_events(), {"degenerate_frac": 0.6}, ["base", "healed"])
    line = " ".join(shown(capsys, events, Measured, None, "base").split())
    assert "the untouched model already is past the limit (broken texts 60% (limit 50%))" in line and "--model" in line
    assert "the untouched model already is past a limit" in verdict(Run(events))
    metric = Run(events).trait_metric
    silent = [
        replace(e, items=e.items | {metric.item: [math.nan] * 3}) if isinstance(e, Measured) else e
        for e in run_events()
    ]
    assert "answers 0 of 3 items of authority_nats" in " ".join(shown(capsys, silent, Measured, None, "base").split())


def test_the_page_names_the_next_commands_of_its_own_run(finished, tmp_path):
    best = Run(run_events())
    commands = [command for _, command in next_steps(best, "'a b'")]
    assert commands[0] == "chat 'a b' --web" and "resume 'a b' --n-rounds 3" in commands and len(commands) == 5
    assert finished[1].count(f"steer-heal resume {finished[0]} --n-rounds 3") == 1
    broken = Run(with_metrics(run_events(), {"degenerate_frac": 0.9}, ["healed"]))
    assert [command for _, command in next_steps(broken, "x")][0] == "chat x --web --allow-broken"
    assert [c for _, c in next_steps(Run(until(run_events(), Trained, 0)), "x")] == ["resume x"]
    with_plugin = with_config(run_events(), plugin=("a b.py",))
    going = Run(until(with_plugin, RoundDone, 0))
    assert [c for _, c in next_steps(going, "x")] == ["resume x --plugin 'a b.py'"]
    own = [c for _, c in next_steps(Run(with_plugin), "x")]
    assert own[0] == "chat x --web --plugin 'a b.py'" and own[3] == "resume x --n-rounds 3 --plugin 'a b.py'"
    trained = [
        replace(e, files={f"{e.checkpoint}/{OWN_CONFIG_FILE}": "0"}) if isinstance(e, Trained) else e
        for e in run_events()
    ]
    assert not any(c.startswith("export") for _, c in next_steps(Run(trained), "x"))
    stuck = Run([*until(with_plugin, RoundDone, 0), RunEnd(error="too few texts", resumable=False)])
    assert [c.split()[0] for _, c in next_steps(stuck, "x")] == ["chat", "export", "eval", "push"]
    dropped = Dropped(round=2, past=("",), dose=1.0, lr=1.0, metrics={}, next_kappa=1.0, next_lr_share=1.0)
    early = Run([*run_events()[:-1], *[dropped] * 3, RunEnd()])
    assert ended_early(early) and not any(c.startswith("resume") for _, c in next_steps(early, "x"))


def test_the_page_names_the_run_and_the_commands_that_work_wherever_it_is_drawn(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "out" / "of mine", run_events())
    monkeypatch.chdir(folder)
    html = save(Run(run_events()), Path(".")).read_text(encoding="utf-8")
    assert "of mine" in html.split("</title>")[0] and "Diary of of mine" in Path("diary.md").read_text(encoding="utf-8")
    assert f"steer-heal chat &#39;{folder}&#39; --web" in html
    monkeypatch.chdir(tmp_path)
    here = [replace(e, folder="out/of mine") if isinstance(e, RunStart) else e for e in run_events()]
    assert "steer-heal chat &#39;out/of mine&#39; --web" in save(Run(here), folder).read_text(encoding="utf-8")


def test_the_page_shows_the_rounds_and_the_date_that_the_run_had_in_the_end():
    start = next(e for e in run_events() if isinstance(e, RunStart))
    read = Chat(date="2026-11-29")
    begun = replace(start, command=("steer-heal", "run", "toy"), chat=read)
    run = Run([begun, Extended(n_rounds=9)])
    assert shlex.join(command_of(run)) == "steer-heal run toy --n-rounds 9 --date 2026-11-29"
    assert settings_of(run).n_rounds == 9
    assert command_of(Run([replace(begun, command=()), Extended(n_rounds=9)])) == []


@pytest.mark.parametrize("made", ["finished", "compared"])
def test_a_page_refers_to_nothing_outside_itself_and_every_link_leads_to_a_place(made, request):
    html = request.getfixturevalue(made)[1]
    built = Page(html)
    names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    sources = [value for name, value in built.attributes if name in names]
    assert sources and all(value.startswith(("data:", "#")) for value in sources)
    ids = {value for name, value in built.attributes if name == "id"}
    assert ids and {value[1:] for value in sources if value.startswith("#")} <= ids
    assert not built.tags["script"] and not built.tags["iframe"]
    assert "@import" not in html and "url(" not in html
    assert "http" not in re.sub(r"http-equiv|data:image[^\"]*", "", html)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert ("content", policy) in built.attributes


def test_runs_that_cannot_be_compared_are_refused(compared, tmp_path, capsys):
    (one, other), _ = compared
    begun = write_run(tmp_path / "begun", run_events()[:1])
    again = one / ".." / one.name
    for argv, word in (
        ([one, "--compare", tmp_path / "x.html"], "got 1 run folder: it takes 2 to 26"),
        ([one, other, again, "--compare", tmp_path / "x.html"], "2 times; give each run once"),
        ([one, other, "--compare", tmp_path], "is a folder"),
        ([one, begun, "--compare", tmp_path / "x.html"], "not measured yet"),
        ([one, tmp_path, "--compare", tmp_path / "x.html"], "no events.jsonl"),
    ):
        assert main(["report", *map(str, argv)]) == 2 and word in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


# --- console -----------------------------------------------------------------------------------------------------
def shown(capsys, events: list[AnyEvent], kind: type, r: int | None = 0, state: str = "") -> str:
    """The log line of one event."""
    console.start(quiet=False)
    capsys.readouterr()
    seen = until(events, kind, r, state)
    console.show(seen[-1], Run(seen))
    console.logger.remove()
    return " ".join(capsys.readouterr().err.split())


def test_a_dose_and_a_gradient_pressure_that_a_heal_has_not_are_not_told(capsys):
    events = run_events(1)
    (own,) = (event for event in events if isinstance(event, Gathered) and event.round == 0)
    plain = changed(events, Gathered, 0, mode="fixed", collected=replace(own.collected, dose=0.0, probes=()))
    assert "kappa" in shown(capsys, events, Gathered) and "kappa" not in shown(capsys, plain, Gathered)
    kappas = [page.steering_table(Run(each))[1][0][1][1] for each in (events, plain)]
    assert kappas[0] != kappas[1] == page.view.MISSING
    assert "pressure" in shown(capsys, events, Trained)
    assert "pressure" not in shown(capsys, changed(events, Trained, 0, pressure=None), Trained)


def test_runs_under_other_attacks_ask_other_items_of_holds():
    held, plain = Metric(name="holds_nats", item="holds", of="pair"), Metric(name="x", item="contrast", of="pair")
    start = replace(run_events(1)[0], wording={"pair": [["a", "b", "c"]]})
    one, other = (Run([replace(start, inputs={"eval.attacks": digest})]) for digest in "12")
    assert compare._asked(one, held) != compare._asked(other, held) and compare._asked(one, held)
    assert compare._asked(one, plain) == compare._asked(other, plain)


def test_a_measured_state_is_shown_with_its_interval_and_every_shown_metric(capsys):
    line = shown(capsys, run_events(), Measured, 1, "healed")
    assert "healed round 2" in line and "authority_nats -2.100 (to base: -0.700 to -0.500)" in line
    assert "coherence 0.9840" in line and "broken texts 2%" in line and "care" not in line


def test_written_texts_are_counted_with_those_that_are_rehearsed_and_the_dose(capsys):
    line = shown(capsys, run_events(), Gathered, 1)
    assert "15 kept for training of 24 written (perplexity 6, repetition 3); 2 of the base for the rehearsal" in line
    assert line.rstrip().endswith("kappa 0.5 (iso_kl)")
    control = shown(capsys, run_events(), Gathered, None)
    assert "control text" in control and "rehearsal" not in control and "kappa" not in control


def curve(*fits: float) -> tuple[dict[str, float], ...]:
    return tuple({"epoch": float(i), "fit": fit, "divergence": 0.1} for i, fit in enumerate(fits))


def probes(*n_kept: int) -> tuple[DoseProbe, ...]:
    return tuple(DoseProbe(kappa=1.0 + i, n=4, n_kept=n) for i, n in enumerate(n_kept))


COLLECTED = until(run_events(1), Gathered, 0)[-1].collected


@pytest.mark.parametrize("kind, as_it_should_be, not_so", [
    (Extracted, {"cosine_to_first": 0.8}, {"cosine_to_first": 0.4}),
    (Trained, {"fired": 0.1, "lam": 0.3}, {"fired": 0.05}),
    (Trained, {"fired": 0.0, "lam": 0.0}, {"lam": 0.3}),
    (Trained, {"pressure": 1.0}, {"pressure": 1.1}),
    (Trained, {"validation": curve(1.0, 0.5, 0.519)}, {"validation": curve(1.0, 0.5, 0.521)}),
    (Calibrated, {"calibration": Calibration(1.0, (KlProbe(1.0, 0.4), KlProbe(2.0, 0.5)))},
     {"calibration": Calibration(1.0, (KlProbe(1.0, 0.5), KlProbe(2.0, 0.4)))}),
    (Gathered, {"collected": replace(COLLECTED, probes=probes(3, 3))},
     {"collected": replace(COLLECTED, probes=probes(2, 3))}),
    (RoundDone, {"cosine_student_teacher": 0.1}, {"cosine_student_teacher": 0.05}),
])  # fmt: skip
def test_advice_is_given_only_if_something_is_not_as_it_should_be(capsys, kind, as_it_should_be, not_so):
    events = changed(run_events(1), kind, 0, **as_it_should_be)
    assert " | " not in shown(capsys, events, kind)
    assert shown(capsys, changed(events, kind, 0, **not_so), kind).count(" | ") == 1


def test_an_untrained_model_gets_no_advice(capsys, tmp_path):
    events = changed(run_events(1), Trained, 0, fired=0.0)
    assert "the barrier hardly acts" in shown(capsys, events, Trained)
    events = with_config(events, model=TINY_RANDOM)
    assert " | " not in shown(capsys, events, Trained) and "the barrier hardly acts" not in read(tmp_path, events)[0]


def conditions(html: str) -> dict[str, str]:
    """The cells of each condition on the page."""
    return dict(re.findall('<tr class=""><td>(the [^<]*)</td>((?:<td>(?:yes|no|\u2013)</td>)*)</tr>', html))


def test_the_page_says_of_every_condition_in_which_rounds_it_holds(finished, tmp_path):
    asked = conditions(finished[1])
    no, yes = "<td>\u2013</td>", "<td>yes</td>"
    assert len(asked) == 8 and [*asked.values()].count(no + yes + yes) == 6
    assert [name for name in asked if asked[name] == yes + no + no] == [*asked][:2], "those of the base"
    assert "all conditions hold" in finished[1]
    events = changed(changed(run_events(), Trained, 1, fired=0.05), Trained, 0, pressure=None)
    html, _ = read(tmp_path, events)
    asked = conditions(html)
    assert asked["the barrier acts in a tenth of the steps or more"] == no + yes + "<td>no</td>"
    assert asked["the gradient pressure of the barrier is 1 or less"] == no + no + yes
    assert "1 exception" in html and "<li>round 2: the barrier hardly acts: use a lower --heal.tau</li>" in html


def test_the_control_is_named_and_gets_no_advice(capsys):
    events = changed(run_events(), Trained, None, fired=0.0)
    for kind, words in ((Gathered, "control text"), (Trained, "control heal"), (Measured, "control ")):
        line = shown(capsys, events, kind, None)
        assert words in line and " | " not in line


@pytest.mark.parametrize("columns", [40, 80, 100, 120, 300])
def test_the_table_fits_the_terminal_and_ends_with_the_verdict(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    run = Run(run_events())
    console.print_table(run)
    table, last = capsys.readouterr().out.split("GOOD:")
    assert " ".join(f"GOOD:{last}".split()) == verdict(run) and max(map(len, f"GOOD:{last}".split("\n"))) <= columns
    table = [line for line in table.splitlines() if line.strip()]
    assert max(map(len, table)) <= columns and "\u2026" not in "".join(table), "no cell is cut"
    healed = [line for line in table if line.strip().startswith("healed round 2")]
    cells = [cell for line in healed for cell in re.split(" {2,}", line.strip())[1:]]
    assert cells == ["-2.100", "-0.600", "-0.700 to -0.500", "21%", "-1.01", "0.9840", "2.00", "2%", "0.100"]
    assert len(cells) == len(table_columns(run)) - 1, "each column is in one table"


def test_long_cells_are_wrapped_between_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = [f"word{i:02}" for i in range(40)]
    tables.show([{"arm": " ".join(words), "of": "a/path/of/sixty/characters/that/holds/no/space.jsonl", "n": 1.5}] * 2)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert all(re.search(rf"\b{word}\b", printed) for word in words) and "no/space.jsonl" in printed


def test_a_cell_that_is_longer_than_the_terminal_is_wrapped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    tables.show([{"a": "x" * 90, "b": 1.23456, "c": None}], title="Above")
    out = capsys.readouterr().out
    assert out.startswith("Above\n") and out.count("x") == 90 and "1.235" in out and "None" not in out
    assert max(map(len, out.splitlines())) <= 40
    tables.show([])
    assert capsys.readouterr().out == ""


def test_markdown_has_a_column_for_every_name_and_nothing_for_none():
    lines = tables.markdown([{"a": 1, "b": 0.12345}, {"a": "x", "c": None}]).splitlines()
    assert lines == ["| a | b     | c |", "| - | ----- | - |", "| 1 | 0.123 |   |", "| x |       |   |"]


def test_an_untrained_model_is_graded_nowhere(capsys, tmp_path):
    """Neither by the console nor on the page, in the diary, the pictures and beside another run."""
    said = "the pipeline works, and the numbers mean nothing"
    events = with_metrics(run_events(), {"degenerate_frac": 0.9}, ["healed"], 1)
    trained = [write_run(tmp_path / "trained", events), *read(tmp_path / "trained", events)]
    assert "broken" in re.findall('class="badge (.*?)"', trained[1]) and "(best)" in trained[1]
    events = with_config(events, model=TINY_RANDOM)
    html, diary = read(tmp_path / "untrained", events)
    compare.compare([trained[0], write_run(tmp_path / "untrained", events)], tmp_path / "both.html")
    assert re.findall('class="badge (.*?)"', html) == ["untrained"] and "<h1>T" + said[1:] in html
    assert "(best)" not in html and diary.rstrip().endswith(f"UNTRAINED: {said}")
    assert "badge untrained" in (tmp_path / "both.html").read_text(encoding="utf-8")
    run = Run(events)
    console.print_table(run)
    assert capsys.readouterr().out.rstrip().endswith(f"UNTRAINED: {said}")
    for figure in (plot.trajectory(run), plot.plane(run, headline=True)):
        title = " ".join(figure.get_suptitle().split())
        assert title.endswith(f"UNTRAINED: {said}") and "BROKEN" not in title
    assert verdict(Run(until(events, Trained, 0))) == "no healed round yet"


# --- progress ----------------------------------------------------------------------------------------------------
class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_follows_the_work_at_hand():
    bar = console.Bar(Run(), quiet=False, file=Terminal())
    with bar.stage("base", None, "measuring"):
        for done, total, n in ((0, 8, 0), (2.5, 8, 2.5), (8, 8, 8), (0, 8, 0), (6, 6, 6), (6, 6, 6)):
            bar.at(done, total)
            assert (bar.bar.n, bar.bar.total) == (n, total)
        bar.at(0, 0)
        assert (bar.bar.n, bar.bar.total) == (6, 6), "no work is no part"
        bar.part(1, 2)
        bar.part(2, 2)
        assert bar.bar.desc == "base: measuring, eval 2 of 2"
    assert "base: measuring" in bar.file.getvalue()


def test_a_bar_that_begins_in_the_middle_measures_only_the_speed_of_its_own_work():
    bar = console.Bar(Run(), quiet=False, file=Terminal())
    with bar.stage("base", None, "measuring"):
        bar.at(60, 80)
        assert bar.bar.format_dict["n"] == bar.bar.format_dict["initial"] == 60


@pytest.mark.parametrize("quiet, file", [(True, Terminal()), (False, io.StringIO())])
def test_no_bar_is_drawn_when_quiet_or_off_a_terminal(quiet, file):
    bar = console.Bar(Run(), quiet, file)
    bar.at(1, 2)  # outside of a stage
    with bar.stage("heal", None, "healing"):
        bar.part(1, 2)
        bar.at(1, 2)
    assert file.getvalue() == ""


def test_the_time_left_is_that_of_the_steps_to_come():
    steps = [event for event in run_events(n_rounds=3) if not isinstance(event, HealStepped)]
    events = [replace(event, wall_s=10.0 * i) for i, event in enumerate(steps)]
    for r, kind, left in (
        (None, RunStart, None),
        (None, Measured, (10.0 * (2 + 2 * 3 - 1), False)),  # of states alone
        (0, RoundDone, (10.0 * 2 * 6, True)),
        (1, Gathered, (10.0 * (6 + 4), True)),
        (2, RoundDone, (0.0, True)),
    ):
        run = Run(until(events, kind, r, "base" if kind is Measured else ""))
        control = 10.0 * run.start.config.control if kind is Measured else 0.0
        assert console.seconds_left(run) == (left and (left[0] + control, left[1])), kind
    run = Run(until(events, Gathered, 1))
    assert console.place("heal", 1, run) == "round 2 of 3, about 2 min left"
    assert console.place("prompted", None, Run(until(events, Measured, None, "base"))).endswith(" s left")
    of_round = [event.round for event in events].count(1)
    run = Run(until(events, RoundDone, 1))
    assert f" of 3 in {console.duration(10.0 * of_round)}" in console._words(run.events[-1], run)


def test_a_duration_has_the_unit_that_suits_it():
    seconds = (0.4, 89.0, 90.0, 3000.0, 9000.0)
    assert [*map(console.duration, seconds)] == ["0 s", "89 s", "2 min", "50 min", "2.5 h"]


def test_the_control_is_never_called_a_round():
    places = [console.place(stage, None, Run()) for stage in ("base", "text", "heal", "control")]
    assert places == ["base", "control", "control", "control"]
    events = run_events(1)
    words = [event_words(until(events, *which)[-1]) for which in ((Measured, None, "base"), (Trained,), (Trained, 0))]
    assert words == ["the measurement of base", "the heal of the control", "the heal of round 1"]


def test_the_first_line_of_a_run_names_the_weights_that_are_not_adapted_or_where_it_was_resumed(tmp_path):
    lines: list[str] = []
    for events, resumed in ((run_events()[:1], False), (until(run_events(), Trained, 0), True)):
        run = Run(events)
        run.folder = tmp_path
        console.logger.remove()
        console.logger.add(lines.append, format="{message}")
        console.opened(run, resumed)
        console.logger.remove()
    assert "mlp.router.weight" in lines[0] and "out/run" in lines[0]
    assert lines[1:] == [f"resuming {tmp_path} after the heal of round 1\n"]


# --- the difference of two runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("how, has_interval", [("mean", True), ("median", False)])
def test_runs_with_other_bases_are_compared_by_their_shifts(how, has_interval):
    rng = np.random.default_rng(0)
    base, other = rng.normal(0, 1, 40), rng.normal(5, 1, 40)
    sides = (base + rng.normal(1, 0.1, 40), base, other + rng.normal(0.2, 0.1, 40), other)
    metric = Metric(name="x", item="x", how=how)
    found = compare._paired([SimpleNamespace(items={"x": side.tolist()}) for side in sides], metric)
    assert (found is not None) == has_interval
    assert found is None or 0.7 < found[1] < 0.8 < found[2] < 0.9
    assert found is None or found[0] == pytest.approx(np.mean(sides[0] - base) - np.mean(sides[2] - other))
