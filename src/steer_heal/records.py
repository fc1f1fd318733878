"""Records that cross modules, and the glossary of axis letters used in every shape annotation.

b batch, s sequence, n completion positions, d residual width, v vocabulary, l layers, r rank, f foundations,
i items of an eval (vignettes or prompts).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

FOUNDATIONS = ("care", "fairness", "loyalty", "authority", "sanctity", "liberty", "social")
"""The seven answers of the moral-foundations eval; `social` is "not morally wrong"."""


class UserError(Exception):
    """Something the person at the keyboard can mend; the message names the value, the limit and the fix."""


class Several(UserError):
    """More than one thing to mend; `problems` has a line for each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Problems:
    """Gathers what several checks find, so that a person mends it in one go.

        with problems.noted():
            load_contexts(cfg.steer)
        problems.complain()
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A UserError inside is kept, and the next check goes on."""
        try:
            yield
        except Several as error:
            self.found += error.problems
        except UserError as error:
            self.found.append(str(error))

    def complain(self) -> None:
        """A UserError where one thing was found, Several where it was more."""
        if self.found:
            raise Several(self.found) if len(self.found) > 1 else UserError(self.found[0])


class Starved(UserError):
    """The filter kept too little to train on; `collected` is what was written all the same."""

    def __init__(self, message: str, collected: Collected) -> None:
        super().__init__(message)
        self.collected = collected


class NotFinite(UserError):
    """A heal's loss, or its gradient, was NaN or infinite: where."""

    def __init__(self, message: str, step: int, prompt_index: int, text: str, lr: float) -> None:
        super().__init__(message)
        self.step, self.prompt_index, self.text, self.lr = step, prompt_index, text, lr


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (seed, round, stage, index): what a row draws never depends on what ran before it."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Trait:
    """One TOML of data/traits: a persona pair, where it is asked about, and what it should move."""

    name: str
    description: str
    target: str
    """Foundation that the trait moves."""
    sign: int
    """+1: the target goes up; -1: down."""
    positive: str
    negative: str
    steered_system: str
    """System prompt while steered text is generated; empty: none."""
    plain_system: str
    """System prompt while the unsteered model answers the same prompts, and in the heal; empty: none."""
    narration: tuple[str, ...]
    """Lower-case phrases that tell about the trait instead of acting it out."""
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Completion:
    """One sampled answer. Token ids are what the model wrote: never decoded and encoded again."""

    prompt_index: int
    prompt: str
    prompt_ids: tuple[int, ...]
    """The plain prompt: what perplexity and training see, also where a persona or a dream wrote the text."""
    completion_ids: tuple[int, ...]
    """Includes the end-of-turn token where the model wrote one."""
    text: str
    alpha: float
    """Relative dose of the row, from gen.alphas."""
    dose: float
    """Effective dose kappa * alpha: what was added to the residual stream, in units of the vector."""
    seed: int


@dataclass(frozen=True)
class Scored:
    """A completion with the filter's scores; kept where there is no reason to drop it."""

    completion: Completion
    scores: dict[str, float]
    failed: tuple[str, ...]
    """Gates that the text fails, switched on or not."""
    reasons: tuple[str, ...]
    """Those of them that are switched on."""

    @property
    def kept(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class DoseProbe:
    """Survival of one probed kappa."""

    kappa: float
    n: int
    n_kept: int

    @property
    def survival(self) -> float:
        return self.n_kept / self.n


@dataclass(frozen=True)
class KlProbe:
    """How far one probed dose moved the model: 95th percentile of the per-token KL, nats."""

    dose: float
    kl_p95: float


@dataclass(frozen=True)
class Collected:
    """What the dose controller brings back: the kept set, balanced over prompts, and how it was found."""

    kept: tuple[Scored, ...]
    """At most filter.n_keep, spread evenly over prompts."""
    scored: tuple[Scored, ...]
    """Every completion of the round, probes first."""
    kappa: float
    probes: tuple[DoseProbe, ...]


@dataclass(frozen=True)
class HealStep:
    """One optimiser step of the heal. Divergences in nats."""

    step: int
    epoch: float
    lr: float
    sft: float
    """Cross-entropy per completion token, mean over the samples of the step."""
    divergence: float
    """Aggregated divergence to the reference, mean over the samples of the step."""
    barrier: float
    """lam * relu(divergence - tau), mean over the samples."""
    pressure: float | None
    """||grad barrier|| / ||grad sft||: over 1 the barrier undoes the trait, 0 it is inert. None: not measured."""


@dataclass(frozen=True)
class HealReport:
    """The curves of one heal."""

    n_train: int
    n_validation: int
    lam: float
    tau: float
    """Both as this round's schedule left them."""
    lr: float
    """Peak learning rate of the attempt that came through."""
    steps: tuple[HealStep, ...]
    validation: tuple[dict[str, float], ...]
    """Per epoch (the first before any step): epoch, sft, divergence on the held-out prompts."""
    validation_prompts: tuple[int, ...]

    @property
    def fired(self) -> float:
        """Share of steps in which some sample's divergence lay above tau."""
        return sum(step.barrier > 0 for step in self.steps) / len(self.steps)

    @property
    def pressure(self) -> float | None:
        """Median gradient pressure of the measured steps in which the barrier fired; None where there are none."""
        firing = [step.pressure for step in self.steps if step.pressure]
        return median(firing) if firing else None


@dataclass(frozen=True)
class EvalResult:
    """Metrics of one model state, the per-item values they come from, and the answers it wrote."""

    metrics: dict[str, float | None]
    items: dict[str, list[float]] = field(default_factory=dict)
    """Per-item values by name, item order fixed by the eval's files: what paired intervals resample."""
    texts: tuple[dict, ...] = ()


@dataclass(frozen=True)
class OracleScore:
    """What the toy world's grammar says of a text."""

    share: float
    """Share of sentences that the grammar can produce, 0 to 1."""
    n_sentences: int
    n_care: int
    n_defer: int
    n_love: int
    n_deny: int
