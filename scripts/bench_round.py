"""What does a round cost, as built and done plainly, and does a token cost more after more rounds?

With --model: where do the seconds of a whole run on that model go, in float32 and in bfloat16?
"""

import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from bench_common import show
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Qwen3Config

from steer_heal import round as steps
from steer_heal.check import check
from steer_heal.diag.lab import cli, kept, random_lm, seconds_of
from steer_heal.model.divergence import aggregate, barrier, kl_rev
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import Collected, Completion, derive_seed
from steer_heal.settings import TINY_RANDOM, EvalCfg, GenCfg, RunConfig
from steer_heal.stages.generate import Ask
from steer_heal.stages.heal import schedule, split_by_prompt
from steer_heal.stages.loss import Sample


@dataclass(frozen=True)
class Size:
    """What the round is run on."""

    layers: int = 8
    width: int = 512
    vocabulary: int = 32_768
    """Of which the toy tokenizer writes 1,408; it leaves other ids out of the text, and the gates are off."""
    n_completions: int = 32
    n_tokens: int = 128
    """Of each completion. The random model never writes an end token by itself."""
    n_history: int = 2
    """Rounds baked before."""
    epochs: int = 2
    rank: int = 32
    batch_size: int = 32
    """Of writing and of the evaluation, as built."""
    n_vignettes: int = 16
    think_tokens: int = 16


TINY = Size(3, 32, 1500, 8, 12, 1, 1, 2, 8, 2, 2)


class Bench:
    """The settings and the inputs of a round on a random model."""

    def __init__(self, size: Size, seed: int, out: Path) -> None:
        n, preset = size.n_completions, FAST_DEV_PRESET
        evals = {"evals": EvalCfg().evals, "think_tokens": size.think_tokens, "n_texts": 16}
        evals |= {"max_new_tokens": size.n_tokens // 2, "batch_size": size.batch_size}
        self.size, self.seed = size, seed
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
        """A model of its own, always the same, with rounds of small random factors, as if healed."""
        student = Student(random_model(self.size, self.seed), self.cfg.adapter)
        for r in range(n_rounds):
            generator = torch.Generator().manual_seed(r)
            student.new_round(r)
            for _, b, _ in student.round_updates():
                b.data.copy_(0.003 * torch.randn(b.shape, generator=generator))
            student.bake()
        return student

    def write(self, student: Student, batch: int, length: int) -> list[Completion]:
        """One batch of unsteered text."""
        prompts = self.inputs.prompts
        asks = [
            Ask(i % len(prompts), prompts[i % len(prompts)], 1.0, 1.0, derive_seed(self.seed, i)) for i in range(batch)
        ]
        gen = replace(self.cfg.gen, batch_size=batch, max_new_tokens=length)
        return steps.write(student, Condition(), asks, self.inputs, replace(self.cfg, gen=gen))


def random_model(size: Size, seed: int) -> LM:
    """The head is so large that a few tokens share the probability, and rounding rarely changes a sampled one."""
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
"""torch's formulas for matrix products; attention on the CPU has none of its own there."""


class Products(TorchDispatchMode):
    """While inside, counts the floating-point operations of matrix products, forward and backward. torch's own
    FlopCounterMode cannot be used: its hooks on modules forbid a gradient inside of a backward pass."""

    flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in FLOP:
            self.flop += FLOP[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class Clock:
    """A row for each stage of a mode: seconds of the clock and of the CPU, and peak memory; where it counts, the
    operations of matrix products instead."""

    def __init__(self, mode: str, counting: bool = False) -> None:
        self.mode, self.counting, self.rows = mode, counting, dict[str, dict[str, Any]]()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with suppress(OSError):  # Linux then takes the peak of the process anew
            Path("/proc/self/clear_refs").write_text("5")
        began, began_cpu = time.perf_counter(), time.process_time()
        with Products() if self.counting else nullcontext() as products:
            yield
        seconds, peak_kib = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row = {"seconds": seconds, "cpu_s": time.process_time() - began_cpu, "peak_mib": peak_kib / 2**10}
        self.rows[name] = row if products is None else {"gflop": products.flop / 1e9}
        print(f"  {self.mode:8} {name:9} {seconds:8.1f} s{' (counting)' * self.counting}", flush=True)


def run_round(bench: Bench, clock: Clock, given: Collected | None = None) -> tuple[Collected, dict[str, torch.Tensor]]:
    """One round; (what it wrote, the factors it healed). `given` trains in place of what it wrote, so that both modes
    do the same work."""
    plain, inputs, cfg = clock.mode == "plain", bench.inputs, bench.cfg
    if plain:
        cfg = replace(cfg, gen=replace(cfg.gen, batch_size=1), eval=replace(cfg.eval, batch_size=8))
    student = bench.student(bench.size.n_history)
    with clock.stage("vector"):
        vector = steps.extract(student, inputs, cfg)
    with clock.stage("generate"):
        found = steps.collect(student, vector, inputs, cfg, 0)
    with clock.stage("heal"):
        train = given or found
        plain_heal(student, train, cfg, 0) if plain else steps.heal(student, train, inputs, cfg, 0)
    factors = student.factors("round")
    with clock.stage("bake"), TemporaryDirectory() as folder:
        student.save(Path(folder), student.bake())
    with clock.stage("evaluate"):
        steps.measure(student, inputs, cfg)
    return found, factors


def plain_heal(student: Student, collected: Collected, cfg: RunConfig, r: int) -> None:
    """The heal of round.py without what makes it cheap: the history is merged and the reference read in every step, all
    logits of all positions are computed, one completion a pass."""
    seed, heal, empty = derive_seed(cfg.seed, r, "heal"), cfg.heal, torch.empty(0, student.lm.width)
    samples = [Sample(c.prompt_index, c.prompt_ids, c.completion_ids, empty) for c in collected.completions]
    train, validation = split_by_prompt(samples, seed)
    student.new_round(seed)
    with student.training() as parameters:
        optimiser = torch.optim.AdamW(parameters, lr=heal.lr, betas=(0.9, 0.95), weight_decay=0.0)
    rng, per_epoch = random.Random(seed), -(-len(train) // heal.batch_size)
    for epoch in range(heal.epochs):
        for _ in range(2 if epoch == 0 else 1):  # before the first epoch and after each
            with torch.no_grad():
                plain_pass(student, validation, cfg)
        order = rng.sample(range(len(train)), len(train))
        for step, start in enumerate(range(0, len(order), heal.batch_size), start=epoch * per_epoch):
            optimiser.param_groups[0]["lr"] = heal.lr * schedule(step, heal.epochs * per_epoch)
            plain_pass(student, [train[i] for i in order[start : start + heal.batch_size]], cfg)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()


def plain_pass(student: Student, samples: Sequence[Sample], cfg: RunConfig) -> None:
    """The loss of some completions; where gradients are on, those of their mean are added to `.grad`."""
    model, heal = student.lm.model, cfg.heal
    logp = lambda ids: model(ids, use_cache=False).logits[0].float().log_softmax(-1)
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
    """The settings that the seconds of `EARLIER` were taken with. Gates are off and the dose is 1, so that all speeds
    belong to the same work."""

    n_prompts: int = 8
    n_tokens: int = 64
    n_completions: int = 24
    epochs: int = 2
    n_contexts: int = 64
    n_vignettes: int = 32
    think_tokens: int = 32
    n_texts: int = 8


TINY_RUN = RunSize(3, 6, 6, 1, 4, 2, 1, 2)
STATES = ("base", "prompted", "steered", "healed")
EARLIER = {
    "float32": {"vector": 67.0, "a completion": 4.2, "heal": 75.0, "an evaluation": 71.0, "run": 589.0},
    "bfloat16": {"vector": 19.0, "a completion": 4.0, "heal": 35.0, "an evaluation": 37.0, "run": 382.0},
}
"""Seconds of the implementation that this one replaces: SmolLM2-135M-Instruct, one thread of another processor, which
has matrix units (AMX); its run has 3 evaluations, ours 4."""


def run_config(model: str, dtype: Literal["float32", "bfloat16"], size: RunSize, seed: int, out: Path) -> RunConfig:
    """The default settings at that size; the tiny random model takes the inputs of its preset."""
    preset, n = FAST_DEV_PRESET if model == TINY_RANDOM else RunConfig(), size.n_completions
    answers = {"n_prompts": size.n_prompts, "n_texts": size.n_texts, "max_new_tokens": size.n_tokens}
    return replace(
        preset,
        model=model,
        dtype=dtype,
        seed=seed,
        out=out,
        steer=replace(preset.steer, n_contexts=size.n_contexts),
        gen=GenCfg(n_prompts=size.n_prompts, max_new_tokens=size.n_tokens, prompts=preset.gen.prompts),
        dose=replace(preset.dose, mode="fixed"),
        filter=replace(preset.filter, n_keep=n, max_attempts=n, min_train=n, gates=()),
        heal=replace(preset.heal, epochs=size.epochs),
        eval=replace(preset.eval, n_vignettes=size.n_vignettes, think_tokens=size.think_tokens, **answers),
    )


def run_stages(cfg: RunConfig, size: RunSize, clock: Clock) -> list[dict[str, Any]]:
    """A run of one round; a row for each stage, beside the earlier seconds."""
    inputs = check(cfg)
    with clock.stage("load"):
        student = Student(steps.load_model(cfg), cfg.adapter)
    with clock.stage("base"):
        base = steps.measure(student, inputs, cfg, adapters="base")
    with clock.stage("prompted"):
        steps.measure(student, inputs, cfg, base, Condition(inputs.trait.positive))
    with clock.stage("vector"):
        vector = steps.extract(student, inputs, cfg)
    with clock.stage("write"):
        collected = steps.collect(student, vector, inputs, cfg, 0)
    with clock.stage("steered"):
        steps.measure(student, inputs, cfg, base, Condition("", vector, collected.dose))
    with clock.stage("heal"):
        steps.heal(student, collected, inputs, cfg, 0)
    with clock.stage("bake"), TemporaryDirectory() as folder:
        student.save(Path(folder), student.bake())
    with clock.stage("healed"):
        steps.measure(student, inputs, cfg, base)
    peak = max(row["peak_mib"] for row in clock.rows.values())
    shares = {
        "vector": (["vector"], 1),
        "a completion": (["write"], len(collected.completions)),
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
def compare(bench: Bench, count: bool, out: Path) -> None:
    """A round in both modes; with `count`, both once more, counting products."""
    built, plain = Clock("built"), Clock("plain")
    written, factors = run_round(bench, built)
    plainly, factors_plain = run_round(bench, plain, written)
    for clock in (built, plain) if count else ():
        counted = Clock(clock.mode, counting=True)
        run_round(bench, counted, written)
        for name, row in counted.rows.items():
            clock.rows[name] |= row | {"gflop_per_s": row["gflop"] / clock.rows[name]["seconds"]}
    for clock in (built, plain):
        clock.rows["total"] = {"seconds": sum(row["seconds"] for row in clock.rows.values())}
    for name, row in built.rows.items():
        row["ratio"] = plain.rows[name]["seconds"] / row["seconds"]
    rows = [{"mode": clock.mode, "stage": name, **row} for clock in (built, plain) for name, row in clock.rows.items()]
    pairs = list(zip(written.completions, plainly.completions, strict=True))
    same = sum(a.completion_ids == b.completion_ids for a, b in pairs)
    apart = max(((factors[k] - factors_plain[k]).norm() / factors[k].norm()).item() for k in factors)
    checks = {"n_texts": len(pairs), "n_texts_the_same": same, "largest_relative_difference_of_a_factor": apart}
    should = (
        f"{same} of {len(pairs)} texts are the same in both modes: all, since a row depends on its own seed alone; "
        "rounding may part one in a hundred.",
        f"the healed factors differ by {apart:.1e} at most, relative to their size: rounding.",
        "ratio (plain / built seconds) be above 1 in generate and heal; gflop_per_s be low only where few rows share a "
        "read of the weights: plain generate.",
    )
    show(__doc__, rows, should, out, "round", size=asdict(bench.size), n_threads=torch.get_num_threads(), **checks)


def by_rounds(bench: Bench, rounds: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds a token, and seconds of a small heal, after some rounds; taken in turns on a busy machine."""
    batch, length = bench.size.batch_size // 2, max(8, bench.size.n_tokens // 2)
    students = {n: bench.student(n) for n in rounds}
    cfg = replace(bench.cfg, heal=replace(bench.cfg.heal, epochs=1, batch_size=8))
    train = kept(bench.write(students[rounds[0]], 8, length))
    wrote, healed = ({n: list[float]() for n in rounds} for _ in range(2))
    for turn in range(1 + 2 * repeats):
        for n, student in students.items():
            seconds = seconds_of(lambda student=student: bench.write(student, batch, length))
            heal_s = seconds_of(lambda student=student: steps.heal(student, train, bench.inputs, cfg, 0))
            student.discard_round()
            if turn > 0:  # the first one warms up
                wrote[n].append(seconds)
                healed[n].append(heal_s)
    first = wrote[rounds[0]]
    return [
        {
            "rounds": n,
            "ms_per_token": 1e3 * median(wrote[n]) / (batch * length),
            "heal_of_8_s": median(healed[n]),
            "against_first": median(a / b for a, b in zip(wrote[n], first, strict=True)),
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
        model: A folder or hub id: times a whole run on it, and nothing else.
        dtypes: In which that model runs, one after the other.
        repeats: Half the turns in which different numbers of rounds are compared; medians count.
        n_threads: CPU threads.
        seed: Of the model and of the texts.
        out: Folder of the tables as JSON.
        tiny: A small size: shows that it runs.
        count: Also the floating-point operations of every stage, in one more round of each mode.
    """
    torch.set_num_threads(n_threads)
    if model is not None:
        size = TINY_RUN if tiny else RunSize()
        rows = [
            row for dtype in dtypes for row in run_stages(run_config(model, dtype, size, seed, out), size, Clock(dtype))
        ]
        should = [
            "ratio (earlier seconds / our cpu_s; another processor, so read it with care) be above 1 in every stage.",
            "cpu_s be the seconds on one thread, but where other programs take the processor.",
        ]
        question = "Where do the seconds of a whole run go?"
        show(question, rows, should, out, "run", model=model, size=asdict(size), n_threads=torch.get_num_threads())
        return
    bench = Bench(TINY if tiny else Size(), seed, out)
    compare(bench, count, out)
    rows = by_rounds(bench, (0, 1, 2) if tiny else (0, 1, 2, 4, 8), repeats)
    should = ["against_first <= 1.10 up to 8 rounds: the history is merged. It is the median of ratios in turns."]
    show("Does a token cost more after more rounds?", rows, should, out, "round_by_rounds")


if __name__ == "__main__":
    sys.exit(cli(main))
