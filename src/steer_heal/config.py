"""RunConfig: the stages' settings composed, and the presets. Free of torch."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections import Counter
from dataclasses import dataclass, field, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
from beartype.door import is_bearable

from steer_heal.evals.instrument import load_instrument, load_vignettes
from steer_heal.files import resolve, sha256
from steer_heal.records import Problems, Trait, UserError
from steer_heal.stages.cfg import DoseCfg, EvalCfg, FilterCfg, GenCfg, HealCfg, SteerCfg, require
from steer_heal.traits import load_contexts, load_trait, prompts_file

TOY = Path("data/toylm")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A trait into a model's weights: teacher_vec -> steered generation -> filter -> heal -> bake -> evaluate, looped.

    In place of a preset: `--resume out/<run>` goes on with a run that was stopped, `--verify out/<run>` checks that its
    base weights, vectors, kept completions, adapters and evaluations are the ones that belong together.
    """

    model: str = "google/gemma-3-4b-it"
    """A folder, a hub id, or tiny-random (untrained, for trying the commands)."""
    trait: str = "authority"
    """Name of a file in data/traits/; love/inner is another phrasing of love."""
    arm: str = ""
    """Label under which `just results` puts runs of several seeds together; empty: the preset."""
    n_rounds: int = 4
    seed: int = 42
    out: Path = Path("out")
    """Folder in which the run gets its own stamped folder, and results.tsv its row."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights and activations; auto is bfloat16 on a GPU, float32 on the CPU. Adapters are always float32."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: linear weights in 4 bits (QLoRA), for a model that bfloat16 cannot hold; decoding is some three times slower."""
    n_threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    max_prompt_tokens: int = 1024
    """Longer prompts are an error: a cut one would lose the tag that the vector is read at."""
    control: bool = False
    """Also heal once on the model's own unsteered text: what training alone does to the trait."""
    export: Path | None = None
    """Also write the final student, merged, as a plain transformers model to this folder."""
    resume: Path | None = None
    """Folder of a run that was stopped: goes on at its first unfinished stage, and ends as if it had never stopped. Alone
    (run --resume out/<run>) it takes that run's settings; behind a preset and flags, these must be the run's own."""
    quiet: bool = False
    """Only warnings and errors on the console."""
    steer: SteerCfg = field(default_factory=SteerCfg)
    gen: GenCfg = field(default_factory=GenCfg)
    dose: DoseCfg = field(default_factory=DoseCfg)
    filter: FilterCfg = field(default_factory=FilterCfg)
    heal: HealCfg = field(default_factory=HealCfg)
    eval: EvalCfg = field(default_factory=EvalCfg)

    def __post_init__(self) -> None:
        probes, gates = self.dose.n_kappas * self.dose.n_probes, self.filter.gates
        require(
            (self.n_rounds >= 1, "n_rounds", self.n_rounds, ">= 1"),
            (abs(self.seed) < 2**63, "seed", self.seed, "within 64 bits"),
            (0 <= self.n_threads <= 4096, "n_threads", self.n_threads, ">= 0 and <= 4096"),
            (self.max_prompt_tokens >= 1, "max_prompt_tokens", self.max_prompt_tokens, ">= 1"),
            (
                probes <= self.filter.max_attempts, "filter.max_attempts", self.filter.max_attempts,
                f">= dose.n_kappas * dose.n_probes = {probes}, the first probes",
            ),
            (
                self.dose.mode != "survival" or bool({"perplexity", "spike", "repetition", "loop"} & set(gates)), "filter.gates", gates,
                "one that drops broken text, or more: without a gate for broken text every dose survives, so dose.mode survival would pick the "
                "ceiling; or give --dose.mode fixed --dose.kappa K, or --dose.mode iso_kl",
            ),
        )

    def fingerprint(self) -> str:
        """Eight hex digits that two runs share where only seed, folders, threads, batch sizes and labels differ."""
        same = {"seed": 0, "out": Path(), "export": None, "quiet": False, "arm": "", "n_threads": 0, "resume": None}
        same |= {"gen": replace(self.gen, batch_size=0), "eval": replace(self.eval, batch_size=0, cache=True)}
        return hashlib.sha256(repr(replace(self, **same)).encode()).hexdigest()[:8]


TOY_PRESET = RunConfig(
    model=str(TOY), n_rounds=4, control=True, n_threads=1,  # a second thread makes a model of this size no faster
    steer=SteerCfg(layers=(0.25, 0.75), contexts=TOY / "contexts.jsonl"),
    gen=GenCfg(alphas=(0.5, 0.75, 1.0), max_new_tokens=128, n_prompts=64, prompts=TOY / "prompts", batch_size=128),
    dose=DoseCfg(floor=0.05, ceiling=2.0, n_kappas=6, n_probes=16),
    filter=FilterCfg(ppl_max=3.0, spike_max=7.0, rep_max=0.3, n_keep=128, max_attempts=384, min_train=32),
    heal=HealCfg(lam=0.3, tau=0.03, lr=1e-3, batch_size=8, rank=16, lora_alpha=32.0, layers=(0.0, 0.5), tokens_per_pass=4096),
    eval=EvalCfg(
        vignettes=TOY / "vignettes.jsonl", instrument=TOY / "instrument.toml", think_tokens=0, batch_size=128, n_prompts=32, n_texts=64,
        max_new_tokens=128, oracle="toylm",
    ),
)
FAST_DEV_PRESET = RunConfig(
    model="tiny-random", n_rounds=2, control=True,
    steer=SteerCfg(layers=(0.3, 0.7), n_contexts=16, contexts=TOY / "contexts.jsonl"),
    gen=GenCfg(max_new_tokens=24, n_prompts=8, prompts=TOY / "prompts", batch_size=32),
    dose=DoseCfg(n_kappas=3, n_probes=4),
    # an untrained model writes noise: the gates are opened so that every later stage has something to run on
    filter=FilterCfg(ppl_max=1e9, rep_max=1.0, loop_max=1.0, min_words=0, n_keep=16, min_train=4, max_attempts=32),
    heal=HealCfg(epochs=2, rank=4, lora_alpha=8.0, layers=(0.0, 1.0), pressure_every=2),
    eval=EvalCfg(
        vignettes=TOY / "vignettes.jsonl", instrument=TOY / "instrument.toml", think_tokens=4, n_prompts=4, n_texts=8, max_new_tokens=24,
        n_bootstrap=200, oracle="toylm", batch_size=32,
    ),
)
PRESETS: dict[str, tuple[str, RunConfig]] = {
    "gemma": ("gemma-3-4b-it on one 24 GB card.", RunConfig(n_rounds=8)),
    "toy": ("The bundled trained toy model: a real result in minutes on a laptop.", TOY_PRESET),
    "fast-dev": ("A tiny random model through every stage in seconds: meaningless numbers, working code.", FAST_DEV_PRESET),
}


def from_dict(kind: Any, value: Any) -> Any:
    """The record that `asdict` and JSON made `value` from: nested dataclasses, paths and tuples come back as they were.

    TypeError where a value is not of its field's type, as in a record of another version.
    """
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: from_dict(hints[name], item) for name, item in value.items()})
    if get_origin(kind) is tuple:
        return tuple(from_dict(get_args(kind)[0], item) for item in value)
    if kind is Path or Path in get_args(kind):
        return None if value is None and kind is not Path else Path(value)
    if isinstance(value, bool) is not (kind is bool) or not is_bearable(value, int | float if kind is float else kind):
        raise TypeError(f"{value!r:.80} is not a {getattr(kind, '__name__', kind)}")
    return value


def check(cfg: RunConfig) -> Trait:
    """Everything about the inputs that can be known before a model is loaded; returns the loaded trait.

    One UserError with a line for each thing that is wrong.
    """
    problems, trait = Problems(), None
    with problems.noted():
        trait = load_trait(cfg.trait, cfg.gen.prompts)
        _check_pool(cfg, trait)
    with problems.noted():
        load_contexts(cfg.steer)
    with problems.noted():
        load_vignettes(cfg.eval.vignettes)
    with problems.noted():
        load_instrument(cfg.eval.instrument)
    for field_name, backend, packages in (
        ("steer.backend", cfg.steer.backend, {"steering-lite": ("steering_lite",)}),
        ("eval.backend", cfg.eval.backend, {"tinymfv": ("moralmaps", "tinymfv")}),
    ):
        if backend in packages and not any(find_spec(name) for name in packages[backend]):
            problems.found.append(f"{field_name} is {backend!r}: its package is not installed; pip install -e '.[{backend}]', or use builtin")
    if cfg.quantize != "none" and not find_spec("bitsandbytes"):
        problems.found.append(f"quantize is {cfg.quantize!r}: its package is not installed; pip install -e '.[quantize]', or leave it out")
    if cfg.quantize != "none" and cfg.export is not None:
        problems.found.append(f"export is {str(cfg.export)!r}: a quantized model cannot be exported merged; leave out --export or --quantize")
    for field_name, folder in (("out", cfg.out), ("export", cfg.export)):
        with problems.noted():
            _check_writable(field_name, folder)
    problems.complain()
    cfg.out.mkdir(parents=True, exist_ok=True)
    return trait


def _check_pool(cfg: RunConfig, trait: Trait) -> None:
    """Enough prompts, and none of them both in training and in evaluation."""
    wanted, problems = cfg.gen.n_prompts + cfg.eval.n_prompts, Problems()
    if wanted > len(trait.prompts):
        problems.found.append(
            f"gen.n_prompts + eval.n_prompts is {cfg.gen.n_prompts} + {cfg.eval.n_prompts} = {wanted}: the pool of trait {trait.name!r} holds "
            f"{len(trait.prompts)}, and evaluation prompts are never trained on; ask for fewer"
        )
    for prompt, n in [most for most in Counter(trait.prompts).most_common(1) if most[1] > 1]:
        problems.found.append(f"the pool of trait {trait.name!r} holds {prompt!r:.80} {n} times: evaluation prompts are never trained on; keep it once")
    problems.complain()


def _check_writable(field_name: str, folder: Path | None) -> None:
    """UserError unless the folder can be made and written to; nothing is made yet."""
    if folder is None:
        return
    try:
        there = next(place for place in (folder, *folder.resolve().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OSError(f"{there} is {'not writable' if there.is_dir() else 'not a folder'}")
    except (OSError, ValueError, RuntimeError) as error:  # too long, a zero byte, a loop of links
        raise UserError(f"{field_name} is {str(folder)!r}: no folder can be made there ({error}); give another --{field_name}") from None


def inputs(cfg: RunConfig) -> dict[str, str]:
    """SHA-256 of the data files that a run reads, by the setting that names them; of the trait its values are kept instead."""
    paths = {"steer.contexts": cfg.steer.contexts, "eval.vignettes": cfg.eval.vignettes, "eval.instrument": cfg.eval.instrument}
    files = {name: resolve(path, name) for name, path in paths.items()}
    if cfg.gen.prompts is not None:
        files["gen.prompts"] = prompts_file(cfg.gen.prompts, cfg.trait.partition("/")[0])
    return {name: sha256(path) for name, path in files.items()}


def parse(argv: list[str] | None = None) -> tuple[str, RunConfig]:
    """(preset name, configuration) from the command line; a bad value exits 2 with the field, value and limit."""
    argv = sys.argv[1:] if argv is None else argv
    cfg = tyro.extras.overridable_config_cli(PRESETS, args=argv, prog="python -m steer_heal.run", description=inspect.getdoc(RunConfig))
    return next(word for word in argv if word in PRESETS), cfg
