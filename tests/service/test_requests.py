"""A request asked twice is done once."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from app.domain import Edit, EditCommand, Guard, IdempotentRequest, WriteTerms
from app.errors import (
    GuardFailed,
    InvalidInput,
    JournalError,
    PreconditionFailed,
    ShuttingDown,
)

from .bench import FACT, OTHER, QUICK, Bench

TERMS = WriteTerms(request=IdempotentRequest("today-1", "a" * 64))


def ask(bench: Bench, terms: WriteTerms, guard: Guard = Guard()) -> Future[Edit]:  # noqa: B008
    command = EditCommand((FACT,), method="rome", hparams=QUICK, guard=guard)
    return bench.service.submit_edit(command, terms)


def test_the_same_request_twice_is_one_edit_even_after_a_restart(bench: Bench) -> None:
    together = [ask(bench, TERMS), ask(bench, TERMS)]
    first = together[0].result(60)
    assert together[1].result(60) == first
    assert ask(bench, TERMS).result(60) == first
    bench.restart()
    assert ask(bench, TERMS).result(60) == first
    assert bench.service.head.number == 1


def test_a_key_used_for_another_request_is_refused(bench: Bench) -> None:
    other = WriteTerms(request=IdempotentRequest("today-1", "b" * 64))
    running = ask(bench, TERMS)
    for _ in range(2):
        with pytest.raises(InvalidInput, match="another request") as caught:
            ask(bench, other)
        assert caught.value.field == "Idempotency-Key"
        running.result(60)
    assert bench.service.head.number == 1


def test_a_refused_request_is_refused_again_without_a_second_attempt(bench: Bench) -> None:
    guard = Guard(min_efficacy=1.1)
    errors = []
    for _ in range(2):
        with pytest.raises(GuardFailed) as caught:
            ask(bench, TERMS, guard).result(60)
        errors.append(caught.value)
    assert errors[0].edit == errors[1].edit
    assert errors[0].detail == errors[1].detail
    assert len(bench.service.edits(10, None).items) == 1


def test_what_failed_without_a_record_may_be_asked_again(bench: Bench) -> None:
    late = WriteTerms(expected=(7,), request=TERMS.request)
    with pytest.raises(PreconditionFailed):
        ask(bench, late).result(60)
    assert ask(bench, TERMS).result(60).revision == 1


def test_an_edit_that_was_never_committed_answers_for_no_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk may not even take the note that it was given up."""

    def fail(*_: object, **__: object) -> None:
        raise JournalError("The disk is full.")

    with monkeypatch.context() as patch:
        patch.setattr(bench.journal, "commit_edit", fail)
        patch.setattr(bench.journal, "discard_edit", fail)
        with pytest.raises(JournalError):
            ask(bench, TERMS).result(60)
    assert ask(bench, TERMS).result(60).revision == 1


def test_a_repeated_request_is_answered_though_its_sandbox_is_gone(bench: Bench) -> None:
    sandbox = bench.service.create_sandbox().result(30).id
    command = EditCommand((FACT,), method="rome", hparams=QUICK, sandbox=sandbox)
    first = bench.service.submit_edit(command, TERMS).result(60)
    bench.service.delete_sandbox(sandbox).result(30)
    assert bench.service.submit_edit(command, TERMS).result(60) == first


def test_stopping_while_requests_come_in_does_not_lock_up(bench: Bench) -> None:
    futures = [
        ask(bench, WriteTerms(request=IdempotentRequest(f"key-{n}", "a" * 64))) for n in range(6)
    ]
    bench.service.stop_accepting()
    assert all(future.done() or future.running() for future in futures[1:])
    with pytest.raises(ShuttingDown):
        ask(bench, TERMS)


def test_a_write_is_made_only_on_the_head_its_caller_expects(bench: Bench) -> None:
    assert ask(bench, WriteTerms(expected=(0,))).result(60).revision == 1
    with pytest.raises(PreconditionFailed, match="The head is r1, not r0"):
        ask(bench, WriteTerms(expected=(0,))).result(60)
    assert ask(bench, WriteTerms(expected=(0, 1))).result(60).revision == 2
    for write in (bench.service.reset, lambda terms: bench.service.revert("r1", terms)):
        with pytest.raises(PreconditionFailed):
            write(WriteTerms(expected=(1,))).result(30)
    bench.edit(OTHER)
    assert bench.service.head.number == 3
