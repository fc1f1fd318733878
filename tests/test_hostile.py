"""Text that is out to do harm: page, diary, pictures, console, results.tsv, and a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from made_runs import Page, read, run_events, write_run
from markupsafe import escape

from steer_heal.__main__ import main
from steer_heal.errors import UserError, print_error, print_safe
from steer_heal.events import Run, decode, encode
from steer_heal.report import console, plot, tables
from steer_heal.report.compare import compare
from steer_heal.report.view import fenced, inline, visible
from steer_heal.runs.begin import new_run_folder

SCRIPT = "<script>document.documentElement.setAttribute('data-ran', 1)</script>"
HOSTILE = (
    f"</p></article>{SCRIPT}"
    "<img src=x onerror=\"document.documentElement.setAttribute('data-ran', 2)\">"
    "<svg onload=alert(1)>{{ 7 * 7 }}{% raw %}\"' onmouseover='alert(1)"
    "\x00\x1b[31mred\x1b[0m\x1b]0;title\x07\ud800 \udfff\u202egnp.exe\x85"
    "\r\n```\n````\n# not a heading\n- [link](javascript:alert(1))\n~~~\n"
    "</style><base href=//evil.example><meta http-equiv=refresh content=0>"
)


RECORDED = re.sub("[\ud800-\udfff]", "\ufffd", HOSTILE)
"""As the record holds it: without halves of characters."""


def as_rows(events):
    return [encode(event, "") for event in events]


def as_events(rows):
    return [decode(json.dumps(row)) for row in rows]


def named(name):
    """A run whose trait and model have a name."""
    start, *rest = run_events()
    trait = replace(start.trait, name=name)
    return [replace(start, trait=trait, config=replace(start.config, model=name)), *rest]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("finished"), run_events())
    return folder, *read(folder, run_events())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Every string of a model, a trait file or a folder name is hostile, and so are the titles of metrics."""
    rows = as_rows(run_events(text=HOSTILE))
    for metric in rows[0]["metrics"]:
        metric["title"] += SCRIPT
    for gate in rows[0]["gates"].values():
        gate["measures"] += RECORDED
    rows[0]["trait"] |= {"name": RECORDED, "positive": RECORDED}
    rows[0]["config"]["model"] = RECORDED
    rows[0]["command"] = [RECORDED]
    rows[0]["wording"]["vignette"] = [[RECORDED, RECORDED]] * 3
    for row in rows:
        for text in row.get("texts", ()):
            text["prompt"] = RECORDED + text["prompt"]
            text["reasons"].append(RECORDED)
        for text in row.get("collected", {}).get("scored", ()):
            text["completion"]["prompt"] = RECORDED + text["completion"]["prompt"]
            text["reasons"].append(RECORDED)
    rows[1]["texts"][0]["text"] = "x" * 1_000_000
    rows[-1]["error"] = RECORDED
    folder = write_run(tmp_path_factory.mktemp("hostile"), as_events(rows))
    return folder, *read(folder, as_events(rows))


def test_hostile_text_is_shown_and_does_nothing(hostile, finished):
    _, html, _ = hostile
    page, harmless = Page(html), Page(finished[1])
    assert page.tags.keys() == harmless.tags.keys()
    assert {name for name, _ in page.attributes} == {name for name, _ in harmless.attributes}
    assert "<script>document.documentElement" in page.text and "{{ 7 * 7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", html)
    assert "\ufffdred\ufffd\ufffd\ufffd \ufffd\ufffdgnp.exe\ufffd" in page.text
    assert f"{'x' * 1500}... (998,500 characters more)" in page.text and "x" * 1501 not in html


def test_hostile_text_does_nothing_on_the_page_of_several_runs(hostile, finished, tmp_path):
    html = compare([hostile[0], finished[0]], tmp_path / "both.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not page.tags["script"] and not page.tags["base"] and not page.tags["svg"]
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "<script>document.documentElement" in page.text and "{{ 7 * 7 }}" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", html)


def outside_of_fences(markdown: str) -> list[str]:
    """The lines that are not in a block of code. Every block is closed."""
    fence, outside = None, []
    for line in markdown.splitlines():
        run = re.match("`*", line).group()
        if fence is None and len(run) >= 3:
            fence = run
        elif fence is not None and len(run) >= len(fence) and line.strip("`") == "":
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    return outside


def test_hostile_text_stays_inside_its_block_of_the_diary(hostile):
    outside = outside_of_fences(hostile[2])
    headings = [line for line in outside if line.startswith("#")]
    assert len(headings) == 5, headings
    assert not re.search("(?<!\\\\)[<>`]", "\n".join(outside))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", hostile[2])


@pytest.mark.parametrize(
    "text, shown",
    [
        (
            "plain, caf\u00e9, \u65e5\u672c\u8a9e, \U0001f600\ttab\nline",
            "plain, caf\u00e9, \u65e5\u672c\u8a9e, \U0001f600\ttab\nline",
        ),
        ("\x1b[1;31mred\x1b[0m", "\ufffdred\ufffd"),
        ("a\x00b\x7fc\x9bd", "a\ufffdb\ufffdc\ufffdd"),
        ("\ud83d", "\ufffd"),
        ("a\r\nb\rc", "a\nb\nc"),
        ("y" * 1501, "y" * 1500 + "... (1 character more)"),
        ("y" * 1502, "y" * 1500 + "... (2 characters more)"),
    ],
)
def test_what_does_not_print_is_replaced_and_what_is_long_is_cut(text, shown):
    assert visible(text) == shown


def test_a_fence_is_longer_than_the_runs_of_backticks_in_its_text():
    assert fenced("a ````` b").startswith("``````text\n") and fenced("plain").startswith("```text\n")
    assert len(fenced("`" * 1_000_000)) < 6000
    assert inline("a\n# b <i> [c](d) `e`") == r"a \# b \<i\> \[c\](d) \`e\`"


ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


def test_nothing_reaches_the_terminal_that_acts_on_it(capsys, tmp_path):
    console.start(quiet=False, log_file=tmp_path / "run.log")
    run = Run(named(HOSTILE))
    console.show(run.start, run)
    console.logger.warning(HOSTILE)
    console.print_table(run)
    tables.show([{HOSTILE: f"{HOSTILE}[red]x[/red]"}], title=HOSTILE)
    print_safe(HOSTILE)
    print_error(UserError(HOSTILE))
    print_error(ValueError("\x1b[2J"))
    main(["run", "fast-dev", "--trait", HOSTILE, "--model", HOSTILE, "--out", str(tmp_path / "out")])
    console.logger.remove()
    out, err = capsys.readouterr()
    logged = (tmp_path / "run.log").read_text(encoding="utf-8")
    for text in (out, err, logged):
        assert "gnp.exe" in text and not ACTS.search(text)
    assert err.count("--- Logging error") == 0 and "[red]" in out, "no text is mark-up"


@pytest.mark.parametrize(
    "name",
    [
        "$x^{$",
        "\\frac{1",
        "a\x00b",
        "\ud800",
        "caf\u00e9 \u65e5\u672c",
        "\x1b[31m",
        "x" * 5000,
        "a\nb",
        "${\\it }$ %s {} <i>",
    ],
)
def test_the_pictures_are_drawn_with_any_name(name, tmp_path):
    start, *rest = named(name)
    run = Run([replace(start, metrics=tuple(replace(metric, title="$x^{$") for metric in start.metrics)), *rest])
    plot.trajectory(run).savefig(tmp_path / "x.svg")
    plot.plane(run).savefig(tmp_path / "x.png", dpi=20)


@pytest.mark.parametrize(
    "slug",
    [
        "../../x",
        "/etc/passwd",
        "a/b\\c",
        "..",
        ".",
        "a\tb\nc",
        "caf\u00e9 \u65e5\u672c",
        "\x00\ud800",
        "-rf",
        "CON",
        "",
    ],
)
def test_a_run_s_folder_lies_in_out_under_a_plain_name(slug, tmp_path):
    folder = new_run_folder(tmp_path, slug)
    assert (
        folder.parent == tmp_path
        and folder.is_dir()
        and re.fullmatch(r"[\w-]+", folder.name)
        and list(tmp_path.iterdir()) == [folder]
    )


@pytest.mark.parametrize(
    "trait",
    ["../authority", "/etc/passwd", "authority/../../x", "../../data/traits/authority", "a\x00b", "\ud800", "a\tb"],
)
def test_a_trait_is_a_name_and_never_a_path(trait, tmp_path, capsys):
    assert main(["run", "fast-dev", "--trait", trait, "--out", str(tmp_path / "out")]) == 2
    assert re.search("^(error:|-) --trait is ", capsys.readouterr().err, re.M) and not (tmp_path / "out").exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

NO_CHROMIUM = (
    "no chromium on this machine: what a browser makes of the page is not tested here; apt-get install chromium"
)


def browse(html_file, profile, *flags: str, width: int = 1400) -> tuple[str, list[str]]:
    """(the page as the browser built it, its console messages)."""
    own = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    )
    own = [*own.split(), f"--user-data-dir={profile}", f"--window-size={width},2000"]
    command = [CHROMIUM, *own, *flags, html_file.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def head(built: str) -> str:
    """Where a script of HOSTILE that ran leaves its mark: the attributes of the root element."""
    return built[: built.index("<head>")]


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
def test_a_browser_opens_hostile_text_without_a_word_and_runs_none_of_it(hostile, tmp_path):
    built, console = browse(hostile[0] / "report.html", tmp_path / "profile")
    assert "Answers to the evaluation prompts" in built and console == []
    assert "data-ran" not in head(built) and "&lt;script&gt;document.documentElement" in built
    broken = tmp_path / "unescaped.html"
    assert str(escape(SCRIPT)) in hostile[1]
    broken.write_text(hostile[1].replace(str(escape(SCRIPT)), SCRIPT, 1), encoding="utf-8")
    stopped, console_ = browse(broken, tmp_path / "profile2")
    assert console_ and "data-ran" not in head(stopped), (
        "a script that was not escaped: the policy stops it with a message"
    )
    broken.write_text(re.sub("<meta http-equiv[^>]*>", "", broken.read_text(encoding="utf-8")), encoding="utf-8")
    assert 'data-ran="1"' in head(browse(broken, tmp_path / "profile3")[0]), (
        "without the policy it runs, and is seen to"
    )


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize(
    "choice, seen",
    [
        ("answers-round-all", {"base": 2, "steered": 4, "healed": 4}),
        ("answers-round-r1", {"base": 2, "steered": 2, "healed": 2}),
        ("answers-why-none", {"base": 2, "steered": 4, "healed": 2}),
        ("answers-why-1", {"base": 0, "steered": 0, "healed": 2}),
    ],
)
def test_a_choice_hides_the_other_answers_without_a_script(choice, seen, tmp_path):
    rows = as_rows(run_events(n_texts=2))
    for row in rows:
        if row.get("state") == "healed" and row["round"] == 1:
            row["texts"] = [text | {"failed": ["loop"]} for text in row["texts"]]
    html = read(tmp_path / "run", as_events(rows))[0].replace("<details", "<details open ")
    html = html.replace(f'id="{choice}" checked', f'id="{choice}"').replace(f'id="{choice}"', f'id="{choice}" checked')
    count = "[...document.querySelectorAll('article.' + s)].filter(a => a.offsetHeight).length"
    script = f"for (const s of {[*seen]}) document.documentElement.dataset[s] = {count}"
    html = re.sub("<meta http-equiv[^>]*>", "", html).replace("</body>", f"<script>{script}</script></body>")
    shown = tmp_path / "shown.html"
    shown.write_text(html, encoding="utf-8")
    built = head(browse(shown, tmp_path / "profile")[0])
    assert {stage: int(re.search(f'data-{stage}="([0-9]+)"', built)[1]) for stage in seen} == seen


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize("width", [400, 1400])
def test_no_page_scrolls_sideways(hostile, finished, tmp_path, width):
    both = compare([hostile[0], finished[0]], tmp_path / "both.html").read_text(encoding="utf-8")
    for name, html in (("hostile", hostile[1]), ("finished", finished[1]), ("compared", both)):
        inner = tmp_path / f"{name}.html"
        inner.write_text(
            re.sub("<meta http-equiv[^>]*>", "", html).replace("<details", "<details open "), encoding="utf-8"
        )
        outer = tmp_path / f"{name}-frame.html"
        outer.write_text(
            f"<iframe id=f src={inner.name} style='width:{width}px;height:900px;border:0'></iframe>"
            "<script>onload=()=>{const d=f.contentDocument;"
            "document.body.dataset.widths=d.documentElement.scrollWidth+' '+d.documentElement.clientWidth}</script>"
        )
        built, _ = browse(outer, tmp_path / f"profile-{name}", "--allow-file-access-from-files", width=width + 100)
        inside, visible_ = map(int, re.search(r'data-widths="(\d+) (\d+)"', built).groups())
        assert inside <= visible_ <= width
