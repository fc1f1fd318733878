"""What does a round cost, as built and done plainly, and how does it scale with rounds, batch and length?"""

import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from steer_heal.account import Tally, rates
from steer_heal import console
from steer_heal.config import FAST_DEV_PRESET, RunConfig, check
from steer_heal.divergence import aggregate, barrier, kl_rev
from steer_heal.evals.metrics import Condition
from steer_heal.lab import cli, show
from steer_heal.lm import load
from steer_heal.footprint import resident_peak
from steer_heal.records import Collected, Completion, Trait, derive_seed
from steer_heal.stages.bake import Student
from steer_heal.stages.dose import collect
from steer_heal.stages.evaluate import EvalItems, evaluate, load_items
from steer_heal.stages.filter import score
from steer_heal.stages.generate import Ask, generate
from steer_heal.stages.heal import heal, schedule, split_by_prompt
from steer_heal.stages.loss import Sample
from steer_heal.stages.teacher_vec import teacher_vec
from steer_heal.steering import Vector


@dataclass(frozen=True, kw_only=True)
class Size:
    """What the round is run on."""

    layers: int = 8
    width: int = 512
    vocabulary: int = 32_768
    """Of which the toy tokenizer writes 1,408; it leaves other ids out of the text, and the gates are open."""
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


TINY = Size(
    layers=3,
    width=32,
    vocabulary=1500,
    n_completions=8,
    n_tokens=12,
    n_history=1,
    epochs=1,
    rank=2,
    batch_size=8,
    n_vignettes=2,
    think_tokens=2,
)


class Bench:
    """The settings, the trait and the items of a round on a random model."""

    def __init__(self, size: Size, seed: int) -> None:
        n = size.n_completions
        self.size, self.seed = size, seed
        preset = FAST_DEV_PRESET
        self.cfg: RunConfig = replace(
            preset,
            seed=seed,
            gen=replace(preset.gen, max_new_tokens=size.n_tokens, batch_size=size.batch_size),
            filter=replace(preset.filter, n_keep=n, max_attempts=n, min_train=4, gates=()),
            dose=replace(preset.dose, mode="fixed", n_kappas=2, n_probes=1),
            heal=replace(
                preset.heal,
                epochs=size.epochs,
                rank=size.rank,
                lora_alpha=2.0 * size.rank,
                layers=(0.2, 0.8),
                tau=0.0,
                pressure_every=10**6,
            ),
            eval=replace(
                preset.eval,
                batch_size=size.batch_size,
                think_tokens=size.think_tokens,
                n_texts=16,
                max_new_tokens=size.n_tokens // 2,
                oracle="none",
            ),
        )
        self.trait: Trait = check(self.cfg)
        items = load_items(self.cfg.eval, self.trait)
        self.items: EvalItems = replace(items, vignettes=items.vignettes[: size.n_vignettes])

    def student(self, n_rounds: int) -> Student:
        """A model of its own, always the same."""
        student = Student(
            replace(load("tiny-random"), model=_model(self.size, self.seed), name="random"), self.cfg.heal
        )
        for r in range(n_rounds):
            _bake_noise(student, r)
        return student

    def write(
        self, student: Student, vector: Vector | None, asks: Sequence[Ask], n_tokens: int, batch_size: int
    ) -> list[Completion]:
        with student.gate("full") as lm:
            return generate(lm, asks, vector, self.trait.steered_system, self.trait.plain_system, n_tokens, batch_size)

    def asks(self, n: int) -> list[Ask]:
        prompts = self.trait.prompts[: self.cfg.gen.n_prompts]
        return [Ask(i % len(prompts), prompts[i % len(prompts)], 1.0, 1.0, derive_seed(self.seed, i)) for i in range(n)]


@dataclass
class Clock:
    """Seconds, peak memory and tokens of a mode's stages or, where it is `counting`, their operators."""

    mode: str
    rows: list[dict[str, Any]]
    counting: bool = False
    tallies: dict[str, Tally] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, n_tokens: int):
        began, worked = time.perf_counter(), time.process_time()
        with resident_peak() as peak, self.tallies.setdefault(name, Tally()) if self.counting else nullcontext():
            yield
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - worked
        self.rows.append(
            {
                "mode": self.mode,
                "stage": name,
                "seconds": seconds,
                "cpu_s": cpu_s,
                "tokens_per_s": n_tokens / seconds or None,
                "peak_mib": peak[0] / 2**20 if peak else None,
            }
        )
        print(f"  {self.mode:6} {name:9} {seconds:8.1f} s{' (counting)' * self.counting}", flush=True)


def round_(
    bench: Bench, clock: Clock, given: Sequence[Completion] = ()
) -> tuple[list[Completion], dict[str, torch.Tensor]]:
    """One round; (what it wrote, the factors it healed). `given` trains in place of what it wrote, so that modes do the same work."""
    cfg, trait, size = bench.cfg, bench.trait, bench.size
    plain, student = clock.mode == "plain", bench.student(size.n_history)
    with clock.stage("vector", 2 * cfg.steer.n_contexts), student.gate("full") as lm:
        vector = teacher_vec(lm, trait, cfg.steer)

    def judge(completions):
        with student.gate("base") as lm:
            return score(lm, completions, trait.narration, cfg.filter)

    with clock.stage("generate", size.n_completions * size.n_tokens):
        found: Collected = collect(
            lambda asks: bench.write(student, vector, asks, size.n_tokens, 1 if plain else size.batch_size),
            judge,
            trait.prompts[: cfg.gen.n_prompts],
            cfg.gen.alphas,
            cfg.dose,
            cfg.filter,
            (cfg.seed, 0, "gen"),
            1.0,
        )
    written = [row.completion for row in found.kept]
    kept = list(given) or written
    with clock.stage("heal", size.epochs * sum(len(c.completion_ids) for c in kept)):
        (plain_heal if plain else heal)(student, kept, 0, cfg.heal, bench.seed)
    factors = student.factors("round")
    with clock.stage("bake", 0), TemporaryDirectory() as folder:
        student.save(Path(folder) / "r", student.bake())
    n_read = 2 * size.n_vignettes * size.think_tokens + cfg.eval.n_texts * cfg.eval.max_new_tokens
    with clock.stage("evaluate", n_read):
        evaluate(
            student,
            "full",
            Condition(trait.plain_system),
            bench.items,
            trait,
            replace(cfg.eval, batch_size=8) if plain else cfg.eval,
            cfg.filter,
            cfg.seed,
        )
    return written, factors


def plain_heal(student: Student, kept: Sequence[Completion], r: int, cfg, seed: int) -> None:
    """The same heal without any of what makes it cheap: history merged into the weights and out again around every
    step, the reference read in every step, all logits of all positions, one completion a pass."""
    lm, rng = student.lm, random.Random(seed)
    empty = torch.empty(0, lm.width)
    train, validation = split_by_prompt(
        [Sample(c.prompt_index, c.prompt_ids, c.completion_ids, empty) for c in kept], seed
    )
    student.new_round(seed)
    with student.training() as parameters:
        pass
    optimiser = torch.optim.AdamW(parameters, lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay)
    n_steps, step = cfg.epochs * -(-len(train) // cfg.batch_size), 0
    for epoch in range(cfg.epochs):
        with student.gate("prev"), torch.no_grad():
            for sample in validation * (2 if epoch == 0 else 1):  # before the first epoch and after each
                _plain_loss(student, sample, parameters, cfg)
        order = rng.sample(range(len(train)), len(train))
        for start in range(0, len(order), cfg.batch_size):
            batch = [train[i] for i in order[start : start + cfg.batch_size]]
            optimiser.param_groups[0]["lr"] = cfg.lr * schedule(step, n_steps)
            with student.gate("prev"):
                for sample in batch:
                    _plain_loss(student, sample, parameters, cfg, len(batch))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            step += 1


def _plain_loss(student: Student, sample: Sample, parameters: Sequence[torch.Tensor], cfg, n_samples: int = 1) -> None:
    """The loss of one completion and, where gradients are on, its share of them."""
    ids, start = torch.tensor([sample.ids]), len(sample.prompt_ids) - 1
    with torch.no_grad():
        logp_ref = student.lm.model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    with student._acting(["round"]):
        for parameter in parameters:
            parameter.requires_grad_(True)
        logp = student.lm.model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        nll = -logp[:-1].gather(-1, ids[0, 1:, None])[start:, 0]
        penalty = barrier(aggregate(kl_rev(logp, logp_ref)[start:-1], cfg.aggregate), cfg.lam, cfg.tau)
        loss = (nll.mean() + penalty) / n_samples
        if loss.requires_grad:
            loss.backward()


def scaling(
    bench: Bench, rounds: Sequence[int], batches: Sequence[int], lengths: Sequence[int], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Tokens per second as built: by rounds baked (with the seconds of a small heal), by batch, by length."""
    size, out, length = bench.size, {"rounds": [], "batch": [], "length": []}, max(8, bench.size.n_tokens // 2)
    write = lambda student, batch, length: _seconds(
        lambda: bench.write(student, None, bench.asks(batch), length, batch)
    )
    students = {n: bench.student(n) for n in rounds}
    kept, cfg, half = (
        bench.write(students[0], None, bench.asks(8), length, 8),
        replace(bench.cfg.heal, epochs=1, batch_size=8),
        size.batch_size // 2,
    )
    wrote, healed = {n: [] for n in rounds}, {n: [] for n in rounds}
    for turn in range(
        1 + 2 * repeats
    ):  # in turns, so that a machine that slows down slows all of them; the first one warms up
        for n, student in students.items():
            wrote[n].append(write(student, half, length))
            healed[n].append(_seconds(lambda: heal(student, kept, 0, cfg, bench.seed)))
            student.discard_round()
        print(f"  turn {turn} of {2 * repeats}", flush=True)
    for n in rounds:
        ms, ratios = 1e3 * median(wrote[n][1:]) / (half * length), (a / b for a, b in zip(wrote[n][1:], wrote[0][1:]))
        out["rounds"].append(
            {"rounds": n, "ms_per_token": ms, "heal_of_8_s": median(healed[n][1:]), "against_0": median(ratios)}
        )

    def speed(student: Student, batch: int, length: int) -> float:
        return batch * length / min(write(student, batch, length) for _ in range(repeats))

    for batch in batches:
        out["batch"].append({"batch": batch, "tokens_per_s": speed(students[max(rounds)], batch, length)})
        print(f"  batch {batch}", flush=True)
    for length in lengths:
        out["length"].append({"length": length, "tokens_per_s": speed(students[max(rounds)], 8, length)})
        print(f"  length {length}", flush=True)
    return out


def account(bench: Bench, timed: Sequence[dict[str, Any]], given: Sequence[Completion], out: Path) -> None:
    """Both rounds once more, counting: what each stage's seconds went to, beside what the same work takes at this processor's best."""
    best, rows = rates(), []
    for mode in ("built", "plain"):
        clock = Clock(mode, [], counting=True)
        round_(bench, clock, given)
        for name, tally in clock.tallies.items():
            seconds = next(row["seconds"] for row in timed if (row["mode"], row["stage"]) == (mode, name))
            rows.append({"mode": mode, "stage": name} | tally.account(seconds, best))
    should = (
        "between_s is not below 0: seconds less those of the operators alone, on operands of the same shapes, are left for Python, dispatch, the tokenizer, and memory that was just handed out.",
        f"at_best_s is what every operator takes at {best['gflop_per_s']:.0f} GFLOP/s or {best['gb_per_s']:.0f} GB/s, measured here; memory that was just handed out is written at {best['fresh_gb_per_s']:.1f} GB/s.",
    )
    show("Where do the seconds of a round go?", rows, should, out, "round_account", **best)


def main(
    size: Size = Size(),
    repeats: int = 2,
    n_threads: int = 1,
    seed: int = 0,
    out: Path = Path("out/bench"),
    tiny: bool = False,
    scale: bool = True,
    count: bool = True,
) -> None:
    """What does a round cost, as built and done plainly, and how does it scale with rounds, batch and length?"""
    size = TINY if tiny else size
    torch.set_num_threads(n_threads)
    console.start(quiet=True)
    bench, rows = Bench(size, seed), []
    written, factors = round_(bench, Clock("built", rows))
    plainly, factors_plain = round_(bench, Clock("plain", rows), given=written)
    for name in ("vector", "generate", "heal", "bake", "evaluate"):
        built, plain = (
            next(row for row in rows if (row["mode"], row["stage"]) == (mode, name)) for mode in ("built", "plain")
        )
        built |= _ratios(built, plain)
    for mode in ("built", "plain"):
        rows.append(
            {"mode": mode, "stage": "total"}
            | {name: sum(row[name] for row in rows if row["mode"] == mode) for name in ("seconds", "cpu_s")}
        )
    rows[-2] |= _ratios(*rows[-2:])
    same = sum(a.completion_ids == b.completion_ids for a, b in zip(written, plainly, strict=True))
    apart = max(((factors[k] - factors_plain[k]).norm() / factors[k].norm()).item() for k in factors)
    checks = {
        "n_texts": len(written),
        "n_texts_the_same": same,
        "largest_relative_difference_of_a_factor": apart,
        "n_threads": n_threads,
    }
    should = (
        f"{same} of {len(written)} texts are the same in both modes: all, since a row depends on its own seed alone; rounding may part one in a hundred.",
        f"the healed factors differ by {apart:.1e} at most, relative to their size: rounding. ratio is plain / built, of seconds and of processor seconds (which a busy machine changes less).",
    )
    show("What does a round cost, as built and done plainly?", rows, should, out, "round", size=vars(size), **checks)
    if count:
        account(bench, rows, written, out)
    if scale:
        small = (
            dict(rounds=(0, 1, 2), batches=(1, 4), lengths=(8, 16))
            if tiny
            else dict(rounds=(0, 1, 2, 4, 8), batches=(1, 2, 4, 8, 16, 32, 64), lengths=(64, 128, 256, 512))
        )
        tables = scaling(bench, **small, repeats=repeats)
        show(
            "Does a token cost more after more rounds?",
            tables["rounds"],
            (
                "against_0 <= 1.10 up to 8 rounds: the history is merged before writing. It is the median of ratios taken in turns.",
            ),
            out,
            "round_by_rounds",
        )
        show(
            "How does writing scale with the batch?",
            tables["batch"],
            ("tokens_per_s rise with the batch.",),
            out,
            "round_by_batch",
        )
        show(
            "How does writing scale with the length?",
            tables["length"],
            ("tokens_per_s fall slowly: attention alone grows.",),
            out,
            "round_by_length",
        )


def _ratios(built: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    return {"ratio": plain["seconds"] / built["seconds"], "cpu_ratio": plain["cpu_s"] / built["cpu_s"]}


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _bake_noise(student: Student, seed: int) -> None:
    """A round of small random factors, as if healed."""
    generator = torch.Generator().manual_seed(seed)
    student.new_round(seed)
    for _, b, _ in student.round_updates():
        b.data.copy_(0.003 * torch.randn(b.shape, generator=generator))
    student.bake()


def _model(size: Size, seed: int) -> Qwen3ForCausalLM:
    """Random weights; the head so large that a few tokens share the probability, and rounding rarely changes a sampled one."""
    torch.manual_seed(seed)
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
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    model.lm_head.weight.mul_(8 / (0.06 * size.width**0.5))  # logits of standard deviation 8
    model.generation_config.update(do_sample=True, temperature=1.0, eos_token_id=2)
    return model


if __name__ == "__main__":
    sys.exit(cli(main))
