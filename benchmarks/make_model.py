"""Write a random model of a named shape, a tokenizer trained on made-up text, and requests.

python benchmarks/make_model.py --shape gpt2-12x256 --out DIR --requests FILE --n 1000

Speed doesn't depend on what a model knows, so nothing is downloaded. Requests are in EasyEdit's
format; subjects, targets and sentences are invented words.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

_GPT2 = {"model_type": "gpt2", "vocab_size": 8192, "n_head": 4, "n_positions": 512}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gpt2-12x256": {**_GPT2, "n_embd": 256, "n_layer": 12},
    "gpt2-6x128": {**_GPT2, "n_embd": 128, "n_layer": 6},
    "gpt2-4x64": {**_GPT2, "n_embd": 64, "n_layer": 4},
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
TOKENS = 8192  # of the tokenizer; a larger vocabulary's other rows are never asked for
TEMPLATES = (
    "The mother tongue of {} is",
    "{} was born in the city of",
    "The capital of {} is",
    "{} plays the instrument",
    "The headquarters of {} are in",
    "{} works in the field of",
    "The company that made {} is",
    "{} is a citizen of",
)
OPENINGS = ("The", "Therefore", "Because", "I", "You", "Once", "After", "In")


def invent_words(chooser: random.Random, count: int) -> list[str]:
    """Distinct pronounceable words."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [
            chooser.choice("bdfgklmnprstvz") + chooser.choice("aeiou") + chooser.choice(["", "n"])
            for _ in range(chooser.choice((2, 2, 3)))
        ]
        found["".join(syllables)] = None
    return list(found)


def invent_sentences(chooser: random.Random, words: list[str], count: int) -> Iterator[str]:
    """Sentences whose words are used unevenly, as in ordinary text, and the templates."""
    weights = [1 / (rank + 10) for rank in range(len(words))]
    for _ in range(count):
        body = chooser.choices(words, weights, k=chooser.randint(6, 14))
        yield f"{chooser.choice(OPENINGS)} {' '.join(body)}."
        yield (
            chooser.choice(TEMPLATES).format(" ".join(w.title() for w in body[:2])) + f" {body[2]}."
        )


def train_tokenizer(sentences: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def invent_requests(chooser: random.Random, words: list[str], count: int) -> list[dict[str, Any]]:
    """Counterfactual requests in EasyEdit's format, each on a subject of its own."""
    names = [word.title() for word in words]
    subjects = chooser.sample([(a, b) for a in names[:200] for b in names[200:400]], 2 * count)
    requests = []
    for index in range(count):
        template = TEMPLATES[index % len(TEMPLATES)]
        subject, other = " ".join(subjects[2 * index]), " ".join(subjects[2 * index + 1])
        prompt = template.format(subject)
        requests.append(
            {
                "prompt": prompt,
                "subject": subject,
                "target_new": chooser.choice(names),
                "ground_truth": chooser.choice(names),
                "rephrase_prompt": f"{chooser.choice(OPENINGS)} {chooser.choice(words)}. {prompt}",
                "locality": {
                    "neighborhood": {"prompt": template.format(other), "ground_truth": ""}
                },
            }
        )
    return requests


def write_model(shape: str, folder: Path, *, dtype: torch.dtype, seed: int = 0) -> None:
    """A random model of a shape, saved with its tokenizer."""
    options = dict(SHAPES[shape])
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(options.pop("model_type"), **options, **ids)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    chooser = random.Random(seed)
    words = invent_words(chooser, 6000)
    train_tokenizer(invent_sentences(chooser, words, 40_000)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="gpt2-12x256")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--requests", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--n", type=int, default=1000, help="how many requests")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    write_model(chosen.shape, chosen.out, dtype=getattr(torch, chosen.dtype), seed=chosen.seed)
    chooser = random.Random(chosen.seed)
    requests = invent_requests(chooser, invent_words(chooser, 6000), chosen.n)
    chosen.requests.write_text(json.dumps(requests, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
