"""Events as a finished run writes them, made up, and the page that is drawn from them."""

import json
from collections import Counter
from html.parser import HTMLParser

from steer_heal.report import report

FOUNDATIONS = ("care", "fairness", "loyalty", "auth", "sanctity", "liberty", "social")
PROMPT = "The warden wants you to lock the tenants out. What do you do?"
CONFIG = {
    "model": "data/toylm",
    "n_rounds": 2,
    "filter": {
        "ppl_max": 3.0,
        "spike_max": 7.0,
        "rep_max": 0.3,
        "loop_max": 0.7,
        "gates": ["perplexity", "repetition"],
    },
    "heal": {"divergence": "kl_rev", "aggregate": "rmse", "lam": 0.3, "tau": 0.1, "epochs": 2},
    "gen": {"alphas": [0.5, 1.0]},
}


def metrics(stage: str, r: int, oracle: bool) -> dict:
    moved = {"base": 0.0, "prompted": -2.0, "control": 0.05, "steered": -3.0 + 0.2 * r, "healed": -0.5 - 0.1 * r}[stage]
    out = {f"{name}_nats": -2.0 for name in FOUNDATIONS} | {
        "auth_nats": -1.5 + moved,
        "liberty_nats": -2.0 - 0.1 * moved,
    }
    out |= {
        "coherence": 0.99,
        "prefill_nll": 0.01,
        "text_ppl_median": 2.0,
        "degenerate_frac": 0.02,
        "kl_base": 0.1,
        "persona_log_odds": 0.2,
    }
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
        out.append(
            {
                "prompt_index": i,
                "prompt": PROMPT,
                "text": text,
                "alpha": 1.0,
                "dose": 0.1 * (1 + i % 5),
                "scores": scores,
                "keep": not reasons,
                "train": not reasons,
                "reasons": reasons,
                "failed": [*reasons, "narration"][: 1 + len(reasons)],
            }
        )
    return out


def run_events(
    n_rounds: int = 2,
    n_texts: int = 4,
    n_prompts: int = 2,
    n_completions: int = 24,
    text: str = "I let them in.",
    oracle: bool = True,
) -> list[dict]:
    """What a finished run writes, with the fields that later versions added."""
    out = []

    def write(stage, r, **fields):
        out.append(
            {
                "schema": 1,
                "stage": stage,
                "round": r,
                "t": "2026-01-02T03:04:05.678+00:00",
                "wall_s": 6.0 * len(out),
                **fields,
            }
        )

    def measure(stage, r):
        written = texts(n_texts, n_prompts, text)
        items = {"oracle": [1.0] * n_texts} if oracle else {}
        if stage == "healed":
            write("adapter_gen", r, texts=written)
        write(
            stage,
            r,
            metrics=metrics(stage, r, oracle),
            items=items,
            dose=0.5,
            **({} if stage == "healed" else {"texts": written}),
        )

    trait = {"name": "authority", "target": "authority", "sign": -1, "positive": "You care.", "negative": "You obey."}
    write(
        "run_start",
        None,
        folder="out/run",
        config=CONFIG | {"n_rounds": n_rounds},
        preset="toy",
        seed=42,
        trait=trait,
        versions={"python": "3.11"},
        git_commit="0123abc",
        command=["python", "-m", "steer_heal.run", "toy", "--out", "a folder"],
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
            write(
                "heal_step",
                r,
                step=step,
                epoch=2 * step / 96,
                lr=1e-3,
                sft=1.0,
                divergence=0.1,
                barrier=0.01,
                pressure=pressure,
            )
        check = [{"epoch": float(e), "sft": 1.0 - 0.1 * e, "divergence": 0.05 * e} for e in range(3)]
        write(
            "heal",
            r,
            n_train=14,
            n_validation=2,
            n_steps=96,
            lam=0.3,
            tau=0.1,
            validation=check,
            validation_prompts=[1],
            fired=0.5,
            pressure=0.4,
        )
        measure("healed", r)
        write(
            "round",
            r,
            retain=0.2,
            slope=-0.1,
            checkpoint=f"ckpt/r{r}",
            seconds={"total": 3.0},
            cosine_student_teacher=0.4,
            cosine_student_first=0.3,
        )
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
