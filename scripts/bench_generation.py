"""What does each way of writing and reading text faster buy on the bundled model?"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lab import Lab, LabCfg, cli, seconds_of, show
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from steer_heal.evals.base import Condition
from steer_heal.evals.moral_foundations import answer_slots, digit_ids, read_slots
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM
from steer_heal.model.sampling import inverse_cdf, sampler


def side_by_side(ways: Mapping[str, Callable[[], Any]], n: int) -> list[dict[str, Any]]:
    """Median milliseconds of each, in turns so that a busy machine slows all of them alike; ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + n):
        for name, work in ways.items():
            ms = 1e3 * seconds_of(work)
            if turn > 0:  # the first one warms up
                times[name].append(ms)
    medians = {name: median(values) for name, values in times.items()}
    first = next(iter(medians.values()))
    return [{"way": name, "ms": ms, "times_faster": first / ms} for name, ms in medians.items()]


def sampling(batch: int, n: int) -> list[dict[str, Any]]:
    """A token from 262,208 logits with top-k 64 and top-p 0.95: over the vocabulary, and over the likeliest alone."""
    pick = sampler(GenerationConfig(do_sample=True, top_k=64, top_p=0.95))
    warpers: Any = LogitsProcessorList([TopKLogitsWarper(64), TopPLogitsWarper(0.95)])
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, 262_208, generator=generator)
    uniform = torch.rand(batch, generator=generator, dtype=torch.float64)
    ways = {
        f"vocabulary, batch {batch}": lambda: inverse_cdf(warpers(None, logits), uniform),
        f"likeliest, batch {batch}": lambda: pick(logits, uniform),
    }
    return side_by_side(ways, n)


def decoding(lm: LM, rows: Sequence[Row], sizes: Sequence[int], n: int) -> list[dict[str, Any]]:
    """Answers of 64 tokens, by batch size."""
    ways = {f"batch {size}": lambda size=size: decode(lm, rows, None, Decoding(64, size)) for size in sizes}
    return side_by_side(ways, n)


def reading(bench: Lab, rows: Sequence[Row], n: int) -> list[dict[str, Any]]:
    """An evaluation of the toy preset in its parts: free text, and the vignettes."""
    lm, instrument, cfg = bench.lm, bench.inputs.instrument, bench.cfg.eval
    questions = [instrument.question(v.text, order) for v in bench.inputs.vignettes for order in instrument.frames]
    slots = answer_slots(lm, questions, instrument, Condition(), 0, cfg.batch_size)
    ways = {
        f"{len(rows)} free texts": lambda: decode(lm, rows, None, Decoding(cfg.max_new_tokens, cfg.batch_size)),
        f"{len(slots)} answer slots": lambda: read_slots(lm, slots, digit_ids(lm), Condition()),
    }
    return side_by_side(ways, n)


def main(
    n: int = 7, n_answers: int = 96, sizes: tuple[int, ...] = (1, 8, 32, 96), out: Path = Path("out/bench")
) -> None:
    """Prints the tables.

    Args:
        n: Repetitions; the median counts.
        n_answers: Answers to decode.
        sizes: Batch sizes to decode them in.
        out: Folder of the tables as JSON.
    """
    bench = Lab(LabCfg(n_threads=1, out=out).run_config())
    prompts = bench.trait.prompts
    rows = [Row(bench.lm.chat(prompts[i % len(prompts)]), seed=i) for i in range(n_answers)]
    drawn = [row for batch in (1, 16) for row in sampling(batch, n)]
    show("Sampling", drawn, ["likeliest be several times faster"], out, "sampling")
    decoded = decoding(bench.lm, rows, sizes, max(1, n // 2))
    show("Decoding", decoded, ["larger batches be faster"], out, "decoding")
    read = reading(bench, rows[: bench.cfg.eval.n_texts], n)
    show("An evaluation", read, ["show which part a faster way of reading could save"], out, "reading")


if __name__ == "__main__":
    sys.exit(cli(main))
