"""Every setting of a run: type, limit, default and help text. Importing this module does not import torch."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import field, fields, is_dataclass
from datetime import date as Date
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import tyro
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from tyro.constructors import PrimitiveConstructorSpec

from steer_heal.errors import Problems, UserError, nearest, problem_lines, shown, validated

TINY_RANDOM = "tiny-random"
"""Name of an untrained 3-layer model with the toy tokenizer: every stage runs in seconds, with meaningless numbers."""
MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct", "gemma-3-270m")
"""Names of models whose weights come from the package index."""
BUILT_IN = {
    "heal.divergence": ("kl_rev", "kl_fwd", "none"),
    "steer.method": ("mean_diff", "pca", "cosine_gated", "directional_ablation"),
    "adapter.kind": ("lora", "bias"),
    "filter.gates": (*("perplexity", "spike", "repetition", "loop", "relevance", "short", "narration", "refusal"),),
    "eval.evals": (
        *("moral_foundations", "likelihood", "text_quality", "drift", "persona", "contrast", "everyday"),
        *("instructions", "holds", "panel", "judge", "classifier", "toylm"),
    ),
}
"""The names that these settings take without plugins. They are here because their tables import torch."""
Settings = TypeVar("Settings")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Perplexity = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
BatchSize = Annotated[int, Field(ge=0)]
TeacherName = Literal["vector", "prompt", "prompt+vector", "contrast", "contrast+vector"]
"""What turns the student into the teacher."""
CONTRASTS = ("contrast", "contrast+vector")
"""Teachers that are made of the difference between the two personas."""
TEACHER_WORDS: dict[TeacherName, str] = {
    "vector": "its vector",
    "prompt": "the positive persona as system prompt",
    "prompt+vector": "its vector and the positive persona as system prompt",
    "contrast": "the contrast of the personas",
    "contrast+vector": "the contrast of the personas, each with its vector",
}
"""What turns the student into each teacher, in words."""
Aggregate = Literal["mean", "rmse", "p95", "max"]
Form = Literal["hf", "peft", "gguf-lora", "gguf"]
"""A merged folder for transformers, an adapter for PEFT, an adapter for llama.cpp, a merged model for llama.cpp."""
Quantization = Literal["f16", "q8_0"]
STRONGEST = 4
"""Largest factor by which the effect of an adapter is multiplied, in either direction."""


class Unread:
    """Words of a command line that are no value of their flag, and what they must be."""

    def __init__(self, words: str, limit: str) -> None:
        self.words = words
        self.limit = limit


_NUMBERS: dict[type, str] = {int: "it must be a whole number", float: "it must be a number"}


def read_word(kind: type, word: str) -> Any:
    """One word of a command line as a `kind`, or Unread."""
    try:
        return kind(word)
    except ValueError:
        return Unread(word, _NUMBERS[kind])


def _words(kind: type, metavar: str, between: str = ",", n: int = 0) -> PrimitiveConstructorSpec[Any]:
    """How a flag gives a tuple: values separated by spaces or by `between`; `n` of them, unless that is 0."""

    def read(words: list[str]) -> Any:
        parts = [part for word in words for part in word.split(between) if part]
        if n and len(parts) != n:
            return Unread(" ".join(parts), f"it takes {n} values, {metavar}")
        return tuple(read_word(kind, part) for part in parts)

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(each) for each in value],
    )


def _read_limits(words: list[str]) -> Any:
    if len(words) % 2:
        return Unread(" ".join(words), "give NAME LIMIT, such as kl_base 0.2")
    return {name: read_word(float, word) for name, word in zip(words[::2], words[1::2], strict=True)}


def _read_round(words: list[str]) -> Any:
    word = words[0]
    if word in ("best", "last"):
        return word
    number = read_word(int, word)
    if isinstance(number, int) and number > 0:
        return number
    return Unread(word, "give best, last or a number from 1")


def _scale(value: float) -> float:
    if not -STRONGEST <= value <= STRONGEST:
        raise PydanticCustomError("scale", f"it must be from -{STRONGEST} to {STRONGEST}")  # pyright: ignore
    return value


AdapterScale = Annotated[float, AfterValidator(_scale)]
RoundName = Annotated[
    Literal["best", "last"] | int,
    Field(
        description="Round of the run: its number (from 1), last (the last round that was kept), or best (the one "
        "that the verdict names)."
    ),
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="{best,last}|INT",
        instance_from_str=_read_round,
        is_instance=lambda value: isinstance(value, (str, int)),
        str_from_instance=lambda value: [str(value)],
    ),
]
RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
RunFolders = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
AllowBroken = Annotated[bool, Field(description="Accept a round that the run judged broken.")]
Band = Annotated[tuple[float, float], _words(float, "LO HI", n=2)]
Limits = Annotated[
    dict[str, Finite],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME LIMIT ...]",
        instance_from_str=_read_limits,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [str(word) for pair in value.items() for word in pair],
    ),
]
Names = Annotated[tuple[str, ...], _words(str, "NAME [NAME ...]")]
Plugins = Annotated[tuple[str, ...], _words(str, "PLUGIN [PLUGIN ...]", "\n")]
Assignments = Annotated[tuple[str, ...], _words(str, "NAME.KEY=VALUE [...]", "\n")]
Rule = tuple[str, bool, str]
Numbers = Annotated[tuple[Positive, ...], _words(float, "FLOAT [FLOAT ...]")]


def _utf8(path: Path) -> Path:
    """ValueError if the path is not UTF-8, because an event could not hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!r} is not UTF-8; give another path") from None
    return path


def _device(name: str) -> str:
    if re.fullmatch("auto|cpu|cuda(:[0-9]+)?", name):
        return name
    raise PydanticCustomError("device", "choose auto, cpu, cuda or cuda:N")


def _iso_date(value: str) -> str:
    try:
        return Date.fromisoformat(value).isoformat() if value else ""
    except ValueError:
        raise PydanticCustomError("date", "it must be a date as YYYY-MM-DD") from None


UserPath = Annotated[Path, AfterValidator(_utf8)]


def reflowed(text: str) -> str:
    """The text with one line per paragraph, so that `--help` can wrap it at any width of the terminal."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text.strip()))


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(section: str) -> Callable[[type[Settings]], type[Settings]]:
    """Makes a class a frozen pydantic dataclass whose fields are flags, with their docstrings as help texts.

    Invalid fields raise one ValueError with a line for each, which names it as `section.field`. The method `_rules`
    gives (field, whether its value is allowed, limit) for limits that depend on other fields.
    """
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def placed(field_name: str) -> str:
        return f"{section}.{field_name}" if section and field_name else field_name

    def check(self: Any) -> Any:
        lines = [
            f"{placed(name)} is {shown(attrgetter(name)(self))}: it must be {limit}"
            for name, holds, limit in self._rules()
            if not holds
        ]
        if lines:
            raise ValueError("\n".join(lines))
        return self

    def decorate(cls: Any) -> Any:
        if hasattr(cls, "_rules"):
            cls._check = model_validator(mode="after")(check)
        made: Any = dataclass(frozen=True, kw_only=True, config=config)(cls)
        made.__doc__ = reflowed(made.__doc__ or "")
        for name, each in made.__pydantic_fields__.items():  # tyro would keep the line breaks of the source
            if each.description:
                made.__dataclass_fields__[name].metadata = {"help": reflowed(each.description)}
        init = made.__init__

        @functools.wraps(init)
        def validating(self: Any, **given: Any) -> None:
            try:
                init(self, **given)
            except ValidationError as error:
                raise ValueError("\n".join(problem_lines(error, made, placed))) from None

        made.__init__ = validating
        return made

    return decorate


def _band_rule(layers: Band) -> Rule:
    low, high = layers
    return "layers", 0 <= low < high <= 1, "LO HI with 0 <= LO < HI <= 1 (fractions of the depth)"


@settings("steer")
class SteerCfg:
    """Extraction of the steering vector."""

    backend: Literal["builtin", "steering-lite"] = "builtin"
    """The code that extracts the vector. steering-lite is an optional package."""
    method: str = "mean_diff"
    """How the vector is computed and applied. mean_diff: the mean difference of the hidden states, added at every
    position. pca: the first principal component of these differences, added at every position. cosine_gated: mean_diff,
    added in proportion to |cosine| with the hidden state. directional_ablation: mean_diff, in place of the hidden
    state's component along it. Only mean_diff has been measured (docs/results.md)."""
    normalize: bool = False
    """Scale the vector of each block to length 1, so that doses are in units of the residual stream. The effect has not
    been measured."""
    layers: Band = (0.45, 0.55)
    """LO HI: the blocks that are steered, as fractions of the depth. In a wide band, the effect of an unnormalized
    vector grows from block to block and text becomes incoherent."""
    contexts: UserPath = Path("data/contexts.jsonl")
    """JSON lines file with a `text` field: user messages. The vector is the difference between the model's hidden
    states under the two personas, after these messages."""
    n_contexts: Count = 256
    """Number of contexts to read, evenly spaced over the file."""

    def _rules(self) -> list[Rule]:
        return [_band_rule(self.layers)]


@settings("gen")
class GenCfg:
    """How the training texts are written."""

    alphas: Annotated[Numbers, Field(min_length=1)] = (0.5, 0.75, 1.0)
    """Relative doses. The dose controller multiplies them by kappa."""
    max_new_tokens: Count = 512
    """Maximum length of a completion, in tokens."""
    n_prompts: Annotated[int, Field(ge=2)] = 36
    """Number of the trait's prompts, from the start of its list, for which training text is written. One in eight of
    them, but at least one, is held out for validation."""
    prompts: UserPath | None = None
    """Prompts to use instead of those in the trait's file: a JSON lines file with a `text` field, or a folder of
    <trait>.jsonl files. With a folder, a trait that is given as a path keeps its own prompts."""
    batch_size: BatchSize = 0
    """Sequences decoded at once. 0: as many as fit into free GPU memory (32 on a CPU). It does not
    change the text in float32. In bfloat16 it can, because rounding depends on the batch."""


@settings("dose")
class DoseCfg:
    """The dose controller, which chooses kappa, the multiplier of gen.alphas."""

    mode: Literal["survival", "iso_kl", "fixed"] = "survival"
    """survival: use the highest kappa at which enough completions pass the filter. iso_kl: use the kappa at which the
    divergence of the teacher from the student is kl_target. fixed: use dose.kappa."""
    kappa: Positive = 1.0
    """The multiplier in mode fixed."""
    kl_target: Positive = 1.0
    """The divergence that mode iso_kl aims at, in nats: the 95th percentile of KL(teacher || student) over
    positions."""
    kl_tokens: Count = 32
    """Number of tokens that the student writes after each of 8 prompts, to measure the divergence in mode iso_kl."""
    target: Share = 0.75
    """Share of completions that should pass the filter in mode survival."""
    floor: Positive = 0.2
    """Smallest kappa to probe. It is also used if no probed kappa reaches dose.target."""
    ceiling: Positive = 3.0
    """Largest kappa to probe."""
    n_kappas: Annotated[int, Field(ge=2)] = 6
    """Kappas in the first batch of probes, evenly spaced in log(kappa). Later batches have half as many."""
    n_probes: Count = 12
    """Completions for each probed kappa."""
    n_refinements: BatchSize = 1
    """Number of further batches of probes, between the highest kappa that reaches dose.target and the lowest that does
    not."""

    def _rules(self) -> list[Rule]:
        return [("floor", self.floor <= self.ceiling, f"<= dose.ceiling = {self.ceiling:g}")]


@settings("filter")
class FilterCfg:
    """The filter, which drops incoherent completions. docs/evidence/filter.md shows what each gate catches."""

    gates: Names = ("perplexity", "spike", "repetition", "loop", "short", "narration", "refusal")
    """The gates to apply: perplexity, spike, repetition, loop, short, narration, refusal or relevance. relevance drops
    fluent text that does not answer the question. With an empty list, every completion trains the student and only the
    barrier keeps it coherent."""
    ppl_max: Perplexity = 40.0
    """Gate perplexity: maximum perplexity of the last quarter of a completion under the base model."""
    rep_max: Share = 0.35
    """Gate repetition: maximum share of repeated word 2- to 4-grams, or of text inside repeating blocks of
    characters."""
    spike_max: Perplexity = 1e4
    """Gate spike: maximum perplexity of any 12 consecutive tokens under the base model. 10000 drops only gibberish. The
    presets of toy and smol have tighter limits, chosen for their models."""
    loop_max: Share = 0.7
    """Gate loop: maximum share of repeated words in any 20 consecutive words. A sentence that directly repeats the one
    before it, or that occurs a third time, counts as 1."""
    relevance_min: Finite = 0.05
    """Gate relevance: the question must make a text likelier under the base model by at least this many nats per
    token."""
    min_words: BatchSize = 12
    """Gate short: minimum length of a completion, in words."""
    min_train: Annotated[int, Field(ge=2)] = 24
    """Stop the run if the filter keeps fewer completions than this."""
    n_keep: Count = 64
    """Number of completions to keep in each round."""
    max_attempts: Count = 192
    """Maximum number of completions written in each round, probes included. With --heal.text own it holds for the
    student's texts and for the probes of the teacher each."""

    def _rules(self) -> list[Rule]:
        return [
            ("min_train", self.min_train <= self.n_keep, f"<= filter.n_keep = {self.n_keep}"),
            ("max_attempts", self.max_attempts >= self.n_keep, f">= filter.n_keep = {self.n_keep}"),
        ]


@settings("adapter")
class AdapterCfg:
    """The adapter that each round trains."""

    kind: str = "lora"
    """lora: low-rank factors on every linear layer and stack of experts. bias: one vector per block, added to the
    residual stream; not measured."""
    rank: Count = 32
    """Rank of each round's LoRA factor."""
    alpha: Positive = 64.0
    """LoRA alpha: the scale of the update is alpha divided by the rank."""
    layers: Band = (0.2, 0.8)
    """LO HI: the blocks that are adapted, as fractions of the depth."""

    def _rules(self) -> list[Rule]:
        return [_band_rule(self.layers)]


@settings("heal")
class HealCfg:
    """Training of the adapter on the kept text, with a penalty on divergence from a reference model (the barrier)."""

    target: Literal["tokens", "distribution"] = "tokens"
    """What the student learns. tokens: the tokens of the text, by cross-entropy; distribution: the teacher's next-token
    distribution at every position of the text, by KL divergence."""
    text: Literal["steered", "own"] = "steered"
    """Text that the student trains on. steered: text that the teacher writes; own: text that the student writes without
    the vector and the persona. own needs --heal.target distribution."""
    teacher: TeacherName = "vector"
    """What turns the student into the teacher. vector: the vector at the chosen dose. prompt: the positive persona as
    system prompt. contrast: the difference that the two personas make, added to the plain student. prompt+vector and
    contrast+vector: also add the vector; in a contrast it acts on the two personas with opposite signs."""
    contrast: Positive = 1.0
    """With a teacher that is a contrast: the factor of the difference between the personas."""
    contrast_kl: NotNegative = 0.0
    """With a contrast and --heal.text own: choose the strength at which the mean of KL(teacher || student) over the
    student's text is this many nats. A text of --heal.hold is read without its attack if that opposes the trait. 0:
    use --heal.contrast."""
    kl: Literal["forward", "reverse"] = "forward"
    """With --heal.target distribution: fit KL(teacher || student) (forward) or KL(student || teacher) (reverse)."""
    hold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """With --heal.text own: share of the training texts that are written under an attack, such as a contrary system
    prompt. The teacher keeps its own prompts, so that the student learns to keep the trait. 0: none."""
    hold_attacks: UserPath = Path("data/attacks/train.toml")
    """TOML file of the attacks for --heal.hold. Those of the eval "holds" must not be among them. By default all of
    them oppose the trait."""
    rehearsal: BatchSize = 0
    """With --heal.target distribution: number of texts that the base model writes per round, on
    --heal.rehearsal-prompts. The student trains on them too, with the base as teacher. This preserves what the trait
    should not change. 0 turns it off."""
    rehearsal_prompts: UserPath | None = None
    """JSON lines file with a `text` field: prompts unrelated to the trait. Default: prompts of the other traits of the
    package and everyday messages, without those of the trait and of its pairs. What is rehearsed is likely to stay, so
    an eval that asks the same tells little."""
    rehearsal_near: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Without --heal.rehearsal-prompts: share of the rehearsed prompts that are those of the other traits."""
    divergence: str = "kl_rev"
    """Distance from the reference that the barrier penalizes: kl_rev is KL(student || reference), kl_fwd is
    KL(reference || student). none turns the barrier off; kl_rev is still measured and reported."""
    aggregate: Aggregate = "rmse"
    """How the divergences at the positions of a completion become one number. The mean hides short loops."""
    lam: NotNegative = 0.1
    """Strength of the barrier: nats of loss per nat of divergence above tau."""
    tau: NotNegative = 0.5
    """Divergence, in nats, up to which the barrier costs nothing. If no completion diverges further, the barrier has no
    effect."""
    lam_power: Finite = 0.0
    """lam in round k (from 0) is lam * (1 + k) ** -lam_power."""
    reference: Literal["prev", "base"] = "prev"
    """Model that the student is kept close to. prev: the student before this round, so that the trait can add up over
    rounds; base: the original model, so that tau limits all rounds together (not measured over several rounds)."""
    epochs: Count = 6
    """Passes over the training text in each round."""
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-4
    """Peak learning rate, at most 1. It rises linearly over the first tenth of the steps, then falls to 0 along a
    cosine."""
    batch_size: Count = 4
    """Completions per optimizer step."""
    tokens_per_pass: Count = 1024
    """Tokens in one forward and backward pass, padding included. A step takes as many passes as it needs, so this
    changes memory and speed, not results. A pass that runs out of memory is split, and a warning names the new size."""
    checkpoint: Literal["auto", "on", "off"] = "auto"
    """Activation checkpointing: recompute the activations of each block in the backward pass instead of storing them.
    Training is a third slower, but needs memory for the activations of only one block at a time. auto turns it on if a
    pass would fill more than half of the free memory. Results do not change."""
    spectral: NotNegative = 0.0
    """Weight of the spectral penalty: half the squared largest singular value of this round's update, summed over the
    adapted matrices. It works with every divergence. The effect has not been measured."""
    pressure_every: Count = 8
    """Measure the gradient pressure, ||grad barrier|| / ||grad fit||, every N steps. Each measurement costs one more
    backward pass."""

    def _rules(self) -> list[Rule]:
        fits = self.target == "distribution"
        needs_teacher = f"0 with heal.target {self.target}, since it needs a teacher's distribution"
        contrasts = self.teacher in CONTRASTS
        return [
            (
                "hold",
                self.text == "own" or self.hold == 0,
                f"0 with heal.text {self.text}, since only own text is held",
            ),
            ("rehearsal", fits or self.rehearsal == 0, needs_teacher),
            (
                "rehearsal_near",
                (self.rehearsal > 0 and self.rehearsal_prompts is None) or self.rehearsal_near == 0.5,
                "0.5 with heal.rehearsal 0 and with heal.rehearsal_prompts",
            ),
            ("text", fits or self.text == "steered", f"steered with heal.target {self.target}"),
            ("contrast", contrasts or self.contrast == 1, f"1 with heal.teacher {self.teacher}, which is no contrast"),
            ("contrast", not self.contrast_kl or self.contrast == 1, "1 with heal.contrast_kl, which chooses it"),
            (
                "contrast_kl",
                self.contrast_kl == 0 or (contrasts and self.text == "own"),
                f"0 with heal.teacher {self.teacher} and heal.text {self.text}: it needs a contrast and own text",
            ),
        ]


@settings("backtrack")
class BacktrackCfg:
    """What happens if the student of a round is no longer coherent. The round is discarded and repeated with half the
    dose, or with half the learning rate if the teacher has no vector or is a contrast. After the last attempt the run
    ends and keeps the rounds before it."""

    retries: BatchSize = 0
    """Maximum number of times that a round is repeated because its student exceeds a limit. 0 keeps every round."""
    limits: Limits = field(default_factory=dict)
    """NAME LIMIT ...: limits of metrics, such as kl_base 0.2. A limit is a maximum, or a minimum for a metric that
    should be high, such as coherence. Each health metric that is not named has the limit of a healthy model, or the
    worse end of the base model's own 95 percent interval if that allows more."""


@settings("eval")
class EvalCfg:
    """Evaluation of each state of the model."""

    evals: Annotated[Names, Field(min_length=1)] = (
        *("moral_foundations", "text_quality", "drift", "persona", "contrast"),
    )
    """The evals to run: moral_foundations, text_quality, drift, persona, contrast, likelihood, everyday, instructions,
    holds, panel, judge, classifier, toylm, or one of a plugin. "likelihood" is for a model that cannot answer a
    multiple-choice question. "everyday" asks questions of everyday knowledge. "instructions" tells whether the model
    follows system prompts that have nothing to do with the trait. "holds" tells whether the trait stays under attacks,
    such as the opposite persona or earlier talk. "panel" tells how far the model moved on the pairs of every other
    trait. "judge" lets a second model read the answers. "classifier" tells from their words which persona they are
    like. "toylm" checks text against the grammar of the toy world."""
    backend: Literal["builtin", "tinymfv"] = "builtin"
    """The code that asks the vignettes of moral_foundations. tinymfv (moral-maps) is an optional package."""
    vignettes: UserPath = Path("data/vignettes/other.jsonl")
    """JSON lines file with the fields id, foundation_coarse and text: the vignettes of moral_foundations and
    likelihood."""
    n_vignettes: BatchSize = 0
    """Number of vignettes to ask, evenly spaced over the file. 0: all."""
    instrument: UserPath = Path("data/instruments/moral.toml")
    """TOML file with the wording of moral_foundations: order, prompt, schema, options and prefill of the forced
    choice."""
    likelihood: UserPath = Path("data/instruments/likelihood.toml")
    """TOML file with the question and the replies of the eval likelihood."""
    everyday: UserPath = Path("data/everyday.jsonl")
    """JSON lines file with the fields question, right and wrong: the questions and answers of the eval everyday."""
    instructions: UserPath = Path("data/instructions.jsonl")
    """JSON lines file with the fields system, question, right and wrong: the system prompts of the eval instructions,
    an answer that follows each of them, and one that does not."""
    pairs: UserPath | None = None
    """Contrast pairs to use instead of the trait's own: a JSON lines file with the fields prompt, positive and
    negative, or a folder of <trait>.jsonl files. The eval panel reads the other traits from the folder too."""
    attacks: UserPath = Path("data/attacks/eval.toml")
    """TOML file with the attacks of the eval "holds". The file explains its fields."""
    n_panel: BatchSize = 23
    """Number of pairs that the eval panel reads of each other trait, evenly spaced over its pairs. A trait with fewer
    pairs is read whole. 0: all."""
    judge_url: str = ""
    """URL of an endpoint that speaks the OpenAI chat completions protocol, such as http://localhost:8000/v1. The eval
    "judge" sends it the answers, their prompts and the personas. The texts leave this machine. The key, if it needs
    one, is read from the environment variable OPENAI_API_KEY. Empty: the judge is a model on this machine."""
    judge_model: str = ""
    """The model of the eval "judge": its name at --eval.judge-url. Without a URL: a local model (see --model) that
    tells which of two answers the positive persona wrote."""
    think_tokens: BatchSize = 128
    """Number of tokens for which the model thinks before it answers a vignette."""
    batch_size: BatchSize = 0
    """Sequences that think or answer at once. 0: as many as fit into free GPU memory (32 on a CPU)."""
    n_prompts: Count = 12
    """Number of the trait's prompts, from the end of its list, that are answered in free text. The model is never
    trained on them."""
    n_texts: Count = 24
    """Number of free-text answers, spread evenly over the prompts of eval.n_prompts."""
    max_new_tokens: Count = 256
    """Maximum length of a free-text answer, in tokens."""
    n_bootstrap: Annotated[int, Field(ge=10)] = 2000
    """Number of bootstrap resamples for the paired 95 percent intervals of differences from the base model."""


@settings("")
class RunConfig:
    """Put a trait into a model's weights. Each round, the model writes text, incoherent text is dropped, an adapter is
    trained towards a teacher made of the model itself (the heal), the adapter is added to the model, and the model is
    evaluated."""

    model: str = "google/gemma-3-4b-it"
    """A folder, a GGUF file, a Hugging Face model id, the folder of an adapter (it is added to the weights of its base
    model), tiny-random (untrained, to try out the commands), or one of these names, whose 4-bit weights are downloaded
    from the package index on first use: smollm2-135m-instruct (93 MB), qwen2.5-coder-0.5b-instruct (478 MB),
    qwen2.5-coder-1.5b-instruct (1093 MB), gemma-3-270m (238 MB, no chat model)."""
    trait: str = "authority"
    """asks_back, authority, blunt, care, formal, honesty, love, optimistic, or the path of a trait file, which ends in
    .toml. A slash selects another phrasing, as in love/inner."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of every random stream. Runs with the same settings and seed give the same result."""
    n_rounds: Count = 4
    """Number of rounds. Each round starts from the student of the round before it."""
    out: UserPath = Path("out")
    """Folder in which the run creates its own folder, named by date and preset. The run adds a row to results.tsv in
    --out."""
    folder: UserPath | None = None
    """Folder of this run, instead of a new one in --out. If the folder holds an unfinished run with the same settings,
    the command resumes that run. The command leaves a finished run unchanged, and refuses a run with other settings."""
    device: Annotated[str, AfterValidator(_device)] = "auto"
    """auto, cpu, cuda or cuda:N. auto is the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and activations. auto is bfloat16 on a GPU. On a CPU, it is bfloat16 if that multiplies
    at least 1.5 times as fast as float32, and float32 otherwise. Adapters are always float32."""
    control: bool = False
    """Also run the control: one heal on the tokens of the model's own unsteered text. It shows how far
    training with the token recipe moves the trait without steering."""
    arm: str = ""
    """Label by which results of different seeds are grouped. Defaults to the preset name or, in a sweep, to the
    settings that distinguish the run."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: load linear weights in 4 bits (QLoRA), for a model that does not fit into memory in bfloat16. Decoding is
    about three times slower. Not measured on a real model."""
    accept_terms: bool = False
    """Accept the terms of a model that has some. The command names them before it downloads the model."""
    n_threads: Annotated[int, Field(ge=0, le=4096)] = 0
    """Number of CPU threads. 0: torch's default."""
    max_prompt_tokens: Count = 1024
    """Maximum length of a prompt, in tokens. A longer prompt is an error, because cutting it would remove the assistant
    tag, where the vector is extracted."""
    date: Annotated[str, AfterValidator(_iso_date)] = ""
    """Date for chat templates that contain one, as YYYY-MM-DD. Default: today's."""
    temperature: Positive | None = None
    """Sampling temperature. Default: from the model's generation config."""
    top_p: Share | None = None
    """Sample from the likeliest tokens that together have this share of the probability. Default: from the model's
    generation config."""
    quiet: bool = False
    """Print only warnings and errors."""
    chat: bool = True
    """After a run in a terminal, offer to chat with the result. The offer is not made with --quiet, or if the
    environment variable CI is set."""
    share_base: bool = False
    """Take the pre-flight and the states base and prompted from another run in the folder of this one, if that run has
    the same model, trait, evals, seed and device. A sweep does."""
    teach_anyway: bool = False
    """Continue even if the pre-flight finds nothing to teach. The pre-flight compares the trait's pairs under the two
    personas before any text is written. `steer-heal diag teachable` prints the whole reading."""
    track: Names = ()
    """Trackers that also receive the curves and, at the end, the pictures: tensorboard, trackio, wandb."""
    plugin: Plugins = ()
    """Your own evals, gates, steering methods and more (docs/extend.md): Python files, whose names end in .py, or names
    of installed plugins. Their code runs with your rights."""
    plugin_set: Assignments = ()
    """Settings of plugins. NAME is that of the file without .py, or of the installed plugin."""
    steer: SteerCfg = field(default_factory=SteerCfg)
    gen: GenCfg = field(default_factory=GenCfg)
    dose: DoseCfg = field(default_factory=DoseCfg)
    filter: FilterCfg = field(default_factory=FilterCfg)
    adapter: AdapterCfg = field(default_factory=AdapterCfg)
    heal: HealCfg = field(default_factory=HealCfg)
    backtrack: BacktrackCfg = field(default_factory=BacktrackCfg)
    eval: EvalCfg = field(default_factory=EvalCfg)

    def _rules(self) -> list[Rule]:
        probes = self.dose.n_kappas * self.dose.n_probes
        enough = self.dose.mode != "survival" or probes <= self.filter.max_attempts
        limit = f">= dose.n_kappas * dose.n_probes = {probes}, the first probes"
        backend = self.eval.backend
        measured = backend == "builtin" or self.heal.teacher not in CONTRASTS
        return [
            ("filter.max_attempts", enough, limit),
            (
                "eval.backend",
                measured,
                f"builtin with heal.teacher {self.heal.teacher}, which {backend} cannot measure",
            ),
        ]

    def fingerprint(self) -> str:
        """Eight hex digits that are equal for runs which differ only in the seed and in RUN_ONLY settings.

        Only values that differ from their defaults count. A new setting therefore leaves the fingerprints of all runs
        made before it as they are.
        """
        defaults = leaves(type(self)())
        free = ("seed", *RUN_ONLY)
        own = {name: value for name, value in leaves(self).items() if name not in free and value != defaults[name]}
        return hashlib.sha256(json.dumps(own, default=str, sort_keys=True).encode()).hexdigest()[:8]


SECTIONS = tuple(name for name, each in RunConfig.__dataclass_fields__.items() if is_dataclass(each.default_factory))
RUN_ONLY = (
    *("quiet", "chat", "out", "folder", "arm", "track", "n_threads", "teach_anyway", "accept_terms", "share_base"),
    *("gen.batch_size", "eval.batch_size", "heal.tokens_per_pass", "heal.checkpoint"),
)
"""Settings that do not change the result, up to rounding. They may differ when a run is resumed."""


def leaves(cfg: Any) -> dict[str, Any]:
    """Every setting by its dotted name, such as heal.lam.

    Args:
        cfg: A settings dataclass, or the dict that `as_json` makes of one. Of a dict, only sections of RunConfig are
            taken apart: backtrack.limits is one setting.
    """
    values = cfg if isinstance(cfg, Mapping) else {each.name: getattr(cfg, each.name) for each in fields(cfg)}
    out: dict[str, Any] = {}
    for name, value in values.items():
        if is_dataclass(value) or (name in SECTIONS and isinstance(value, Mapping)):
            out |= {f"{name}.{inner}": each for inner, each in leaves(value).items()}
        else:
            out[name] = value
    return out


def as_json(cfg: Any, *, none: bool = True) -> dict[str, Any]:
    """A settings dataclass as nested dicts of JSON values. `none=False` drops each value that is None."""
    return TypeAdapter(type(cfg)).dump_python(cfg, mode="json", exclude_none=not none)


def changed(cfg: Settings, values: Mapping[str, Any], where: str = "") -> Settings:
    """The settings with some values replaced, by dotted name: {"seed": 7, "heal.epochs": 2}.

    A whole section can be given too, {"heal": HealCfg(...)}, or a part of it, {"heal": {"epochs": 2}}. UserError with a
    line for each invalid name or value; each line begins with `where`.
    """
    nested = as_json(cfg)
    problems = Problems()
    for name, value in values.items():
        section, dot, key = name.partition(".")
        given = as_json(value) if is_dataclass(value) else value
        if not dot:
            part = name in SECTIONS and isinstance(value, Mapping)
            nested[name] = {**nested[name], **given} if part else given
        elif isinstance(nested.get(section), dict):
            nested[section][key] = given
        else:
            place = f"{where}: {name!r}" if where else name
            problems.found.append(f"{place}: there is no section {section!r}; {nearest(section, SECTIONS)}")
    problems.raise_if_any()
    return validated(type(cfg), nested, where)


def require_judge(cfg: EvalCfg) -> None:
    """UserError if a URL is given although no judge is asked there."""
    if cfg.judge_url and "judge" not in cfg.evals:
        raise UserError(
            f"eval.judge_url is {cfg.judge_url!r}: only the eval judge asks it; add judge to --eval.evals, or leave it "
            "out"
        )
