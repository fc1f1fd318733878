"""Every annotated shape is checked in the process of the tests.

Their subprocesses skip the checks: installing them takes seconds in each process. So do functions inside of functions
that annotate no shape: their checks would be made anew in each call of the outer one, which takes a seventh of the time
of a run. tests/test_end_to_end.py checks those too.

In each test a function is checked in its first calls. The shapes of the hundreds that follow are made alike. Every call
is checked where KILLS is set, as every night.
"""

import os
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import jaxtyping

checked = jaxtyping.jaxtyped
N_CALLS = 20
CALLS: Counter[Callable[..., Any]] = Counter()
"""Of the test that runs."""


def checked_where_shaped(*, typechecker):
    """The decorator that the import hook gives to every class and function."""

    def decorate(made):
        shaped = any("Tensor, " in str(annotation) for annotation in made.__annotations__.values())
        if not shaped and "<locals>" in made.__qualname__:
            return made
        tested = checked(made, typechecker=typechecker)
        return tested if isinstance(made, type) or "KILLS" in os.environ else at_first(tested, made)

    return decorate


def at_first(tested: Callable[..., Any], made: Callable[..., Any]) -> Callable[..., Any]:
    """`tested` in the first calls of a test, then `made`."""

    @wraps(tested)
    def called(*args, **kwargs):
        CALLS[made] += 1
        return (tested if CALLS[made] <= N_CALLS else made)(*args, **kwargs)

    return called


jaxtyping.jaxtyped = checked_where_shaped
os.environ["BEARTYPE"] = "1"
import steer_heal  # noqa: E402, F401 - reads BEARTYPE

del os.environ["BEARTYPE"]
