"""The page of evidence: what it shows of whole and of partial runs, no outside references, and its size."""

import json
import re

import pytest
from made_runs import PROMPT, Page, read, run_events, write_run

from steer_heal import plot
from steer_heal.report import borderline, main, report, survival


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, *read(folder, run_events())


def test_the_page_says_verdict_rounds_answers_filter_heal_and_how_to_run_it_again_in_this_order(finished):
    text = Page(finished[1]).text
    wanted = (
        "GOOD",
        "finished: 2 of 2 rounds",
        "data/toylm, seed 42",
        "Trajectory and map",
        "healed r1",
        f"{PROMPT} 0",
        "tail perplexity 2.1",
        "100% possible sentences",
        "round 1",
        "dose against divergence",
        "0.9 nats",
        "just kept",
        "just dropped",
        "held-out prompts",
        "git checkout 0123abc",
        "toy --out 'a folder'",
        "heal.tau",
    )
    places = [text.index(word) for word in wanted[:4]] + [text.rindex(word) for word in wanted[-3:]]
    assert all(word in text for word in wanted) and places == sorted(places)
    for column in ("cosine to round 0", "cosine student, teacher", "dose", "retain"):
        assert column in text


def test_steered_stands_beside_healed_in_every_round_and_prompt(finished):
    html = finished[1]
    assert Page(html).tags["article"] == 4 * (3 + 2 * 2)
    assert html.count("<details open>") == 2, "the headline prompt and the last round's filter"


def test_the_page_refers_to_nothing_outside_itself(finished):
    page = Page(finished[1])
    sources = [
        value
        for name, value in page.attributes
        if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
    ]
    assert sources and all(value.startswith("data:") for value in sources)
    assert (
        not page.tags["script"]
        and not page.tags["iframe"]
        and "@import" not in finished[1]
        and "url(" not in finished[1]
    )
    assert "http" not in re.sub(r"http-equiv|data:image[^\"]*", "", finished[1])
    assert (
        "content",
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    ) in page.attributes


def test_a_page_is_the_same_when_drawn_again_and_leaves_no_file_behind(finished):
    folder, html, diary = finished
    report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == html and (folder / "diary.md").read_text(
        encoding="utf-8"
    ) == diary
    assert sorted(p.name for p in folder.iterdir()) == ["diary.md", "events.jsonl", "report.html"]


def test_the_diary_goes_round_by_round_and_ends_with_the_verdict(finished):
    diary = finished[2]
    places = [
        diary.index(line)
        for line in (
            "The untouched model:",
            "## Round 0",
            "Steered:",
            "Healed, without steering:",
            "## Round 1",
            "## Verdict",
        )
    ]
    assert places == sorted(places) and diary.count("I let them in.") == 3 + 2 * 2
    assert diary.rstrip().splitlines()[-1].startswith("GOOD: ")


def test_a_heal_that_was_tried_twice_is_said(tmp_path):
    events = run_events()
    at = max(i for i, e in enumerate(events) if e["stage"] == "heal_step" and e["round"] == 0)
    again = {
        "stage": "heal_retry",
        "schema": 1,
        "t": events[at]["t"],
        "wall_s": events[at]["wall_s"],
        "step": 7,
        "prompt_index": 3,
        "text": "<i>I let",
        "lr": 2.5e-4,
        "error": "...",
    }
    events[at + 1 : at + 1] = [again | {"round": 0}]
    events[8:8] = [again | {"round": -1}]
    html, diary = read(tmp_path / "run", events)
    text = " ".join(Page(html).text.split())
    told = "was healed again from its start, at learning rate 0.00025: loss or gradient was not finite at step 7, on an answer to prompt 3 that begins “<i>I let”."
    assert f"The control {told}" in text and f"Round 0 {told}" in text and "Round 1 was healed again" not in text
    places = [
        diary.index(line)
        for line in (
            "## Before the loop",
            "The control's heal met",
            "The untouched model:",
            "## Round 0",
            "Its heal met",
            "Steered:",
            "## Round 1",
        )
    ]
    assert places == sorted(places) and diary.count("began again at learning rate 0.00025") == 2


@pytest.mark.parametrize(
    "last, words",
    [
        (
            "run_start",
            (
                "running: 0 of 2 rounds",
                "No answers are written yet",
                "No state is measured yet",
                "No heal has begun",
                "Drawn once",
            ),
        ),
        ("base", ("the last event is base at 2026-01-02 03:04:05 UTC", "No text to train on", "no healed round yet")),
        ("gen", ("the last event is gen of round 1", "of 24 kept")),
        ("steered", ("the last event is steered of round 1",)),
        ("heal_step", ("not finished", "96 steps")),
        ("heal", ("on 14 texts, 2 held out",)),
        ("adapter_gen", ("the last event is adapter_gen of round 1",)),
    ],
)
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
    html, diary = read(
        tmp_path, [*events[: at + 1], events[-1] | {"error": "the filter starved: 3 of 24 kept; lower --dose.floor"}]
    )
    text = Page(html).text
    assert "stopped: 0 of 2 rounds" in text and "the filter starved: 3 of 24 kept" in text and "3 to train on" in text
    assert "the filter starved" in diary


def test_missing_metrics_scores_and_oracle_do_not_stop_the_page(tmp_path):
    events = run_events(oracle=False)
    for event in events:
        if "metrics" in event:
            event["metrics"] = dict.fromkeys(event["metrics"])
        for row in [*event.get("texts", ()), *event.get("completions", ())]:
            row.pop("failed", None)
            row.pop("train", None)
            row.update({"ppl_tail": None, "rep": None} if "scores" not in row else {"scores": {"ppl": None}})
        for name in ("mode", "tau", "cosine_student_teacher", "cosine_student_first"):
            event.pop(name, None)
    html, diary = read(tmp_path, [e for e in events if e["stage"] != "calibration"])
    assert "UNREADABLE" in Page(html).text and "possible sentences" not in html and "UNREADABLE" in diary


def test_survival_counts_every_row_once_and_falls_with_the_dose():
    rows = [{"dose": dose, "keep": dose < 1} for dose in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 1.6, 2.0)]
    ranges = survival(rows)
    assert sum(n for _, n, _ in ranges) == len(rows) and sum(kept for *_, kept in ranges) == 6
    assert ranges[0] == ("0", 1, 1) and ranges[-1] == ("1.6 to 2", 3, 0) and len(ranges) <= 9
    assert survival([]) == [] and survival(rows[:1] * 3) == [("0", 3, 3)] and survival(rows[4:5] * 2) == [("0.4", 2, 2)]


def test_borderline_rows_are_the_closest_on_both_sides_of_the_cut():
    row = lambda value, *reasons: {"scores": {"rep": value}, "keep": not reasons, "reasons": reasons}
    rows = (
        [row(v) for v in (0.1, 0.29, 0.2, 0.28)]
        + [row(v, "repetition") for v in (None, 0.9, 0.31, 0.5)]
        + [row(0.3, "short")]
    )
    kept, dropped = borderline(rows, "repetition", "rep")
    assert [r["scores"]["rep"] for r in kept] == [0.29, 0.28, 0.2] and [r["scores"]["rep"] for r in dropped] == [
        0.31,
        0.5,
        0.9,
    ]


def test_the_page_of_eight_rounds_stays_under_5_mb_and_says_what_it_leaves_out(tmp_path):
    text = ("I let the tenants in & tell the warden that <nobody> sleeps in the rain. " * 9)[:600]
    html, _ = read(tmp_path, run_events(8, 64, 64, 384, text))
    assert len(html.encode()) < 5_000_000
    assert Page(html).tags["article"] == 64 * (3 + 8 * 2)
    assert "All 384 completions of this round" in html
    more, _ = read(tmp_path, run_events(1, 200, 100))
    assert "Not shown: 36 prompts and 136 answers a state" in Page(more).text


def test_the_command_draws_again_and_names_a_folder_without_events(finished, tmp_path, capsys):
    assert main([finished[0]]) == 0 and "report.html" in capsys.readouterr().out
    assert main([tmp_path]) == 1 and "no events.jsonl" in capsys.readouterr().err
    for broken in (
        [{"stage": "run_start", "round": None}],
        [{"stage": "run_start", "round": None, "trait": 3, "config": {}}, {"stage": "base", "round": -1}],
    ):
        for draw in (main, plot.main):
            folder = write_run(tmp_path / "broken", broken)
            status, printed = draw([folder]), capsys.readouterr()
            assert (
                status == 1
                and "is not as this version of steer-heal writes it" in printed.err
                or "nothing to draw" in printed.out
            )
    assert main([write_run(tmp_path / "empty", [])]) == 0 and "did not start yet" in capsys.readouterr().out


def test_pictures_are_drawn_for_the_page_at_a_width_that_a_phone_can_read(finished):
    events = [json.loads(line) for line in (finished[0] / "events.jsonl").read_text().splitlines()]
    for figure in (plot.rounds(events), plot.map_(events, headline=False)):
        assert figure.get_figwidth() * 72 <= 400
        plot.plt.close(figure)
