"""What a batch that is being written keeps of its tokens: a cache that grows, or one at fixed addresses for CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from steer_heal.lm import LM

Follow = Callable[[Int[Tensor, " kept"]], None]
"""Told which rows of the batch stay in it: the doses follow them."""


class Growing:
    """transformers' own cache. A row that has ended is gone at once."""

    def __init__(self, lm: LM, mask: Int[Tensor, "b s"], follow: Follow) -> None:
        """`mask` is 0 at the padding before each prompt."""
        self.lm, self.mask, self.follow = lm, mask, follow
        self.positions = prompt_positions(mask)
        self.cache = DynamicCache(config=lm.model.config.get_text_config())

    def feed(self, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b d"]:
        """The last position's final hidden state, after the prompts (first) or one more token of every row."""
        hidden = self.lm.text_model(
            input_ids=ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state[:, -1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return hidden

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.follow(rows)


class Fixed:
    """Every tensor of a step lies at a fixed address and has a fixed shape, so that on a GPU the step is one CUDA graph.

    Rows that have ended are computed along until half of the batch has; then the batch is halved and the step captured anew.
    Without CUDA the same step runs as it stands. Blocks with a sliding window keep all their tokens and mask what is behind it.
    """

    def __init__(self, lm: LM, mask: Int[Tensor, "b s"], n_new: int, follow: Follow) -> None:
        b, s = mask.shape
        self.lm, self.follow, self.config = lm, follow, lm.model.config.get_text_config()
        self.cache = Cache(layers=[StaticLayer(s + n_new) for _ in lm.blocks])
        self.real = torch.cat([mask.bool(), mask.new_ones(b, n_new, dtype=torch.bool)], dim=1)
        self.prompt_positions = prompt_positions(mask)
        self.position = self.prompt_positions[:, -1:].clone()
        self.slot = torch.full((1,), s - 1, device=mask.device)
        self.token = mask.new_zeros(b, 1)
        self.hidden = torch.empty(b, lm.width, dtype=lm.head.weight.dtype, device=mask.device)
        self.live = torch.arange(b, device=mask.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.n_warm = 0
        self.begun = False

    def feed(self, ids: Int[Tensor, "b s"]) -> Float[Tensor, "b d"]:
        if not self.begun:
            self.begun = True
            slots = torch.arange(ids.shape[1], device=ids.device)
            return self._forward(ids, self.prompt_positions, slots)
        self.token[self.live] = ids
        if self.graph is None and self.token.is_cuda and self.n_warm >= 2 and self.lm.fixed_addresses:
            self._capture()
        if self.graph is None:
            self._step()
            self.n_warm += 1
        else:
            self.graph.replay()
        return self.hidden[self.live]

    def _step(self) -> None:
        """One token of every row, from and into tensors that stay where they are."""
        self.position += 1
        self.slot += 1
        self.hidden.copy_(self._forward(self.token, self.position, self.slot))

    def _forward(self, ids: Int[Tensor, "b s"], positions: Int[Tensor, "b s"], slots: Int[Tensor, " s"]) -> Float[Tensor, "b d"]:
        return self.lm.text_model(
            input_ids=ids, attention_mask=self._masks(slots), position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state[:, -1]

    def _masks(self, slots: Int[Tensor, " s"]) -> dict[str, Bool[Tensor, "b 1 s total"]]:
        """What a token in each slot sees: real tokens up to itself and, where there is a window, not behind it.

        Padding sees itself, since a softmax over nothing is not a number; nothing sees padding.
        """
        keys = torch.arange(self.real.shape[1], device=slots.device)
        behind = slots[:, None] - keys
        seen = self.real[:, None, None] & (behind >= 0) | (behind == 0)
        window = getattr(self.config, "sliding_window", None)
        return {"full_attention": seen, "sliding_attention": seen & (behind < window) if window else seen}

    def _capture(self) -> None:
        """Records the step after two that warmed it up; where that fails, all decoding goes on without graphs."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
            self.graph = graph
        except RuntimeError as error:
            self.lm.fixed_addresses = False
            warnings.warn(f"a decoding step could not be captured as a CUDA graph ({str(error).splitlines()[0]}); decodes on without", stacklevel=2)

    def select(self, rows: Int[Tensor, " kept"]) -> None:
        self.live = self.live[rows]
        if len(self.live) > len(self.token) // 2:
            return
        self.graph, self.n_warm = None, 0
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[self.live], layer.values[self.live]
        self.real, self.token, self.position, self.hidden = (x[self.live] for x in (self.real, self.token, self.position, self.hidden))
        self.follow(self.live)
        self.live = torch.arange(len(self.live), device=self.live.device)


def prompt_positions(mask: Int[Tensor, "b s"]) -> Int[Tensor, "b s"]:
    """Rotary positions of left-padded prompts: each begins at 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
