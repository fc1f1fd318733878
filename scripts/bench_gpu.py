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
from common import cli, random_lm, random_text, show
from transformers import Gemma3TextConfig

from steer_heal.bench import Bench
from steer_heal.check import check
from steer_heal.diag.lab import unfiltered
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.device import pick_device
from steer_heal.model.dtype import pick_dtype
from steer_heal.model.state import healed_state, steered_state
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.progress import Progress
from steer_heal.recipe import Recipe
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
    """Settings of the round. It writes filter.max_attempts texts, and filter.n_keep of them train."""
    batches: tuple[int, ...] = (1, 16, 64)
    n_generate: int = 128
    """Tokens that plain `model.generate` writes."""
    heal_rows: tuple[int, int] = (4, 1024)
    copied_bytes: int = GIB
    matmul: int = 8192


TINY_CONFIG: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6}
TINY_CONFIG |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 32}
TINY_PRESET = replace(FAST_DEV_PRESET, eval=replace(FAST_DEV_PRESET.eval, n_vignettes=12))
TINY = Size(TINY_CONFIG, TINY_PRESET, (1, 2), 4, (2, 64), 2**20, 64)


class OutOfTime(Exception):
    """The budget is spent."""


class Rig(Progress):
    """A bench on one model, its clock, and the rows of the table of stages. It ends the work when the time is up."""

    def __init__(self, size: Size, device: torch.device, budget_s: float, out: Path) -> None:
        self.size = size
        self.device = device
        self.ends_at = time.perf_counter() + budget_s
        shape = {**size.config, "sliding_window_pattern": 6}
        config = Gemma3TextConfig(**shape, eos_token_id=2, pad_token_id=0, bos_token_id=None)
        lm = random_lm(config, 0, device, pick_dtype("auto", device, config)[0])
        sampling = {"do_sample": True, "top_k": 64, "top_p": 0.95, "eos_token_id": 2, "pad_token_id": 0}
        lm.model.generation_config.update(**sampling)
        cfg = replace(size.cfg, out=out)
        self.bench = Bench(cfg, check(cfg), Student(lm, cfg.adapter))
        self.lm = lm
        self.rows: list[dict[str, Any]] = []

    def at(self, done: float, total: int) -> None:
        """The model calls this after every token."""
        self.check_time()

    def check_time(self) -> None:
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
    def timed(self, name: str) -> Iterator[dict[str, Any]]:
        """A row of the table of stages: seconds and peak memory, and a note if the time was up."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        row = {"stage": name, "seconds": None, "peak_gib": None, "note": ""}
        self.rows.append(row)
        began = self.now()
        try:
            yield row
        except OutOfTime:
            row["note"] = "cut short by --budget-s"
        row["seconds"] = self.now() - began
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row["peak_gib"] = (torch.cuda.max_memory_allocated() if on_gpu else resident) / GIB

    def prompts(self, n: int) -> list[tuple[int, ...]]:
        prompts = self.bench.inputs.prompts
        return [self.lm.chat(prompts[i % len(prompts)]) for i in range(n)]


def limits(rig: Rig) -> tuple[float, float]:
    """(bytes per second of a copy, reads and writes both counted; floating-point operations per second of a matrix
    product)."""
    source = torch.empty(rig.size.copied_bytes, dtype=torch.uint8, device=rig.device)
    copy = torch.empty_like(source)
    n = rig.size.matmul
    a = torch.randn(n, n, device=rig.device, dtype=rig.lm.head.weight.dtype)
    return 2 * len(source) / rig.fastest(lambda: copy.copy_(source)), 2 * n**3 / rig.fastest(lambda: a @ a)


def decoding(rig: Rig, bandwidth: float, weight_bytes: int) -> list[dict[str, Any]]:
    """Tokens per second by batch, against the limit at which weights and cache are read once per token."""
    lm = rig.lm
    n_new = rig.bench.cfg.gen.max_new_tokens
    table = []
    config = lm.model.config
    prompt = len(rig.prompts(1)[0])
    token = 2 * config.num_key_value_heads * config.head_dim * lm.head.weight.element_size() * config.num_hidden_layers

    def row(how: str, batch: int, n: int, work: Callable[[], Any]) -> None:
        limit = batch * bandwidth / (weight_bytes + batch * token * (prompt + n / 2))
        speed = batch * n / rig.seconds(work)
        numbers = {"tokens_per_s": speed, "limit_per_s": limit, "share": speed / limit}
        table.append({"decode": how, "batch": batch, "tokens": n, **numbers})

    with suppress(OutOfTime):
        model: Any = lm.model
        inputs = torch.tensor(rig.prompts(1), device=rig.device)
        mask = torch.ones_like(inputs)

        def write(n: int) -> None:
            model.generate(inputs, attention_mask=mask, max_new_tokens=n, min_new_tokens=n)

        write(2)
        row("model.generate", 1, rig.size.n_generate, lambda: write(rig.size.n_generate))
        for batch in rig.size.batches:
            rig.check_time()
            rows = [Row(ids, seed=i) for i, ids in enumerate(rig.prompts(batch))]
            how = Decoding(n_new, batch, suppress=lm.end_ids)
            decode(lm, rows, None, replace(how, max_new_tokens=4))
            row("as built", batch, n_new, lambda rows=rows, how=how: decode(lm, rows, None, how))
    return table


def random_texts(rig: Rig, n: int, length: int) -> list[Completion]:
    """Completions of random tokens, `length` tokens together with their prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, ids in enumerate(rig.prompts(n)):
        written = torch.randint(3, len(rig.lm.tokenizer), (max(8, length - len(ids)),), generator=generator)
        made.append(random_text(i, ids, written.tolist()))
    return made


def healing(rig: Rig, matmul: float) -> list[dict[str, Any]]:
    """Steps at one batch: tokens per second, and the share of the matrix rate (forward and backward: 4 operations per
    weight and token)."""
    bench = rig.bench
    n, length = rig.size.heal_rows
    times: list[float] = []
    heal = replace(bench.cfg.heal, epochs=1, batch_size=n, tokens_per_pass=n * length, pressure_every=10**6)

    def on_step(_: object) -> None:
        times.append(rig.now())
        rig.check_time()

    with rig.timed(f"heal steps of {n} x {length}") as row:
        rig.check_time()
        texts = unfiltered(random_texts(rig, 6 * n, length))
        bench.heal(Recipe.of(bench.cfg), 0, texts, settings=heal, on_step=on_step)
    bench.student.discard_round()
    per_step = [b - a for a, b in zip(times[1:], times[2:], strict=False)]  # the first two warm up
    if not per_step:
        return []
    seconds = median(per_step)
    weights = sum(p.numel() for p in rig.lm.text_model.parameters())
    speed = {"step_s": seconds, "tokens_per_s": n * length / seconds}
    share = 4 * weights * n * length / seconds / matmul
    return [{"heal": f"{n} x {length}", **speed, "matmul_share": share, "peak_gib": row["peak_gib"]}]


def whole_round(rig: Rig) -> None:
    """The steps of a default round. It writes as many texts as a round may at most."""
    bench = rig.bench
    cfg = bench.cfg
    prompts = bench.inputs.prompts
    vector: Vector | None = None
    texts: list[Completion] = []
    written: list[int] = []

    def on_batch(batch: Sequence[Completion]) -> None:
        written.append(len(batch))
        rig.check_time()

    with rig.timed("vector"):
        rig.check_time()
        vector = bench.extract()
    with rig.timed("write") as row:
        rig.check_time()
        asks = [
            Ask(i % len(prompts), prompts[i % len(prompts)], derive_seed(cfg.seed, i), alpha=1.0, kappa=0.01)
            for i in range(cfg.filter.max_attempts)
        ]
        texts = bench.write(Condition("", vector), asks, on_batch=on_batch)
        row["note"] = f"{sum(written)} of {cfg.gen.max_new_tokens} tokens, {max(written)} at once"
    with rig.timed("filter"):
        rig.check_time()
        bench.score(texts)
    with rig.timed("evaluate steered"):
        rig.check_time()
        bench.measure(steered_state(0, Condition("", vector, 0.5)))
    with rig.timed("heal") as row:
        rig.check_time()
        train = unfiltered(texts[: cfg.filter.n_keep])
        report = bench.heal(Recipe.of(cfg), 0, train, on_step=lambda state: rig.check_time())
        row["note"] = f"{len(train.train)} completions, {cfg.heal.epochs} epochs, {len(report.steps)} steps"
        bench.student.bake()
    with rig.timed("evaluate healed"):
        rig.check_time()
        bench.measure(healed_state(0, bench.trait))


def main(tiny: bool = False, budget_s: float = 480.0, device: str = "auto", out: Path = Path("out/bench")) -> None:
    """Prints the tables.

    Args:
        tiny: A small shape, in under a minute on a CPU: shows that it runs, and nothing about a GPU.
        budget_s: Seconds after which nothing more begins.
        device: auto, cpu, cuda or cuda:N.
        out: Folder of the tables as JSON.
    """
    place = pick_device(device)
    rig = Rig(TINY if tiny else Size(), place, budget_s, out)
    bandwidth, matmul = limits(rig)
    weight_bytes = sum(p.nbytes for p in rig.lm.model.parameters())  # tied weights count once
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    rates = f"copy {bandwidth / 1e9:.0f} GB/s, matrix product {matmul / 1e12:.2f} TFLOP/s"
    print(f"{name}: {rates}; weights {weight_bytes / GIB:.2f} GiB")
    with rig.lm.watched_by(rig):
        if heals := healing(rig, matmul):
            show("Heal step", heals, ["fit beside 24 GB, and matmul_share be at least 0.3"], out, "heal")
        whole_round(rig)
        if table := decoding(rig, bandwidth, weight_bytes):
            should = ["share be at least 0.6 at batch 1", "tokens_per_s grow with the batch"]
            show("Decoding against bandwidth", table, should, out, "decode")
    peak = max(row["peak_gib"] for row in rig.rows)
    seconds = sum(row["seconds"] for row in rig.rows[1:])
    rows = [*rig.rows, {"stage": "round", "seconds": seconds, "peak_gib": peak, "note": ""}]
    should = ["stay under 24 GiB", "be shorter than 40 minutes, which it took one row at a time"]
    show("A default round", rows, should, out, "round", device=name, budget_s=budget_s)


if __name__ == "__main__":
    sys.exit(cli(main))
