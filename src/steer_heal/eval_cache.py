"""What the untouched model measures is kept on disk: every run on the same weights, items and settings reads the same."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger

from steer_heal.evals.metrics import Condition
from steer_heal.events import versions
from steer_heal.lm import LM, weights_sha256
from steer_heal.records import EvalResult, Trait
from steer_heal.stages.bake import Gate, Student
from steer_heal.stages.cfg import EvalCfg, FilterCfg
from steer_heal.stages.evaluate import EvalItems, evaluate

CODE = Path(__file__).parent


@dataclass
class EvalCache:
    """`evaluate`, whose result is taken from `folder` where the model is the untouched one and all that it hangs on is the same.

    The name of a result is the SHA-256 of what it was made from: the weights' bytes, never the model's name.
    """

    folder: Path
    student: Student
    items: EvalItems
    trait: Trait

    def __call__(self, which: Gate, condition: Condition, cfg: EvalCfg, keep: FilterCfg, seed: int, base: EvalResult | None) -> EvalResult:
        read = lambda: evaluate(self.student, which, condition, self.items, self.trait, cfg, keep, seed, base)
        if not cfg.cache or which != "base" or condition.vector is not None:
            return read()
        settings = {
            "system": condition.system, "items": asdict(self.items), "trait": asdict(self.trait), "eval": asdict(cfg) | {"cache": None},
            "filter": asdict(keep), "seed": seed, "base": base and base.items,
        }
        path = self.folder / f"{digest({'model': identity(self.student.lm), 'program': program(), **settings})}.json"
        with suppress(OSError, ValueError, TypeError):  # none there, or not whole: measured again
            found = EvalResult(**json.loads(path.read_text(encoding="utf-8")))
            logger.info(f"the untouched model was measured before: taken from {path}")
            return found
        result = read()
        with suppress(OSError):  # a result that is not kept is no reason to stop
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(asdict(result)), encoding="utf-8")
            part.replace(path)
        return result


def identity(lm: LM) -> dict[str, Any]:
    """Everything about a model that its answers hang on."""
    config = {key: value for key, value in lm.model.config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    return {
        "weights": weights_sha256(lm.model), "config": config, "sampling": lm.model.generation_config.to_dict(),
        "tokenizer": digest(lm.tokenizer.backend_tokenizer.to_str()), "template": lm.tokenizer.chat_template, "ends": sorted(lm.end_ids),
        "device": lm.device.type, "threads": torch.get_num_threads(), "max_prompt_tokens": lm.max_prompt_tokens, "fixed_addresses": lm.fixed_addresses,
    }


def program() -> dict[str, str]:
    """Versions of the packages, and of every line of this one."""
    return versions() | {str(path.relative_to(CODE)): digest(path.read_text(encoding="utf-8")) for path in sorted(CODE.rglob("*.py"))}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
