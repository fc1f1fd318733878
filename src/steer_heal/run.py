"""The command: parse, check, load, loop.

    python -m steer_heal.run {gemma,toy,fast-dev} [flags]
    python -m steer_heal.run --resume out/<run>
    python -m steer_heal.run --verify out/<run>
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from steer_heal.config import check
from steer_heal.records import UserError
from steer_heal.resume import Stopped, finished, parse_or_resume, same_inputs, stoppable
from steer_heal.terminal import complain, say

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
    report = session.heal(r, collected)
    session.bake(r, report)
    session.measure("healed", r)
    session.end_round(r)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 stopped by something the person can mend, 2 a wrong argument, 130 by Ctrl-C, 143 by SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].split("=")[0] == "--verify":
        from steer_heal.provenance import main as verify

        return verify(argv)
    try:
        preset, cfg = parse_or_resume(argv)
        trait = check(cfg)
        if cfg.resume is not None:
            same_inputs(cfg.resume, cfg, trait)
            if finished(cfg.resume):
                say(f"{cfg.resume} is finished: there is nothing to resume; read {cfg.resume / 'report.html'}")
                return 0
    except (UserError, OSError, ValueError) as error:
        complain(error)
        return 2
    try:
        with stoppable():
            from steer_heal.guard import guard
            from steer_heal.session import open_session

            return guard(open_session(cfg, preset, trait), run_loop)
    except (UserError, OSError) as error:
        complain(error)
        return 1
    except Stopped as stopped:
        print("stopped before it began", file=sys.stderr)
        return stopped.status


if __name__ == "__main__":
    sys.exit(main())
