"""How fast are decoding, the heal and a whole round on this machine, on random weights in the shape of gemma-3-4b?

Needs no network and no weights. The tokenizer is the toy's; random weights end no text, so every row runs to its limit:
the slowest case. --tiny runs the same code on a small shape in under a minute, on the CPU too.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_common import show
from transformers import Gemma3TextConfig

from steer_heal import round as steps
from steer_heal.check import check
from steer_heal.diag.lab import cli, kept, random_lm
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.device import pick_device
from steer_heal.model.dtype import pick_dtype
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import Completion, derive_seed
from steer_heal.settings import RunConfig
from steer_heal.stages.generate import Ask

GIB = 2**30


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    config: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 262_208,
            "hidden_size": 2560,
            "intermediate_size": 10_240,
            "num_hidden_layers": 34,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
        }
    )
    cfg: RunConfig = field(default_factory=RunConfig)
    """Of the round. It writes filter.max_attempts texts, and filter.n_keep of them train."""
    batches: tuple[int, ...] = (1, 16, 64)
    n_generate: int = 128
    """Tokens that plain `model.generate` writes."""
    heal_rows: tuple[int, int] = (4, 1024)
    copied_bytes: int = GIB
    matmul: int = 8192


TINY_CONFIG: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
TINY_CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 32}
TINY = Size(TINY_CONFIG, FAST_DEV_PRESET, (1, 2), 4, (2, 64), 2**20, 64)


class OutOfTime(Exception):
    """The budget is spent."""


class Bench:
    """One model, its clock, and the rows of the table of stages."""

    def __init__(self, size: Size, device: torch.device, budget_s: float, out: Path) -> None:
        self.size, self.device, self.ends_at = size, device, time.perf_counter() + budget_s
        shape = {**size.config, "sliding_window_pattern": 6}
        config = Gemma3TextConfig(**shape, eos_token_id=2, pad_token_id=0, bos_token_id=None)
        self.lm = random_lm(config, 0, device, pick_dtype("auto", device, config)[0])
        sampling = {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": 2, "pad_token_id": 0}
        self.lm.model.generation_config.update(**sampling)
        self.cfg = replace(size.cfg, out=out)
        self.lm.progress = self.check_time  # called at every token
        self.inputs, self.student = check(self.cfg), Student(self.lm, self.cfg.adapter)
        self.rows: list[dict[str, Any]] = []

    def check_time(self, *_: Any) -> None:
        if time.perf_counter() > self.ends_at:
            raise OutOfTime

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        began = self.now()
        work()
        return self.now() - began

    def fastest(self, work: Callable[[], Any]) -> float:
        """Seconds of the fastest of three, after one that warms up."""
        work()
        return min(self.seconds(work) for _ in range(3))

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A row of the table of stages: seconds and the most memory held. What runs out of time says so."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row, began = {"stage": name, "seconds": None, "peak_gib": None, "note": ""}, self.now()
        self.rows.append(row)
        try:
            yield row
        except OutOfTime:
            row["note"] = "cut short by --budget-s"
        row["seconds"] = self.now() - began
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row["peak_gib"] = (torch.cuda.max_memory_allocated() if on_gpu else resident) / GIB

    def prompts(self, n: int) -> list[tuple[int, ...]]:
        return [self.lm.chat(self.inputs.prompts[i % len(self.inputs.prompts)]) for i in range(n)]


def limits(bench: Bench) -> tuple[float, float]:
    """(bytes a second of a copy, reads and writes counted; floating-point operations a second of a matrix product)."""
    source = torch.empty(bench.size.copied_bytes, dtype=torch.uint8, device=bench.device)
    target, n = torch.empty_like(source), bench.size.matmul
    a = torch.randn(n, n, device=bench.device, dtype=bench.lm.head.weight.dtype)
    return 2 * len(source) / bench.fastest(lambda: target.copy_(source)), 2 * n**3 / bench.fastest(lambda: a @ a)


def decoding(bench: Bench, bandwidth: float, weight_bytes: int) -> list[dict[str, Any]]:
    """Tokens a second by batch, against what reading weights and cache once a token allows."""
    lm, n_new, table = bench.lm, bench.cfg.gen.max_new_tokens, []
    config, prompt = lm.model.config, len(bench.prompts(1)[0])
    token = 2 * config.num_key_value_heads * config.head_dim * lm.head.weight.element_size() * config.num_hidden_layers

    def row(how: str, batch: int, n: int, work: Callable[[], Any]) -> None:
        limit = batch * bandwidth / (weight_bytes + batch * token * (prompt + n / 2))
        speed = batch * n / bench.seconds(work)
        numbers = {"tokens_per_s": speed, "limit_per_s": limit, "share": speed / limit}
        table.append({"decode": how, "batch": batch, "tokens": n, **numbers})

    with suppress(OutOfTime):
        model: Any = lm.model
        inputs = torch.tensor(bench.prompts(1), device=bench.device)
        mask = torch.ones_like(inputs)
        write = lambda n: model.generate(inputs, attention_mask=mask, max_new_tokens=n, min_new_tokens=n)
        write(2)
        row("model.generate", 1, bench.size.n_generate, lambda: write(bench.size.n_generate))
        for batch in bench.size.batches:
            bench.check_time()
            rows = [Row(ids, seed=i) for i, ids in enumerate(bench.prompts(batch))]
            how = Decoding(n_new, batch, suppress=lm.end_ids)
            decode(lm, rows, None, replace(how, max_new_tokens=4))
            row("as built", batch, n_new, lambda rows=rows, how=how: decode(lm, rows, None, how))
    return table


def random_texts(bench: Bench, n: int, length: int) -> list[Completion]:
    """Completions of random tokens, `length` tokens with their prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, ids in enumerate(bench.prompts(n)):
        written = torch.randint(3, len(bench.lm.tokenizer), (max(8, length - len(ids)),), generator=generator)
        made.append(Completion(i % 8, "", ids, tuple(written.tolist()), "", 1.0, 1.0, i))
    return made


def healing(bench: Bench, matmul: float) -> list[dict[str, Any]]:
    """Steps at one batch: tokens a second, and the share of the matrix rate (forward and backward: 4 operations per
    weight and token)."""
    (n, length), times = bench.size.heal_rows, list[float]()
    heal = replace(bench.cfg.heal, epochs=1, batch_size=n, tokens_per_pass=n * length, pressure_every=10**6)

    def on_step(_: Any) -> None:
        times.append(bench.now())
        bench.check_time()

    with bench.stage(f"heal steps of {n} x {length}") as row:
        bench.check_time()
        texts = kept(random_texts(bench, 6 * n, length))
        steps.heal(bench.student, texts, bench.inputs, replace(bench.cfg, heal=heal), 0, on_step=on_step)
    bench.student.discard_round()
    per_step = [b - a for a, b in zip(times[1:], times[2:], strict=False)]  # the first two warm up
    if not per_step:
        return []
    seconds, weights = median(per_step), sum(p.numel() for p in bench.lm.text_model.parameters())
    speed = {"step_s": seconds, "tokens_per_s": n * length / seconds}
    share = 4 * weights * n * length / seconds / matmul
    return [{"heal": f"{n} x {length}", **speed, "matmul_share": share, "peak_gib": row["peak_gib"]}]


def whole_round(bench: Bench) -> None:
    """The steps of a default round; it writes as many texts as a round may at most."""
    student, inputs, cfg, prompts = bench.student, bench.inputs, bench.cfg, bench.inputs.prompts
    vector: Vector | None = None
    texts: list[Completion] = []
    written: list[int] = []

    def on_batch(batch: Sequence[Completion]) -> None:
        written.append(len(batch))
        bench.check_time()

    with bench.stage("vector"):
        bench.check_time()
        vector = steps.extract(student, inputs, cfg)
    with bench.stage("write") as row:
        bench.check_time()
        asks = [
            Ask(i % len(prompts), prompts[i % len(prompts)], 1.0, 0.01, derive_seed(cfg.seed, i))
            for i in range(cfg.filter.max_attempts)
        ]
        texts = steps.write(student, Condition("", vector), asks, inputs, cfg, on_batch=on_batch)
        row["note"] = f"{sum(written)} of {cfg.gen.max_new_tokens} tokens, {max(written)} at once"
    with bench.stage("filter"):
        bench.check_time()
        steps.judge(student, texts, inputs, cfg)
    with bench.stage("evaluate steered"):
        bench.check_time()
        steps.measure(student, inputs, cfg, condition=Condition("", vector, 0.5))
    with bench.stage("heal") as row:
        bench.check_time()
        train = kept(texts[: cfg.filter.n_keep])
        report = steps.heal(student, train, inputs, cfg, 0, on_step=bench.check_time)
        row["note"] = f"{len(train.kept)} completions, {cfg.heal.epochs} epochs, {len(report.steps)} steps"
        student.bake()
    with bench.stage("evaluate healed"):
        bench.check_time()
        steps.measure(student, inputs, cfg)


def main(tiny: bool = False, budget_s: float = 480.0, device: str = "auto", out: Path = Path("out/bench")) -> None:
    """Prints the tables.

    Args:
        tiny: A small shape, in under a minute on a CPU: shows that it runs, and nothing about a GPU.
        budget_s: Seconds after which nothing more is begun.
        device: auto, cpu, cuda or cuda:N.
        out: Folder of the tables as JSON.
    """
    place = pick_device(device)
    bench = Bench(TINY if tiny else Size(), place, budget_s, out)
    bandwidth, matmul = limits(bench)
    weight_bytes = sum(p.nbytes for p in bench.lm.model.parameters())  # tied weights count once
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    rates = f"copy {bandwidth / 1e9:.0f} GB/s, matrix product {matmul / 1e12:.2f} TFLOP/s"
    print(f"{name}: {rates}; weights {weight_bytes / GIB:.2f} GiB")
    if heals := healing(bench, matmul):
        show("Heal step", heals, ["fit beside 24 GB, and matmul_share be at least 0.3"], out, "heal")
    whole_round(bench)
    if table := decoding(bench, bandwidth, weight_bytes):
        should = ["share be at least 0.6 at batch 1", "tokens_per_s grow with the batch"]
        show("Decoding against bandwidth", table, should, out, "decode")
    peak, seconds = max(row["peak_gib"] for row in bench.rows), sum(row["seconds"] for row in bench.rows[1:])
    rows = [*bench.rows, {"stage": "round", "seconds": seconds, "peak_gib": peak, "note": ""}]
    should = ["stay under 24 GiB", "be shorter than 40 minutes, what it took one row at a time"]
    show("A default round", rows, should, out, "round", device=name, budget_s=budget_s)


if __name__ == "__main__":
    sys.exit(cli(main))
