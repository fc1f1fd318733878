"""What does a round cost, as built and done plainly, and does a token cost more after more rounds?

With --model: where do the seconds of a whole run on that model go, in float32 and in bfloat16?
"""

import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from common import cli, random_lm, seconds_of, show
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Qwen3Config

from steer_heal.bench import Bench, load_model
from steer_heal.check import check
from steer_heal.diag.lab import unfiltered
from steer_heal.events import Gathered
from steer_heal.loop import Loop, run_loop, run_round
from steer_heal.model.divergence import aggregate, barrier, kl_rev
from steer_heal.model.lm import LM
from steer_heal.model.state import healed_state
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.progress import Progress
from steer_heal.recipe import Recipe
from steer_heal.records import Collected, Completion, HealReport, derive_seed
from steer_heal.runs.begin import start_event
from steer_heal.runs.stored import MemoryRun
from steer_heal.settings import TINY_RANDOM, EvalCfg, GenCfg, HealCfg, RunConfig
from steer_heal.stages.generate import Ask
from steer_heal.stages.heal import BETAS, MAX_NORM, schedule, split_by_prompt
from steer_heal.stages.loss import Sample


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of the round."""

    layers: int = 8
    width: int = 512
    vocabulary: int = 32_768
    """The toy tokenizer knows 1,408 of these tokens and leaves the others out of the text. The gates are off."""
    n_completions: int = 32
    n_tokens: int = 128
    """Tokens of each completion. The random model never writes an end token by itself."""
    n_history: int = 2
    """Rounds that were baked before."""
    epochs: int = 2
    rank: int = 32
    batch_size: int = 32
    """Batch size of writing and of the evaluation, as built."""
    n_vignettes: int = 16
    think_tokens: int = 16


TINY = Size(
    layers=3,
    width=32,
    vocabulary=1500,
    n_completions=8,
    n_tokens=12,
    n_history=1,
    epochs=3,
    rank=2,
    batch_size=8,
    n_vignettes=2,
    think_tokens=2,
)


class Setup:
    """The settings and the inputs of a round on a random model."""

    def __init__(self, size: Size, seed: int, out: Path) -> None:
        n = size.n_completions
        preset = FAST_DEV_PRESET
        evals = {"evals": EvalCfg().evals, "think_tokens": size.think_tokens, "n_texts": 16}
        evals |= {"max_new_tokens": size.n_tokens // 2, "batch_size": size.batch_size}
        self.size = size
        self.seed = seed
        self.cfg = replace(
            preset,
            seed=seed,
            out=out,
            gen=replace(preset.gen, max_new_tokens=size.n_tokens, batch_size=size.batch_size),
            filter=replace(preset.filter, n_keep=n, max_attempts=n, gates=()),
            dose=replace(preset.dose, mode="fixed"),
            adapter=replace(preset.adapter, rank=size.rank, alpha=2.0 * size.rank, layers=(0.2, 0.8)),
            heal=replace(preset.heal, epochs=size.epochs, tau=0.0, pressure_every=10**6),
            eval=replace(preset.eval, **evals),
        )
        inputs = check(self.cfg)
        self.inputs = replace(inputs, vignettes=inputs.vignettes[: size.n_vignettes])

    def student(self, n_rounds: int) -> Student:
        """A student on a model of its own, which is always the same. Its rounds are small random factors."""
        student = Student(random_model(self.size, self.seed), self.cfg.adapter)
        for r in range(n_rounds):
            generator = torch.Generator().manual_seed(r)
            student.new_round(r)
            for _, b, _ in student.adapter.updates():
                b.data.copy_(0.003 * torch.randn(b.shape, generator=generator))
            student.bake()
        return student

    def bench(self, n_rounds: int) -> Bench:
        return Bench(self.cfg, self.inputs, self.student(n_rounds))


def write(bench: Bench, batch: int, length: int) -> list[Completion]:
    """One batch of unsteered text."""
    prompts = bench.inputs.prompts
    seeds = [derive_seed(bench.cfg.seed, i) for i in range(batch)]
    asks = [Ask(i % len(prompts), prompts[i % len(prompts)], seed, alpha=1.0) for i, seed in enumerate(seeds)]
    bench = replace(bench, cfg=replace(bench.cfg, gen=replace(bench.cfg.gen, batch_size=batch)))
    return bench.write(Condition(), asks, max_new_tokens=length)


def random_model(size: Size, seed: int) -> LM:
    """A random model. The weights of its head are so large that a few tokens share the probability, and rounding rarely
    changes which one is sampled."""
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=3 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=max(8, size.width // 8),
        tie_word_embeddings=False,
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    lm = random_lm(config, seed)
    lm.head.weight.mul_(8 / (0.06 * size.width**0.5))  # logits of standard deviation 8
    lm.model.generation_config.update(do_sample=True, temperature=1.0, eos_token_id=2)
    return lm


# --- one round ---------------------------------------------------------------------------------------------------
aten = torch.ops.aten
FLOP: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""torch's formulas for matrix products. It has none for attention on the CPU, which takes those of the GPU."""


class Products(TorchDispatchMode):
    """While inside, counts the floating-point operations of matrix products, forward and backward. torch's own
    FlopCounterMode cannot be used, since its hooks on modules forbid a gradient inside a backward pass."""

    flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOP:
            self.flop += FLOP[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class Clock(Progress):
    """A row for each stage of a mode: seconds of the clock and of the CPU, and peak memory. If it is `counting`, the
    operations of matrix products instead."""

    def __init__(self, mode: str, counting: bool = False) -> None:
        self.mode = mode
        self.counting = counting
        self.rows: dict[str, dict[str, Any]] = {}

    @contextmanager
    def stage(self, stage: str, r: int | None = None, doing: str = "") -> Iterator[None]:
        with suppress(OSError):  # Linux then restarts the peak of the process
            Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        began_cpu = time.process_time()
        with Products() if self.counting else nullcontext() as products:
            yield
        seconds = time.perf_counter() - began
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = {"seconds": seconds, "cpu_s": time.process_time() - began_cpu, "peak_mib": peak_kib / 2**10}
        self.rows[stage] = row if products is None else {"gflop": products.flop / 1e9}
        print(f"  {self.mode:8} {stage:9} {seconds:8.1f} s{' (counting)' if self.counting else ''}", flush=True)


@dataclass
class ComparedBench(Bench):
    """A bench that keeps what two modes are compared by."""

    given: Collected | None
    """Text that trains in place of what was written, so that two modes do the same work."""
    is_plain: bool
    """Whether it heals plainly."""
    written: list[Completion] = field(default_factory=list)
    factors: dict[str, torch.Tensor] = field(default_factory=dict)
    """The factor that the heal made."""

    def collect(self, *args: Any, **more: Any) -> Collected:
        collected = super().collect(*args, **more)
        self.written = collected.completions
        return self.given or collected

    def heal(self, recipe: Recipe, r: int | None, collected: Collected, *args: Any, **more: Any) -> HealReport:
        if self.is_plain:
            report = plain_heal(self.student, collected, self.cfg.heal, recipe.heal_seed(self.cfg.seed, r))
        else:
            report = super().heal(recipe, r, collected, *args, **more)
        self.factors = self.student.factors("round")
        return report


def timed_round(setup: Setup, clock: Clock, given: Collected | None = None) -> ComparedBench:
    """The bench after one round and its evaluation."""
    cfg = setup.cfg
    is_plain = clock.mode == "plain"
    if is_plain:
        cfg = replace(cfg, gen=replace(cfg.gen, batch_size=1), eval=replace(cfg.eval, batch_size=8))
    bench = ComparedBench(cfg, setup.inputs, setup.student(setup.size.n_history), given, is_plain)
    run_round(Loop(bench, MemoryRun(), clock, measures_teacher=False), Recipe.of(cfg), 0)
    with clock.stage("evaluate"):
        bench.measure(healed_state(0, bench.trait))
    return bench


def plain_heal(student: Student, collected: Collected, heal: HealCfg, seed: int) -> HealReport:
    """A heal without what makes it cheap: every step merges the history and reads the reference again, computes all
    logits of all positions, and takes one completion per pass."""
    empty = torch.empty(0, student.lm.width)
    samples = [Sample(c.prompt_index, c.prompt_ids, c.completion_ids, empty) for c in collected.completions]
    train, validation = split_by_prompt(samples, seed)
    student.new_round(seed)
    with student.training() as parameters:
        optimiser = torch.optim.AdamW(parameters, lr=heal.lr, betas=BETAS, weight_decay=0.0)
    rng = random.Random(seed)
    per_epoch = -(-len(train) // heal.batch_size)
    for epoch in range(heal.epochs):
        for _ in range(2 if epoch == 0 else 1):  # before the first epoch and after each
            with torch.no_grad():
                plain_pass(student, validation, heal)
        order = rng.sample(range(len(train)), len(train))
        for step, start in enumerate(range(0, len(order), heal.batch_size), start=epoch * per_epoch):
            optimiser.param_groups[0]["lr"] = heal.lr * schedule(step, heal.epochs * per_epoch)
            plain_pass(student, [train[i] for i in order[start : start + heal.batch_size]], heal)
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimiser.step()
            optimiser.zero_grad()
    return HealReport(
        n_train=len(train),
        n_validation=len(validation),
        lam=heal.lam,
        tau=heal.tau,
        lr=heal.lr,
        steps=(),
        validation=(),
        validation_prompts=(),
    )


def plain_pass(student: Student, samples: Sequence[Sample], heal: HealCfg) -> None:
    """The loss of some completions. If gradients are on, those of the mean are added to `.grad`."""
    model = student.lm.model

    def logp(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).logits[0].float().log_softmax(-1)

    rows = [(torch.tensor([sample.ids]), len(sample.prompt_ids) - 1) for sample in samples]
    with student.using("prev"), torch.no_grad():
        references = [logp(ids) for ids, _ in rows]
    with student.training():
        for (ids, start), reference in zip(rows, references, strict=True):
            own = logp(ids)
            nll = -own[:-1].gather(-1, ids[0, 1:, None])[start:, 0]
            divergence = aggregate(kl_rev(own, reference)[start:-1], heal.aggregate)
            loss = (nll.mean() + barrier(divergence, heal.lam, heal.tau)) / len(rows)
            if loss.requires_grad:
                loss.backward()


# --- a whole run on a given model --------------------------------------------------------------------------------
@dataclass(frozen=True)
class RunSize:
    """The settings with which the seconds of `EARLIER` were measured. Gates are off and the dose is 1, so that every
    machine does the same work."""

    n_prompts: int = 8
    n_tokens: int = 64
    n_completions: int = 24
    epochs: int = 2
    n_contexts: int = 64
    n_vignettes: int = 32
    think_tokens: int = 32
    n_texts: int = 8


TINY_RUN = RunSize(
    n_prompts=3, n_tokens=6, n_completions=6, epochs=1, n_contexts=4, n_vignettes=2, think_tokens=1, n_texts=2
)
STATES = ("base", "prompted", "steered", "healed")
EARLIER = {
    "float32": {"vector": 67.0, "a completion": 4.2, "heal": 75.0, "an evaluation": 71.0, "run": 589.0},
    "bfloat16": {"vector": 19.0, "a completion": 4.0, "heal": 35.0, "an evaluation": 37.0, "run": 382.0},
}
"""Seconds of the implementation that this one replaced: SmolLM2-135M-Instruct, one thread of another processor, which
has matrix units (AMX). Its run has 3 evaluations, ours 4."""


def run_config(model: str, dtype: Literal["float32", "bfloat16"], size: RunSize, seed: int, out: Path) -> RunConfig:
    """The default settings at that size, for one round. The tiny random model takes the inputs of its preset."""
    preset = FAST_DEV_PRESET if model == TINY_RANDOM else RunConfig()
    n = size.n_completions
    answers = {"n_prompts": size.n_prompts, "n_texts": size.n_texts, "max_new_tokens": size.n_tokens}
    return replace(
        preset,
        model=model,
        dtype=dtype,
        seed=seed,
        n_rounds=1,
        control=False,
        out=out,
        steer=replace(preset.steer, n_contexts=size.n_contexts),
        gen=GenCfg(n_prompts=size.n_prompts, max_new_tokens=size.n_tokens, prompts=preset.gen.prompts),
        dose=replace(preset.dose, mode="fixed"),
        filter=replace(preset.filter, n_keep=n, max_attempts=n, min_train=n, gates=()),
        heal=replace(preset.heal, epochs=size.epochs),
        eval=replace(preset.eval, n_vignettes=size.n_vignettes, think_tokens=size.think_tokens, **answers),
    )


def run_stages(cfg: RunConfig, clock: Clock) -> list[dict[str, Any]]:
    """A run of one round: a row for each stage, beside the earlier seconds."""
    inputs = check(cfg)
    with clock.stage("load"):
        student = Student(load_model(cfg), cfg.adapter)
    run = MemoryRun([start_event(cfg, inputs)])
    run_loop(Loop(Bench(cfg, inputs, student), run, clock))
    n_texts = len(run.require(Gathered, 0).collected.scored)
    peak = max(row["peak_mib"] for row in clock.rows.values())
    shares = {
        "vector": (["vector"], 1),
        "a completion": (["text"], n_texts),
        "heal": (["heal"], 1),
        "an evaluation": (STATES, len(STATES)),
        "run": (clock.rows, 1),
    }
    rows = []
    for stage, (parts, n) in shares.items():
        took = {kind: sum(clock.rows[part][kind] for part in parts) / n for kind in ("seconds", "cpu_s")}
        earlier = EARLIER[cfg.dtype][stage]
        row = {"dtype": cfg.dtype, "stage": stage, **took, "earlier_s": earlier, "ratio": earlier / took["cpu_s"]}
        rows.append(row | {"peak_mib": peak if stage == "run" else None})
    return rows


# --- tables ------------------------------------------------------------------------------------------------------
def compare(setup: Setup, count: bool, out: Path) -> None:
    """A round in both modes. With `count`, both once more, counting products."""
    clocks = [Clock("built"), Clock("plain")]
    built = timed_round(setup, clocks[0])
    given = unfiltered(built.written)
    plain = timed_round(setup, clocks[1], given)
    for clock in clocks if count else ():
        counted = Clock(clock.mode, counting=True)
        timed_round(setup, counted, given)
        for name, row in counted.rows.items():
            clock.rows[name] |= row | {"gflop_per_s": row["gflop"] / clock.rows[name]["seconds"]}
    for clock in clocks:
        clock.rows["total"] = {"seconds": sum(row["seconds"] for row in clock.rows.values())}
    for name, row in clocks[0].rows.items():
        row["ratio"] = clocks[1].rows[name]["seconds"] / row["seconds"]
    rows = [{"mode": clock.mode, "stage": name, **row} for clock in clocks for name, row in clock.rows.items()]
    pairs = list(zip(built.written, plain.written, strict=True))
    same = sum(a.completion_ids == b.completion_ids for a, b in pairs)
    apart = max(
        ((factor - plain.factors[name]).norm() / factor.norm()).item() for name, factor in built.factors.items()
    )
    checks = {"n_texts": len(pairs), "n_texts_the_same": same, "largest_relative_difference_of_a_factor": apart}
    should = (
        f"{same} of {len(pairs)} texts be the same in both modes: all, since a row depends on its own seed alone, but "
        "for one in a hundred that rounding may change.",
        f"the healed factors differ by rounding: {apart:.1e} at most, relative to their size.",
        "ratio (plain / built seconds) be above 1 in text and heal; gflop_per_s be low only where few rows share a "
        "read of the weights, as in plain text.",
    )
    show(__doc__, rows, should, out, "round", size=asdict(setup.size), **checks)


def by_rounds(setup: Setup, rounds: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds per token, and seconds of a small heal, after some rounds, measured in turns on a busy machine."""
    batch = setup.size.batch_size // 2
    length = max(8, setup.size.n_tokens // 2)
    benches = {n: setup.bench(n) for n in rounds}
    heal = replace(setup.cfg.heal, epochs=1, batch_size=8)
    train = unfiltered(write(benches[rounds[0]], 8, length))
    recipe = Recipe.of(setup.cfg)
    write_s: dict[int, list[float]] = {n: [] for n in rounds}
    heal_s: dict[int, list[float]] = {n: [] for n in rounds}
    for turn in range(1 + 2 * repeats):
        for n, bench in benches.items():
            wrote = seconds_of(partial(write, bench, batch, length))
            healed = seconds_of(partial(bench.heal, recipe, 0, train, settings=heal))
            bench.student.discard_round()
            if turn > 0:  # the first one warms up
                write_s[n].append(wrote)
                heal_s[n].append(healed)
    first = write_s[rounds[0]]
    return [
        {
            "rounds": n,
            "ms_per_token": 1e3 * median(write_s[n]) / (batch * length),
            "heal_of_8_s": median(heal_s[n]),
            "against_first": median(a / b for a, b in zip(write_s[n], first, strict=True)),
        }
        for n in rounds
    ]


def main(
    model: str | None = None,
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    repeats: int = 2,
    n_threads: int = 1,
    seed: int = 0,
    out: Path = Path("out/bench"),
    tiny: bool = False,
    count: bool = True,
) -> None:
    """Prints the tables.

    Args:
        model: A folder or hub id. Times a whole run on it, and nothing else.
        dtypes: Dtypes of that model, one after the other.
        repeats: Half the number of turns in which different numbers of rounds are compared. Medians count.
        n_threads: CPU threads.
        seed: Seed of the model and of the texts.
        out: Folder of the tables as JSON.
        tiny: A small size that only shows that the script runs.
        count: Also count the floating-point operations of every stage, in one more round of each mode.
    """
    torch.set_num_threads(n_threads)
    if model is not None:
        size = TINY_RUN if tiny else RunSize()
        rows = []
        for dtype in dtypes:
            rows += run_stages(run_config(model, dtype, size, seed, out), Clock(dtype))
        should = [
            "ratio (earlier seconds / our cpu_s; another processor, so read it with care) be above 1 in every stage.",
            "cpu_s be the seconds on one thread, unless other programs take the processor.",
        ]
        question = "Where do the seconds of a whole run go?"
        show(question, rows, should, out, "run", model=model, size=asdict(size))
        return
    setup = Setup(TINY if tiny else Size(), seed, out)
    compare(setup, count, out)
    rows = by_rounds(setup, (0, 1, 2) if tiny else (0, 1, 2, 4, 8), repeats)
    should = ["against_first <= 1.10 up to 8 rounds: the history is merged. It is the median of ratios in turns."]
    show("Does a token cost more after more rounds?", rows, should, out, "round_by_rounds")


if __name__ == "__main__":
    sys.exit(cli(main))
