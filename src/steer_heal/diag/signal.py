"""Why does a distribution teach more than tokens? Shows what a text says about the teacher, and how well texts agree.

All gradients are those of the first training step. The agreement is the cosine between the gradients of two disjoint
sets of texts of equal size. It is 1 if one set already holds the whole signal, and near 0 if the noise of the texts is
larger than the signal.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import torch
from torch import Tensor

from steer_heal.diag.distil import PLAIN
from steer_heal.diag.lab import Given, Lab, PresetFlags, Row, show
from steer_heal.errors import UserError
from steer_heal.model.lm import LM
from steer_heal.model.student import Student
from steer_heal.recipe import Recipe
from steer_heal.report import tables
from steer_heal.settings import HealCfg, TeacherName, changed, settings
from steer_heal.stages.heal import read_samples
from steer_heal.stages.loss import Sample, losses
from steer_heal.stages.states import kl_between

BITS = 1 / torch.log(torch.tensor(2.0)).item()


@settings("")
class Flags(PresetFlags):
    teacher: TeacherName = "prompt+vector"
    """What turns the student into the teacher: see --heal.teacher of steer-heal run."""
    kappa: float = 0.25
    """Dose of the teacher's vector."""
    n: int = 64
    """Number of steered texts, and of the student's own texts."""
    sizes: tuple[int, ...] = (4, 8, 16, 32)
    """Sizes of the two sets, in texts. Each size gives one agreement. Twice the largest must not exceed --n."""
    n_splits: int = 4
    """Number of random draws of the two sets. The agreement is the mean over the draws."""


def main(flags: Flags, given: Given) -> None:
    n = flags.n
    if 2 * max(flags.sizes) > n:
        raise UserError(f"sizes is {flags.sizes}: two sets of {max(flags.sizes)} do not fit into n = {n}; ask for less")
    settings = {**PLAIN, "heal.divergence": "none", "heal.target": "distribution", "heal.teacher": flags.teacher}
    settings |= {"heal.kl": "reverse", "dose.mode": "fixed", "dose.kappa": flags.kappa}
    settings |= {"filter.n_keep": n, "filter.min_train": 2 * max(flags.sizes), "filter.max_attempts": 6 * n}
    lab = Lab.of(changed(flags.settings(given), settings))
    student = lab.bench.student
    rows = []
    for text in ("steered", "own"):
        bench = replace(lab.bench, cfg=changed(lab.bench.cfg, {"heal.text": text}))
        recipe = Recipe.of(bench.cfg)
        collected = bench.collect(recipe, 0, lab.vector)
        teacher = bench.make_teacher(recipe, lab.vector, collected)
        for target, condition in (("tokens", None), ("distribution", teacher.condition)):
            samples = read_samples(student, collected.completions, bench.cfg.heal, teacher=condition)
            agreed = agreement(student, samples, bench.cfg.heal, flags, bench.cfg.seed)
            rows.append({"text": text, "fitted": target, **signal(student.lm, samples), **agreed})
    report = bench.heal(recipe, 0, collected, teacher)  # on own text
    blocks = by_block(student)
    should = (
        "the distribution agree with itself on fewer texts than the tokens of the same text do.",
        "few positions hold most of the signal: a token says little about the others.",
    )
    tables.show(blocks)
    bits = report.validation[0]["fit"] * BITS
    show(__doc__, rows, should, flags.out, "signal", blocks=blocks, held_out_bits=bits)


def signal(lm: LM, samples: Sequence[Sample]) -> dict[str, float]:
    """KL(student || teacher) in bits per position: mean, 95th percentile, and the share of positions that hold nine
    tenths of its sum. Empty without a teacher."""
    taught = [(sample.reference, sample.teacher) for sample in samples if sample.teacher is not None]
    if not taught:
        return {}
    bits = BITS * torch.cat([kl_between(lm, reference, states) for reference, states in taught])
    held = bits.sort(descending=True).values.cumsum(0) / bits.sum()
    few = ((held < 0.9).sum().item() + 1) / len(bits)
    return {"bits": bits.mean().item(), "bits_p95": bits.quantile(0.95).item(), "share_of_0.9": few}


def agreement(student: Student, samples: Sequence[Sample], cfg: HealCfg, flags: Flags, seed: int) -> dict[str, float]:
    """Mean cosine between the gradients of two disjoint sets of texts, by the size of the sets."""
    student.new_round(seed)
    found: dict[str, list[float]] = {f"agree_{size}": [] for size in flags.sizes}
    with student.training() as parameters:
        each = torch.stack([gradient(student, sample, cfg, parameters) for sample in samples])
    student.discard_round()
    for split in range(flags.n_splits):
        order = random.Random(seed + split).sample(range(len(each)), len(each))
        for size in flags.sizes:
            first, second = (each[order[start : start + size]].mean(0) for start in (0, size))
            found[f"agree_{size}"].append(torch.cosine_similarity(first, second, dim=0).item())
    return {name: mean(values) for name, values in found.items()}


def gradient(student: Student, sample: Sample, cfg: HealCfg, parameters: Sequence[Tensor]) -> Tensor:
    """Float[p]: gradient of one text's fit at the factors that begin at zero. The others have no gradient yet."""
    fit, _ = losses(student.lm, [sample], replace(cfg, lam=0.0))
    found = torch.autograd.grad(fit.sum(), list(parameters), allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None and part.any()])


def by_block(student: Student) -> list[Row]:
    """Share of the squared size of this round's update in each adapted block, by kind of layer."""
    factors = student.factors("round")
    sizes: dict[str, dict[str, float]] = {}
    for key, a in factors.items():
        if "lora_A" in key:
            block, kind = key.split(".layers.")[1].split(".")[:2]
            kinds = sizes.setdefault(block, {})
            size = (factors[key.replace("lora_A", "lora_B")] @ a).square().sum().item()
            kinds[kind] = kinds.get(kind, 0.0) + size
    total = sum(size for kinds in sizes.values() for size in kinds.values())
    return [{"block": block} | {kind: size / total for kind, size in kinds.items()} for block, kinds in sizes.items()]
