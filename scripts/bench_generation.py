"""What does each way of writing and reading text faster buy on the bundled model?"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import cli, seconds_of, show
from transformers import DynamicCache, GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from steer_heal.bench import Bench, load_model
from steer_heal.check import check
from steer_heal.evals.moral_foundations import Slot, answer_slots, digit_ids, slot_logp
from steer_heal.inputs.files import DATA, read_file
from steer_heal.inputs.instruments import Instrument, parse_instrument, parse_vignettes
from steer_heal.model.attention import NAME as GROUPED
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, load
from steer_heal.model.sampling import inverse_cdf, sampler
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.presets import TOY_PRESET


def side_by_side(ways: Mapping[str, Callable[[], Any]], n: int) -> list[dict[str, Any]]:
    """Median milliseconds of each way, and the ratio to the first. They take turns, so that a busy machine slows all of
    them alike."""
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
        f"likeliest, batch {batch}": partial(pick, logits, uniform),
    }
    return side_by_side(ways, n)


def decoding(lm: LM, rows: Sequence[Row], sizes: Sequence[int], n: int) -> list[dict[str, Any]]:
    """Answers of 64 tokens, by batch size."""
    ways = {f"batch {size}": partial(decode, lm, rows, None, Decoding(64, size)) for size in sizes}
    return side_by_side(ways, n)


def reading(bench: Bench, rows: Sequence[Row], n: int) -> list[dict[str, Any]]:
    """The parts of an evaluation of the toy preset: free text, and the vignettes."""
    lm = bench.student.lm
    instrument = bench.inputs.instrument
    cfg = bench.cfg.eval
    questions = [instrument.question(v.text, order) for v in bench.inputs.vignettes for order in instrument.frames]
    ways = {
        f"{len(rows)} free texts": partial(decode, lm, rows, None, Decoding(cfg.max_new_tokens, cfg.batch_size)),
        f"{len(questions)} answer slots": partial(
            answer_slots, lm, questions, instrument, Condition(), 0, cfg.batch_size
        ),
    }
    return side_by_side(ways, n)


@torch.no_grad()
def plain_thoughts(lm: LM, prompts: Sequence[tuple[int, ...]], n_new: int, suppress: frozenset[int]) -> list[list[int]]:
    """Greedy ids after each prompt, with transformers' cache and attention, in batches of 32 that share nothing."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    out = [[] for _ in prompts]
    for group in (order[k : k + 32] for k in range(0, len(order), 32)):
        longest = max(len(prompts[i]) for i in group)
        ids = torch.tensor([[lm.pad_id] * (longest - len(prompts[i])) + list(prompts[i]) for i in group])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in group])
        cache = DynamicCache(config=lm.model.config.get_text_config())
        for _ in range(n_new):
            hidden = lm.text_model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            logits = lm.logits(hidden[:, -1])
            logits[:, sorted(suppress)] = -torch.inf
            ids = logits.argmax(-1)[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            for i, token in zip(group, ids[:, 0].tolist(), strict=True):
                out[i].append(token)
    return out


def vignettes(lm: LM, instrument: Instrument, questions: Sequence[str], think_tokens: int, n: int) -> list[dict]:
    """Thinking and answering as built, and plainly: with a plain cache, then every sequence again from its start."""
    as_built = partial(answer_slots, lm, questions, instrument, Condition(), think_tokens, 0)
    slots, logp, _ = as_built()
    prompts = [lm.encode_prompt(lm.template.conversation([q]) + instrument.think_open) for q in questions]
    close = lm.encode(instrument.think_close)
    suppress = lm.end_ids.union(close if len(close) == 1 else ())
    forced = [len(p) + think_tokens for p in prompts]
    differ: list[float] = []

    def plain() -> None:
        lm.model.set_attn_implementation("sdpa")
        thoughts = plain_thoughts(lm, prompts, think_tokens, suppress)
        whole = [
            Slot((*p, *thought, *slot.ids[k:]), slot.prefill_start)
            for p, thought, slot, k in zip(prompts, thoughts, slots, forced, strict=True)
        ]
        again, _ = slot_logp(lm, whole, digit_ids(lm), Condition())
        lm.model.set_attn_implementation(GROUPED)
        differ.append((again - logp).abs().max().item())

    rows = side_by_side({"plain": plain, "as built": as_built}, n)
    return [{"dtype": str(lm.head.weight.dtype).removeprefix("torch."), **row, "differ": max(differ)} for row in rows]


def main(
    n: int = 7,
    n_answers: int = 96,
    sizes: tuple[int, ...] = (1, 8, 32, 96),
    model: str | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    n_vignettes: int = 32,
    think_tokens: int = 32,
    max_prompt_tokens: int = 1024,
    out: Path = Path("out/bench"),
) -> None:
    """Prints the tables.

    Args:
        n: Repetitions. The median counts.
        n_answers: Answers to decode.
        sizes: Batch sizes to decode them in.
        model: A folder or hub id. Shows only one table, of its vignettes in two frames.
        dtypes: Dtypes of that model.
        n_vignettes: Vignettes of that table.
        think_tokens: Tokens that the model thinks in that table.
        max_prompt_tokens: Maximum length of a prompt in that table.
        out: Folder of the tables as JSON.
    """
    if model is not None:
        torch.set_num_threads(1)
        instrument = parse_instrument(read_file(DATA / "instruments/moral.toml"))
        scenes = parse_vignettes(read_file(DATA / "vignettes/other.jsonl"))[:n_vignettes]
        questions = [instrument.question(v.text, order) for v in scenes for order in instrument.frames]
        table = [
            row
            for dtype in dtypes
            for row in vignettes(
                load(model, dtype=dtype, max_prompt_tokens=max_prompt_tokens), instrument, questions, think_tokens, n
            )
        ]
        should = ["as built take half of the time", "differ (log-probabilities, nats) be 1e-4 at most in float32"]
        show("Vignettes of a model", table, should, out, "vignettes")
        return
    torch.set_num_threads(1)
    cfg = replace(TOY_PRESET, out=out)
    bench = Bench(cfg, check(cfg), Student(load_model(cfg), cfg.adapter))
    lm = bench.student.lm
    prompts = bench.trait.prompts
    rows = [Row(lm.chat(prompts[i % len(prompts)]), seed=i) for i in range(n_answers)]
    drawn = [row for batch in (1, 16) for row in sampling(batch, n)]
    show("Sampling", drawn, ["likeliest be several times faster"], out, "sampling")
    decoded = decoding(lm, rows, sizes, max(1, n // 2))
    show("Decoding", decoded, ["larger batches be faster"], out, "decoding")
    read = reading(bench, rows[: bench.cfg.eval.n_texts], n)
    show("An evaluation", read, ["show which part a faster way of reading could save"], out, "reading")


if __name__ == "__main__":
    sys.exit(cli(main))
