from __future__ import annotations

import torch

from app.domain import SUBJECT_SLOT
from app.editing.contexts import generate_contexts
from tests.tiny import TinyModels


def test_contexts_are_the_same_whenever_they_are_generated(tiny: TinyModels) -> None:
    """Whatever was drawn before, and whether more are wanted or fewer."""
    loaded = tiny.load()
    torch.manual_seed(1)
    first = generate_contexts(loaded, 4, 10, 7)
    torch.manual_seed(2)
    assert generate_contexts(loaded, 4, 10, 7) == first
    assert generate_contexts(loaded, 2, 10, 7) == first[:3]
    assert generate_contexts(loaded, 4, 10, 8) != first


def test_the_first_context_is_none_and_each_has_one_place_for_a_prompt(tiny: TinyModels) -> None:
    bare, *others = generate_contexts(tiny.load(), 3, 10, 0)
    assert bare == SUBJECT_SLOT
    assert len(set(others)) == 3
    assert all(one.endswith(f". {SUBJECT_SLOT}") for one in others)
    assert all(one.count(SUBJECT_SLOT) == 1 for one in others)
