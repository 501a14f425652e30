"""A small task for lm-evaluation-harness, and a look at what it found.

python -m benchmarks.lm_eval_capitals write
    writes docs/examples/lm_eval/capitals.jsonl
python -m benchmarks.lm_eval_capitals compare SAMPLES...
    holds the harness's log-likelihoods (its --log_samples) against the base model's own,
    computed here in one pass a sentence
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from app.almanac import MODEL_FOLDER
from app.almanac.facts import COUNTRIES, read_table
from app.weights.loading import LoadedModel, load_model

TASK = Path(__file__).parent.parent / "docs" / "examples" / "lm_eval" / "capitals.jsonl"
CHOICES = 4
RELATION = "capital"
PROMPT = "The capital of {} is"


@dataclass(frozen=True, slots=True)
class Likelihood:
    """What the harness says of a continuation: its log-likelihood in nats, and whether each of
    its tokens is the likeliest."""

    context: str
    continuation: str
    logprob: float
    greedy: bool


def write_task(path: Path = TASK) -> int:
    """How many questions were written: one a line, with the right answer and three others in a
    drawn order. Answers end with a full stop, behind which the model ends its text."""
    capitals = [entry for entry in read_table(COUNTRIES) if entry.relation == RELATION]
    names = sorted({entry.object for entry in capitals})
    drawing = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for entry in capitals:
            others = drawing.sample([name for name in names if name != entry.object], CHOICES - 1)
            choices = drawing.sample([entry.object, *others], CHOICES)
            question = {
                "prompt": PROMPT.format(entry.subject),
                "choices": [f"{choice}." for choice in choices],
                "answer": choices.index(entry.object),
            }
            file.write(json.dumps(question, ensure_ascii=False) + "\n")
    return len(capitals)


def read_samples(file: Path) -> Iterator[Likelihood]:
    """What the harness logged, one continuation at a time."""
    for line in file.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        for arguments, answers in zip(
            sample["arguments"].values(), sample["filtered_resps"], strict=True
        ):
            logprob, greedy = answers
            yield Likelihood(
                arguments["arg_0"], arguments["arg_1"], float(logprob), str(greedy) == "True"
            )


@torch.inference_mode()
def score(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """The model's own log-likelihood of a continuation, and whether it is its greedy one."""
    ids = loaded.encode(context + continuation)
    start = len(loaded.encode(context))
    logits: Tensor = loaded.model(torch.tensor([ids], device=loaded.device)).logits
    scores = logits[0, start - 1 : -1].float().log_softmax(dim=-1)
    wanted = torch.tensor(ids[start:], device=loaded.device)
    own = scores.gather(1, wanted[:, None]).sum()
    return float(own), bool((scores.argmax(dim=-1) == wanted).all())


def compare(samples: Sequence[Likelihood], loaded: LoadedModel) -> dict[str, float]:
    """How far the harness's figures are from the model's own."""
    own = [score(loaded, one.context, one.continuation) for one in samples]
    pairs = list(zip(samples, own, strict=True))
    return {
        "continuations": len(samples),
        "largest_difference_nats": max(abs(one.logprob - logprob) for one, (logprob, _) in pairs),
        "mean_logprob_nats": sum(logprob for logprob, _ in own) / len(own),
        "greedy": sum(one.greedy for one in samples),
        "greedy_alike": sum(one.greedy == greedy for one, (_, greedy) in pairs),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("write")
    comparing = commands.add_parser("compare")
    comparing.add_argument("samples", type=Path, nargs="+")
    comparing.add_argument("--model", default=str(MODEL_FOLDER))
    comparing.add_argument("--dtype", default="float32")
    given = parser.parse_args(arguments)
    if given.command == "write":
        sys.stdout.write(f"{write_task()} questions in {TASK}\n")
        return
    loaded = load_model(given.model, device="cpu", dtype=given.dtype)
    for file in given.samples:
        found = compare(list(read_samples(file)), loaded)
        sys.stdout.write(f"{json.dumps({'samples': file.name, **found})}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
