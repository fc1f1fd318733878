"""Every stage's settings. Free of torch, so that `--help` and a wrong argument answer before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args


def require(*rules: tuple[bool, str, object, str]) -> None:
    """ValueError with a line for each (holds, field, value, limit) that does not hold."""
    broken = [f"{field} is {value!r}: it must be {limit}" for holds, field, value, limit in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def layer_band(layers: tuple[float, float], n_layers: int) -> range:
    """Block indices of a band given as fractions of the depth; UserError material where it holds none."""
    low, high = layers
    return range(int(low * n_layers), int(high * n_layers))


@dataclass(frozen=True, kw_only=True)
class SteerCfg:
    """The teacher vector."""

    backend: Literal["builtin", "steering-lite"] = "builtin"
    """Who extracts the vector; steering-lite needs its package."""
    method: Literal["mean_diff", "pca", "cosine_gated", "directional_ablation"] = "mean_diff"
    """How persona pairs become a vector, and how a dose acts: mean_diff and pca are added at every position;
    cosine_gated adds by |cosine| with the position; directional_ablation replaces the component along the vector."""
    normalize: bool = False
    """Scale each layer's vector to length 1 (doses then are residual-stream units)."""
    layers: tuple[float, float] = (0.45, 0.55)
    """LO HI: the steered blocks, as fractions of the depth. A raw vector over a wide band compounds and breaks."""
    contexts: Path = Path("data/contexts.jsonl")
    """JSON lines with `text`: user messages in whose answers the two personas are compared."""
    n_contexts: int = 256
    """Contexts read, evenly over the file."""
    refresh: Literal["round", "once"] = "round"
    """round: extract again from each round's student; once: keep the vector of round 0."""

    def __post_init__(self) -> None:
        low, high = self.layers
        require(
            (0 <= low < high <= 1, "steer.layers", self.layers, "LO HI with 0 <= LO < HI <= 1 (fractions of the depth)"),
            (self.n_contexts >= 1, "steer.n_contexts", self.n_contexts, ">= 1"),
        )


@dataclass(frozen=True, kw_only=True)
class GenCfg:
    """Steered generation."""

    alphas: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Relative doses; the controller's kappa multiplies them."""
    max_new_tokens: int = 512
    n_prompts: int = 36
    """Prompts that training text is written for: the first of the pool."""
    prompts: Path | None = None
    """JSON lines with `text`, or a folder of <trait>.jsonl, in place of the trait's own prompt pool."""
    batch_size: int = 0
    """Sequences decoded at once; 0: as many as the GPU's free memory holds (on the CPU 32). Texts do not depend on it."""
    graphs: bool = False
    """Decode, here and in the evals, on a cache of fixed size whose step is captured as a CUDA graph: fewer launches a
    token. Held equal to the default on the CPU; never yet run on a GPU."""

    def __post_init__(self) -> None:
        finite = all(math.isfinite(a) and a > 0 for a in self.alphas)
        require(
            (bool(self.alphas) and finite, "gen.alphas", self.alphas, "one or more finite numbers > 0"),
            (self.max_new_tokens >= 1, "gen.max_new_tokens", self.max_new_tokens, ">= 1"),
            (self.n_prompts >= 2, "gen.n_prompts", self.n_prompts, ">= 2 (one is held out for the validation curve)"),
            (self.batch_size >= 0, "gen.batch_size", self.batch_size, ">= 1, or 0: as many as fit"),
        )


@dataclass(frozen=True, kw_only=True)
class DoseCfg:
    """The controller that picks kappa, the multiplier of gen.alphas."""

    mode: Literal["survival", "iso_kl", "fixed"] = "survival"
    """survival: the highest kappa whose completions survive the filter; iso_kl: the kappa whose highest dose moves
    the model by kl_target; fixed: kappa as given."""
    kappa: float = 1.0
    """The multiplier in mode fixed."""
    kl_target: float = 1.0
    """Nats: 95th percentile of the per-token KL(steered || student) that mode iso_kl aims at."""
    kl_tokens: int = 32
    """Tokens that the steered model writes, greedily, after each of 8 prompts to measure it."""
    train_on: Literal["all", "highest"] = "all"
    """highest: only the largest alpha is written, and only completions at the highest dose train the student."""

    target: float = 0.75
    """Share of completions that should survive the filter."""
    floor: float = 0.2
    """Smallest kappa that is probed, and the one used where none survives."""
    ceiling: float = 3.0
    """Largest kappa that is probed."""
    n_kappas: int = 6
    """Kappas per batch of probes, evenly spaced in log(kappa)."""
    n_probes: int = 12
    """Completions per probed kappa."""
    n_refinements: int = 1
    """Further batches of probes, between the last kappa that survived and the first that did not."""

    def __post_init__(self) -> None:
        require(
            (0 < self.kappa < math.inf, "dose.kappa", self.kappa, "> 0"),
            (0 < self.kl_target < math.inf, "dose.kl_target", self.kl_target, "> 0 nats"),
            (self.kl_tokens >= 1, "dose.kl_tokens", self.kl_tokens, ">= 1"),
            (0 < self.target <= 1, "dose.target", self.target, "in (0, 1]"),
            (0 < self.floor <= self.ceiling < math.inf, "dose.floor", self.floor, f"in (0, dose.ceiling = {self.ceiling}]"),
            (self.n_kappas >= 2, "dose.n_kappas", self.n_kappas, ">= 2"),
            (self.n_probes >= 1, "dose.n_probes", self.n_probes, ">= 1"),
            (self.n_refinements >= 0, "dose.n_refinements", self.n_refinements, ">= 0"),
        )


Gate = Literal["perplexity", "spike", "repetition", "loop", "short", "narration", "refusal"]


@dataclass(frozen=True, kw_only=True)
class FilterCfg:
    """Which completions may train the student."""

    gates: tuple[Gate, ...] = get_args(Gate)
    """The gates that are switched on; none: everything trains, and the barrier alone keeps the student whole."""
    ppl_max: float = 40.0
    """Highest perplexity under the base of the last quarter of a completion."""
    rep_max: float = 0.35
    """Highest repetition: share of repeated word 2- to 4-grams, or of text inside looping character blocks."""
    spike_max: float = 1e4
    """Highest perplexity under the base of any 12 tokens in a row: one senseless sentence in a clean text. The default
    only drops gibberish; where to cut is known for the toy model alone."""
    loop_max: float = 0.7
    """Highest share of words that any 20 words in a row have already said; a sentence that follows itself or comes a
    third time counts as 1."""
    min_words: int = 12
    """Shorter completions are dropped."""
    min_train: int = 24
    """Fewer kept than this stops the run: the filter starved."""
    n_keep: int = 64
    """Kept completions to collect per round."""
    max_attempts: int = 192
    """Completions generated per round at the most, probes included."""

    def __post_init__(self) -> None:
        require(
            (1 < self.ppl_max < math.inf, "filter.ppl_max", self.ppl_max, "> 1 and finite (a perplexity)"),
            (0 < self.rep_max <= 1, "filter.rep_max", self.rep_max, "in (0, 1]"),
            (1 < self.spike_max < math.inf, "filter.spike_max", self.spike_max, "> 1 and finite (a perplexity)"),
            (0 < self.loop_max <= 1, "filter.loop_max", self.loop_max, "in (0, 1]"),
            (self.min_words >= 0, "filter.min_words", self.min_words, ">= 0"),
            (self.min_train >= 2, "filter.min_train", self.min_train, ">= 2"),
            (self.min_train <= self.n_keep, "filter.min_train", self.min_train, f"<= filter.n_keep = {self.n_keep}"),
            (self.n_keep <= self.max_attempts, "filter.max_attempts", self.max_attempts, f">= filter.n_keep = {self.n_keep}"),
        )


@dataclass(frozen=True, kw_only=True)
class HealCfg:
    """The distillation into an adapter, with its barrier."""

    divergence: Literal["nll", "kl_rev", "kl_fwd"] = "kl_rev"
    """Distance to the reference that the barrier limits; nll: no barrier."""
    aggregate: Literal["mean", "rmse", "p95", "max"] = "rmse"
    """How a completion's positions become one divergence. mean does not see short loops."""
    lam: float = 0.1
    """Strength of the barrier, nats of loss per nat over tau."""
    tau: float = 0.5
    """Nats tolerated before the barrier pushes back; below the operating divergence, or it never fires."""
    lam_power: float = 0.0
    """lam of round k is lam * (1 + k) ** -lam_power."""
    tau_power: float = 0.0
    """tau of round k is tau * (1 + k) ** -tau_power; negative: the tolerance grows."""
    reference: Literal["prev", "base"] = "prev"
    """prev: the student before this round (trust region, the trait adds up); base: the untouched model, with tau as
    the budget in nats that all rounds share."""
    epochs: int = 6
    lr: float = 1e-4
    """Peak learning rate: linear warm-up over the first tenth, then cosine to 0."""
    batch_size: int = 4
    """Completions per optimiser step."""
    tokens_per_pass: int = 1024
    """Padded tokens of one forward and backward pass; a step takes as many passes as its completions need. Changes
    memory and speed, not results; a pass that runs out of memory is split, with a warning that names the size that fits."""
    checkpoint: Literal["auto", "on", "off"] = "auto"
    """Compute each block's activations again in the backward pass instead of storing them: a third slower, memory of
    one block. auto: where a pass would store more than 1 GiB and a fifth of the weights."""
    rank: int = 32
    """Rank of each round's LoRA factor."""
    lora_alpha: float = 64.0
    """LoRA scale times rank."""
    layers: tuple[float, float] = (0.2, 0.8)
    """LO HI: adapted blocks, as fractions of the depth."""
    weight_decay: float = 0.0
    """AdamW's, on this round's factors. Under about 30 it does nothing at lr 1e-4."""
    spectral: float = 0.0
    """Weight of the spectral penalty: half the squared largest singular value of this round's update, summed over the
    adapted matrices. Composes with any divergence."""
    pressure_every: int = 8
    """Steps between measurements of the gradient pressure (each costs one more backward pass)."""

    def __post_init__(self) -> None:
        low, high = self.layers
        require(
            (0 <= self.lam < math.inf, "heal.lam", self.lam, ">= 0 and finite"),
            (0 <= self.tau < math.inf, "heal.tau", self.tau, ">= 0 nats and finite"),
            (math.isfinite(self.lam_power), "heal.lam_power", self.lam_power, "finite"),
            (math.isfinite(self.tau_power), "heal.tau_power", self.tau_power, "finite"),
            (0 <= self.spectral < math.inf, "heal.spectral", self.spectral, ">= 0 and finite"),
            (self.epochs >= 1, "heal.epochs", self.epochs, ">= 1"),
            (0 < self.lr < math.inf, "heal.lr", self.lr, "> 0 and finite"),
            (self.batch_size >= 1, "heal.batch_size", self.batch_size, ">= 1"),
            (self.tokens_per_pass >= 1, "heal.tokens_per_pass", self.tokens_per_pass, ">= 1"),
            (self.rank >= 1, "heal.rank", self.rank, ">= 1"),
            (0 < self.lora_alpha < math.inf, "heal.lora_alpha", self.lora_alpha, "> 0 and finite"),
            (0 <= low < high <= 1, "heal.layers", self.layers, "LO HI with 0 <= LO < HI <= 1 (fractions of the depth)"),
            (0 <= self.weight_decay < math.inf, "heal.weight_decay", self.weight_decay, ">= 0 and finite"),
            (self.pressure_every >= 1, "heal.pressure_every", self.pressure_every, ">= 1"),
        )


@dataclass(frozen=True, kw_only=True)
class EvalCfg:
    """Moral-foundation vignettes and free text."""

    backend: Literal["builtin", "tinymfv"] = "builtin"
    """Who reads the vignettes; tinymfv (moral-maps) needs its package."""
    vignettes: Path = Path("data/vignettes/other.jsonl")
    """JSON lines {id, foundation_coarse, text}."""
    instrument: Path = Path("data/instruments/moral.toml")
    """Order, prompt, schema, options and prefill of the forced choice."""
    think_tokens: int = 128
    """Tokens the model thinks before the answer slot is read."""
    batch_size: int = 0
    """Sequences that think or answer at once; 0: as many as the GPU's free memory holds (on the CPU 32)."""
    cache: bool = True
    """Keep what base and prompted measured in <out>/.cache/eval, and take it from there where weights, items, settings, seed
    and versions are the same."""
    n_prompts: int = 12
    """Prompts answered in free text: the last of the pool, never trained on."""
    n_texts: int = 24
    """Free-text answers, spread over those prompts."""
    max_new_tokens: int = 256
    """Length of a free-text answer."""
    oracle: Literal["none", "toylm"] = "none"
    """A grammar that knows which sentences are possible; only the toy world has one."""
    n_bootstrap: int = 2000
    """Resamples of the paired 95 percent intervals against base."""

    def __post_init__(self) -> None:
        require(
            (self.think_tokens >= 0, "eval.think_tokens", self.think_tokens, ">= 0"),
            (self.batch_size >= 0, "eval.batch_size", self.batch_size, ">= 1, or 0: as many as fit"),
            (self.n_prompts >= 1, "eval.n_prompts", self.n_prompts, ">= 1"),
            (self.n_texts >= 1, "eval.n_texts", self.n_texts, ">= 1"),
            (self.max_new_tokens >= 1, "eval.max_new_tokens", self.max_new_tokens, ">= 1"),
            (self.n_bootstrap >= 10, "eval.n_bootstrap", self.n_bootstrap, ">= 10"),
        )
