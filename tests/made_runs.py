"""Events as a finished run writes them, made up, and the page that is drawn from them."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import asdict
from html.parser import HTMLParser

from steer_heal.records import Metric
from steer_heal.report.page import report

PROMPT = "The warden wants you to lock the tenants out. What do you do?"
CONFIG = {
    "model": "data/toylm",
    "n_rounds": 2,
    "filter": {"gates": ["perplexity", "repetition"]},
    "heal": {
        "target": "tokens",
        "text": "steered",
        "teacher": "vector",
        "refresh_every": 0,
        "rehearsal": 0,
        "epochs": 2,
        "divergence": "kl_rev",
        "aggregate": "rmse",
        "lam": 0.3,
        "tau": 0.1,
        "reference": "prev",
    },
    "backtrack": {"retries": 1},
    "gen": {"alphas": [0.5, 1.0]},
}
NATS = {"of": "vignette", "how": "log_mean", "form": "+.3f", "unit": "nats", "moved": 0.3, "shown": False}
METRICS = (
    *(Metric(name=f"{n}_nats", item=f"p_{n}", title=n, **NATS) for n in ("care", "loyalty", "authority", "liberty")),
    Metric(name="coherence", item="mass", of="vignette", title="coherence", form=".4f", good=0.95, broken=0.85),
    Metric(
        name="text_tail_ppl_median", item="text_tail_ppl", of="text", how="median", title="text perplexity", form=".2f"
    ),
    Metric(
        name="degenerate_frac", item="degenerate", of="text", title="broken texts", form=".0%", good=0.1, broken=0.5
    ),
    Metric(name="kl_base", item="kl_base", of="text", title="KL to base", unit="nats"),
)
GATES = {
    "perplexity": {"measures": "tail perplexity", "limit": 3.0, "at_least": False, "broken": True, "on": True},
    "repetition": {"measures": "repetition", "limit": 0.3, "at_least": False, "broken": True, "on": True},
    "loop": {"measures": "loop", "limit": 0.7, "at_least": False, "broken": True, "on": False},
    "short": {"measures": "words", "limit": 12, "at_least": True, "broken": False, "on": True},
    "narration": {"measures": "phrases that narrate", "limit": 0.0, "at_least": False, "broken": False, "on": False},
}
TRAIT = {
    "name": "authority",
    "description": "Care for people, over authority.",
    "target": "authority_nats",
    "sign": -1,
    "positive": "You care.",
    "negative": "You obey.",
    "off_targets": ["care_nats", "loyalty_nats", "liberty_nats"],
}


def metrics(stage: str, r: int) -> dict:
    moved = {"base": 0.0, "prompted": -2.0, "control": 0.05, "steered": -3.0 + 0.2 * r, "healed": -0.5 - 0.1 * r}[stage]
    values = dict.fromkeys((metric.name for metric in METRICS), -2.0)
    values |= {"authority_nats": -1.5 + moved, "liberty_nats": -2.0 - 0.1 * moved, "coherence": 0.99 + 0.01 * moved}
    values |= {"text_tail_ppl_median": 2.0, "degenerate_frac": 0.02, "kl_base": 0.1}
    if stage == "base":
        return values
    values |= {"authority_nats_lo": moved - 0.1, "authority_nats_hi": moved + 0.1}
    return values | {"degenerate_frac_lo": -0.05, "degenerate_frac_hi": 0.08}


def item_values(metric: Metric, stage: str, r: int, n_texts: int) -> list[float | None]:
    """Of three vignettes, or of every text: each moves another way; the last has no value."""
    here = {"base": 0.0, "healed": 1.0 + r}.get(stage, 0.5)
    return [*(0.3 + 0.01 * here * (1 - 2 * i) for i in range(n_texts if metric.of == "text" else 3))][:-1] + [None]


def texts(n: int, n_prompts: int, text: str) -> list[dict]:
    scores = {"perplexity": 2.1, "repetition": 0.05, "loop": 0.2, "short": 40.0, "narration": 0.0}
    return [
        {"prompt": f"{PROMPT} {i % n_prompts}", "text": text, "scores": scores, "failed": [], "reasons": []}
        for i in range(n)
    ]


def completions(n: int, text: str) -> list[dict]:
    out = []
    for i in range(n):
        reasons = ["perplexity"] * (i % 4 == 3) + ["repetition"] * (i % 7 == 6)
        tail = None if i % 16 == 3 else i / n + (3 if "perplexity" in reasons else 2)
        scores = {"perplexity": tail, "repetition": 0.4 if "repetition" in reasons else 0.1, "loop": 0.2, "short": 40.0}
        out.append({
            "prompt_index": i, "prompt": PROMPT, "text": text, "alpha": 1.0, "dose": 0.1 * (1 + i % 5),
            "scores": scores, "keep": not reasons, "train": not reasons, "reasons": reasons,
            "failed": [*reasons, "narration"][: 1 + len(reasons)],
        })  # fmt: skip
    return out


def run_events(
    n_rounds: int = 2, n_texts: int = 4, n_prompts: int = 2, n_completions: int = 24, text: str = "I let them in."
) -> list[dict]:
    """What a finished run with a control writes."""
    out = []

    def write(stage, r, **fields):
        at = {"t": "2026-01-02T03:04:05.678+00:00", "wall_s": 6.0 * len(out), "prev": "0" * 64}
        out.append({"schema": 4, "stage": stage, "round": r, **at, **fields})

    def measure(stage, r):
        last_word = {"base": " Yes.", "healed": " No."}.get(stage, "")
        written = {"texts": texts(n_texts, n_prompts, text + last_word)}
        items = {metric.item: item_values(metric, stage, r, n_texts) for metric in METRICS}
        if stage == "healed":
            write("adapter_gen", r, **written)
        write(stage, r, metrics=metrics(stage, r), items=items, dose=0.5, **({} if stage == "healed" else written))

    def heal(r):
        for step in range(4 * 24):
            pressure = 0.4 if step % 8 == 0 else None
            at = {"step": step, "epoch": 2 * step / 96, "lr": 1e-3}
            nats = {"fit": 1.0 - step / 400, "divergence": 0.1, "barrier": 0.01}
            write("heal_step", r, **at, **nats, n_texts=8, pressure=pressure)
        check = [{"epoch": float(e), "fit": 1.0 - 0.1 * e, "divergence": 0.05 * e} for e in range(3)]
        counts = {"n_train": 14, "n_validation": 2, "n_steps": 96, "n_retries": 0, "validation_prompts": [1]}
        name = f"ckpt/r{r}" if r >= 0 else "ckpt/control"
        files = {"checkpoint": name, "files": {f"{name}/adapter_model.safetensors": "5" * 64}}
        write("heal", r, **counts, **files, lam=0.3, tau=0.1, lr=1e-3, validation=check, fired=0.5, pressure=0.4)

    write(
        "run_start",
        None,
        folder="out/run",
        config=CONFIG | {"n_rounds": n_rounds, "seed": 42},
        preset="toy",
        seed=42,
        trait=deepcopy(TRAIT),
        metrics=[asdict(metric) for metric in METRICS],
        gates=deepcopy(GATES),
        wording={"vignette": [[f"{text} Scene {i}.", "authority"] for i in (1, 2, 3)]},
        versions={"python": "3.11", "steer-heal": "0.2.0"},
        device="Some Processor",
        settings="01234567",
        base_model="owner/base",
        weights={"sha256": "7" * 64, "dtype": "float32"},
        git_commit="0123abc",
        unadapted=["mlp.router.weight"],
        command=["python", "-m", "steer_heal.run", "toy", "--out", "a folder"],
    )
    measure("base", -1)
    measure("prompted", -1)
    write("control_gen", -1, n_train=8, completions=completions(8, text), rehearsal=[])
    heal(-1)
    measure("control", -1)
    for r in range(n_rounds):
        write("vector", r, norms={"1": 2.0}, cosine_to_first=1.0)
        write("calibration", r, dose=0.5, probes=[{"dose": 0.25, "kl_p95": 0.4}, {"dose": 0.5, "kl_p95": 0.9}])
        write("dose", r, kappa=0.5, dose=0.5, mode="iso_kl", probes=[])
        write("gen", r, n_train=16, completions=completions(n_completions, text), rehearsal=[{}, {}])
        measure("steered", r)
        heal(r)
        measure("healed", r)
        cosines = {"cosine_student_teacher": 0.4, "cosine_student_first": 0.3}
        write("round", r, retain=0.2, slope=-0.1, checkpoint=f"ckpt/r{r}", seconds={"total": 3.0}, **cosines)
    write("run_end", None, verdict="", table=[])
    return out


def renamed(events: list[dict], names: dict[str, str]) -> list[dict]:
    """The events with words replaced wherever they stand alone or before _lo and _hi, as keys and as values."""
    text = json.dumps(events)
    for old, new in names.items():
        for end in ("", "_lo", "_hi"):
            text = text.replace(f'"{old}{end}"', f'"{new}{end}"')
    return json.loads(text)


def write_run(folder, events):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def read(folder, events) -> tuple[str, str]:
    assert report(write_run(folder, events)) == folder / "report.html"
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "diary.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements and attributes of a page, its text, and whether every element that must be closed is."""

    VOID = {"meta", "link", "img", "br", "wbr", "input"}

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
