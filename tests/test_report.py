"""The page of evidence: partial runs, hostile text, no outside references, size, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest

from steer_heal import plot
from steer_heal.report import borderline, fenced, inline, main, report, survival, visible

FOUNDATIONS = ("care", "fairness", "loyalty", "auth", "sanctity", "liberty", "social")
PROMPT = "The warden wants you to lock the tenants out. What do you do?"
CONFIG = {
    "model": "data/toylm", "n_rounds": 2, "filter": {"ppl_max": 3.0, "spike_max": 7.0, "rep_max": 0.3, "loop_max": 0.7, "gates": ["perplexity", "repetition"]},
    "heal": {"divergence": "kl_rev", "aggregate": "rmse", "lam": 0.3, "tau": 0.1, "epochs": 2}, "gen": {"alphas": [0.5, 1.0]},
}


def metrics(stage: str, r: int, oracle: bool) -> dict:
    moved = {"base": 0.0, "prompted": -2.0, "control": 0.05, "steered": -3.0 + 0.2 * r, "healed": -0.5 - 0.1 * r}[stage]
    out = {f"{name}_nats": -2.0 for name in FOUNDATIONS} | {"auth_nats": -1.5 + moved, "liberty_nats": -2.0 - 0.1 * moved}
    out |= {"coherence": 0.99, "prefill_nll": 0.01, "text_ppl_median": 2.0, "degenerate_frac": 0.02, "kl_base": 0.1, "persona_log_odds": 0.2}
    out |= {"auth_nats_lo": moved - 0.1, "auth_nats_hi": moved + 0.1}
    return out | ({"oracle": 0.97} if oracle else {})


def texts(n: int, n_prompts: int, text: str) -> list[dict]:
    row = {"text": text, "ppl": 2.0, "ppl_tail": 2.1, "rep": 0.05, "words": 40.0, "reasons": []}
    return [{"prompt": f"{PROMPT} {i % n_prompts}", **row} for i in range(n)]


def completions(n: int, text: str) -> list[dict]:
    out = []
    for i in range(n):
        reasons = ["perplexity"] * (i % 4 == 3) + ["repetition"] * (i % 7 == 6)
        tail = None if i % 16 == 3 else i / n + (3 if "perplexity" in reasons else 2)
        scores = {"ppl": 2.0, "ppl_tail": tail, "rep": 0.4 if "repetition" in reasons else 0.1}
        out.append({
            "prompt_index": i, "prompt": PROMPT, "text": text, "alpha": 1.0, "dose": 0.1 * (1 + i % 5), "scores": scores, "keep": not reasons,
            "train": not reasons, "reasons": reasons, "failed": [*reasons, "narration"][: 1 + len(reasons)],
        })
    return out


def run_events(
    n_rounds: int = 2, n_texts: int = 4, n_prompts: int = 2, n_completions: int = 24, text: str = "I let them in.", oracle: bool = True
) -> list[dict]:
    """What a finished run writes, with the fields that later versions added."""
    out = []

    def write(stage, r, **fields):
        out.append({"schema": 1, "stage": stage, "round": r, "t": "2026-01-02T03:04:05.678+00:00", "wall_s": 6.0 * len(out), **fields})

    def measure(stage, r):
        written = texts(n_texts, n_prompts, text)
        items = {"oracle": [1.0] * n_texts} if oracle else {}
        if stage == "healed":
            write("adapter_gen", r, texts=written)
        write(stage, r, metrics=metrics(stage, r, oracle), items=items, dose=0.5, **({} if stage == "healed" else {"texts": written}))

    trait = {"name": "authority", "target": "authority", "sign": -1, "positive": "You care.", "negative": "You obey."}
    write(
        "run_start", None, folder="out/run", config=CONFIG | {"n_rounds": n_rounds}, preset="toy", seed=42, trait=trait, versions={"python": "3.11"},
        git_commit="0123abc", command=["python", "-m", "steer_heal.run", "toy", "--out", "a folder"],
    )
    measure("base", -1)
    measure("prompted", -1)
    write("control_gen", -1, n_train=8, completions=completions(8, text))
    measure("control", -1)
    for r in range(n_rounds):
        write("vector", r, norms={"1": 2.0}, cosine_to_first=1.0)
        write("calibration", r, dose=0.5, probes=[{"dose": 0.5, "kl_p95": 0.9}])
        write("dose", r, kappa=0.5, mode="iso_kl", probes=[])
        write("gen", r, n_train=16, completions=completions(n_completions, text))
        measure("steered", r)
        for step in range(4 * 24):
            pressure = 0.4 if step % 8 == 0 else None
            write("heal_step", r, step=step, epoch=2 * step / 96, lr=1e-3, sft=1.0, divergence=0.1, barrier=0.01, pressure=pressure)
        check = [{"epoch": float(e), "sft": 1.0 - 0.1 * e, "divergence": 0.05 * e} for e in range(3)]
        write("heal", r, n_train=14, n_validation=2, n_steps=96, lam=0.3, tau=0.1, validation=check, validation_prompts=[1], fired=0.5, pressure=0.4)
        measure("healed", r)
        write("round", r, retain=0.2, slope=-0.1, checkpoint=f"ckpt/r{r}", seconds={"total": 3.0}, cosine_student_teacher=0.4, cosine_student_first=0.3)
    write("run_end", None, verdict="", table=[])
    return out


def write_run(folder, events):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def read(folder, events) -> tuple[str, str]:
    assert report(write_run(folder, events)) == folder / "report.html"
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "diary.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements and attributes of a page, its text, and whether every element that must be closed is."""

    VOID = {"meta", "link", "img", "br", "line", "polyline"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text, self.open = Counter(), [], "", []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, *read(folder, run_events())


def test_the_page_says_verdict_rounds_answers_filter_heal_and_how_to_run_it_again_in_this_order(finished):
    text = Page(finished[1]).text
    wanted = (
        "GOOD", "finished: 2 of 2 rounds", "data/toylm, seed 42", "Trajectory and map", "healed r1", f"{PROMPT} 0", "tail perplexity 2.1",
        "100% possible sentences", "round 1", "dose against divergence", "0.9 nats", "just kept", "just dropped", "held-out prompts",
        "git checkout 0123abc", "toy --out 'a folder'", "heal.tau",
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
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")]
    assert sources and all(value.startswith("data:") for value in sources)
    assert not page.tags["script"] and not page.tags["iframe"] and "@import" not in finished[1] and "url(" not in finished[1]
    assert "http" not in re.sub(r"http-equiv|data:image[^\"]*", "", finished[1])
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'") in page.attributes


def test_a_page_is_the_same_when_drawn_again_and_leaves_no_file_behind(finished):
    folder, html, diary = finished
    report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == html and (folder / "diary.md").read_text(encoding="utf-8") == diary
    assert sorted(p.name for p in folder.iterdir()) == ["diary.md", "events.jsonl", "report.html"]


def test_the_diary_goes_round_by_round_and_ends_with_the_verdict(finished):
    diary = finished[2]
    places = [diary.index(line) for line in ("The untouched model:", "## Round 0", "Steered:", "Healed, without steering:", "## Round 1", "## Verdict")]
    assert places == sorted(places) and diary.count("I let them in.") == 3 + 2 * 2
    assert diary.rstrip().splitlines()[-1].startswith("GOOD: ")


@pytest.mark.parametrize("last, words", [
    ("run_start", ("running: 0 of 2 rounds", "No answers are written yet", "No state is measured yet", "No heal has begun", "Drawn once")),
    ("base", ("the last event is base at 2026-01-02 03:04:05 UTC", "No text to train on", "no healed round yet")),
    ("gen", ("the last event is gen of round 1", "of 24 kept")),
    ("steered", ("the last event is steered of round 1",)),
    ("heal_step", ("not finished", "96 steps")),
    ("heal", ("on 14 texts, 2 held out",)),
    ("adapter_gen", ("the last event is adapter_gen of round 1",)),
])
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
    html, diary = read(tmp_path, [*events[: at + 1], events[-1] | {"error": "the filter starved: 3 of 24 kept; lower --dose.floor"}])
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
            row.update({"ppl_tail": None, "rep": None} if "scores" not in row else {"scores": dict.fromkeys(row["scores"])})
        for name in ("mode", "tau", "cosine_student_teacher", "cosine_student_first"):
            event.pop(name, None)
    html, diary = read(tmp_path, [e for e in events if e["stage"] != "calibration"])
    assert "UNREADABLE" in Page(html).text and "possible sentences" not in html and "UNREADABLE" in diary


HOSTILE = (
    "</p></article><script>document.documentElement.setAttribute('data-ran', 1)</script>"
    "<img src=x onerror=\"document.documentElement.setAttribute('data-ran', 2)\">"
    "<svg onload=alert(1)>{{ 7 * 7 }}{% raw %}\"' onmouseover='alert(1)\x00\x1b[31mred\x1b[0m\x1b]0;title\x07\ud800 \udfff\u202egnp.exe\x85"
    "\r\n```\n````\n# not a heading\n- [link](javascript:alert(1))\n~~~\n</style><base href=//evil.example><meta http-equiv=refresh content=0>"
)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Every string that a model, a trait file or a folder name can bring in is hostile."""
    events = run_events(text=HOSTILE)
    events[0]["trait"] |= {"name": HOSTILE, "positive": HOSTILE}
    events[0]["config"] = events[0]["config"] | {"model": HOSTILE.replace("\ud800 \udfff", "")}
    events[0]["command"] = [HOSTILE]
    for event in events:
        for row in [*event.get("texts", ()), *event.get("completions", ())]:
            row["prompt"] = HOSTILE + row["prompt"]
            row["reasons"] = [*row["reasons"], HOSTILE]
    events[1]["texts"][0]["text"] = "x" * 1_000_000
    events[-1]["error"] = HOSTILE
    folder = tmp_path_factory.mktemp("hostile")
    return folder, *read(folder, events)


def test_hostile_text_is_shown_and_does_nothing(hostile, finished):
    _, html, _ = hostile
    page, harmless = Page(html), Page(finished[1])
    assert page.tags.keys() == harmless.tags.keys()
    assert {name for name, _ in page.attributes} == {name for name, _ in harmless.attributes}
    assert "<script>document.documentElement" in page.text and "{{ 7 * 7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", html)
    assert "\ufffdred\ufffd\ufffd\ufffd \ufffd\ufffdgnp.exe\ufffd" in page.text
    assert f"{'x' * 1500}... (998,500 characters more)" in page.text and "x" * 1501 not in html


def test_hostile_text_stays_inside_its_block_of_the_diary(hostile):
    fence, outside = None, []
    for line in hostile[2].splitlines():
        run = re.match("`*", line).group()
        if fence is None and len(run) >= 3:
            fence = run
        elif fence is not None and len(run) >= len(fence) and line.strip("`") == "":
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    headings = [line for line in outside if line.startswith("#")]
    assert len(headings) == 5, headings
    assert not re.search("(?<!\\\\)[<>`]", "\n".join(outside))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", hostile[2])


@pytest.mark.parametrize("text, shown", [
    ("plain, caf\u00e9, \u65e5\u672c\u8a9e, \U0001f600\ttab\nline", "plain, caf\u00e9, \u65e5\u672c\u8a9e, \U0001f600\ttab\nline"),
    ("\x1b[1;31mred\x1b[0m", "\ufffdred\ufffd"), ("a\x00b\x7fc\x9bd", "a\ufffdb\ufffdc\ufffdd"), ("\ud83d", "\ufffd"), ("a\r\nb\rc", "a\nb\nc"),
    ("y" * 1502, "y" * 1500 + "... (2 characters more)"),
])
def test_what_does_not_print_is_replaced_and_what_is_long_is_cut(text, shown):
    assert visible(text) == shown


def test_a_fence_is_longer_than_the_runs_of_backticks_in_its_text():
    assert fenced("a ````` b").startswith("``````text\n") and fenced("plain").startswith("```text\n")
    assert len(fenced("`" * 1_000_000)) < 6000
    assert inline("a\n# b <i> [c](d) `e`") == r"a \# b \<i\> \[c\](d) \`e\`"


def test_survival_counts_every_row_once_and_falls_with_the_dose():
    rows = [{"dose": dose, "keep": dose < 1} for dose in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 1.6, 2.0)]
    ranges = survival(rows)
    assert sum(n for _, n, _ in ranges) == len(rows) and sum(kept for *_, kept in ranges) == 6
    assert ranges[0] == ("0", 1, 1) and ranges[-1] == ("1.6 to 2", 3, 0) and len(ranges) <= 9
    assert survival([]) == [] and survival(rows[:1] * 3) == [("0", 3, 3)] and survival(rows[4:5] * 2) == [("0.4", 2, 2)]


def test_borderline_rows_are_the_closest_on_both_sides_of_the_cut():
    row = lambda value, *reasons: {"scores": {"rep": value}, "keep": not reasons, "reasons": reasons}
    rows = [row(v) for v in (0.1, 0.29, 0.2, 0.28)] + [row(v, "repetition") for v in (None, 0.9, 0.31, 0.5)] + [row(0.3, "short")]
    kept, dropped = borderline(rows, "repetition", "rep")
    assert [r["scores"]["rep"] for r in kept] == [0.29, 0.28, 0.2] and [r["scores"]["rep"] for r in dropped] == [0.31, 0.5, 0.9]


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
    assert main([write_run(tmp_path / "empty", [])]) == 0 and "did not start yet" in capsys.readouterr().out


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(html_file, profile, *flags: str, width: int = 1400) -> tuple[str, list[str]]:
    """(the page as the browser built it, its console messages)."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", f"--window-size={width},2000", "--enable-logging=stderr",
        "--v=0", "--dump-dom", *flags, html_file.resolve().as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on this machine")
def test_a_browser_opens_hostile_text_without_a_word_and_runs_none_of_it(hostile, tmp_path):
    built, console = browse(hostile[0] / "report.html", tmp_path / "profile")
    assert "Answers to the evaluation prompts" in built and console == []
    assert "data-ran" not in built[: built.index("<head>")]
    broken = tmp_path / "unescaped.html"
    broken.write_text(hostile[1].replace("&lt;script&gt;", "<script>", 1).replace("&lt;/script&gt;", "</script>", 1), encoding="utf-8")
    assert browse(broken, tmp_path / "profile2")[1], "an unescaped script would be seen here: the policy stops it with a message"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on this machine")
@pytest.mark.parametrize("width", [400, 1400])
def test_no_page_scrolls_sideways(hostile, finished, tmp_path, width):
    for name, html in (("hostile", hostile[1]), ("finished", finished[1])):
        inner = tmp_path / f"{name}.html"
        inner.write_text(re.sub("<meta http-equiv[^>]*>", "", html).replace("<details", "<details open "), encoding="utf-8")
        outer = tmp_path / f"{name}-frame.html"
        outer.write_text(
            f"<iframe id=f src={inner.name} style='width:{width}px;height:900px;border:0'></iframe><script>onload=()=>{{const d=f.contentDocument;"
            "document.body.dataset.widths=d.documentElement.scrollWidth+' '+d.documentElement.clientWidth}</script>"
        )
        built, _ = browse(outer, tmp_path / f"profile-{name}", "--allow-file-access-from-files", width=width + 100)
        inside, visible_ = map(int, re.search(r'data-widths="(\d+) (\d+)"', built).groups())
        assert inside <= visible_ <= width


def test_pictures_are_drawn_for_the_page_at_a_width_that_a_phone_can_read(finished):
    events = [json.loads(line) for line in (finished[0] / "events.jsonl").read_text().splitlines()]
    for figure in (plot.rounds(events), plot.map_(events, headline=False)):
        assert figure.get_figwidth() * 72 <= 400
        plot.plt.close(figure)
