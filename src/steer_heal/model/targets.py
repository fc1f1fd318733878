"""Which weights of the adapted blocks LoRA adapts: found from the model, not from a list of names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from steer_heal.errors import UserError
from steer_heal.model.lm import LM
from steer_heal.settings import Band


@dataclass(frozen=True)
class Targets:
    """Names in the order of the model. Norms and biases are never adapted, and not listed."""

    linears: tuple[str, ...]
    """Linear layers, by module."""
    experts: tuple[str, ...]
    """Stacks of experts [e d_out d_in] or [e d_in d_out], by parameter."""
    left_out: tuple[str, ...]
    """All other weights of two or more axes, such as routers, by their name within a block."""


def targets(lm: LM, layers: Band) -> Targets:
    """The weights of the blocks in the band `layers`; the same with adapters attached. UserError where none serves.

    Routers are left out: an update of theirs would change which experts a token visits, not what they compute.
    """
    prefix = blocks_path(lm)
    linears, experts, left_out = [], [], {}
    for i in lm.band("adapter.layers", layers):
        modules = {
            name.replace(".base_layer", ""): module  # the innermost of the wrappers comes last
            for name, module in lm.blocks[i].named_modules()
            if ".lora_" not in name
        }
        routed = [(name.rpartition(".")[0], n) for name, module in modules.items() if (n := _n_experts(module))]
        for name, module in modules.items():
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim < 2 or own.endswith("bias"):
                    continue
                if isinstance(module, nn.Linear) and not _is_router(name, module, routed):
                    linears.append(f"{prefix}.{i}.{name}")
                elif parameter.ndim == 3 and len(parameter) == _n_experts(module) and parameter.is_floating_point():
                    experts.append(f"{prefix}.{i}.{name}.{own}")
                else:
                    left_out[f"{name}.{own}"] = None
    if not linears and not experts:
        raise UserError(f"model {lm.name!r} has no linear layers that LoRA can adapt in blocks {layers} of its depth")
    return Targets(tuple(linears), tuple(experts), tuple(left_out))


def blocks_path(lm: LM) -> str:
    """Name of the list of blocks within the model, such as model.layers."""
    return next(name for name, module in lm.model.named_modules() if module is lm.blocks)


def _n_experts(module: nn.Module) -> int:
    """Experts whose weights the module holds as stacks; 0 in any other module."""
    n = getattr(module, "num_experts", 0)
    return n if any(p.ndim == 3 and len(p) == n for p in module.parameters(recurse=False)) else 0


def _is_router(name: str, linear: nn.Linear, routed: list[tuple[str, int]]) -> bool:
    """Whether a linear layer has an output for each of the experts beside it."""
    return any(name.startswith(f"{parent}.") and linear.out_features == n for parent, n in routed)
