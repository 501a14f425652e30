"""What a method says of itself, in ``GET /methods`` and in docs/methods.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from app.editing.registry import METHODS, describe
from tests.editing.conftest import FACTS, MakeEditor, hparams

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_people_choose_it_by(make_editor: MakeEditor, method: str) -> None:
    editor, _ = make_editor()
    told = describe(METHODS[method], editor.plan(method, {}).hparams)
    assert told["name"] == method
    assert all(told[key] for key in ("title", "paper", "rank", "batch", "sequential"))
    assert isinstance(told["needs_statistics"], bool)
    assert set(told["defaults"]) == set(told["parameters"])
    assert all(parameter.get("description") for parameter in told["parameters"].values())


@pytest.mark.parametrize("method", METHODS)
def test_a_method_needs_statistics_if_it_says_so(make_editor: MakeEditor, method: str) -> None:
    editor, _ = make_editor()
    plan = editor.plan(method, hparams(method, 1))
    timings: dict[str, float] = {}
    editor.propose(plan, (), FACTS[:1], independent=False, seed=0, timings=timings)
    assert (timings["statistics_s"] > 0) is METHODS[method].needs_statistics


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_its_page(method: str) -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert f"## `{method}`\n" in text
    assert f"| `{method}` |" in text
    assert all(paper in text for paper in re.findall(r"\d{4}\.\d{5}", METHODS[method].paper))
