"""Divergences between a student and a reference, per position and aggregated: pure functions, in nats and float32.

A new divergence is an entry in DIVERGENCES, a new aggregate a case in `aggregate`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from steer_heal.settings import Aggregate


def kl_rev(logp: Float[Tensor, "n v"], logp_ref: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(student || reference) in nats at each of n completion positions.

    sum_v p(v) [log p(v) - log q(v)]; mode-seeking: punishes mass where the reference has none.
    """
    return einsum(logp.exp(), logp - logp_ref, "n v, n v -> n")


def kl_fwd(logp: Float[Tensor, "n v"], logp_ref: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
    """KL(reference || student) in nats at each of n completion positions.

    sum_v q(v) [log q(v) - log p(v)]; mass-covering: punishes losing what the reference can say.
    """
    return einsum(logp_ref.exp(), logp_ref - logp, "n v, n v -> n")


def kl_rev_slope(
    logp: Float[Tensor, "n v"], logp_ref: Float[Tensor, "n v"], kl: Float[Tensor, " n"]
) -> Float[Tensor, "n v"]:
    """d KL(student || reference) / d the student's logits: p (log p - log q - KL)."""
    return (logp - logp_ref).sub_(kl[:, None]).mul_(logp.exp())


def kl_fwd_slope(
    logp: Float[Tensor, "n v"], logp_ref: Float[Tensor, "n v"], kl: Float[Tensor, " n"]
) -> Float[Tensor, "n v"]:
    """d KL(reference || student) / d the student's logits: p - q."""
    return logp.exp().sub_(logp_ref.exp())


class Divergence(NamedTuple):
    """A distance between two distributions at each position, and its gradient."""

    value: Callable[[Tensor, Tensor], Tensor]
    """(logp, logp_ref), both Float[n v] -> distance in nats, Float[n]."""
    slope: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(logp, logp_ref, value) -> gradient at the student's logits, Float[n v]. None: autograd computes it, which takes
    more memory."""
    barrier: bool = True
    """Whether the heal penalises it."""

    def gradient(
        self, logp: Float[Tensor, "n v"], logp_ref: Float[Tensor, "n v"], value: Float[Tensor, " n"]
    ) -> Float[Tensor, "n v"]:
        """d value / d the student's logits."""
        if self.slope is not None:
            return self.slope(logp, logp_ref, value)
        with torch.enable_grad():
            logits = logp.detach().requires_grad_()
            total = self.value(logits.log_softmax(-1), logp_ref).sum()
            return torch.autograd.grad(total, logits)[0]


DIVERGENCES: dict[str, Divergence] = {
    "kl_rev": Divergence(kl_rev, kl_rev_slope),
    "kl_fwd": Divergence(kl_fwd, kl_fwd_slope),
    "none": Divergence(kl_rev, kl_rev_slope, barrier=False),
}
"""Divergences by the name that `heal.divergence` takes. `none` is no barrier: kl_rev is only measured and reported."""

_ROOT_EPSILON = 1e-12


def aggregate(divergence: Float[Tensor, " n"], how: Aggregate) -> Float[Tensor, ""]:
    """One number for all positions of a completion, in nats. A tau suits one aggregate only.

    The mean hides a short loop. rmse = sqrt(mean of squares) and max show it, and so does p95 if the loop covers more
    than a twentieth of the positions. The epsilon keeps the gradient of the root finite at the first step, when the
    divergence is 0 at every position.
    """
    divergence = divergence.float()
    if how == "mean":
        return divergence.mean()
    if how == "rmse":
        return (divergence.square().mean() + _ROOT_EPSILON).sqrt()
    if how == "p95":
        return torch.quantile(divergence, 0.95)
    return divergence.max()


def spectral_step(
    a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"], direction: Float[Tensor, " d_in"]
) -> tuple[Float[Tensor, ""], Float[Tensor, " d_in"]]:
    """(||B A v'||, v'): one step of power iteration towards the largest singular value of B A, from the unit vector
    `direction` to the next one, v'.

    Each optimiser step takes one such step. The gradient flows through A and B only (spectral norm regularisation;
    Yoshida and Miyato 2017).
    """
    with torch.no_grad():
        following = a.T @ (b.T @ (b @ (a @ direction)))
        norm = following.norm()
        following = following / norm if norm > 0 else direction
    return (b @ (a @ following)).norm(), following


def barrier(divergence: Float[Tensor, "*b"], lam: float, tau: float) -> Float[Tensor, "*b"]:
    """lam * relu(divergence - tau): 0 up to tau nats, then linear."""
    return lam * torch.relu(divergence - tau)
