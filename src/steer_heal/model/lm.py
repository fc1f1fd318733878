"""A causal language model with its tokenizer: loading, chat prompts, batched log-probabilities, hidden states.

Teacher-forced batches are padded on the right and need no mask: causal attention never lets a real token see the
padding after it, so that each row of a batch gives the same numbers as it does alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal
from unicodedata import name as character_name
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.hub import cached_file

from steer_heal.errors import UserError
from steer_heal.inputs.files import DATA, adapter_base, adapter_folder, candidates
from steer_heal.model.attention import pack_groups
from steer_heal.model.device import pick_device
from steer_heal.model.dtype import pick_dtype
from steer_heal.model.gguf import PACKAGED, cache, gguf_file, packaged_folder, quantization, read_gguf
from steer_heal.model.hub import from_cache_alone
from steer_heal.model.memory import BatchLimits, batches, fewer_rows, free_unused, ran_out
from steer_heal.model.prompts import require_finite_prompts, require_no_marks
from steer_heal.model.sampling import require_sampling, token_ids
from steer_heal.model.self_check import OTHER_MODEL, SAME_LOGITS, check_model, require_all_weights, require_decoder
from steer_heal.model.template import ChatTemplate
from steer_heal.progress import SILENT, Progress
from steer_heal.records import Conversation, alone
from steer_heal.settings import TINY_RANDOM, Band

LOGIT_CHUNK_ELEMENTS = 2**24
"""Positions x vocabulary that go through the head at once, which bounds memory for any batch size and length."""
LOGIT_CHUNK_ELEMENTS_ON_CPU = 2**22
"""The same on a CPU, where larger tensors are slower: the allocator returns their memory to the system each time."""
SHORTEST_CHUNK = 64
"""Minimum number of positions per chunk. With fewer, loading the head's weights takes longer than the product."""
BEFORE = ("\n", "x", ".")
"""One of these stands before a text that is encoded as part of a longer one: the first that no token joins with it."""
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "FULLWIDTH", "HALFWIDTH KATAKANA")
"""How Unicode's names of Chinese and Japanese characters begin."""
NAMES_OF_BLOCKS = ("layers", "h", "blocks")
"""Names of the list of decoder layers in the families of transformers."""
FIX_OF_MODEL = "give a folder with config.json and safetensors, a GGUF file, or a hub id"


@dataclass
class LM:
    """A loaded model in eval mode, its tokenizer, and the limits on prompts and batches."""

    model: PreTrainedModel
    tokenizer: Any
    """A PreTrainedTokenizerBase that pads on the left."""
    name: str
    """As the user gave it: see `load`."""
    max_prompt_tokens: int = 1024
    why_dtype: str = ""
    """The reason for the dtype of the weights."""
    date: str = ""
    """The date that the chat template reads, as YYYY-MM-DD. Empty: today's."""
    limits: BatchLimits = field(default_factory=BatchLimits)
    weights_note: str = ""
    """How the weights differ from the published ones, such as "8-bit (Q8_0) weights, unpacked from a GGUF file". Empty:
    they do not."""
    own_generation: Any = None
    """The model's generation config without the temperature and top-p of a run."""
    one_by_one: bool = False
    """Whether the model continues a text that it has read by one token at a time only. Found when it is loaded."""
    pads_inside: bool = True
    """Whether padding behind the first token of a row leaves its later tokens as they are. Found when it is loaded."""
    progress: Progress = SILENT
    """Receives the number of rows done after each batch that is read, and after each token that is written."""

    @property
    def base(self) -> str:
        """The model that an adapter names as its base: TINY_RANDOM, a name of PACKAGED, a hub id, or the absolute path
        of a folder or file on this machine."""
        return self.name if self.name in (TINY_RANDOM, *PACKAGED) else _located(self.name)

    @property
    def hub_id(self) -> str | None:
        """The model on the Hugging Face hub whose weights these are, or nearly are if there is a `weights_note`."""
        if self.name in PACKAGED:
            return PACKAGED[self.name].hub_id
        local = self.base == TINY_RANDOM or Path(self.base).is_absolute()
        return None if local else self.base

    @contextmanager
    def watched_by(self, progress: Progress) -> Iterator[None]:
        """Inside the context, `progress` receives the progress of all batched work."""
        before = self.progress
        self.progress = progress
        try:
            yield
        finally:
            self.progress = before

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @cached_property
    def text_model(self) -> Any:
        """The decoder stack without the head. In a multimodal model, that of the nested language model."""
        decoder = self.model.get_decoder()
        return getattr(decoder, "model", decoder) if decoder is self.model else decoder

    @cached_property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has a head"
        return head

    @cached_property
    def blocks(self) -> nn.ModuleList:
        found = [getattr(self.text_model, name, None) for name in NAMES_OF_BLOCKS]
        blocks = next((each for each in found if each is not None), None)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            raise UserError(
                f"model {self.name!r} ({type(self.model).__name__}) has no list of decoder layers to steer; "
                + OTHER_MODEL
            )
        return blocks

    def band(self, setting: str, layers: Band) -> range:
        """Indices of the blocks in a band, which is given as fractions of the depth. UserError if it is empty."""
        low, high = (int(share * len(self.blocks)) for share in layers)
        if low == high:
            raise UserError(
                f"{setting} is {layers}: it contains none of the {len(self.blocks)} blocks of {self.name!r}; widen it",
                resumable=False,
            )
        return range(low, high)

    def after_block(self, i: int, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        """Hooks block i: what `change` makes of the residual stream after it replaces the stream, unless it is None."""

        def hook(_module: nn.Module, _inputs: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
            if not isinstance(output, tuple):
                return change(output)
            changed = change(output[0])
            return None if changed is None else (changed, *output[1:])

        return self.blocks[i].register_forward_hook(hook)

    @property
    def quantized(self) -> bool:
        """Whether linear weights are stored as codes, to which no update can be added."""
        return getattr(self.model, "quantization_method", None) is not None

    @property
    def width(self) -> int:
        return self.head.weight.shape[1]

    @property
    def pad_id(self) -> int:
        """The token that fills short rows. Nothing is read at its positions."""
        own = (self.tokenizer.pad_token_id, *sorted(self.end_ids))
        return next((i for i in own if i is not None and i < self.n_ids), 0)

    @property
    def n_ids(self) -> int:
        """Number of token ids that the model can read."""
        embedding: Any = self.model.get_input_embeddings()
        return int(embedding.weight.shape[0])

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end the assistant's turn: the generation config's, the tokenizer's, and the one that the chat
        template writes after a reply. UserError if there is none, or the template writes plain text there."""
        configured = self.model.generation_config.eos_token_id
        ids = {*token_ids(configured), *token_ids(self.tokenizer.eos_token_id)}
        closing = self.encode(self.template.closing.strip())
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder} - {
            self.tokenizer.unk_token_id
        }
        if closing and closing[0] not in ids | special:
            raise UserError(
                f"the chat template of {self.name!r} ends a reply with the text {self.template.closing[:40]!r}, and no "
                "token of it ends decoding: texts would run past the turn; use a tokenizer with another template"
            )
        ids |= {*closing[:1]}
        if not ids:
            raise UserError(
                f"no token ends a reply of {self.name!r}: its chat template writes none, and its tokenizer and "
                "generation config name none; set eos_token_id in generation_config.json"
            )
        n_written = self.head.weight.shape[0]
        return frozenset(i for i in ids if i < n_written)  # others cannot be written

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """float32 logits of final hidden states, with the model's own scale and soft cap, if it has them."""
        logits = self.head(hidden.to(self.head.weight.dtype)).float()
        config = self.model.config.get_text_config()
        if divisor := getattr(config, "logits_scaling", None):
            logits = logits / divisor
        for name in ("logit_scale", "lm_head_multiplier"):
            logits = logits * (getattr(config, name, None) or 1)
        cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
        return logits if not cap else cap * torch.tanh(logits / cap)

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.of(self.tokenizer, self.name, self.date)

    def chat(self, user: str, system: str | None = None) -> tuple[int, ...]:
        """Token ids of one user message, up to where the assistant's reply begins."""
        return self.prompt(alone(user), system)

    def prompt(self, conversation: Conversation, system: str | None = None) -> tuple[int, ...]:
        """Token ids of a conversation, up to where the assistant's reply goes on. `system` is the system prompt if the
        conversation has none of its own."""
        if conversation.system is not None:
            system = conversation.system
        begun = conversation.prefill.rstrip()
        require_no_marks(self.tokenizer, {"the beginning of a reply": (begun,)})
        text = self.template.conversation(conversation.turns, system)
        return self.encode_prompt(text, self.encode_reply(begun) if begun else ())

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a whole text, without special tokens around it and without a limit on the length. UserError if
        the model has no embedding for one."""
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        if ids and max(ids) >= self.n_ids:
            raise UserError(
                f"the tokenizer of {self.name!r} has the token {self.tokenizer.decode([max(ids)])!r} with id "
                f"{max(ids)}, and the model has embeddings for {self.n_ids} ids: give the tokenizer of this model, or "
                "resize its embeddings"
            )
        return ids

    def encode_on(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that stands behind other text: without the space that some tokenizers put before a text
        that is encoded alone."""
        if not self._adds_space:
            return self.encode(text)
        return next((ids for piece in BEFORE if (ids := self._behind(piece, text)) is not None), self.encode(text))

    @cached_property
    def _adds_space(self) -> bool:
        """Whether the tokenizer puts a space before a text that is encoded alone."""
        return self.encode("a") != self._behind(BEFORE[0], "a")

    def _behind(self, piece: str, text: str) -> tuple[int, ...] | None:
        """Token ids of the text behind the piece; None if a token holds parts of both."""
        before = self.encode(piece)
        ids = self.encode(piece + text)
        return ids[len(before) :] if ids[: len(before)] == before else None

    def encode_reply(self, text: str, prefill: str = "") -> tuple[int, ...]:
        """Token ids of a reply of the assistant, as they stand behind `prompt`: where the reply begins or, behind a
        `prefill`, where it goes on in running text. Words are separated by a space if the prefill does not end in white
        space, but not in Chinese or Japanese."""
        begun = prefill.rstrip()
        if begun:
            apart = "" if _is_unspaced(begun[-1]) or _is_unspaced(text[:1]) else " "
            return self.encode_on((prefill[len(begun) :] or apart) + text)
        if self._adds_space and (ids := self._behind(self._opened, self.template.space + text)) is not None:
            return ids
        return self.encode_on(self.template.space + text)

    @cached_property
    def _opened(self) -> str:
        """A prompt, up to where the reply begins. Behind its last token some tokenizers put a space before a text."""
        return self.template.conversation(["Hello."])

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids. `special=True` keeps special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def encode_prompt(self, text: str, begun: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Token ids of a prompt that the chat template wrote, and of the reply that has `begun` behind it. UserError if
        there are too many; they are never cut."""
        ids = self.encode(text) + begun
        if len(ids) > self.max_prompt_tokens:
            raise UserError(
                f"a prompt has {len(ids)} tokens, max_prompt_tokens is {self.max_prompt_tokens}: {text[:80]!r}...; "
                "shorten it or raise --max-prompt-tokens (a cut prompt would lose the assistant tag)"
            )
        return ids

    def in_batches(self, lengths: Sequence[int], work: Callable[[list[int]], None]) -> None:
        """Calls `work` with the indices of rows of similar length, until it has been called for every row.

        After an out-of-memory error `work` is called again with fewer rows, so it must be idempotent.
        """
        todo = list(batches(lengths, self.limits.read_tokens))
        self.progress.at(0, len(lengths))
        while todo:
            group = todo[0]
            try:
                work(group)
            except RuntimeError as error:
                self.limits.read_tokens = fewer_rows(len(group), error) * lengths[group[-1]]
            else:
                todo.pop(0)
                self.progress.at(len(lengths) - sum(map(len, todo)), len(lengths))
                continue
            free_unused()
            rest = [i for later in todo for i in later]
            todo = [[rest[j] for j in part] for part in batches([lengths[i] for i in rest], self.limits.read_tokens)]

    def pad(
        self, rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "right"
    ) -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
        """(token ids, mask) of rows of different lengths. The mask is 0 at padding."""
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        padded = pad_sequence(ids, batch_first=True, padding_value=self.pad_id, padding_side=side)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True, padding_side=side)
        return padded.to(self.device), mask.to(self.device)

    def hidden(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "b s d"]:
        """Final hidden states of right-padded rows. Ignore the positions after a row's end."""
        return self.text_model(input_ids=self.pad(rows)[0], use_cache=False).last_hidden_state

    def completion_hidden(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[Float[Tensor, "_ d"]]:
        """For each row, the final hidden states before each completion token."""
        rows = list(zip(prompts, completions, strict=True))
        hidden = self.hidden([[*prompt, *completion] for prompt, completion in rows])
        return [h[len(p) - 1 : len(p) - 1 + len(c)] for h, (p, c) in zip(hidden, rows, strict=True)]

    @torch.no_grad()
    def completion_nll(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        """For each row, -log p of each completion token given all tokens before it, float32 [n] on the CPU, in nats."""
        out: list[Tensor] = [torch.empty(0)] * len(prompts)

        def work(group: list[int]) -> None:
            hidden = self.completion_hidden([prompts[i] for i in group], [completions[i] for i in group])
            for i, before in zip(group, hidden, strict=True):
                out[i] = self.nll(before, completions[i]).cpu()

        self.in_batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], work)
        require_finite_prompts(self, prompts, out)
        return out

    @torch.no_grad()
    def nll(self, hidden: Float[Tensor, "n d"], ids: Sequence[int]) -> Float[Tensor, " n"]:
        """-log p of each token id, given the final hidden state before it, in nats. The head runs in chunks."""
        labels = torch.tensor(ids, device=self.device, dtype=torch.long)
        size = self.chunk_size
        parts = [
            nn.functional.cross_entropy(self.logits(h), t, reduction="none")
            for h, t in zip(hidden.split(size), labels.split(size), strict=True)
        ]
        return torch.cat(parts)

    @property
    def chunk_size(self) -> int:
        """Number of positions that go through the head at once."""
        elements = LOGIT_CHUNK_ELEMENTS_ON_CPU if self.device.type == "cpu" else LOGIT_CHUNK_ELEMENTS
        return max(SHORTEST_CHUNK, elements // self.head.weight.shape[0])


def weights_digest(model: nn.Module) -> dict[str, str]:
    """{"sha256", "dtype"} of the base weights. Attached adapters and the device make no difference.

    The SHA-256 is that of the tensors' own digests (of name, dtype, shape and bytes), sorted by name. Tensors are
    hashed in parallel, so that a model of 10 GB takes seconds.
    """
    weights = {n.replace("base_layer.", ""): value for n, value in model.state_dict().items() if ".lora_" not in n}

    def tensor_digest(name: str) -> bytes:
        tensor = weights[name].detach()
        digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sha256 = hashlib.sha256(b"".join(pool.map(tensor_digest, sorted(weights)))).hexdigest()
    return {"sha256": sha256, "dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    max_prompt_tokens: int = 1024,
    quantize: str = "none",
    temperature: float | None = None,
    top_p: float | None = None,
    date: str = "",
    accept_terms: bool = False,
) -> LM:
    """Loads a model with frozen weights. It never runs code that comes with the model.

    Args:
        name: A folder with safetensors, a GGUF file or a folder with one, a hub id, TINY_RANDOM, a name of PACKAGED, or
            the folder of an adapter, which is added to the weights of its base model.
        temperature, top_p: Replace the values of the model's generation config.
        date: What the chat template reads as the date. By default today's.
        accept_terms: Whether the terms of a model of PACKAGED that has some are accepted.
    """
    if (adapter := adapter_folder(name)) is not None:
        from steer_heal.model.student import merge_saved  # student imports this module

        lm = load(
            adapter_base(adapter),
            device=device,
            dtype=dtype,
            max_prompt_tokens=max_prompt_tokens,
            quantize=quantize,
            temperature=temperature,
            top_p=top_p,
            date=date,
            accept_terms=accept_terms,
        )
        merge_saved(lm, adapter)
        lm.name = name
        return lm
    place = pick_device(device)
    model, tokenizer, why, note = _read(name, dtype, place, quantize, accept_terms=accept_terms)
    if quantize == "none":
        try:
            model.to(device=place)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise UserError(_too_large(name, place)) from None
    lm = wrap(model, tokenizer, name, max_prompt_tokens, why, temperature=temperature, top_p=top_p, date=date)
    lm.weights_note = note
    return lm


def _read(
    name: str, dtype: str, place: torch.device, quantize: str, *, accept_terms: bool
) -> tuple[Any, Any, str, str]:
    """(model, tokenizer, why it has its dtype, what its weights are)."""
    model: Any
    if name == TINY_RANDOM:
        if quantize != "none":
            raise UserError(
                f"quantize is {quantize!r}: only saved weights can be quantized, and {name!r} is not saved; give "
                "another model"
            )
        model, tokenizer = _tiny_random()
        picked, why = pick_dtype(dtype, place, model.config)
        return model.to(dtype=picked), tokenizer, why, ""
    if name not in PACKAGED:
        return _saved(name, dtype, place, quantize)
    folder = packaged_folder(name, accept_terms=accept_terms)
    return *_saved(str(folder), dtype, place, quantize)[:3], PACKAGED[name].note


def wrap(
    model: Any,
    tokenizer: Any,
    name: str,
    max_prompt_tokens: int = 1024,
    why_dtype: str = "",
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    date: str = "",
) -> LM:
    """Makes a loaded model an LM, on its device and in its dtype. `Original.restore` undoes the changes to the model.

    The model is set to eval mode, its weights are frozen, and the tokenizer gets a padding token if it has none.
    UserError if the model or its tokenizer is unsupported.
    """
    if model.dtype not in SAME_LOGITS:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in SAME_LOGITS)
        raise UserError(f"the weights of model {name!r} are {model.dtype}: they must be one of {known}; convert them")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if next(model.parameters()).device.type == "cpu":
        pack_groups(model)
    _keep_4_bit_weights_as_they_are(model, name)
    own_generation = copy.deepcopy(model.generation_config)
    if temperature:
        model.generation_config.update(do_sample=True, temperature=temperature)
    if top_p:
        model.generation_config.update(do_sample=True, top_p=top_p)
    require_sampling(model.generation_config, name)
    lm = LM(model.eval().requires_grad_(False), tokenizer, name, max_prompt_tokens, why_dtype, date)
    lm.own_generation = own_generation
    check_model(lm)
    if not lm.template.takes_system:
        warnings.warn(
            f"the chat template of {name!r} does not support system messages: they are put before the user's message",
            stacklevel=3,
        )
    return lm


def _packing(model: nn.Module) -> list[Any]:
    """Layers whose 4-bit weight bitsandbytes repacks in the first forward pass without gradients on a CPU with
    AVX512-BF16. The repacked weight passes no gradient, and needs an input width that is a multiple of 64."""
    return [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]


def _keep_4_bit_weights_as_they_are(model: nn.Module, name: str) -> None:
    """Switches the repacking off. UserError if a weight is repacked already."""
    for module in _packing(model):
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UserError(
                f"model {name!r} was used on this CPU before: bitsandbytes repacked its 4-bit weights, which pass no "
                "gradient now; load it again, and hand it over before its first forward pass"
            )
    for module in _packing(model):
        module.support_avx512bf16_for_cpu = False


class Original:
    """The state of a model before `wrap` changes it. `restore` brings it back."""

    held: ClassVar[WeakValueDictionary[int, Original]] = WeakValueDictionary()
    """By the id of the model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.held[id(model)] = self
        self.model = model
        self.generation_config = model.generation_config
        model.generation_config = copy.deepcopy(model.generation_config)
        self.attention: Any = model.config._attn_implementation
        self.training = {module for module in model.modules() if module.training}
        self.packing = _packing(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @classmethod
    def require_free(cls, model: object) -> None:
        """UserError if the model was wrapped before and is not restored."""
        if id(model) in cls.held:
            raise UserError("the model is held by another SteerHeal; call close() of that one first")

    def restore(self) -> None:
        self.held.pop(id(self.model), None)
        self.model.generation_config = self.generation_config
        if self.model.config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)
        for module in self.model.modules():
            module.training = module in self.training
        for module in self.packing:
            module.support_avx512bf16_for_cpu = True
        for parameter in self.trained:
            parameter.requires_grad_(True)


def _is_unspaced(character: str) -> bool:
    """Whether a character, by its name in Unicode, is Chinese or Japanese, which have no space between words."""
    return bool(character) and character_name(character, "").startswith(UNSPACED)


def _located(name: str) -> str:
    """The absolute path of a model in the working directory or among the shipped files; any other name unchanged."""
    local = next((place for place in candidates(name) if (place / "config.json").exists()), None)
    if local is None and Path(name).exists():
        local = Path(name)
    return name if local is None else str(local.absolute())


def _saved(name: str, dtype: str, place: torch.device, quantize: str) -> tuple[Any, Any, str, str]:
    """(model, tokenizer, reason for its dtype, LM.weights_note) of a folder, a file or a hub id. UserError if it cannot
    be loaded."""
    folder = _located(name)
    file = gguf_file(folder)
    if file is not None and quantize != "none":
        raise UserError(
            f"quantize is {quantize!r}: GGUF weights are unpacked, and {file} is a GGUF file; give a folder of "
            "safetensors, or leave out --quantize"
        )
    try:
        if file is not None:
            model, tokenizer = read_gguf(file)
            picked, why = pick_dtype(dtype, place, model.config.get_text_config())
            return model.to(dtype=picked), tokenizer, why, quantization(file)
        where: dict[str, Any] = {"trust_remote_code": False}
        if not Path(folder).exists():
            where["local_files_only"] = from_cache_alone(folder)
        config = AutoConfig.from_pretrained(folder, **where)
        if quantize != "none" and getattr(config, "quantization_config", None) is not None:
            raise UserError(
                f"quantize is {quantize!r}: the weights of {name!r} are quantized already; leave out --quantize"
            )
        kind = require_decoder(name, config)
        picked, why = pick_dtype(dtype, place, config.get_text_config())
        how = {} if quantize == "none" else _nf4(picked, place)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **where)
        tokenizer.encode("Hello.", add_special_tokens=False, verbose=False)  # odd settings fail in their own way
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _template_of_processor(folder, where)
        loaded: Any = kind.from_pretrained(
            folder, config=config, dtype=picked, use_safetensors=True, output_loading_info=True, **where, **how
        )
        model, loading = loaded
        if hasattr(model, "peft_config"):
            raise UserError(
                f"model {name!r} comes with an adapter, which now acts on top of its weights; give the adapter's base "
                "model, or a model without one"
            )
        require_all_weights(name, loading, config.get_text_config().num_hidden_layers)
        return model, tokenizer, why, ""
    except UserError:
        raise
    except Exception as error:  # each library reports a damaged file in its own way
        if isinstance(error, RuntimeError) and ran_out(error):
            raise UserError(_too_large(name, place)) from None
        ours = Path(name).parent == cache()
        fix = "delete that folder, and it is created again" if ours else FIX_OF_MODEL
        if not ours and (Path(folder) / "config.json").exists():
            fix = "correct or restore its files"
        why = " ".join(str(error).split())
        raise UserError(f"model {name!r} could not be loaded: {fix} ({why})") from None


def _too_large(name: str, place: torch.device) -> str:
    return (
        f"model {name!r} does not fit into the memory of {place}; use a smaller model or, if its weights are plain "
        "linear layers in safetensors, --quantize nf4"
    )


def _template_of_processor(folder: str, where: dict[str, Any]) -> str | None:
    """The chat template that a model keeps in the file of its processor alone."""
    file = cached_file(
        folder,
        "chat_template.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        local_files_only=where.get("local_files_only", False),
    )
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))["chat_template"]


def _nf4(compute: torch.dtype, place: torch.device) -> dict[str, Any]:
    """Options with which transformers loads linear weights as 4-bit normal floats (QLoRA; Dettmers et al. 2023)."""
    warnings.warn(
        "quantize nf4: decoding is about three times slower than in bfloat16; use it only if bfloat16 does not fit",
        stacklevel=3,
    )
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )
    return {"quantization_config": config, "device_map": {"": place}}


def _tiny_random() -> tuple[PreTrainedModel, Any]:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "toylm", padding_side="left")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(config)
    model.name_or_path = TINY_RANDOM
    model.generation_config.update(do_sample=True, temperature=1.0, eos_token_id=tokenizer.eos_token_id)
    return model, tokenizer
