"""The page, the diary and the console: what they show of whole and of partial runs, no outside references, size."""

import io
import json
import re

import pytest
from made_runs import GATES, METRICS, PROMPT, Page, read, renamed, run_events, write_run

from steer_heal.report import console, draw, page, plot
from steer_heal.report.__main__ import main
from steer_heal.report.compare import compare
from steer_heal.report.measurements import verdict
from steer_heal.report.texts import borderline, survival, word_diff
from steer_heal.report.view import evenly
from steer_heal.settings import TINY_RANDOM
from steer_heal.share.card import card


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, *read(folder, run_events())


def test_the_page_says_verdict_rounds_answers_filter_heal_and_how_to_run_it_again_in_this_order(finished):
    text = Page(finished[1]).text
    wanted = (
        "GOOD", "finished: 2 of 2 rounds", "data/toylm, seed 42", "healed r1", f"{PROMPT} 0", "tail perplexity 2.1",
        "dose against divergence", "0.9 nats", "just kept", "just dropped", "held-out prompts",
        "git checkout 0123abc", "toy --out 'a folder'", "heal.tau",
    )  # fmt: skip
    places = [text.index(word) for word in wanted[:3]] + [text.rindex(word) for word in wanted[-4:]]
    assert all(word in text for word in wanted) and places == sorted(places)


def test_every_link_of_the_contents_leads_to_a_place(finished):
    built = Page(finished[1])
    links = [value[1:] for name, value in built.attributes if name == "href" and value.startswith("#")]
    assert links and set(links) <= {value for name, value in built.attributes if name == "id"}


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
    headings = ['<h2 id="metrics">', "Of vignettes", "Of free answers", '<h2 id="items">']
    places = [finished[1].index(heading) for heading in headings]
    assert places == sorted(places) and "Others" not in text


def test_the_target_is_read_item_by_item_with_the_wanted_change_first(finished):
    text = " ".join(Page(finished[1]).text.split())
    assert "1 of 2 went down, as wanted, from base to healed r1. 1 more have no value" in text
    assert "Below each scene stands its answer." in text
    first, second = (
        f"I let them in. Scene {i}.authority{values}" for i, values in ((2, "0.3 to 0.28"), (1, "0.3 to 0.32"))
    )
    assert first + second in text, text[text.index("item by item") :][:900]


def test_items_without_wording_are_told_by_their_number(finished, tmp_path):
    """As in a run whose events hold none, and where its list is too short."""
    events = run_events()
    for wording, seen in (({"wording": {"vignette": [["A scene."]]}}, "A scene."), ({}, "vignette 1")):
        start = {key: value for key, value in events[0].items() if key != "wording"} | wording
        text = " ".join(Page(read(tmp_path, [start, *events[1:]])[0]).text.split())
        assert f"vignette 20.3 to 0.28{seen}0.3 to 0.32" in text
        assert ("Below each scene" in text) is bool(wording)


def test_texts_and_pairs_are_told_by_their_prompt(tmp_path):
    events = run_events()
    events[0]["wording"]["pair"] = [["Is it open?", "It is <b>open</b>.", "It is shut."]] * 3
    target = next(metric for metric in events[0]["metrics"] if metric["name"] == "authority_nats")
    for of, told in (
        ("pair", "Is it open?It is <b>open</b>.It is shut.0.3 to 0.28"),
        ("text", f"{PROMPT} 10.3 to 0.28"),
    ):
        target["of"] = of
        html = read(tmp_path / of, events)[0]
        assert told in " ".join(Page(html).text.split()) and "<b>open" not in html


def test_every_answer_has_its_own_scores(finished):
    answers = re.findall("<article.*?</article>", finished[1], re.S)
    healed = [a for a in answers if "healed r1" in a]
    assert [re.findall("KL to base ([^<]*)", a) for a in healed] == [["0.320"], ["0.240"], ["0.280"], ["\u2013"]]
    assert all("tail perplexity 2.1" in a and "broken texts" not in a for a in answers)


def test_a_word_diff_holds_both_texts_and_marks_what_is_only_in_one():
    old, new = "I lock the gate & leave <b>now</b>.", "I open the gate and leave <b>now</b>."
    words = word_diff(old, new)
    assert "<del>lock</del> <ins>open</ins>" in words and "&lt;b&gt;now" in words and "<b>" not in words
    without = lambda tag: " ".join(re.sub(f"<{tag}>.*?</{tag}>", "", words).split())
    assert Page(without("ins")).text == old and Page(without("del")).text == new
    assert word_diff("a b c d e f", "a x c y e f") == "a <del>b c d</del> <ins>x c y</ins> e f", "one piece"
    assert word_diff("", "") == "" and word_diff("a  b", "a b") == "a b"


def test_what_changed_from_base_is_shown_for_the_best_and_the_last_round(finished, tmp_path):
    assert finished[1].count("<del>Yes.</del> <ins>No.</ins>") == 4
    events = run_events()
    for event in events:
        if event["stage"] == "healed" and event["round"] == 1:
            event["metrics"]["degenerate_frac"] = 0.9
    html, _ = read(tmp_path, events)
    assert "best round: 0" in html and "healed r0 (best)" in html
    assert html.count("word by word</h4>") == 2 * 4 and html.count("base to healed r0, word") == 4


def test_each_choice_of_a_filter_has_its_rule_and_each_rule_its_choice(finished):
    style = finished[1][finished[1].index("<style>") : finished[1].index("</style>")]
    ids = dict.fromkeys(re.findall(r'<input type="\w+"(?: name="[\w-]+")? id="([\w-]+)"', finished[1]))
    ruled = set(re.findall(r":has\(#([\w-]+):(?:checked|not\(:checked\))\)", style))
    assert ruled == {name for name in ids if not name.endswith(("-all", "-any"))} and len(ruled) >= 15
    used = set(" ".join(re.findall('class="([^"]*)"', finished[1])).split())
    assert set(re.findall(r"\.((?:why|round)-[\w-]+)", style)) <= used


def test_texts_are_evenly_spaced():
    assert evenly(range(10), 3) == [0, 3, 6] and evenly([1, 2], 3) == [1, 2] and evenly([], 3) == []


def test_steered_stands_beside_healed_in_every_round_and_prompt(finished):
    html = finished[1]
    assert Page(html).tags["article"] == 4 * (3 + 2 * 2)
    assert html.count("<details open>") == 3, "the metrics of the target, the headline prompt, the last round's filter"


def test_each_heal_has_its_curves_and_the_control_s_come_first(finished):
    found = re.findall('alt="Curves of the heal of ([^"]*)" src="data:image/svg', finished[1])
    assert found == ["control", "round 0", "round 1"]


def test_the_page_refers_to_nothing_outside_itself(finished):
    built = Page(finished[1])
    names = ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    sources = [value for name, value in built.attributes if name in names]
    assert sources and all(value.startswith(("data:", "#")) for value in sources)
    assert not built.tags["script"] and not built.tags["iframe"]
    assert "@import" not in finished[1] and "url(" not in finished[1]
    assert "http" not in re.sub(r"http-equiv|data:image[^\"]*", "", finished[1])
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert ("content", policy) in built.attributes


def test_a_run_drawn_again_is_the_same_and_no_file_is_left_behind(finished, tmp_path):
    files = []
    for _ in range(2):
        page._drawn.cache_clear()
        assert draw(write_run(tmp_path, run_events(1))) == tmp_path / "report.html"
        files.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert files[0] == files[1]
    assert sorted(files[0]) == ["diary.md", "events.jsonl", "map.png", "report.html", "trajectory.png"]


def test_no_metric_and_no_gate_is_known_by_name(finished, tmp_path):
    names = {name: f"x{i}x" for i, name in enumerate([*(metric.name for metric in METRICS), *GATES])}
    for drawn, before in zip(
        read(tmp_path / finished[0].name, renamed(run_events(), names)), finished[1:], strict=True
    ):
        drawn, before = (re.sub('data:image[^"]*|<wbr>', "", text).replace("\\_", "_") for text in (drawn, before))
        for old, new in names.items():
            drawn, before = (re.sub(rf"{new}|\b{old}\b", "?", text) for text in (drawn, before))
        assert drawn == before


def test_the_diary_goes_round_by_round_and_ends_with_the_verdict(finished):
    diary = finished[2]
    parts = "The untouched model:", "## Round 0", "Steered:", "Healed, without steering:", "## Round 1", "## Verdict"
    places = [diary.index(line) for line in parts]
    assert places == sorted(places) and diary.count("I let them in.") == 2 * (3 + 2 * 2), "both prompts"
    assert diary.rstrip().splitlines()[-1].startswith("GOOD: ")


def test_a_round_that_was_dropped_is_said_and_its_figures_are_gone(tmp_path):
    events = run_events()
    at = max(i for i, e in enumerate(events) if e["round"] == 1)
    dropped = {"stage": "backtrack", "schema": 4, "round": 1, "t": events[at]["t"], "wall_s": events[at]["wall_s"]}
    dropped |= {"past": ["<i>texts are 31%"], "dose": 0.5, "lr": 1e-3, "metrics": {}}
    events[at + 1 : at + 1] = [dropped, dropped]  # after the one attempt that run_start allows
    html, _ = read(tmp_path / "run", events)
    text = " ".join(Page(html).text.split())
    assert text.count("An attempt at round 1 was dropped (dose 0.5, learning rate 0.001): <i>texts are 31%.") == 2
    assert "healed r0" in text and "healed r1" not in text
    assert "the last whole round is 0: round 1 was dropped" in text


def test_a_heal_that_was_tried_twice_is_said(tmp_path):
    events = run_events()
    at = max(i for i, e in enumerate(events) if e["stage"] == "heal_step" and e["round"] == 0)
    again = {"stage": "heal_retry", "schema": 4, "t": events[at]["t"], "wall_s": events[at]["wall_s"], "step": 7}
    again |= {"prompt_index": 3, "text": "<i>I let", "lr": 2.5e-4, "error": "..."}
    events[at + 1 : at + 1] = [again | {"round": 0}]
    events[8:8] = [again | {"round": -1}]
    html, diary = read(tmp_path / "run", events)
    text = " ".join(Page(html).text.split())
    for who in ("The control", "Round 0"):
        told = text[text.index(f"{who} was healed again") :][:250]
        assert all(word in told for word in ("0.00025", "step 7", "prompt 3", "\u201c<i>I let\u201d"))
    assert "Round 1 was healed again" not in text
    parts = "## Before the loop", "The control's heal", "The untouched model:", "## Round 0", "Its heal", "## Round 1"
    places = [diary.index(line) for line in parts]
    assert places == sorted(places) and diary.count("0.00025") == 2


@pytest.mark.parametrize("last, words", [
    ("run_start", ("running: 0 of 2 rounds", "No answers are written yet", "No state is measured yet", "No heal has")),
    ("base", ("the last event is base at 2026-01-02 03:04:05 UTC", "No text to train on", "no healed round yet")),
    ("gen", ("the last event is gen of round 1", "of 24 kept", "2 of the base rehearsed")),
    ("steered", ("the last event is steered of round 1",)),
    ("heal_step", ("not finished", "96 steps")),
    ("heal", ("on 14 texts, 2 held out",)),
    ("adapter_gen", ("the last event is adapter_gen of round 1",)),
])  # fmt: skip
def test_a_run_that_died_shows_what_it_had(tmp_path, last, words):
    events = run_events()
    end = max(i for i, e in enumerate(events) if e["stage"] == last)
    html, diary = read(tmp_path / "run", events[: end + 1])
    text = " ".join(Page(html).text.split())
    assert all(word in text for word in words)
    assert "## Verdict" in diary


def test_a_starved_run_says_so_and_shows_what_the_filter_dropped(tmp_path):
    events = run_events()
    at = next(i for i, e in enumerate(events) if e["stage"] == "gen")
    events[at]["n_train"] = 3
    error = "the filter starved: 3 of 24 kept; lower --dose.floor"
    html, diary = read(tmp_path, [*events[: at + 1], events[-1] | {"error": error}])
    text = Page(html).text
    assert "stopped: 0 of 2 rounds" in text and error in text and "3 to train on, 2 of the base rehearsed" in text
    assert "the filter starved" in diary


def test_metrics_and_scores_without_a_value_do_not_stop_the_page(tmp_path):
    events = run_events()
    for event in events[1:]:
        if "metrics" in event:
            event["metrics"] = dict.fromkeys(event["metrics"])
        for row in [*event.get("texts", ()), *event.get("completions", ())]:
            row["scores"] = dict.fromkeys(row["scores"])
        for name in ("cosine_to_first", "cosine_student_teacher", "cosine_student_first", "retain", "slope"):
            if name in event:
                event[name] = None
    html, diary = read(tmp_path, [e for e in events if e["stage"] != "calibration"])
    assert "UNREADABLE" in Page(html).text and "UNREADABLE" in diary


def test_survival_counts_every_row_once_and_falls_with_the_dose():
    rows = [{"dose": dose, "keep": dose < 1} for dose in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 1.6, 2.0)]
    ranges = survival(rows)
    assert sum(n for _, n, _ in ranges) == len(rows) and sum(kept for *_, kept in ranges) == 6
    assert ranges[0] == ("0", 1, 1) and ranges[-1] == ("1.6 to 2", 3, 0) and len(ranges) <= 9
    assert survival([]) == [] and survival(rows[:1] * 3) == [("0", 3, 3)]
    assert survival(rows[4:5] * 2) == [("0.4", 2, 2)]


@pytest.mark.parametrize("side", [1, -1])
def test_borderline_rows_are_the_closest_on_both_sides_of_the_limit(side):
    """Whether the text fails above the limit or below it."""
    row = lambda value, *reasons: {"scores": {"rep": value and side * value}, "keep": not reasons, "reasons": reasons}
    rows = [row(v) for v in (0.1, 0.29, 0.2, 0.28)] + [row(v, "rep") for v in (None, 0.9, 0.31, 0.5)]
    kept, dropped = borderline([*rows, row(0.3, "short")], "rep", side * 0.3)
    assert [side * r["scores"]["rep"] for r in kept] == [0.29, 0.28, 0.2]
    assert [side * r["scores"]["rep"] for r in dropped] == [0.31, 0.5, 0.9]


def test_borderline_rows_are_shown_for_gates_of_broken_text_that_are_on_and_have_a_limit(finished):
    assert re.findall("<h3>At the (.*) limit", finished[1]) == ["perplexity", "repetition"] * 3


def test_the_page_of_eight_rounds_stays_under_5_mb_and_says_what_it_leaves_out(tmp_path):
    text = ("I let the tenants in & tell the warden that <nobody> sleeps in the rain. " * 9)[:600]
    html, _ = read(tmp_path, run_events(8, 64, 64, 384, text))
    assert len(html.encode()) < 5_000_000
    assert Page(html).tags["article"] == 64 * (3 + 8 * 2)
    assert Page(html).text.count("All are in events.jsonl") == 1
    more, _ = read(tmp_path, run_events(1, 200, 100))
    assert "Not shown: 36 prompts and 136 answers a state" in Page(more).text


def test_the_command_draws_everything_and_names_a_folder_without_events(tmp_path, capsys):
    folder = write_run(tmp_path / "run", run_events(1))
    assert main([str(folder)]) == 0 and "report.html" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} >= {"trajectory.png", "map.png", "report.html", "diary.md"}
    assert main([str(tmp_path)]) == 1 and "no events.jsonl" in capsys.readouterr().err
    begun = {"stage": "run_start", "round": None}
    for broken in ([begun], [begun | {"trait": 3, "config": {}}, {"stage": "base", "round": -1}]):
        assert main([str(write_run(tmp_path / "broken", broken))]) == 1
        assert str(tmp_path / "broken") in capsys.readouterr().err
    assert main([str(write_run(tmp_path / "empty", []))]) == 0 and "did not start yet" in capsys.readouterr().out


def test_pictures_of_the_page_are_drawn_at_a_width_that_a_phone_can_read(finished):
    events = [json.loads(line) for line in (finished[0] / "events.jsonl").read_text().splitlines()]
    for figure in (*page._state_figures(events).values(), *page.plot.heal_curves(events).values()):
        assert figure.get_figwidth() * 72 <= 400


# --- several runs -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Two runs that differ in a setting, in the number of rounds and in what the healed students wrote."""
    out = tmp_path_factory.mktemp("compared")
    other = run_events(1, text="I keep them out.")
    other[0]["config"]["heal"] = other[0]["config"]["heal"] | {"lam": 0.7}
    other[0]["config"] |= {"model": "<b>other</b>"}
    folders = [write_run(out / "one", run_events(2)), write_run(out / "other", other)]
    assert main([*map(str, folders), "--compare", str(out / "both.html")]) == 0
    return folders, (out / "both.html").read_text(encoding="utf-8")


def test_runs_stand_side_by_side_with_verdicts_states_settings_and_answers(compared):
    folders, html = compared
    text = " ".join(Page(html).text.split())
    assert html.count('class="badge') == 2 and "one" in text and "<b>other</b>" in text and "<b>other" not in html
    rows = dict(re.findall(r'<tr class="healed"><td>(healed r\d)</td>(.*?)</tr>', html.split('id="settings"')[0], re.S))
    assert set(rows) == {"healed r0", "healed r1"}
    table = html[html.index("authority (authority_nats, nats)") :]
    cells = re.findall(r"<td>healed r(\d)</td><td>(.*?)</td><td>(.*?)</td>", table[: table.index("</table>")])
    interval = "<small>\u22120.600 to \u22120.400</small>"
    assert cells[0] == ("0", f"\u22122.000{interval}", f"\u22122.000{interval}") and cells[1][2] == "\u2013"
    settings = text[text.rindex("Settings that differ") : text.rindex("Answers to the same prompts")]
    for row in ("heal.lam ?0.3 ?0.7", "n_rounds ?2 ?1", "model ?data/toylm ?<b>other</b>"):
        assert re.search(row, settings), settings
    assert "heal.tau" not in settings
    for name in ("base of A", "base of B", "A healed r1", "B healed r0"):
        assert text.count(name) == 2, "one for each of two prompts"


def test_the_comparison_refers_to_nothing_outside_itself_and_draws_no_run(compared):
    folders, html = compared
    built = Page(html)
    links = [value for name, value in built.attributes if name in ("src", "href")]
    assert links and all(value.startswith(("data:", "#")) for value in links) and not built.tags["script"]
    ids = {value for name, value in built.attributes if name == "id"}
    assert {value[1:] for value in links if value.startswith("#")} <= ids
    assert all([path.name for path in folder.iterdir()] == ["events.jsonl"] for folder in folders)


def test_runs_that_cannot_be_compared_are_refused(compared, tmp_path, capsys):
    (one, other), _ = compared
    begun = write_run(tmp_path / "begun", run_events()[:1])
    for argv, word in (
        ([one, "--compare", tmp_path / "x.html"], "takes 2 to 26"),
        ([one, other, "--compare", tmp_path], "is a folder"),
        ([one, begun, "--compare", tmp_path / "x.html"], "not measured yet"),
        ([one, tmp_path, "--compare", tmp_path / "x.html"], "no events.jsonl"),
    ):
        assert main([*map(str, argv)]) == 1 and word in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


# --- console -----------------------------------------------------------------------------------------------------
def shown(capsys, events, stage: str, r: int = 0) -> str:
    """The log line of one event."""
    console.start(quiet=False)
    capsys.readouterr()
    at = next(i for i, e in enumerate(events) if e["stage"] == stage and e["round"] == r)
    console.show(events[at], events[: at + 1])
    console.logger.remove()
    return capsys.readouterr().err


def test_a_measured_state_is_shown_with_its_interval_and_every_shown_metric(capsys):
    line = shown(capsys, run_events(), "healed", 1)
    assert "healed r1" in line and "authority_nats -2.100 (to base: -0.700 to -0.500)" in line
    assert "coherence 0.9840" in line and "broken texts 2%" in line and "care" not in line


def test_written_texts_are_told_with_those_that_are_rehearsed(capsys):
    assert "16 kept for training" in (line := shown(capsys, run_events(), "gen", 1))
    assert line.rstrip().endswith("; 2 of the base for the rehearsal")
    assert "rehearsal" not in shown(capsys, run_events(), "control_gen", -1)


@pytest.mark.parametrize("stage, as_it_should_be, change", [
    ("vector", {"cosine_to_first": 0.8}, {"cosine_to_first": 0.4}),
    ("heal", {"fired": 0.5, "lam": 0.3}, {"fired": 0.05}),
    ("heal", {"fired": 0.0, "lam": 0.0}, {"lam": 0.3}),
    ("heal", {"pressure": 0.9}, {"pressure": 1.1}),
    ("heal", {}, {"validation": [{"epoch": e, "fit": ce, "divergence": 0.1} for e, ce in enumerate((1.0, 0.5, 0.6))]}),
    ("calibration", {}, {"probes": [{"dose": 1.0, "kl_p95": 0.5}, {"dose": 2.0, "kl_p95": 0.4}]}),
    ("dose", {"probes": [{"kappa": k, "n": 4, "n_kept": 3} for k in (1.0, 2.0)]},
     {"probes": [{"kappa": k, "n": 4, "n_kept": k} for k in (1, 2)]}),
    ("round", {"cosine_student_teacher": 0.4}, {"cosine_student_teacher": 0.05}),
])  # fmt: skip
def test_advice_is_given_only_where_something_is_not_as_it_should_be(capsys, stage, as_it_should_be, change):
    events = run_events(1)
    event = next(e for e in events if e["stage"] == stage and e["round"] == 0)
    event |= as_it_should_be
    assert " | " not in shown(capsys, events, stage)
    event |= change
    assert shown(capsys, events, stage).count(" | ") == 1


def test_an_untrained_model_gets_no_advice(capsys, tmp_path):
    events = run_events(1)
    next(e for e in events if e["stage"] == "heal" and e["round"] == 0)["fired"] = 0.0
    assert "the barrier hardly acts" in shown(capsys, events, "heal")
    events[0]["config"]["model"] = TINY_RANDOM
    assert " | " not in shown(capsys, events, "heal") and "the barrier hardly acts" not in read(tmp_path, events)[0]


def test_the_page_says_of_every_condition_in_which_rounds_it_holds(finished, tmp_path):
    rows = lambda html: dict(
        re.findall('<tr class=""><td>(the [^<]*)</td>((?:<td>(?:yes|no|\u2013)</td>)*)</tr>', html)
    )
    asked = rows(finished[1])
    assert len(asked) == 6 and set(asked.values()) == {"<td>yes</td><td>yes</td>"} and "all of it does" in finished[1]
    events = run_events()
    for event in events:
        if event["stage"] == "heal":
            event |= {"fired": 0.05} if event["round"] == 1 else {"pressure": None}
    html, _ = read(tmp_path, events)
    assert rows(html)["the barrier acts in a tenth of the steps or more"] == "<td>yes</td><td>no</td>"
    assert rows(html)["the gradient pressure of the barrier is 1 or less"] == "<td>\u2013</td><td>yes</td>"
    assert "1 exception" in html and "<li>round 1: the barrier hardly acts: use a lower --heal.tau</li>" in html


def test_the_control_is_named_and_gets_no_advice(capsys):
    events = run_events()
    next(e for e in events if e["stage"] == "heal")["fired"] = 0.0
    for stage, words in (("control_gen", "control gen"), ("heal", "control heal"), ("control", "control ")):
        line = shown(capsys, events, stage, -1)
        assert words in line and " | " not in line


@pytest.mark.parametrize("columns", [40, 80, 100, 120, 300])
def test_the_table_fits_the_terminal_and_ends_with_the_verdict(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    events = run_events()
    n_shown = len(console.table_columns(events))
    console.print_table(events)
    lines = capsys.readouterr().out.splitlines()
    *table, last = filter(None, lines)
    assert last == verdict(events) and "null" not in "".join(lines)
    assert max(map(len, table)) <= min(max(columns, 80), 120)
    headings = [line for line in table if line.startswith("| state ")]
    assert sum(line.count("|") - 2 for line in headings) == n_shown - 1, "each column is in one table"
    assert sum("healed r1" in line for line in table) == len(headings)
    assert len({len(line) for line in table}) <= len(headings), "the rows of a table are equally long"


def test_a_column_wider_than_the_terminal_is_shown_all_the_same():
    names, wide, narrow = ["state", "base"], ["x" * 90, "1"], ["y", "2"]
    first, second = console._fitting([names, wide, narrow], 80)
    assert first[0] == f"| state | {'x' * 90} |" and second[0] == "| state | y |"


def test_an_untrained_model_is_judged_nowhere(capsys, tmp_path):
    """Neither by the console nor on the page, in the diary, the pictures, the card and beside another run."""
    events, said = run_events(), "the pipeline works, and the numbers mean nothing"
    for event in events:
        if event["stage"] == "healed" and event["round"] == 1:
            event["metrics"]["degenerate_frac"] = 0.9
    trained = [write_run(tmp_path / "trained", events), *read(tmp_path / "trained", events)]
    assert "broken" in re.findall('class="badge (.*?)"', trained[1]) and "(best)" in trained[1]
    events = [events[0] | {"config": events[0]["config"] | {"model": TINY_RANDOM}}, *events[1:]]
    html, diary = read(tmp_path / "untrained", events)
    compare([trained[0], tmp_path / "untrained"], tmp_path / "both.html")
    assert re.findall('class="badge (.*?)"', html) == ["untrained"] and "<h1>T" + said[1:] in html
    assert "(best)" not in html and diary.rstrip().endswith(f"UNTRAINED: {said}")
    assert "badge untrained" in (tmp_path / "both.html").read_text(encoding="utf-8")
    console.print_table(events)
    assert capsys.readouterr().out.rstrip().endswith(f"UNTRAINED: {said}")
    for figure in (plot.trajectory(events), plot.map_(events)):
        title = " ".join(figure.get_suptitle().split())
        assert title.endswith(f"UNTRAINED: {said}") and "BROKEN" not in title
    written = card(events, 1, "0" * 64)
    assert "the numbers mean nothing" in written and not any(grade in written for grade in ("BROKEN", "**GOOD"))
    started = [event for event in events if event["stage"] not in ("healed", "adapter_gen", "round")]
    assert verdict(started[:-1]) == "no healed round yet"


def bar() -> console.Bar:
    return console.Bar(desc="base: measuring", bar_format="{desc}", file=io.StringIO(), ncols=80)


def test_a_bar_follows_the_work_at_hand():
    watched = bar()
    for done, total, n in ((0, 8, 0), (2.5, 8, 2.5), (8, 8, 8), (0, 8, 0), (6, 6, 6), (6, 6, 6)):
        watched.at(done, total)
        assert (watched.n, watched.total) == (n, total)
    watched.at(0, 0)
    assert (watched.n, watched.total) == (6, 6), "no work is no part"
    watched.part(1, 2)
    watched.part(2, 2)
    assert watched.desc == "base: measuring, eval 2 of 2"


def test_a_bar_that_begins_in_the_middle_counts_only_its_own_work_as_done_in_its_time():
    watched = bar()
    watched.at(60, 80)
    assert watched.format_dict["n"] == watched.format_dict["initial"] == 60


def test_the_time_left_is_that_of_the_stages_to_come():
    events = run_events(n_rounds=3)
    started = [e for e in events if e["stage"] != "round"]
    assert console.seconds_left(started) is None
    assert console.place("gen", 0, started) == "round 1 of 3"
    seconds = {"vector": 1.0, "gen": 10.0, "heal": 20.0, "base": 500.0, "total": 531.0}
    events = [e | {"seconds": seconds} if e["stage"] == "round" else e for e in events]
    at = [i for i, e in enumerate(events) if e["stage"] == "round"]
    assert console.seconds_left(events[: at[0] + 1]) == 2 * 31
    in_gen = [i for i, e in enumerate(events) if e["stage"] == "gen"][1]
    assert console.seconds_left(events[: in_gen + 1]) == 31 + 20
    assert console.place("heal", 1, events[: in_gen + 1]) == "round 2 of 3, 51 s left"
    assert console.seconds_left(events) == 0


@pytest.mark.parametrize(
    "seconds, words", [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3000, "50 min"), (9000, "2.5 h")]
)
def test_a_duration_is_said_in_the_unit_that_suits_it(seconds, words):
    assert console.duration(seconds) == words


def test_the_control_is_never_called_a_round():
    assert [console.place(stage, -1, ()) for stage in ("base", "control_gen", "heal", "control")] == [
        "base",
        "control",
        "control",
        "control",
    ]
    steps = [{"stage": "base", "round": -1}, {"stage": "heal", "round": -1}, {"stage": "heal", "round": 0}]
    assert list(map(console.step_name, steps)) == ["base", "heal of the control", "heal of r0"]


def test_the_first_line_of_a_run_names_the_weights_that_are_not_adapted():
    lines = []
    console.logger.remove()
    console.logger.add(lines.append, format="{message}")
    events = run_events()
    for names in (["mlp.router.weight", "conv.weight"], []):
        console.show(events[0] | {"unadapted": names}, events[:1])
    console.logger.remove()
    assert "mlp.router.weight, conv.weight" in lines[0] and len(lines[1].split("|")) < len(lines[0].split("|"))
