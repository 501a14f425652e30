"""Values to put into a journal."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any

from app.domain import (
    BaseIdentity,
    Cause,
    Edit,
    EditStatus,
    Expectation,
    Fact,
    FactOutcome,
    Mode,
    Revision,
    Sandbox,
)
from app.journal import Journal

NOON = datetime(2025, 3, 1, 12, tzinfo=UTC)


def digest(name: object) -> str:
    return sha256(str(name).encode()).hexdigest()


BASE = BaseIdentity(digest("base"), "almanac", "float32")


def an_edit(number: int, *, parent: int = 0, mode: Mode = Mode.SEQUENTIAL) -> Edit:
    fact = Fact(
        prompt="The capital of {} is",
        subject="Norvania",
        target=f"Town {number}",
        ground_truth="Oslo",
        rephrase_prompts=("Norvania's capital:",),
        locality=(Expectation("The capital of Peru is", "Lima"), Expectation("Rivers of")),
        portability=(Expectation("Who rules Town?", "its mayor"),),
    )
    outcome = FactOutcome(fact, "Oslo", f"Town {number}", True, details={"loss": 0.5, "steps": 9})
    return Edit(
        id=f"e{number:04}",
        mode=mode,
        method="rome",
        hparams={"layers": [3, 4], "learning_rate": 0.5, "nested": {"on": True, "off": None}},
        seed=2**64 + number,
        parent=parent,
        outcomes=(outcome,),
        deltas=(digest(number),),
        sandboxes=(),
        metrics={"efficacy": 1.0, "locality": None},
        timings={"total_s": 0.25},
        state_hash=None,
        created_at=NOON + timedelta(seconds=number),
    )


def measured(number: int, **fields: Any) -> Edit:
    return replace(an_edit(number), status=EditStatus.MEASURED, **fields)


def a_revision(number: int, *, edit: Edit | None = None, restored: int | None = None) -> Revision:
    return Revision(
        number=number,
        parent=number - 1,
        cause=Cause.REVERT if edit is None else Cause.EDIT,
        state_hash=digest(f"state {number}"),
        created_at=NOON,
        edit=None if edit is None else edit.id,
        restored=restored,
        deltas=() if edit is None else edit.deltas,
    )


def a_sandbox(name: str, *edits: Edit, root: int = 0) -> Sandbox:
    return Sandbox(
        id=name,
        root=root,
        edits=tuple(edit.id for edit in edits),
        deltas=tuple(delta for edit in edits for delta in edit.deltas),
        state_hash=digest((name, len(edits))),
        created_at=NOON,
    )


def commit_sequential(journal: Journal, number: int) -> Edit:
    """Prepare edit ``number`` and commit it as the next revision."""
    head = journal.head()
    edit = an_edit(number, parent=head.number)
    journal.prepare_edit(edit)
    revision = a_revision(head.number + 1, edit=edit)
    final = replace(edit, revision=revision.number, state_hash=revision.state_hash)
    journal.commit_edit(final, revision=revision, sandboxes=[])
    return final


def restore(journal: Journal, number: int) -> Revision:
    revision = a_revision(journal.head().number + 1, restored=number)
    journal.append_revision(revision)
    return revision
