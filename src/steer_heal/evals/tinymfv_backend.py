"""The optional tinymfv package (moral-maps since July 2026) as the reader of the vignettes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from steer_heal.evals.instrument import Vignette
from steer_heal.evals.metrics import Condition
from steer_heal.lm import LM
from steer_heal.memory import ROWS_ON_CPU
from steer_heal.records import FOUNDATIONS
from steer_heal.steering import steer

try:
    import moralmaps
except ImportError:
    import tinymfv as moralmaps

_THEIR_NAMES = dict(zip(FOUNDATIONS, ("Care", "Fairness", "Loyalty", "Authority", "Sanctity", "Liberty", "SocialNorms"), strict=True))


def run(lm: LM, vignettes: Sequence[Vignette], condition: Condition, think_tokens: int, batch_size: int) -> dict[str, list[float]]:
    """Per vignette, the items of evals/moral_foundations.py, read with the package's own instrument.

    Its call takes no system prompt: a persona is put before the vignette, as templates without a system role do.
    """
    ask = lambda text: f"{condition.system}\n\n{text}" if condition.system else text
    rows = [
        {
            "id": v.id, "foundation": _THEIR_NAMES[v.foundation], "foundation_coarse": _THEIR_NAMES[v.foundation], "wrong": 0.0,
            "other_violate": ask(v.text), "self_violate": ask(v.text), "set": "steer-heal", **{f"human_{name}": 0.0 for name in _THEIR_NAMES.values()},
            f"human_{_THEIR_NAMES[v.foundation]}": 100.0,
        }
        for v in vignettes
    ]
    with steer(lm, condition.vector, [condition.dose]):  # one dose, broadcast over whatever batch it makes
        report = moralmaps.evaluate(
            lm.model, lm.tokenizer, vignettes=rows, max_think_tokens=max(1, think_tokens), batch_size=batch_size or ROWS_ON_CPU, return_per_row=True
        )
    by_id = {row["id"]: row for row in report["per_row"]}
    items: dict[str, list[float]] = {f"p_{name}": [] for name in FOUNDATIONS} | {"mass": [], "prefill_nll": [], "top1": [], "unscorable": []}
    for v in vignettes:
        row = by_id[v.id]
        for name, p in zip(FOUNDATIONS, row["p"], strict=True):
            items[f"p_{name}"].append(float(p))
        items["mass"].append(float(row["pmass_allowed"]))
        items["prefill_nll"].append(float(row["nll_prefill"]))
        items["unscorable"].append(float(math.isnan(float(row["pmass_allowed"]))))
        items["top1"].append(float(row["top1"] in (v.foundation, _THEIR_NAMES[v.foundation])))
    return items
