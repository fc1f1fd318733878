"""How fast are decoding, the heal and a whole round on this machine, on random weights in the shape of gemma-3-4b?

Needs no network and no weights. Prompts are the toy tokenizer's; random weights end no text, so every row runs to its limit: the
slowest case. --tiny runs the same code on a small shape in under a minute, on the CPU too.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig

from steer_heal.evals.metrics import Condition
from steer_heal.files import ROOT
from steer_heal.lab import cli, show
from steer_heal.lm import LM, pick_device, pick_dtype
from steer_heal.records import Completion, derive_seed
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import EvalCfg, FilterCfg, HealCfg, SteerCfg
from steer_heal.stages.evaluate import evaluate, load_items
from steer_heal.stages.filter import score
from steer_heal.stages.generate import Ask, generate
from steer_heal.stages.heal import heal
from steer_heal.stages.teacher_vec import teacher_vec
from steer_heal.steering import Decoding, Row, Vector, decode
from steer_heal.traits import load_trait

GIB = 2**30


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    config: dict[str, int] = field(
        default_factory=lambda: dict(
            vocab_size=262_208,
            hidden_size=2560,
            intermediate_size=10_240,
            num_hidden_layers=34,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=256,
            sliding_window=1024,
        )
    )
    batches: tuple[int, ...] = (1, 16, 64)
    n_new: int = 512
    n_generate: int = 128
    """Tokens that plain `model.generate` writes."""
    heal_rows: tuple[int, int] = (4, 1024)
    n_written: int = 192
    n_kept: int = 64
    copied_bytes: int = GIB
    matmul: int = 8192
    evaluation: EvalCfg = field(default_factory=EvalCfg)
    steer: SteerCfg = field(default_factory=SteerCfg)
    epochs: int = 6


TINY = Size(
    dict(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
    ),
    (1, 2),
    8,
    4,
    (2, 64),
    6,
    4,
    2**20,
    64,
    EvalCfg(
        vignettes=Path("data/toylm/vignettes.jsonl"),
        instrument=Path("data/toylm/instrument.toml"),
        think_tokens=1,
        n_texts=2,
        n_prompts=2,
        max_new_tokens=4,
        n_bootstrap=10,
    ),
    SteerCfg(n_contexts=4, layers=(0.3, 0.7)),
    1,
)


class OutOfTime(Exception):
    """The budget is spent."""


class Bench:
    """One model, its clock, and the rows of the tables."""

    def __init__(self, size: Size, device: torch.device, budget_s: float) -> None:
        self.size, self.device, self.ends_at = size, device, time.perf_counter() + budget_s
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "toylm", padding_side="left")
        config = Gemma3TextConfig(
            **size.config, sliding_window_pattern=6, eos_token_id=2, pad_token_id=0, bos_token_id=None
        )
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=pick_dtype("auto", device))
        model.name_or_path = "random"
        model.generation_config.update(do_sample=True, top_k=64, top_p=0.95, eos_token_id=2, pad_token_id=0)
        self.lm = LM(model.eval().requires_grad_(False), tokenizer, "random", max_prompt_tokens=4096)
        self.student = Student(self.lm, HealCfg())
        self.trait = load_trait("authority", None)
        self.weight_bytes = sum(
            p.numel() * p.element_size() for p in {p.data_ptr(): p for p in model.parameters()}.values()
        )
        self.rows: list[dict[str, Any]] = []

    def check(self, *_: Any) -> None:
        if time.perf_counter() > self.ends_at:
            raise OutOfTime

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of the fastest of three, after one that warms up."""
        work()
        return min(self._once(work) for _ in range(3))

    def _once(self, work: Callable[[], Any]) -> float:
        began = self.now()
        work()
        return self.now() - began

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """A row of the table of stages: seconds and the most memory held; what `check` cut short says so."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row, began = {"stage": name, "seconds": None, "peak_gib": None, "note": ""}, self.now()
        self.rows.append(row)
        try:
            yield row
        except OutOfTime:
            row["note"] = "cut short by --budget-s"
        row["seconds"] = self.now() - began
        on_gpu = self.device.type == "cuda"
        row["peak_gib"] = (
            torch.cuda.max_memory_allocated() / GIB
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        )

    def prompts(self, n: int) -> list[tuple[int, ...]]:
        return [self.lm.chat(self.trait.prompts[i % len(self.trait.prompts)]) for i in range(n)]


def limits(bench: Bench) -> tuple[float, float]:
    """(bytes a second of a copy, reads and writes counted; multiply-adds times two a second of a square matrix product)."""
    source = torch.empty(bench.size.copied_bytes, dtype=torch.uint8, device=bench.device)
    target, n = torch.empty_like(source), bench.size.matmul
    a = torch.randn(n, n, device=bench.device, dtype=bench.lm.head.weight.dtype)
    return 2 * len(source) / bench.seconds(lambda: target.copy_(source)), 2 * n**3 / bench.seconds(lambda: a @ a)


def decoding(bench: Bench, bandwidth: float) -> list[dict[str, Any]]:
    """Tokens a second by batch and kind of cache, against what reading weights and cache once a token allows."""
    lm, size, table = bench.lm, bench.size, []
    config, prompt = lm.model.config, len(bench.prompts(1)[0])
    token = 2 * config.num_key_value_heads * config.head_dim * lm.head.weight.element_size() * config.num_hidden_layers

    def row(how: str, batch: int, n_new: int, seconds: float) -> None:
        bound = batch * bandwidth / (bench.weight_bytes + batch * token * (prompt + n_new / 2))
        per_s = batch * n_new / seconds
        table.append(
            {
                "decode": how,
                "batch": batch,
                "tokens": n_new,
                "tokens_per_s": per_s,
                "limit_per_s": bound,
                "share": per_s / bound,
            }
        )

    with suppress(OutOfTime):
        inputs = torch.tensor(bench.prompts(1), device=bench.device)
        write = lambda n: lm.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=n, min_new_tokens=n
        )
        write(2)
        row("model.generate", 1, size.n_generate, bench._once(lambda: write(size.n_generate)))
        for batch in size.batches:
            rows = [Row(ids, seed=i) for i, ids in enumerate(bench.prompts(batch))]
            for lm.fixed_addresses in (False, True):
                bench.check()
                how = Decoding(size.n_new, batch, suppress=lm.end_ids)
                decode(lm, rows, None, replace(how, max_new_tokens=4))
                name = ("graphs" if lm.device.type == "cuda" else "fixed") if lm.fixed_addresses else "growing"
                row(name, batch, size.n_new, bench._once(lambda: decode(lm, rows, None, how)))
    lm.fixed_addresses = False
    return table


def fake(bench: Bench, n: int, length: int) -> list[Completion]:
    """Completions of random tokens, `length` tokens with their prompt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i, ids in enumerate(bench.prompts(n)):
        written = torch.randint(3, len(bench.lm.tokenizer), (max(8, length - len(ids)),), generator=generator)
        made.append(Completion(i % 8, "", ids, tuple(written.tolist()), "", 1.0, 1.0, i))
    return made


def healing(bench: Bench, matmul: float) -> list[dict[str, Any]]:
    """Steps at one batch: tokens a second and the share of the matrix rate, forward and backward counted as 4 per weight and token."""
    n, length = bench.size.heal_rows
    student, times = bench.student, []
    student.cfg = HealCfg(epochs=1, batch_size=n, tokens_per_pass=n * length, pressure_every=10**6)

    def on_step(_: Any) -> None:
        times.append(bench.now())
        bench.check()

    with bench.stage(f"heal steps of {n} x {length}") as row:
        bench.check()
        heal(student, fake(bench, 6 * n, length), 0, student.cfg, 1, on_step)
    student.discard_round()
    per_step = [b - a for a, b in zip(times[1:], times[2:])]  # the first measures the pressure and warms up
    if not per_step:
        return []
    seconds, weights = sorted(per_step)[len(per_step) // 2], sum(p.numel() for p in bench.lm.text_model.parameters())
    share = 4 * weights * n * length / seconds / matmul
    return [
        {
            "heal": f"{n} x {length}",
            "step_s": seconds,
            "tokens_per_s": n * length / seconds,
            "matmul_share": share,
            "peak_gib": row["peak_gib"],
        }
    ]


def whole_round(bench: Bench) -> None:
    """The stages of a default round, each as Session calls it; texts to write are as many as a round may at most."""
    lm, size, trait = bench.lm, bench.size, bench.trait
    heal_cfg, keep = (
        HealCfg(epochs=size.epochs),
        FilterCfg(gates=(), n_keep=size.n_kept, min_train=2, max_attempts=size.n_written),
    )
    student, items, vector, written = bench.student, load_items(size.evaluation, trait), None, []
    student.cfg = heal_cfg

    def measure(name: str, vector: Vector | None = None) -> None:
        with bench.stage(name):
            bench.check()
            evaluate(
                student, "full", Condition("", vector, 0.5 if vector else 0.0), items, trait, size.evaluation, keep, 1
            )

    with bench.stage("vector"):
        bench.check()
        vector = teacher_vec(lm, trait, size.steer)
    with bench.stage("write") as row:
        bench.check()
        asks = [Ask(i % 36, trait.prompts[i % 36], 1.0, 0.01, derive_seed(1, i)) for i in range(size.n_written)]
        for start in range(0, len(asks), 64):
            written += generate(
                lm,
                asks[start : start + 64],
                vector,
                trait.steered_system,
                trait.plain_system,
                size.n_new,
                0,
                bench.check,
            )
        row["note"] = f"{len(written)} of {size.n_new} tokens, {lm.rows_at_once} at once"
    with bench.stage("filter"):
        bench.check()
        score(lm, written, trait.narration, keep)
    measure("evaluate steered", vector)
    with bench.stage("heal") as row:
        bench.check()
        row["note"] = f"{len(written[: size.n_kept])} completions, {size.epochs} epochs"
        report = heal(student, written[: size.n_kept], 0, heal_cfg, 1, bench.check)
        row["note"] += f", {len(report.steps)} steps"
        student.bake()
    measure("evaluate healed")


def main(tiny: bool = False, budget_s: float = 480.0, device: str = "auto", out: Path = Path("out/bench")) -> None:
    """How fast are decoding, the heal and a whole round on this machine?

    Args:
        tiny: A small shape, in under a minute on a CPU: shows that it runs, and nothing about a GPU.
        budget_s: Seconds after which nothing more is begun.
        device: auto, cpu, cuda or cuda:N.
        out: Folder of the tables as JSON.
    """
    place = pick_device(device)
    bench = Bench(TINY if tiny else Size(), place, budget_s)
    bandwidth, matmul = limits(bench)
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    print(
        f"{name}: copy {bandwidth / 1e9:.0f} GB/s, matrix product {matmul / 1e12:.2f} TFLOP/s; weights {bench.weight_bytes / GIB:.2f} GiB"
    )
    heals = healing(bench, matmul)
    whole_round(bench)
    table = decoding(bench, bandwidth)
    if heals:
        show("Heal step", heals, ["fit beside 24 GB, and matmul_share be at least 0.3"], out, "heal")
    should = [
        "share be at least 0.6 at batch 1, and graphs not be slower than growing",
        "tokens_per_s grow with the batch",
    ]
    if table:
        show("Decoding against bandwidth", table, should, out, "decode")
    total = sum(row["seconds"] for row in bench.rows[1:])
    show(
        "A default round",
        [
            *bench.rows,
            {"stage": "round", "seconds": total, "peak_gib": max(r["peak_gib"] for r in bench.rows), "note": ""},
        ],
        ["stay under 24 GiB", "be shorter than 40 minutes, what it took one row at a time"],
        out,
        "round",
        device=name,
        budget_s=budget_s,
    )


if __name__ == "__main__":
    sys.exit(cli(main))
