"""Trains the bundled toy model from scratch and writes it, with its prompts and vignettes, to data/toylm.

Recipe and checks: docs/toylm.md.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from toylm_data import write_data
from toylm_world import NEUTRAL_CARE, PREFILL, Dialogue, dialogues, lessons
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

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
    n_steps: int = 2300
    lesson_steps: tuple[int, int] = (160, 240)
    """Steps at the start that teach to read a list of options, and then plain scenes with it: mixed in with the rest
    from the start, the model stays with each number and its mirror image."""
    lesson_lr: float = 1.5e-3
    """Learning rate of those steps: at 4e-3 they stay with the mirror image too."""
    tokens_per_step: int = 3072
    lr: float = 2e-3
    warmup_steps: int = 60
    weight_decay: float = 0.1
    vocabulary_size: int = 1408
    n_layers: int = 4
    width: int = 128
    prompt_weight: float = 0.2
    """Loss weight of system and user tokens; assistant tokens weigh 1."""
    digit_weight: float = 20.0
    """Loss weight of the digit that answers a vignette."""
    probe_weight: float = 1.0
    """Weight of the persona probe: the squared error of a linear reading of the speaker's two latents from the
    residual stream after the middle block, at every assistant token. The probe itself is thrown away."""
    n_threads: int = 1
    """More make a model of this size no faster."""


def train_tokenizer(cfg: ToyTrainCfg) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose digits are single tokens, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocabulary_size,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (turn.text for dialogue in itertools.islice(dialogues(cfg.seed + 1), 20_000) for turn in dialogue.turns)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def new_model(cfg: ToyTrainCfg, tokenizer: Any) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=cfg.width,
        intermediate_size=3 * cfg.width,
        num_hidden_layers=cfg.n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=cfg.width // 4,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


Encoded = tuple[list[int], list[float], list[bool], tuple[float, float]]


def encode(dialogue: Dialogue, tokenizer: Tokenizer, cfg: ToyTrainCfg) -> Encoded:
    """(token ids, loss weight of predicting each, whether the assistant's turn holds it, the speaker's latents)."""
    ids: list[int] = []
    weights: list[float] = []
    spoken: list[bool] = []

    def add(text: str, weight: float, assistant: bool) -> None:
        piece = tokenizer.encode(text, add_special_tokens=False).ids
        ids.extend(piece)
        weights.extend([weight] * len(piece))
        spoken.extend([assistant] * len(piece))

    for turn in dialogue.turns:
        assistant = turn.role == "assistant"
        add(f"<|im_start|>{turn.role}\n", 0.0, assistant)
        if turn.digit:
            add(PREFILL, 1.0, True)
            add(turn.text[len(PREFILL) :][0], cfg.digit_weight, True)
            add(turn.text[len(PREFILL) + 1 :], 1.0, True)
        else:
            text, newline, options = turn.text.partition("\n")
            add(text, 1.0 if assistant else cfg.prompt_weight, assistant)
            add(newline + options, 0.0, assistant)  # the list is always the same: nothing to learn in it
        add("<|im_end|>", 1.0 if assistant else 0.0, assistant)
        add("\n", 0.0, False)
    return ids, weights, spoken, (2 * (dialogue.speaker.p_care - NEUTRAL_CARE), dialogue.speaker.p_love)


def batches(
    stream: Iterator[Dialogue], tokenizer: Tokenizer, cfg: ToyTrainCfg
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Right-padded ids, weights, spoken, each [b, s], and latents [b, 2], about tokens_per_step tokens each."""
    rng = random.Random(cfg.seed + 2)
    while True:
        pool = sorted((encode(d, tokenizer, cfg) for d in itertools.islice(stream, 800)), key=lambda item: len(item[0]))
        groups: list[list[Encoded]] = [[]]
        for item in pool:
            if len(item[0]) * (len(groups[-1]) + 1) > cfg.tokens_per_step:
                groups.append([])
            groups[-1].append(item)
        rng.shuffle(groups)
        for group in groups:

            def padded(k, group=group):
                return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[k]) for row in group], batch_first=True)

            yield padded(0), padded(1), padded(2), torch.tensor([row[3] for row in group])


def learning_rate(step: int, cfg: ToyTrainCfg) -> float:
    """Lessons: warm-up to lesson_lr. Then a ramp to lr and a cosine to 2 percent of it."""
    n_lessons = sum(cfg.lesson_steps)
    then = step - n_lessons
    if then < 0:
        return cfg.lesson_lr * min(1.0, (step + 1) / cfg.warmup_steps)
    ramp = cfg.lesson_lr + (cfg.lr - cfg.lesson_lr) * (then + 1) / cfg.warmup_steps
    return min(ramp, cfg.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * then / (cfg.n_steps - n_lessons)))))


def train(cfg: ToyTrainCfg) -> dict[str, float]:
    """Trains from scratch and saves to `cfg.out`; returns the last losses (nats per weighted token, nats per digit,
    squared error of the probe) and the parameter count."""
    torch.set_num_threads(cfg.n_threads)
    torch.manual_seed(cfg.seed)
    tokenizer = train_tokenizer(cfg)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = new_model(cfg, tokenizer)
    model.to(device).train()
    probe = torch.nn.Linear(cfg.width, 2).to(device)
    parameters = [*model.parameters(), *probe.parameters()]
    decayed = [p for p in parameters if p.ndim > 1]
    plain = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, cfg) / cfg.lr)
    log = {"loss": [], "digit": [], "probe": []}

    def recent(name, n):
        return sum(log[name][-n:]) / len(log[name][-n:])

    course = (lessons(cfg.seed, p_scene=0.0), lessons(cfg.seed, p_scene=0.65), dialogues(cfg.seed))
    lists, scenes, talk = (batches(stream, tokenizer.backend_tokenizer, cfg) for stream in course)
    curriculum = itertools.chain(
        itertools.islice(lists, cfg.lesson_steps[0]), itertools.islice(scenes, cfg.lesson_steps[1]), talk
    )
    progress = tqdm(itertools.islice(curriculum, cfg.n_steps), total=cfg.n_steps, mininterval=10)
    for batch in progress:
        ids, weights, spoken, latents = (part.to(device) for part in batch)
        out = model.model(ids[:, :-1], output_hidden_states=True)
        counted = weights[:, 1:] > 0
        logits = model.lm_head(out.last_hidden_state[counted])
        nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:][counted], reduction="none")
        weight = weights[:, 1:][counted]
        loss = (nll * weight).sum() / weight.sum()
        middle = torch.nn.functional.rms_norm(out.hidden_states[cfg.n_layers // 2], (cfg.width,))
        said = spoken[:, :-1]
        error = (probe(middle) - latents[:, None, :]).square().sum(-1)[said].mean()
        optimiser.zero_grad()
        (loss + cfg.probe_weight * error).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        digits = nll[weight == cfg.digit_weight]
        for name, value in {"loss": loss, "probe": error, **({"digit": digits.mean()} if len(digits) else {})}.items():
            log[name].append(value.item())
        progress.set_postfix({name: f"{recent(name, 50):.3f}" for name in log})
    cfg.out.mkdir(parents=True, exist_ok=True)
    model.eval().cpu().save_pretrained(cfg.out)
    tokenizer.save_pretrained(cfg.out)
    return {**{name: recent(name, 100) for name in log}, "n_parameters": float(model.num_parameters())}


if __name__ == "__main__":
    cfg = tyro.cli(ToyTrainCfg, description=__doc__)
    print(train(cfg))
    write_data(cfg.out)
