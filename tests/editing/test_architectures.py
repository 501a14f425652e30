"""Every architecture of the table takes an edit of every method.

Methods in closed form, whose searches, keys and writing ``test_reference`` compares with a plain
procedure on every architecture, are tried here on those that are unlike others.
"""

from __future__ import annotations

from math import exp

import pytest

from app.editing.registry import METHODS
from app.evaluation.scoring import score_targets
from tests.editing.conftest import CLOSED_FORM, FACTS, MakeEditor, hparams, pair_up
from tests.tiny import MemoryDeltas


@pytest.mark.parametrize(("model_type", "method"), pair_up(CLOSED_FORM, *METHODS))
def test_an_edit_raises_the_probability_of_its_target(
    make_editor: MakeEditor, deltas: MemoryDeltas, model_type: str, method: str
) -> None:
    editor, views = make_editor(model_type)
    fact = FACTS[0]
    plan = editor.plan(method, hparams(method, 1))
    (proposal,) = editor.propose(plan, (), [fact], independent=False, seed=0, timings={})
    after = (deltas.add(proposal.payload),)

    def probability(composition: tuple[str, ...]) -> float:
        model = views.get(composition).model
        (score,) = score_targets(model, views.loaded, [(fact.text, fact.target)])
        return exp(score.logprob)

    assert probability(after) > 1.1 * probability(())
