"""What does each way of writing and reading text faster buy on the bundled model?"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from steer_heal.config import PRESETS, TOY
from steer_heal.evals.instrument import load_instrument, load_vignettes
from steer_heal.evals.metrics import Condition
from steer_heal.evals.moral_foundations import answer_slots, digit_ids, read_slots
from steer_heal.events import of_stage, read_events
from steer_heal.lab import cli, show
from steer_heal.lm import LM, load
from steer_heal.sampling import inverse_cdf, sampler
from steer_heal.stages.filter import loop
from steer_heal.steering import Decoding, Row, decode
from steer_heal.traits import load_trait

INSTRUMENTS = {
    "toy": (TOY / "instrument.toml", TOY / "vignettes.jsonl"),
    "moral": (Path("data/instruments/moral.toml"), Path("data/vignettes/other.jsonl")),
}


def side_by_side(works: Sequence[tuple[str, Callable[[], Any]]], n: int) -> list[dict[str, Any]]:
    """Median milliseconds of each, taken in turns so that a busy machine slows all of them alike; ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name, _ in works}
    for name, work in works:
        work()
    for _ in range(n):
        for name, work in works:
            began = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - began))
    first = median(times[works[0][0]])
    return [{"way": name, "ms": median(ms), "times_faster": first / median(ms)} for name, ms in times.items()]


def sampling(n: int) -> list[dict[str, Any]]:
    """A token from 262,208 logits with top-k 64 and top-p 0.95: over the vocabulary, and over the likeliest alone."""
    config, rows = GenerationConfig(do_sample=True, top_k=64, top_p=0.95), []
    warpers, pick = LogitsProcessorList([TopKLogitsWarper(64), TopPLogitsWarper(0.95)]), sampler(config)
    for batch in (1, 16):
        generator = torch.Generator().manual_seed(0)
        logits, uniform = (
            torch.randn(batch, 262_208, generator=generator),
            torch.rand(batch, generator=generator, dtype=torch.float64),
        )
        ways = (
            (f"vocabulary, batch {batch}", lambda: inverse_cdf(warpers(None, logits), uniform)),
            (f"likeliest, batch {batch}", lambda: pick(logits, uniform)),
        )
        rows += side_by_side(ways, n)
    return rows


def decoding(lm: LM, rows: Sequence[Row], n: int) -> list[dict[str, Any]]:
    """96 answers of 64 tokens at several batch sizes, and with the cache at fixed addresses."""
    ways = [
        (f"growing, batch {size}", lambda size=size: decode(lm, rows, None, Decoding(64, size)))
        for size in (1, 8, 32, 96)
    ]
    fixed = replace(lm, fixed_addresses=True)
    ways += [
        (f"fixed, batch {size}", lambda size=size: decode(fixed, rows, None, Decoding(64, size))) for size in (32, 96)
    ]
    return side_by_side(ways, n)


def prefixes(lm: LM) -> list[dict[str, Any]]:
    """What of the vignettes' prompts is shared: by all of them, and by the two frames of one."""
    rows = []
    for name, (instrument, vignettes) in INSTRUMENTS.items():
        asked, scenes = load_instrument(instrument), load_vignettes(vignettes)
        prompts = [[lm.chat(asked.question(v.text, order)) for order in asked.frames] for v in scenes]
        every = [ids for pair in prompts for ids in pair]
        total, by_all = sum(map(len, every)), min(shared(every[0], ids) for ids in every[1:])
        rows.append(
            {
                "instrument": name,
                "prompts": len(every),
                "tokens": total / len(every),
                "saved_by_all": by_all * (len(every) - 1) / total,
                "saved_by_frames": sum(shared(*pair) for pair in prompts) / total,
            }
        )
    return rows


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning that two prompts have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def reading(lm: LM, rows: Sequence[Row], n: int) -> list[dict[str, Any]]:
    """An evaluation of the toy preset in its parts: free text, and the vignettes."""
    instrument, scenes = load_instrument(INSTRUMENTS["toy"][0]), load_vignettes(INSTRUMENTS["toy"][1])
    slots = answer_slots(
        lm,
        [instrument.question(v.text, order) for v in scenes for order in instrument.frames],
        instrument,
        Condition(),
        0,
        128,
    )
    return side_by_side(
        [
            ("64 free texts", lambda: decode(lm, rows[:64], None, Decoding(128, 128))),
            ("336 answer slots", lambda: read_slots(lm, slots, digit_ids(lm), Condition())),
        ],
        n,
    )


def looping(lm: LM, folder: Path, every: int = 16) -> list[dict[str, Any]]:
    """Decoding that a finished run would have been spared had rows left once the loop gate was certain to drop them.

    A gate's verdict is certain when the words that are whole already fail it: windows that are said stay said.
    """
    events = read_events(folder)
    limit, rows = events[0]["config"]["filter"]["loop_max"], []
    for event in of_stage(events, "gen"):
        lengths = []
        for row in event["completions"]:
            ids = row["completion_ids"]
            cut = (
                k
                for k in range(every, len(ids), every)
                if certain(lm.tokenizer.decode(ids[:k], skip_special_tokens=True), limit)
            )
            lengths.append((len(ids), next(cut, len(ids)), row["keep"]))
        assert not any(keep and end < n for n, end, keep in lengths)
        total = sum(n for n, _, _ in lengths)
        rows.append(
            {
                "round": event["round"],
                "rows": len(lengths),
                "left": sum(end < n for n, end, _ in lengths),
                "row_steps_saved": 1 - sum(end for _, end, _ in lengths) / total,
            }
        )
    return rows


def certain(text: str, limit: float) -> bool:
    words = text.lower().split()
    return len(words) > 21 and loop(text.lower().rsplit(maxsplit=1)[0]) > limit


def main(n: int = 7, run: Path | None = None, out: Path = Path("out/bench")) -> None:
    """What does each way of writing and reading text faster buy on the bundled model?

    Args:
        n: Repetitions; the median counts.
        run: A finished run's folder: also what rows that loop would save by leaving early.
        out: Folder of the tables as JSON.
    """
    torch.set_num_threads(1)
    lm = load(PRESETS["toy"][1].model, max_prompt_tokens=4096)
    prompts = load_trait("authority", TOY / "prompts").prompts
    rows = [Row(lm.chat(prompts[i % len(prompts)]), seed=i) for i in range(96)]
    show("Sampling", sampling(n), ["likeliest be several times faster"], out, "sampling")
    show(
        "Decoding",
        decoding(lm, rows, max(1, n // 2)),
        [
            "larger batches be faster",
            "fixed be slower on a CPU: it computes rows that ended, and slots not written yet",
        ],
        out,
        "decoding",
    )
    show("An evaluation", reading(lm, rows, n), ["say what a shared prefix could save at the most"], out, "reading")
    show(
        "Prompts that begin alike", prefixes(lm), ["be over half to be worth a second way of reading"], out, "prefixes"
    )
    if run is not None:
        show("Rows that leave their loop early", looping(lm, run), ["save over a tenth to be worth it"], out, "looping")


if __name__ == "__main__":
    sys.exit(cli(main))
