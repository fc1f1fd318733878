"""steer-heal: a trait into a model's weights, without breaking the model.

    from steer_heal import SteerHeal

The names in `__all__` are the library (docs/library.md). They are imported when they are first used, so that
`import steer_heal` needs no torch. Under BEARTYPE=1 the annotations of all modules that hold tensors are checked at
run time (jaxtyping's import hook with beartype).
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if os.environ.get("BEARTYPE") == "1":
    from jaxtyping import install_import_hook

    for library in ("peft", "polars", "scipy.stats"):
        import_module(library)  # inside a checked module, the hook has them compiled anew: seconds
    with_tensors = (
        "backends",
        "bench",
        "diag",
        "evals",
        "library",
        "loop",
        "model",
        "recipe",
        "runs",
        "stages",
        "teachable",
    )
    # An int is a float, as for type checkers.
    checker = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
    install_import_hook([f"steer_heal.{part}" for part in with_tensors], checker)

if TYPE_CHECKING:
    from steer_heal.errors import UserError
    from steer_heal.inputs.traits import TraitFile
    from steer_heal.library import SteerHeal, define_trait, metrics_frame
    from steer_heal.model.steering import Vector
    from steer_heal.model.vector_files import from_steering_vectors, read_vector, to_steering_vectors, write_gguf
    from steer_heal.presets import PRESETS
    from steer_heal.settings import RunConfig

_HOMES = {
    "SteerHeal": "library",
    "define_trait": "library",
    "metrics_frame": "library",
    "TraitFile": "inputs.traits",
    "Vector": "model.steering",
    "read_vector": "model.vector_files",
    "write_gguf": "model.vector_files",
    "to_steering_vectors": "model.vector_files",
    "from_steering_vectors": "model.vector_files",
    "PRESETS": "presets",
    "RunConfig": "settings",
    "UserError": "errors",
}
__all__ = [
    "PRESETS",
    "RunConfig",
    "SteerHeal",
    "TraitFile",
    "UserError",
    "Vector",
    "define_trait",
    "from_steering_vectors",
    "metrics_frame",
    "read_vector",
    "to_steering_vectors",
    "write_gguf",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("steer-heal")
    if name in _HOMES:
        return getattr(import_module(f"steer_heal.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
