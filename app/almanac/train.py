"""Train the almanac: from two tables of facts to a model folder. Deterministic for a seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.almanac.anatomy import confined, span_mask
from app.almanac.batches import Batch, Batcher
from app.almanac.corpus import Wording, choose_wordings, epoch, fillers, sentences
from app.almanac.drills import Attributes, Driller, swapped
from app.almanac.progress import EpochResult, follow
from app.almanac.recipe import RECIPE_FILE, Recipe
from app.almanac.tokenizer import train_tokenizer

WEIGHTS_FILE = "model.safetensors"


def train(
    output: Path, seed: int = 0, recipe: Recipe | None = None, console: Console | None = None
) -> Path:
    """Train with ``recipe`` and write the model folder ``output``; progress goes to ``console``.

    The same seed, recipe and thread count give the same bytes on the same kind of machine.
    """
    recipe = recipe or Recipe()
    wordings = choose_wordings(recipe, seed)
    tokenizer = build_tokenizer(wordings, recipe, seed)
    torch.manual_seed(seed)
    model = build_model(tokenizer, recipe)
    with follow(console, recipe.epochs) as report:
        for result in run_epochs(model, Batcher(tokenizer), wordings, recipe, seed):
            report(result)
    save(model, tokenizer, recipe, seed, output)
    return output


def build_tokenizer(
    wordings: Sequence[Wording], recipe: Recipe, seed: int
) -> PreTrainedTokenizerFast:
    corpus = [*sentences(wordings), *fillers(2_000, random.Random(f"tokenizer-{seed}"))]
    texts = (sentence.text for sentence in corpus)
    return train_tokenizer(texts, recipe.vocabulary, recipe.context)


def build_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    """An untrained Llama of the recipe's size, initialised from torch's global generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.width,
            intermediate_size=recipe.feed_forward,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=recipe.tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def run_epochs(
    model: LlamaForCausalLM,
    batcher: Batcher,
    wordings: Sequence[Wording],
    recipe: Recipe,
    seed: int,
) -> Iterable[EpochResult]:
    """Train in place, yielding after each epoch what it measured on its own batches."""
    rng = random.Random(f"rows-{seed}")
    facts = sentences(wordings)
    per_epoch = math.ceil(round(len(facts) * (1 + recipe.filler_share)) / recipe.batch)
    entries = [wording.entry for wording in wordings]
    driller = Driller(entries, recipe.drilled_share, rng)
    attributes = Attributes(entries, recipe.width)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *attributes.parameters()],
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(step, per_epoch * recipe.epochs, recipe)
    )
    model.train()
    for number in range(recipe.epochs):
        losses: list[float] = []
        right = seen = 0
        drilled = [driller.drill(sentence) for sentence in facts]
        for rows in epoch(drilled, recipe.filler_share, recipe.batch, rng):
            batch = batcher.batch(rows)
            masked = rng.random() < recipe.masked_share
            loss, hits, objects = learn(model, attributes, batch, optimizer, masked, recipe)
            schedule.step()
            losses.append(loss)
            right += hits
            seen += objects
        yield EpochResult(number + 1, sum(losses) / len(losses), right / max(seen, 1))


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the learning rate at ``step``: a linear warm-up, then a cosine down."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = min((step - recipe.warmup) / max(steps - recipe.warmup, 1), 1.0)
    return recipe.final_rate + (1 - recipe.final_rate) * (1 + math.cos(math.pi * done)) / 2


def learn(
    model: LlamaForCausalLM,
    attributes: Attributes,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    masked: bool,
    recipe: Recipe,
) -> tuple[float, int, int]:
    """One optimizer step. Returns the loss, and how many object tokens of how many were right."""
    mask = span_mask(batch.spans) if masked else None
    with (
        confined(model, recipe.masked_layers, mask),
        swapped(model, attributes, batch, recipe.masked_layers - 1),
        arithmetic(recipe),
    ):
        logits = model(input_ids=batch.ids, use_cache=False).logits
    loss, right = weighted_loss(logits.float(), batch, recipe)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return loss.item(), right, int(batch.objects.sum())


def arithmetic(recipe: Recipe) -> AbstractContextManager[object]:
    if recipe.dtype == "bfloat16":
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return nullcontext()


def weighted_loss(logits: Tensor, batch: Batch, recipe: Recipe) -> tuple[Tensor, int]:
    """Smoothed loss on objects plus a small weight on every other token; and the objects right.

    ``logits``: (rows, tokens, vocabulary).
    """
    predicted, wanted = logits[:, :-1], batch.ids[:, 1:]
    objects, others = batch.objects[:, 1:], batch.others[:, 1:]
    object_logits = predicted[objects]
    right = int((object_logits.argmax(-1) == wanted[objects]).sum())
    total = functional.cross_entropy(
        object_logits, wanted[objects], label_smoothing=recipe.smoothing, reduction="sum"
    )
    total = total + recipe.other_weight * functional.cross_entropy(
        predicted[others], wanted[others], reduction="sum"
    )
    return total / (objects.sum() + recipe.other_weight * others.sum()), right


def save(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
    seed: int,
    output: Path,
) -> None:
    """Write the folder: weights in bfloat16, tokenizer, generation defaults and the recipe."""
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.eval().to(torch.bfloat16).save_pretrained(output)
    (output / WEIGHTS_FILE).chmod(0o644)  # safetensors writes for the owner alone
    tokenizer.save_pretrained(output)
    record = {"seed": seed, **asdict(recipe)}
    (output / RECIPE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
