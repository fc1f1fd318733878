"""Records that cross modules, and the glossary of axis letters used in every shape annotation.

b batch, s sequence, n completion positions, d residual width, v vocabulary, l layers, r rank, f foundations,
i items of an eval (vignettes or prompts), k terms of a condition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from steer_heal.errors import UserError

StateName = Literal["base", "prompted", "control", "steered", "healed"]
"""States of the model that a run measures. base, prompted and control come before the loop."""
NOT_FINITE = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
"""How JSON spells the numbers that it lacks."""


def _number(value: object) -> object:
    """The number that a JSON string spells; any other value unchanged."""
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


Number = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(_number)]
"""A float that may be infinite or NaN."""


NOTHING = "nothing to teach"
"""Verdict on personas whose contrast does not move the trait's pairs."""
PAIR_MOVED = 0.05
"""Smallest shift of the mean margin of contrast pairs that counts, in nats per token."""

NO_ATTACK = "plain"
"""Stands for no attack among the names of attacks."""
OPPOSES = "opposes"
"""Marks an attack that asks for the opposite of the trait, or to drop it. Others change only the context."""


def round_label(r: int | None) -> str:
    """A heal in the name of a file: `r0` for round 0; `control` for None, the heal before the loop."""
    return "control" if r is None else f"r{r}"


def round_name(r: int | None) -> str:
    """A heal as people read it. They count rounds from 1, events and files from 0: round 0 is `round 1`, None is
    `control`."""
    return "control" if r is None else f"round {r + 1}"


def state_label(name: str, r: int | None) -> str:
    """A state as people read it: `base`, `healed round 1`."""
    return name if r is None else f"{name} {round_name(r)}"


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (seed, round, stage, index): what a row draws never depends on what ran before it."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Starved(UserError):
    """The filter kept too few completions to train on. `collected` is everything that was written."""

    def __init__(self, message: str, collected: Collected) -> None:
        super().__init__(message, resumable=False)
        self.collected = collected


class NotFinite(UserError):
    """The loss or the gradient of a heal was NaN or infinite: at which step, on which completion."""

    def __init__(self, message: str, step: int, prompt_index: int | None, text: str) -> None:
        super().__init__(message)
        self.step, self.prompt_index, self.text = step, prompt_index, text


HELD = "holds"
"""Name of the items that are the shifts of the contrast pairs, in the mean over the attacks."""


def under_attack(name: str = NO_ATTACK) -> str:
    """Name of the items that are the margins of the contrast pairs under an attack. By default without an attack."""
    return f"{HELD}_{name}"


def attack_reference(name: str, opposes: bool) -> str:
    """Name of the items of the base that an attacked state is compared with: those without an attack if the attack
    opposes the trait, so that the state should keep its shift; otherwise those under the same attack, since the context
    alone can move the base."""
    return under_attack() if opposes else under_attack(name)


How = Literal["mean", "log_mean", "median", "rms"]
"""How items become a number. log_mean is log(mean), rms the root of the mean square."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number that an eval reports, the per-item values it is computed from, and how to read it."""

    name: str
    """As in events: authority_nats, coherence."""
    item: str
    of: str = ""
    """What one item is, as its eval says: vignette, text (an answer that the state wrote), pair, question, instruction,
    trait."""
    how: How = "mean"
    """How item values become the metric, in nats for log_mean."""
    title: str = ""
    """A few words for tables and pictures."""
    form: str = ".3f"
    """Format of the number."""
    unit: str = ""
    moved: float | None = None
    """Smallest shift from base that counts as movement. None: a trait cannot be judged by this metric."""
    towards_persona: bool = False
    """It rises towards the positive persona, whatever the sign of the trait."""
    good: float | None = None
    """A whole model is at this value or better."""
    broken: float | None = None
    """A model past this value is broken. Below `good`: the metric should be high; above it: low."""
    reads_persona: bool = False
    """Whether the state `prompted` must lie above base, with an interval above 0. Where it does not, the metric cannot
    read the trait, and the verdict says so."""
    shown: bool = True
    """Whether the console and the table of rounds show it for every trait."""

    @property
    def is_health(self) -> bool:
        """Whether the metric tells a coherent model from a broken one: it has both limits, `good` and `broken`."""
        return self.good is not None and self.broken is not None

    @property
    def is_share(self) -> bool:
        """Whether it is a health metric whose limits lie from 0 to 1."""
        return self.is_health and max(self.good or 0.0, self.broken or 0.0) <= 1

    @property
    def high_is_good(self) -> bool:
        """Whether a health metric should be high."""
        return (self.good or 0.0) > (self.broken or 0.0)

    def within(self, value: float, limit: float | None) -> bool:
        """Whether a value of a health metric is at a limit or better. Without a limit every value is."""
        return limit is None or (value >= limit if self.high_is_good else value <= limit)


@dataclass(frozen=True)
class Trait:
    """A trait: a persona pair, where it is asked about, and the metric that judges it."""

    name: str
    description: str
    target: str
    """Name of the metric that the trait moves."""
    sign: int
    """+1: the target should go up; -1: down. Of a target that rises towards the positive persona it is +1."""
    off_targets: tuple[str, ...]
    """Metrics that should move less than the target."""
    positive: str
    negative: str
    steered_system: str
    """System prompt while steered text is generated; empty: none."""
    plain_system: str
    """System prompt while the unsteered model answers the same prompts, and in the heal; empty: none."""
    narration: tuple[str, ...]
    """Lower-case phrases that tell about the trait instead of acting it out."""
    prompts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What stands before a reply of the assistant."""

    turns: tuple[str, ...]
    """Messages of the user and the assistant in turn. The user has the first and the last."""
    system: str | None = None
    """System prompt in place of the one that the model is read under. Empty: without one, so that the chat template may
    write its own. None: the one that the model is read under."""
    prefill: str = ""
    """What the assistant's reply begins with. White space at its end is read as the beginning of what follows."""


def alone(prompt: str) -> Conversation:
    """A conversation of one message."""
    return Conversation(turns=(prompt,))


@dataclass(frozen=True)
class Completion:
    """One sampled answer. Token ids are what the model wrote: never decoded and encoded again."""

    prompt_index: int
    prompt: str
    prompt_ids: tuple[int, ...]
    """The plain prompt: what perplexity and training see, also where a persona wrote the text. With an attack, the
    prompt under the attack."""
    completion_ids: tuple[int, ...]
    """Includes the end-of-turn token where the model wrote one."""
    text: str
    alpha: float
    """Relative dose of the row, from gen.alphas."""
    dose: float
    """Effective dose kappa * alpha: what was added to the residual stream, in units of the vector."""
    seed: int
    attack: str = ""
    """Name of the attack under which it was written and trains. Empty: none."""
    taught: Conversation | None = None
    """What the teacher reads before it. None: the prompt alone."""


@dataclass(frozen=True)
class Scored:
    """A completion with the number that each gate read. It is kept where there is no reason to drop it."""

    completion: Completion
    scores: dict[str, Number]
    """By gate."""
    failed: tuple[str, ...]
    """Gates that the text fails, whether they are on or off."""
    reasons: tuple[str, ...]
    """The failed gates that are on."""

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
    kl_p95: Number


@dataclass(frozen=True)
class Calibration:
    """The dose that moves the model by a given divergence, and every dose that was probed."""

    dose: float
    probes: tuple[KlProbe, ...]


@dataclass(frozen=True)
class Strength:
    """How strong a contrast is."""

    strength: Number
    """The factor of the difference between the personas."""
    kl: Number
    """Mean of KL(teacher || student) over the positions of the text, in nats."""


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What one teacher changes on the pairs of a trait, against the base under the plain prompt."""

    name: str
    strength: Number | None
    """Factor of a contrast. None: another teacher."""
    kl: Number
    """Mean of KL(teacher || base) on the base's own text, in nats."""
    shift: Number
    """Mean change of the margin of the positive reply, in nats per token."""
    low: Number | None
    high: Number | None
    """95 percent interval of the shift over the pairs."""
    right: Number
    """Share of the pairs whose margin rises."""
    halves: tuple[Number, Number]
    """Shift of every second pair, and of the others. NaN: there are none."""


@dataclass(frozen=True, kw_only=True)
class Teachable:
    """Whether the personas of a trait give a model anything to teach."""

    verdict: Literal["teachable", "weak", "nothing to teach"]
    reason: str
    band: Number
    """Root mean square shift of the teachers that have nothing to do with the trait: the null band."""
    personas: tuple[Teaching, ...]
    """The two personas as system prompts."""
    contrasts: tuple[Teaching, ...]
    """The contrast of the personas, by its KL."""
    null: tuple[Teaching, ...]
    """Teachers that have nothing to do with the trait."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The text of one heal: everything that was written, what of it trains, and how the dose was found."""

    scored: tuple[Scored, ...]
    """Every completion, those that only searched for the dose first."""
    train: tuple[int, ...]
    """Indices into `scored` of what trains, spread evenly over prompts, in the order of training."""
    kappa: float = 1.0
    probes: tuple[DoseProbe, ...] = ()
    dose: float = 0.0
    """The teacher's dose: the highest effective dose that trains or, where the text is the student's own, kappa times
    the highest alpha. 0 without a vector."""
    rehearsal: tuple[Completion, ...] = ()
    """Completions that the base wrote on prompts that have nothing to do with the trait. They train too."""

    def __repr__(self) -> str:
        found = f"kappa {self.kappa:.3g}, dose {self.dose:.3g}"
        return f"Collected({len(self.train)} of {len(self.scored)} texts train, {found})"

    @property
    def kept(self) -> list[Scored]:
        """What trains, with its scores."""
        return [self.scored[i] for i in self.train]

    @property
    def completions(self) -> list[Completion]:
        return [row.completion for row in self.kept]


@dataclass(frozen=True)
class HealStep:
    """One optimiser step of the heal. Divergences in nats."""

    step: int
    epoch: float
    lr: float
    fit: Number
    """Cross-entropy per completion token or, of a distribution, KL to the teacher: mean over the samples of the step.
    """
    divergence: Number
    """Aggregated divergence to the reference, mean over the samples of the step."""
    barrier: float
    """lam * relu(divergence - tau), mean over the samples."""
    pressure: Number | None
    """||grad barrier|| / ||grad fit||: above 1 the barrier undoes the trait. None: not measured in this step."""


@dataclass(frozen=True, kw_only=True)
class HealSummary:
    """What is known of a heal once it has ended, without its steps."""

    n_train: int
    """Texts that train, those of the rehearsal among them."""
    n_validation: int
    lam: float
    tau: float
    """lam and tau of this round, after their schedules."""
    lr: float
    """Peak learning rate of the attempt that succeeded."""
    validation: tuple[dict[str, Number], ...]
    """Per epoch (the first before any step): epoch, fit and divergence on the held-out prompts. With a teacher also the
    means of KL(teacher || student): kl_held_out and, in the first and the last, kl_trained."""
    validation_prompts: tuple[int, ...]

    def closed(self, texts: Literal["trained", "held_out"]) -> float | None:
        """Share of KL(teacher || student) that the heal closed on its texts or on those of held-out prompts. None:
        there is no teacher, or nothing to close."""
        name = f"kl_{texts}"
        before = self.validation[0].get(name) if self.validation else None
        after = self.validation[-1].get(name) if self.validation else None
        return None if not before or after is None else 1 - after / before


@dataclass(frozen=True, kw_only=True)
class HealReport(HealSummary):
    """A heal that has ended."""

    steps: tuple[HealStep, ...]

    def __repr__(self) -> str:
        fits = " to ".join(f"{row['fit']:.3f}" for row in (self.validation[0], self.validation[-1]))
        return f"HealReport({len(self.steps)} steps, validation {fits} nats, barrier acted in {self.fired:.0%})"

    @property
    def fired(self) -> float:
        """Share of steps in which the divergence of some sample was above tau."""
        return sum(step.barrier > 0 for step in self.steps) / max(1, len(self.steps))

    @property
    def pressure(self) -> float | None:
        """Median gradient pressure of the measured steps in which the barrier fired; None: there are none."""
        firing = [step.pressure for step in self.steps if step.pressure]
        return median(firing) if firing else None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A free-text answer that a measured state wrote, with the number of every gate."""

    prompt: str
    text: str
    scores: Mapping[str, Number]
    failed: tuple[str, ...]
    reasons: tuple[str, ...]


Values = dict[str, Number | None]
"""Metrics by name, with `<name>_lo` and `<name>_hi` for the interval of the difference to base. None: no item has a
value."""


@dataclass(frozen=True)
class EvalResult:
    """Metrics of one state, the values of the items that they are made of, and the answers that the state wrote."""

    metrics: Values
    items: dict[str, list[Number]] = field(default_factory=dict)
    """Values of the items by name, in the order of the eval's data. Paired intervals resample them."""
    texts: tuple[Answer, ...] = ()

    def __repr__(self) -> str:
        known = {name: value for name, value in self.metrics.items() if value is not None}
        values = ", ".join(f"{name} {value:.4g}" for name, value in known.items() if name[-3:] not in ("_lo", "_hi"))
        return f"EvalResult({values})"


@dataclass(frozen=True, kw_only=True)
class GateFacts:
    """What readers of a run need to know of a gate."""

    measures: str
    limit: Number
    at_least: bool
    degenerate: bool
    """Whether a text that fails is degenerate."""
    on: bool
    """Whether a text that fails is dropped."""
