"""Why does a distribution teach more than tokens? What a text says about the teacher, and how well halves of it agree.

The student is untouched, so each gradient is the first step's. The agreement is the cosine between the gradients of two
disjoint sets of n texts: 1 where one set already says all, near 0 where the texts' noise is larger than the signal.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor

from steer_heal import round as steps
from steer_heal.diag.lab import Lab, LabFlags, markdown, show
from steer_heal.errors import UserError, print_safe
from steer_heal.model.student import ROUND, Student
from steer_heal.settings import HealCfg
from steer_heal.stages.heal import read_samples
from steer_heal.stages.loss import Sample, losses
from steer_heal.stages.states import kl_between

BITS = 1 / torch.log(torch.tensor(2.0)).item()


def main(
    lab: LabFlags,
    teacher: Literal["vector", "prompt", "both"] = "both",
    kappa: float = 0.25,
    n: int = 64,
    sizes: tuple[int, ...] = (4, 8, 16, 32),
    n_splits: int = 4,
) -> None:
    """Reads texts of both kinds, and heals one round on the student's own.

    Args:
        teacher: What makes the teacher out of the student.
        kappa: Dose of its vector.
        n: Texts of each kind.
        sizes: Numbers of texts in each of two sets whose gradients are compared.
        n_splits: Ways to draw the two sets.
    """
    if 2 * max(sizes) > n:
        raise UserError(f"sizes is {sizes}: two sets of {max(sizes)} do not fit into n = {n}; ask for fewer")
    bench = Lab(lab.run_config())
    heal = replace(bench.cfg.heal, divergence="none", target="distribution", teacher=teacher, kl="reverse")
    cfg = replace(bench.cfg, heal=heal, dose=replace(bench.cfg.dose, mode="fixed", kappa=kappa))
    cfg = replace(cfg, filter=replace(cfg.filter, n_keep=n, min_train=2 * max(sizes), max_attempts=6 * n))
    rows, fits = [], {"tokens": None, "distribution": steps.teacher(bench.vector, kappa, bench.inputs, cfg)}
    by_text = {text: replace(cfg, heal=replace(heal, text=text)) for text in ("steered", "own")}
    for text, mine in by_text.items():
        collected = steps.collect(bench.student, bench.vector, bench.inputs, mine, 0)
        for target, who in fits.items():
            samples = read_samples(bench.student, collected.completions, mine.heal, teacher=who)
            agreed = agreement(bench.student, samples, mine.heal, sizes, n_splits, cfg.seed)
            rows.append({"text": text, "fitted": target, **signal(bench, samples), **agreed})
    should = (
        "the distribution agree with itself on fewer texts than the tokens of the same text do.",
        "few positions hold most of the signal: a token says little about the others.",
    )
    report = steps.heal(bench.student, collected, bench.inputs, by_text["own"], 0, bench.vector)
    blocks, before = by_block(bench.student), report.validation[0]["fit"] * BITS
    bench.student.bake()
    print_safe(markdown(blocks))
    show(__doc__, rows, should, lab.out, "signal", blocks=blocks, held_out_bits=before)


def signal(bench: Lab, samples: Sequence[Sample]) -> dict[str, Any]:
    """KL(student || teacher) in bits a position: mean, 95th percentile, and the share of positions that hold nine
    tenths of its sum. Nothing where there is no teacher."""
    taught = [(sample.reference, sample.teacher) for sample in samples if sample.teacher is not None]
    if not taught:
        return {}
    bits = BITS * torch.cat([kl_between(bench.lm, reference, states) for reference, states in taught])
    held = bits.sort(descending=True).values.cumsum(0) / bits.sum()
    few = ((held < 0.9).sum().item() + 1) / len(bits)
    return {"bits": bits.mean().item(), "bits_p95": bits.quantile(0.95).item(), "share_of_0.9": few}


def agreement(
    student: Student, samples: Sequence[Sample], cfg: HealCfg, sizes: Sequence[int], n_splits: int, seed: int
) -> dict[str, float]:
    """Mean cosine between the gradients of two disjoint sets of texts, by the size of the sets."""
    student.new_round(seed)
    found: dict[str, list[float]] = {f"agree_{size}": [] for size in sizes}
    with student.training() as parameters:
        each = torch.stack([gradient(student, sample, cfg, parameters) for sample in samples])
    student.discard_round()
    for split in range(n_splits):
        order = random.Random(seed + split).sample(range(len(each)), len(each))
        for size in sizes:
            first, second = (each[order[start : start + size]].mean(0) for start in (0, size))
            found[f"agree_{size}"].append(torch.cosine_similarity(first, second, dim=0).item())
    return {name: mean(values) for name, values in found.items()}


def gradient(student: Student, sample: Sample, cfg: HealCfg, parameters: Sequence[Tensor]) -> Tensor:
    """Float[p]: of one text's fit at the factors that begin at zero; the others have none yet."""
    fit, _ = losses(student.lm, [sample], replace(cfg, lam=0.0))
    found = torch.autograd.grad(fit.sum(), list(parameters), allow_unused=True)
    parts = [g.flatten() for g in found if g is not None and g.any()]
    return torch.cat(parts)


def by_block(student: Student) -> list[dict[str, Any]]:
    """Share of the squared size of this round's update in each adapted block, by kind of layer."""
    factors, sizes = student.factors(ROUND), dict[str, dict[str, float]]()
    for key, a in factors.items():
        if "lora_A" in key:
            path = key.split(".layers.")[1].split(".")
            size = (factors[key.replace("lora_A", "lora_B")] @ a).square().sum().item()
            kinds = sizes.setdefault(path[0], {})
            kinds[path[1]] = kinds.get(path[1], 0.0) + size
    total = sum(size for kinds in sizes.values() for size in kinds.values())
    return [{"block": block} | {kind: size / total for kind, size in kinds.items()} for block, kinds in sizes.items()]
