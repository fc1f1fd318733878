"""The command: parse, check, load, loop.

    python -m steer_heal.run {gemma,toy,fast-dev} [flags]
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from steer_heal.config import RunConfig, check, parse
from steer_heal.records import UserError

if TYPE_CHECKING:
    from steer_heal.session import Session


def run_loop(session: Session) -> None:
    """The whole experiment, on one screen."""
    session.measure("base", -1)
    session.measure("prompted", -1, system=session.trait.positive)
    if session.cfg.control:
        session.run_control()
    for r in range(session.cfg.n_rounds):
        run_round(r, session)
    session.finish()


def run_round(r: int, session: Session) -> None:
    vector = session.teacher_vec(r)
    collected = session.collect(r, vector)
    session.measure("steered", r, vector=vector, dose=session.top_dose(collected))
    session.heal(r, collected)
    session.bake(r)
    session.measure("healed", r)
    session.end_round(r)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 stopped by something the person can mend, 2 a wrong argument."""
    try:
        preset, cfg = parse(argv)
        trait = check(cfg)
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from steer_heal.session import open_session

    try:
        session = open_session(cfg, preset, trait)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return session.guard(run_loop)


if __name__ == "__main__":
    sys.exit(main())
