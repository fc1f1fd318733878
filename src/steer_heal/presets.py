"""The presets of `steer-heal run`: for each name a description and the settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from steer_heal.errors import UserError, nearest
from steer_heal.settings import (
    TINY_RANDOM,
    AdapterCfg,
    BacktrackCfg,
    DoseCfg,
    EvalCfg,
    FilterCfg,
    GenCfg,
    HealCfg,
    RunConfig,
    SteerCfg,
)

TOY = Path("data/toylm")

TOY_PRESET = RunConfig(
    model=str(TOY),
    dtype="float32",
    n_rounds=4,
    control=True,
    n_threads=1,  # a second thread makes a model of this size no faster
    steer=SteerCfg(layers=(0.25, 0.75), contexts=TOY / "contexts.jsonl"),
    gen=GenCfg(alphas=(0.5, 0.75, 1.0), max_new_tokens=128, n_prompts=64, prompts=TOY / "prompts", batch_size=128),
    dose=DoseCfg(floor=0.05, ceiling=2.0, n_kappas=6, n_probes=16),
    filter=FilterCfg(ppl_max=3.0, spike_max=7.0, rep_max=0.3, n_keep=128, max_attempts=384, min_train=32),
    adapter=AdapterCfg(rank=16, alpha=32.0, layers=(0.0, 0.5)),
    heal=HealCfg(
        rehearsal_prompts=TOY / "everyday.jsonl", lam=0.3, tau=0.03, lr=1e-3, batch_size=8, tokens_per_pass=4096
    ),
    eval=EvalCfg(
        evals=(*EvalCfg().evals, "toylm"),
        vignettes=TOY / "vignettes.jsonl",
        instrument=TOY / "instrument.toml",
        pairs=TOY / "pairs",
        think_tokens=0,
        batch_size=128,
        n_prompts=32,
        n_texts=64,
        max_new_tokens=128,
    ),
)
UNNAMED_SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_p": 0.95}
"""For models whose files name no sampling."""
SMOL_PRESET = RunConfig(
    model="smollm2-135m-instruct",
    trait="love",
    n_rounds=4,
    **UNNAMED_SAMPLING,
    steer=SteerCfg(n_contexts=64),
    gen=GenCfg(max_new_tokens=96),
    dose=DoseCfg(floor=0.2, ceiling=2.0, n_kappas=5, n_probes=8),
    filter=FilterCfg(
        gates=(*FilterCfg().gates, "relevance"),
        ppl_max=6.0,
        spike_max=30.0,
        relevance_min=0.15,
        n_keep=48,
        max_attempts=128,
    ),
    adapter=AdapterCfg(rank=16, alpha=32.0),
    heal=HealCfg(lam=0.1, tau=0.1, lr=3e-4, epochs=3, batch_size=8, tokens_per_pass=4096),
    eval=EvalCfg(
        evals=("likelihood", "contrast", "text_quality", "drift", "persona"),
        n_vignettes=70,
        n_texts=24,
        max_new_tokens=96,
    ),
)
DISTIL = {"target": "distribution", "text": "own", "kl": "reverse", "divergence": "none"}
TOY_DISTIL_PRESET = replace(
    TOY_PRESET,
    n_rounds=2,
    dose=DoseCfg(target=0.95, floor=0.05, ceiling=0.25, n_kappas=4, n_probes=32),
    heal=replace(TOY_PRESET.heal, **DISTIL, teacher="prompt+vector", epochs=12),
    backtrack=BacktrackCfg(retries=2),
)
CONTRAST_KL = 0.1
"""heal.contrast_kl of every preset whose teacher is a contrast: nats between teacher and student."""
CHAT_PRESET = RunConfig(
    model="qwen2.5-coder-0.5b-instruct",
    trait="love",
    n_rounds=1,
    steer=SteerCfg(n_contexts=64),
    gen=GenCfg(max_new_tokens=96),
    dose=DoseCfg(mode="fixed", kappa=0.5),  # of a vector, if the teacher is given one
    filter=FilterCfg(n_keep=48, max_attempts=128),
    adapter=AdapterCfg(rank=16, alpha=32.0),
    heal=replace(
        HealCfg(lr=3e-4, epochs=8, batch_size=8, tokens_per_pass=2048),
        **DISTIL,
        teacher="contrast",
        contrast_kl=CONTRAST_KL,
        hold=0.5,
        rehearsal=48,
    ),
    backtrack=BacktrackCfg(retries=2),
    eval=EvalCfg(
        evals=("contrast", "holds", "panel", "everyday", "instructions", "text_quality", "drift"),
        n_texts=24,
        max_new_tokens=96,
    ),
)
SMOL_DISTIL_PRESET = replace(
    CHAT_PRESET,
    model=SMOL_PRESET.model,
    filter=SMOL_PRESET.filter,
    heal=replace(CHAT_PRESET.heal, lr=1e-3, tokens_per_pass=SMOL_PRESET.heal.tokens_per_pass),
    **UNNAMED_SAMPLING,
)
FAST_DEV_PRESET = RunConfig(
    model=TINY_RANDOM,
    dtype="float32",
    n_rounds=2,
    control=True,
    steer=SteerCfg(layers=(0.3, 0.7), n_contexts=16, contexts=TOY / "contexts.jsonl"),
    gen=GenCfg(max_new_tokens=24, n_prompts=8, prompts=TOY / "prompts", batch_size=32),
    dose=DoseCfg(n_kappas=3, n_probes=4),
    # an untrained model writes noise: the gates are open, so that the later stages receive text
    filter=FilterCfg(ppl_max=1e9, rep_max=1.0, loop_max=1.0, min_words=0, n_keep=16, min_train=4, max_attempts=32),
    adapter=AdapterCfg(rank=4, alpha=8.0, layers=(0.0, 1.0)),
    heal=HealCfg(epochs=2, rehearsal_prompts=TOY / "everyday.jsonl", pressure_every=2),
    eval=replace(
        TOY_PRESET.eval, think_tokens=4, n_prompts=4, n_texts=8, max_new_tokens=24, n_bootstrap=200, batch_size=32
    ),
)
PRESETS: dict[str, tuple[str, RunConfig]] = {
    "chat": (
        "Any instruction-tuned model (--model): it learns the difference between the two personas on its own text.",
        CHAT_PRESET,
    ),
    "gemma": (
        "chat for gemma-3-4b-it, on one GPU with 24 GB (not measured).",
        replace(CHAT_PRESET, model=RunConfig().model),
    ),
    "qwen": (
        "chat for Qwen2.5-Coder-0.5B-Instruct (4-bit weights, repacked).",
        replace(CHAT_PRESET, **UNNAMED_SAMPLING),
    ),
    "toy": ("The bundled toy model, already trained: a real result in minutes on a laptop.", TOY_PRESET),
    "toy-distil": (
        "The toy model learns its own next-token distribution under the persona prompt and the vector.",
        TOY_DISTIL_PRESET,
    ),
    "smol": ("SmolLM2-135M-Instruct (4-bit weights, repacked) learns its steered text, on two CPU cores.", SMOL_PRESET),
    "smol-distil": ("chat for SmolLM2-135M-Instruct (4-bit weights, repacked), on two CPU cores.", SMOL_DISTIL_PRESET),
    "fast-dev": ("A tiny random model, to run every stage in seconds. The numbers mean nothing.", FAST_DEV_PRESET),
}


def require_preset(name: str, where: str = "") -> None:
    """UserError unless there is a preset of this name. `where`: what the error begins with."""
    if name not in PRESETS:
        raise UserError(f"{where}preset is {name!r}: {nearest(name, PRESETS)}")
