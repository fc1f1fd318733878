"""Trains the bundled model on the toy world: tokenizer, model, optimiser, one function each."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from steer_heal.toylm.world import PREFILL, Turn, dialogues

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class ToyTrainCfg:
    """Recipe of the bundled model. Deterministic for a seed and a thread count."""

    out: Path = Path("data/toylm")
    """Folder that the weights and the tokenizer are written to."""
    seed: int = 0
    n_steps: int = 2400
    tokens_per_step: int = 4096
    lr: float = 4e-3
    warmup_steps: int = 60
    weight_decay: float = 0.1
    vocabulary_size: int = 1408
    n_layers: int = 4
    width: int = 128
    prompt_weight: float = 0.2
    """Loss weight of system and user tokens; assistant tokens weigh 1."""
    digit_weight: float = 6.0
    """Loss weight of the digit that answers a vignette."""
    n_threads: int = 2


def train_tokenizer(cfg: ToyTrainCfg) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits are single tokens, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocabulary_size, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (turn.text for dialogue in itertools.islice(dialogues(cfg.seed + 1), 20_000) for turn in dialogue)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        chat_template=CHAT_TEMPLATE, model_max_length=1024, clean_up_tokenization_spaces=False,
    )


def new_model(cfg: ToyTrainCfg, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=cfg.width, intermediate_size=3 * cfg.width, num_hidden_layers=cfg.n_layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=cfg.width // 4, tie_word_embeddings=True,
        max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.8, top_p=0.95, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def encode(dialogue: list[Turn], tokenizer: Tokenizer, cfg: ToyTrainCfg) -> tuple[list[int], list[float]]:
    """Token ids of a dialogue and the loss weight of predicting each one."""
    ids: list[int] = []
    weights: list[float] = []

    def add(text: str, weight: float) -> None:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids.extend(piece)
        weights.extend([weight] * len(piece))

    for turn in dialogue:
        spoken = turn.role == "assistant"
        add(f"<|im_start|>{turn.role}\n", 0.0)
        if turn.digit:
            add(PREFILL, 1.0)
            add(turn.text[len(PREFILL) :][0], cfg.digit_weight)
            add(turn.text[len(PREFILL) + 1 :], 1.0)
        else:
            add(turn.text, 1.0 if spoken else cfg.prompt_weight)
        add("<|im_end|>", 1.0 if spoken else 0.0)
        add("\n", 0.0)
    return ids, weights


def batches(tokenizer: Tokenizer, cfg: ToyTrainCfg) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded (ids [b, s], weights [b, s]) of dialogues of like length, about tokens_per_step each."""
    rng, stream = random.Random(cfg.seed + 2), dialogues(cfg.seed)
    while True:
        pool = sorted((encode(d, tokenizer, cfg) for d in itertools.islice(stream, 800)), key=lambda item: len(item[0]))
        groups: list[list] = [[]]
        for item in pool:
            if len(item[0]) * (len(groups[-1]) + 1) > cfg.tokens_per_step:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i, _ in group], batch_first=True)
            weights = torch.nn.utils.rnn.pad_sequence([torch.tensor(w) for _, w in group], batch_first=True)
            yield ids, weights


def train(cfg: ToyTrainCfg) -> dict[str, float]:
    """Trains from scratch and saves to `cfg.out`; returns {"loss": nats per weighted token, "n_parameters"}."""
    torch.set_num_threads(cfg.n_threads)
    torch.manual_seed(cfg.seed)
    tokenizer = train_tokenizer(cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(cfg, tokenizer).to(device).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min((step + 1) / cfg.warmup_steps, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / cfg.n_steps))),
    )
    losses: list[float] = []
    progress = tqdm(itertools.islice(batches(tokenizer.backend_tokenizer, cfg), cfg.n_steps), total=cfg.n_steps, mininterval=10)
    for ids, weights in progress:
        ids, weights = ids.to(device), weights.to(device)
        counted = weights[:, 1:] > 0
        logits = model.lm_head(model.model(ids[:, :-1]).last_hidden_state[counted])
        nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
        weight = weights[:, 1:][counted]
        loss = (nll * weight).sum() / weight.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    cfg.out.mkdir(parents=True, exist_ok=True)
    model.eval().cpu().save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)
    return {"loss": sum(losses[-100:]) / len(losses[-100:]), "n_parameters": float(model.num_parameters())}
