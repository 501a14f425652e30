"""The almanac: the embedded default model, the facts it knows, and how it was made.

A toy language model with real anatomy: an ordinary Llama of a few million parameters, trained
here on a few thousand facts, small enough to ship and regular enough that editing methods made
for large models work on it.

    countries.csv people.csv    the world it knows
    facts → templates → corpus  sentences, and which paraphrases are held out
    tokenizer, recipe           words; every knob
    anatomy, drills             who may look at whom in training; practice in being edited
    train                       → model/
    answers, trials, check      what it knows, and whether it can be edited → report, card
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODEL_FOLDER: Final = Path(__file__).parent / "model"

__all__ = ["MODEL_FOLDER"]
