"""Every annotated shape is checked in the process of the tests.

Their subprocesses skip the checks: installing them takes seconds in each process. So do functions inside of functions
that annotate no shape: their checks would be made anew in each call of the outer one, which takes a seventh of the time
of a run. tests/test_end_to_end.py checks those too.
"""

import os

import jaxtyping

checked = jaxtyping.jaxtyped


def checked_where_shaped(*, typechecker):
    """The decorator that the import hook gives to every class and function."""

    def decorate(made):
        shaped = any("Tensor, " in str(annotation) for annotation in made.__annotations__.values())
        return checked(made, typechecker=typechecker) if shaped or "<locals>" not in made.__qualname__ else made

    return decorate


jaxtyping.jaxtyped = checked_where_shaped
os.environ["BEARTYPE"] = "1"
import steer_heal  # noqa: E402, F401 - reads BEARTYPE

del os.environ["BEARTYPE"]
