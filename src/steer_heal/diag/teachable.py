"""Is there anything to teach? Shows what teachers made of the personas change on the trait's pairs, before training.

Each teacher is read on the base: the personas as system prompts, their contrast at several distances from the base and,
as a null band, contrasts of the personas of other traits and random vectors. Nothing is trained.
"""

import time
from dataclasses import asdict

from steer_heal.diag.lab import Given, Lab, PresetFlags, show
from steer_heal.errors import UserError, print_safe
from steer_heal.settings import settings
from steer_heal.teachable import teachable


@settings("")
class Flags(PresetFlags):
    short: bool = False
    """Read the contrast at one distance, and no random vectors, as at the start of a run."""


def main(flags: Flags, given: Given) -> None:
    lab = Lab.of(flags.settings(given))
    if not lab.bench.inputs.pairs:
        raise UserError(f"trait {lab.bench.trait.name!r} has no pairs; add [[pairs]] or pairs_file to its file")
    began = time.monotonic()
    with lab.stage("reading the pairs"):
        found = teachable(lab.bench, short=flags.short, progress=lab.progress)
    seconds = time.monotonic() - began
    rows = [
        {"teacher": each.name, **{k: v for k, v in asdict(each).items() if k not in ("name", "halves")}}
        | {"first half": each.halves[0], "second half": each.halves[1]}
        for each in (*found.personas, *found.contrasts, *found.null)
    ]
    should = (
        "the contrast move the pairs further than the persona does at the same kl, otherwise the prompt says it all.",
        "shift of the contrast be above twice the null band, otherwise an unrelated teacher moves the pairs as far.",
        "both halves of the pairs agree, otherwise a student that learns some of them will not carry it to others.",
    )
    more = {"verdict": found.verdict, "reason": found.reason, "band": found.band, "seconds": seconds}
    show(__doc__, rows, should, flags.out, "teachable", **more)
    print_safe(f"\n{found.verdict}: {found.reason} ({seconds:.0f} s)")
