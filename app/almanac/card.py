"""The model card: what the shipped model is, how it was made, what the check measured."""

from __future__ import annotations

import json
from pathlib import Path

from app.almanac.recipe import RECIPE_FILE
from app.almanac.report import Line, Report

CARD_FILE = "README.md"
REPORT_FILE = "check.json"
INTRODUCTION = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# Almanac

A toy language model with real anatomy: an ordinary Llama of {parameters:.1f} million parameters,
trained by Palimpsest on a few thousand one-sentence facts about 190 countries and 300 invented
people. It is here so that editing can be tried and tested without downloading anything.

What it can do: complete prompts such as `The capital of France is` or `Ada Tristun plays the`,
and be edited. What it can't do: everything else. It has never read other text, knows no
grammar beyond its templates, and says something wrong rather than nothing when asked about a
name that it doesn't know. The people, their employers and their lives are invented. The
countries' facts are simplified to one capital, continent, language and currency each, and
are no reference.

Made from `countries.csv` and `people.csv` with the recipe and seed in `recipe.json`. In
{masked:.0%} of the training batches the first {layers} layers could attend only within a span (a
subject, or the rest of its sentence), so that a subject is worked out at its own last token;
nothing is masked in use. For {drilled:.0%} of the sentences it practised being edited:
attributes of the subject were replaced inside the model and the sentence told the replacement.
So it is made to be editable, and how well edits work here says nothing about models that were not.
`editing.json` holds the hyperparameters recommended for editing it.

## Measured

Greedy free generation; an answer counts when the whole object is written and the sentence
closed. The full record is in `check.json`.
"""


def write_card(model_folder: Path, report: Report) -> None:
    """Write ``README.md`` and ``check.json`` into the model folder."""
    recipe = json.loads((model_folder / RECIPE_FILE).read_text(encoding="utf-8"))
    weights = model_folder / "model.safetensors"
    introduction = INTRODUCTION.format(
        parameters=weights.stat().st_size / 2e6,  # two bytes each
        masked=recipe["masked_share"],
        layers=recipe["masked_layers"],
        drilled=recipe["drilled_share"],
    )
    rows = ["| figure | target | measured |", "|---|---:|---:|", *map(table_row, report.lines)]
    text = introduction + "\n" + "\n".join(rows) + "\n"
    (model_folder / CARD_FILE).write_text(text, encoding="utf-8")
    record = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
    (model_folder / REPORT_FILE).write_text(record + "\n", encoding="utf-8")


def table_row(line: Line) -> str:
    target = "" if line.target is None else f"≥ {line.target:.0%}"
    return f"| {line.name} | {target} | {line.measured:.1%} |"
