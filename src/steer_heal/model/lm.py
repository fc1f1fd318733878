"""A causal language model with its tokenizer: loading, chat prompts, batched log-probabilities, hidden states.

Everything that is teacher-forced runs right-padded and without a mask: causal attention never lets a real
token see the padding behind it, so a batch reads exactly what its rows read alone.
"""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from steer_heal.errors import UserError
from steer_heal.inputs.files import DATA, candidates
from steer_heal.model.attention import pack_groups
from steer_heal.model.device import pick_device
from steer_heal.model.dtype import pick_dtype
from steer_heal.model.gguf import HUB_ID, SMOL, cache, gguf_file, read_gguf, smol_folder
from steer_heal.model.hub import from_cache_alone
from steer_heal.model.memory import BatchLimits, batches, fewer_rows, free_unused, ran_out
from steer_heal.progress import SILENT, Progress
from steer_heal.settings import TINY_RANDOM, Band

Side = Literal["left", "right"]
LOGIT_CHUNK_ELEMENTS, LOGIT_CHUNK_ELEMENTS_ON_CPU = 2**24, 2**22
"""Positions x vocabulary that go through the head at once: bounds memory whatever the batch and length. On a CPU larger
tensors are slower: the allocator returns them to the system, which hands them out again page by page."""
SAME_LOGITS = 0.02
"""Difference, as a share of the largest logit, that may be rounding: a bfloat16 has 8 bits."""
FIX_OF_MODEL = "give a folder with config.json and safetensors, a GGUF file, or a hub id"
SHORTEST_CHUNK = 64
"""Fewest positions per chunk: with fewer, reading the head's weights takes longer than multiplying with them."""

_MARK = "SYSTEM-GOES-HERE"


@dataclass
class LM:
    """A loaded model in eval mode, its tokenizer, and the limits that prompts are checked against."""

    model: PreTrainedModel
    tokenizer: Any
    """A PreTrainedTokenizerBase, padding on the left."""
    name: str
    max_prompt_tokens: int = 1024
    why_dtype: str = ""
    """Why its weights are in the dtype that they are in."""
    limits: BatchLimits = field(default_factory=BatchLimits)
    weights_note: str = ""
    progress: Progress = SILENT
    """Told of the rows that are done and all rows of the work at hand, after each batch that is read and each token
    that is written. Rows that are being written count in part."""

    @contextmanager
    def watched_by(self, progress: Progress) -> Iterator[None]:
        """Tells `progress` of the work that is done inside."""
        before = self.progress
        self.progress = progress
        try:
            yield
        finally:
            self.progress = before

    @property
    def base(self) -> str:
        """What an adapter names as its base: a hub id, or the absolute path of a folder or file on this machine."""
        return self.name if self.name == TINY_RANDOM else _located(self.name)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @cached_property
    def text_model(self) -> Any:
        """The decoder stack without the head; inside multimodal wrappers, the nested language model."""
        return self.model.get_decoder()

    @cached_property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert head is not None, "a causal language model has a head"
        return head

    @cached_property
    def blocks(self) -> nn.ModuleList:
        blocks = getattr(self.text_model, "layers", None)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            raise UserError(f"model {self.name!r} ({type(self.model).__name__}) has no list of decoder layers to steer")
        return blocks

    def band(self, setting: str, layers: Band) -> range:
        """Block indices of a band given as fractions of the depth. UserError naming `setting` where it holds none."""
        low, high = (int(share * len(self.blocks)) for share in layers)
        if low == high:
            raise UserError(
                f"{setting} is {layers}: it holds none of the {len(self.blocks)} blocks of {self.name!r}; widen it",
                resumable=False,
            )
        return range(low, high)

    @property
    def quantized(self) -> bool:
        """Whether linear weights are codes that nothing can be added to."""
        return getattr(self.model, "quantization_method", None) is not None

    @property
    def width(self) -> int:
        return self.head.weight.shape[1]

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end the assistant's turn: the generation config's and the tokenizer's."""
        configured = self.model.generation_config.eos_token_id
        ids = configured if isinstance(configured, list) else [configured]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """float32 logits of final hidden states, with the model's scale and soft cap where it has one."""
        logits, config = self.head(hidden.to(self.head.weight.dtype)).float(), self.model.config.get_text_config()
        if scale := getattr(config, "logits_scaling", None):
            logits = logits / scale
        cap = getattr(config, "final_logit_softcapping", None)
        return logits if not cap else cap * torch.tanh(logits / cap)

    def chat(self, user: str, system: str | None = None) -> tuple[int, ...]:
        """Token ids of one user message up to and including the opened assistant turn."""
        return self.encode_prompt(self.chat_text(user, system))

    def chat_text(self, user: str, system: str | None = None) -> str:
        """One user message up to and including the opened assistant turn.

        Where the template has no place for a system message, it opens the user's. Without one, the prompt is what the
        template makes of the user's message alone, its own default system prompt included: what a user of the model
        gets.
        """
        return self.conversation([user], system)

    def conversation(self, turns: Sequence[str], system: str | None = None) -> str:
        """What the user and the assistant said in turn, the user first and last; otherwise as `chat_text`."""
        first, *rest = turns
        messages = [{"role": "system", "content": system}] if system else []
        if system and not self.takes_system:
            messages, first = [], f"{system}\n\n{first}"
        roles = ("user", "assistant")
        messages += [{"role": roles[i % 2], "content": text} for i, text in enumerate((first, *rest))]
        return self.render(messages, add_generation_prompt=True)

    @cached_property
    def takes_system(self) -> bool:
        """Whether the chat template writes a system message. Some refuse it; some drop it without a word."""
        system, user = {"role": "system", "content": _MARK}, {"role": "user", "content": "_"}
        try:
            return _MARK in self.render([system, user], add_generation_prompt=True)
        except UserError:
            return False

    def render(self, messages: Sequence[Mapping[str, str]], **how: bool) -> str:
        """Messages as the chat template writes them. UserError where it refuses one."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, **how)
        except TemplateError as error:
            roles = " and a ".join(dict.fromkeys(message["role"] for message in messages))
            raise UserError(
                f"the chat template of {self.name!r} refuses a {roles} message ({error}); use a model that takes them"
            ) from None

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of the text alone, without special tokens around it. Who calls it says where it is too long."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of token ids; `special` keeps special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=not special)

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Ids of templated text (the template writes its own BOS); too long is an error, never a cut."""
        ids = self.encode(text)
        if len(ids) > self.max_prompt_tokens:
            raise UserError(
                f"a prompt has {len(ids)} tokens, max_prompt_tokens is {self.max_prompt_tokens}: {text[:80]!r}...; "
                "shorten it or raise --max-prompt-tokens (a cut prompt would lose the assistant tag)"
            )
        return ids

    def in_batches(self, lengths: Sequence[int], work: Callable[[list[int]], None]) -> None:
        """Calls `work` with row indices of similar length until every row had its turn.

        After an out-of-memory error `work` is called again with fewer rows, so it must be idempotent.
        """
        todo = list(batches(lengths, self.limits.read_tokens))
        self.progress.at(0, len(lengths))
        while todo:
            group, failed = todo[0], None
            try:
                work(group)
            except RuntimeError as error:
                failed = fewer_rows(len(group), error)
            if failed is None:
                todo.pop(0)
                self.progress.at(len(lengths) - sum(map(len, todo)), len(lengths))
                continue
            free_unused()
            self.limits.read_tokens = failed * lengths[group[-1]]
            rest = [i for later in todo for i in later]
            todo = [[rest[j] for j in part] for part in batches([lengths[i] for i in rest], self.limits.read_tokens)]

    def pad(self, rows: Sequence[Sequence[int]], side: Side = "right") -> tuple[Int[Tensor, "b s"], Int[Tensor, "b s"]]:
        """(token ids, mask) of rows of different lengths. The mask is 0 at the padding."""

        def stacked(values: list[Tensor], padding: int) -> Tensor:
            one = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=padding, padding_side=side)
            return one.to(self.device)

        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        return stacked(ids, self.pad_id), stacked([torch.ones_like(row) for row in ids], 0)

    def hidden(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "b s d"]:
        """Final hidden states of right-padded rows; positions past a row's end hold nothing of use."""
        return self.text_model(input_ids=self.pad(rows)[0], use_cache=False).last_hidden_state

    @torch.no_grad()
    def completion_nll(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Per row: -log p of each completion token given all before it, float32 [n] on the CPU, nats."""
        out: list[Tensor] = [torch.empty(0)] * len(prompts)

        def read(group: list[int]) -> None:
            hidden = self.hidden([[*prompts[i], *completions[i]] for i in group])
            for row, i in enumerate(group):
                start, n = len(prompts[i]) - 1, len(completions[i])
                out[i] = self.nll(hidden[row, start : start + n], completions[i]).cpu()

        self.in_batches([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], read)
        return out

    @torch.no_grad()
    def nll(self, hidden: Float[Tensor, "n d"], ids: Sequence[int]) -> Float[Tensor, " n"]:
        """-log p of each id from the final hidden state before it, in nats, through the head in chunks."""
        targets, size = torch.tensor(ids, device=self.device, dtype=torch.long), self.chunk_size
        parts = [
            nn.functional.cross_entropy(self.logits(h), t, reduction="none")
            for h, t in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.cat(parts)

    @property
    def chunk_size(self) -> int:
        """Positions that go through the head at once."""
        elements = LOGIT_CHUNK_ELEMENTS_ON_CPU if self.device.type == "cpu" else LOGIT_CHUNK_ELEMENTS
        return max(SHORTEST_CHUNK, elements // self.head.weight.shape[0])


def weights_digest(model: nn.Module) -> dict[str, str]:
    """{"sha256", "dtype"} of the base weights, the same with adapters attached and on every device.

    SHA-256 over the digests of every tensor (name, dtype, shape and bytes) by name. Tensors are hashed in parallel, so
    that a model of some 10 GB takes seconds.
    """
    weights = {n.replace("base_layer.", ""): value for n, value in model.state_dict().items() if ".lora_" not in n}

    def of_tensor(name: str) -> bytes:
        tensor = weights[name].detach()
        digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sha256 = hashlib.sha256(b"".join(pool.map(of_tensor, sorted(weights)))).hexdigest()
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
) -> LM:
    """A folder of safetensors, a GGUF file or a folder with one, a hub id, or a name of ours (`tiny-random`,
    `smollm2-135m-instruct`). No remote code. Weights are frozen.

    `temperature` and `top_p` replace those of the model's generation config."""
    place = pick_device(device)
    model: Any
    if name == TINY_RANDOM:
        if quantize != "none":
            raise UserError(
                f"quantize is {quantize!r}: weights are quantized while a folder is read, and {name!r} has none; give "
                "a saved model"
            )
        model, tokenizer = _tiny_random()
        picked, why = pick_dtype(dtype, place, model.config)
        model.to(dtype=picked)
    else:
        model, tokenizer, why = _saved(str(smol_folder()) if name == SMOL else name, dtype, place, quantize)
        name = HUB_ID if name == SMOL else name  # an adapter names its base so that PEFT finds it on any machine
    if quantize == "none":
        try:
            model.to(device=place)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise UserError(f"model {name!r} does not fit into the memory of {place}; use --quantize nf4") from None
    return wrap(model, tokenizer, name, max_prompt_tokens, why, temperature=temperature, top_p=top_p)


def wrap(
    model: Any,
    tokenizer: Any,
    name: str,
    max_prompt_tokens: int = 1024,
    why_dtype: str = "",
    *,
    temperature: float | None = None,
    top_p: float | None = None,
) -> LM:
    """A loaded model as an LM, where it is and in its dtype: `Original` can undo what this does to it.

    The model is set to eval mode, its weights are frozen, and the tokenizer gets a padding token where it has none.
    UserError where the model or its tokenizer cannot be used.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {name!r} has no chat template; steer-heal reads personas at the assistant tag, so use "
            "an instruction-tuned model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if next(model.parameters()).device.type == "cpu":
        pack_groups(model)
    _keep_4_bit_weights_as_they_are(model, name)
    given = {name: value for name, value in (("temperature", temperature), ("top_p", top_p)) if value}
    if given:
        model.generation_config.update(do_sample=True, **given)
    lm = LM(model.eval().requires_grad_(False), tokenizer, name, max_prompt_tokens, why_dtype)
    assert lm.blocks is not None
    _require_own_logits(lm)
    if not lm.takes_system:
        warnings.warn(
            f"the chat template of {name!r} takes no system message: it is put before the user's, with a blank line",
            stacklevel=3,
        )
    return lm


def _packing(model: nn.Module) -> list[Any]:
    """Layers whose 4-bit weight bitsandbytes packs anew when it is first read without a gradient on a CPU with
    AVX512-BF16: the packed one passes no gradient on, and an input width must be a multiple of 64."""
    return [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]


def _keep_4_bit_weights_as_they_are(model: nn.Module, name: str) -> None:
    """UserError where one is packed already."""
    for module in _packing(model):
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise UserError(
                f"model {name!r} was used on this CPU before: bitsandbytes packed its 4-bit weights, which pass no "
                "gradient on now; load it again, and hand it over before it reads anything"
            )
    for module in _packing(model):
        module.support_avx512bf16_for_cpu = False


class Original:
    """What `wrap` changes of a model, as it was: `restore` puts it back."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.generation_config = model, model.generation_config
        model.generation_config = copy.deepcopy(model.generation_config)
        self.attention: Any = model.config._attn_implementation
        self.training = {module for module in model.modules() if module.training}
        self.packing = _packing(model)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def restore(self) -> None:
        self.model.generation_config = self.generation_config
        if self.model.config._attn_implementation != self.attention:
            self.model.set_attn_implementation(self.attention)
        for module in self.model.modules():
            module.training = module in self.training
        for module in self.packing:
            module.support_avx512bf16_for_cpu = True
        for parameter in self.trained:
            parameter.requires_grad_(True)


def _located(name: str) -> str:
    """The absolute path of a model in the working directory or among the shipped files; any other name unchanged."""
    local = next((place for place in candidates(name) if (place / "config.json").exists()), None)
    if local is None and Path(name).exists():
        local = Path(name)
    return name if local is None else str(local.absolute())


def _saved(name: str, dtype: str, place: torch.device, quantize: str) -> tuple[Any, Any, str]:
    """(model, tokenizer, why in its dtype) of a folder, a file or a hub id. UserError where it cannot be read."""
    folder = _located(name)
    file = gguf_file(folder)
    if file is not None and quantize != "none":
        raise UserError(
            f"quantize is {quantize!r}: {file} is read unpacked; give a folder of safetensors, or leave it out"
        )
    try:
        if file is not None:
            model, tokenizer = read_gguf(file)
            picked, why = pick_dtype(dtype, place, model.config.get_text_config())
            return model.to(dtype=picked), tokenizer, why
        where: dict[str, Any] = {"trust_remote_code": False}
        if not Path(folder).exists():
            where["local_files_only"] = from_cache_alone(folder)
        config = AutoConfig.from_pretrained(folder, **where)
        picked, why = pick_dtype(dtype, place, config.get_text_config())
        how = {} if quantize == "none" else _nf4(picked, place)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **where)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=picked, use_safetensors=True, **where, **how
        )
        return model, tokenizer, why
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are readers
        ours = Path(name) == cache() / SMOL
        fix = "delete that folder: it is made again" if ours else FIX_OF_MODEL
        raise UserError(f"model {name!r} could not be loaded: {fix} ({error})") from None


@torch.no_grad()
def _require_own_logits(lm: LM) -> None:
    """UserError where the model does more to its final hidden states than `LM.logits` does."""
    ids = lm.encode("Hello.") or (lm.pad_id,)
    own, ours = lm.model(lm.pad([ids])[0]).logits[0].float(), lm.logits(lm.hidden([ids])[0])
    if not own.isfinite().all():
        raise UserError(
            f"model {lm.name!r} gives logits that are not finite: its weights are damaged, or too large for "
            f"{lm.model.dtype}; restore them, or give --dtype float32"
        )
    apart = (own - ours).abs().max().item()
    if not apart <= SAME_LOGITS * own.abs().max().item():
        raise UserError(
            f"model {lm.name!r} ({type(lm.model).__name__}) changes its logits in a way that steer-heal does not know: "
            f"they are {apart:.2g} away from the product with its head; use a model of a family that README lists"
        )


def _nf4(compute: torch.dtype, place: torch.device) -> dict[str, Any]:
    """How transformers reads linear weights as 4-bit normal floats (QLoRA; Dettmers et al. 2023)."""
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
