"""Between the vocabulary's values and plain JSON values.

Exact both ways, except that sequences inside free-form mappings (``hparams``, ``details``)
come back as lists. JSON has no NaN or infinity: these are written ``{"$float": "nan"}``, and
keys of free-form mappings that begin with ``$`` get a second one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from numbers import Integral, Real
from typing import Any, TypeAlias

from app.domain import (
    BaseIdentity,
    Cause,
    Check,
    Checkpoint,
    Contribution,
    Edit,
    EditStatus,
    Expectation,
    Fact,
    FactOutcome,
    IdempotentRequest,
    Mode,
    Revision,
    Sandbox,
)
from app.errors import InvalidInput, JournalError

Plain: TypeAlias = dict[str, Any]

_FLOAT = "$float"


def canonical(value: Any) -> str:
    """The one way to write a plain value: sorted keys, no spaces, ASCII, valid JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def encode_value(value: Any, where: str) -> Any:
    """A free-form value as plain JSON.

    Raises:
        JournalError: a type that JSON can't hold; ``where`` says whose it is.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        number = float(value)
        return number if math.isfinite(number) else {_FLOAT: repr(number)}
    if isinstance(value, Mapping):
        return {
            _escape(key, where): encode_value(item, f"{where}.{key}") for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [encode_value(item, where) for item in value]
    raise JournalError(f"{where} holds a {type(value).__name__}, which the journal can't write.")


def decode_value(value: Any) -> Any:
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    if isinstance(value, dict):
        if _FLOAT in value:
            return float(value[_FLOAT])
        return {
            key[1:] if key.startswith("$") else key: decode_value(item)
            for key, item in value.items()
        }
    return value


def encode_time(moment: datetime) -> str:
    """UTC, always with microseconds, so that texts sort by time."""
    if moment.tzinfo is None:
        raise JournalError(f"The time {moment.isoformat()} has no time zone.")
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def decode_time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def encode_base(base: BaseIdentity) -> Plain:
    return {"digest": base.digest, "name": base.name, "dtype": base.dtype}


def decode_base(plain: Plain) -> BaseIdentity:
    return BaseIdentity(plain["digest"], plain["name"], plain["dtype"])


def encode_revision(revision: Revision) -> Plain:
    return {
        "number": revision.number,
        "parent": revision.parent,
        "cause": revision.cause.value,
        "state_hash": revision.state_hash,
        "created_at": encode_time(revision.created_at),
        "edit": revision.edit,
        "sandbox": revision.sandbox,
        "restored": revision.restored,
        "removed": list(revision.removed),
        "deltas": list(revision.deltas),
        "withdrawn": list(revision.withdrawn),
        "contributions": [_encode_contribution(one) for one in revision.contributions],
    }


def decode_revision(plain: Plain) -> Revision:
    return Revision(
        number=plain["number"],
        parent=plain["parent"],
        cause=Cause(plain["cause"]),
        state_hash=plain["state_hash"],
        created_at=decode_time(plain["created_at"]),
        edit=plain["edit"],
        sandbox=plain["sandbox"],
        restored=plain["restored"],
        removed=tuple(plain["removed"]),
        deltas=tuple(plain["deltas"]),
        withdrawn=tuple(plain["withdrawn"]),
        contributions=tuple(_decode_contribution(one) for one in plain["contributions"]),
    )


def encode_checkpoint(checkpoint: Checkpoint) -> Plain:
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "created_at": encode_time(checkpoint.created_at),
    }


def decode_checkpoint(plain: Plain) -> Checkpoint:
    return Checkpoint(plain["name"], plain["revision"], decode_time(plain["created_at"]))


def encode_sandbox(sandbox: Sandbox) -> Plain:
    return {
        "id": sandbox.id,
        "root": sandbox.root,
        "edits": list(sandbox.edits),
        "removed": list(sandbox.removed),
        "deltas": list(sandbox.deltas),
        "state_hash": sandbox.state_hash,
        "created_at": encode_time(sandbox.created_at),
    }


def decode_sandbox(plain: Plain) -> Sandbox:
    return Sandbox(
        id=plain["id"],
        root=plain["root"],
        edits=tuple(plain["edits"]),
        removed=tuple(plain["removed"]),
        deltas=tuple(plain["deltas"]),
        state_hash=plain["state_hash"],
        created_at=decode_time(plain["created_at"]),
    )


def encode_edit(edit: Edit) -> Plain:
    return {
        "id": edit.id,
        "mode": edit.mode.value,
        "method": edit.method,
        "hparams": encode_value(edit.hparams, "hparams"),
        "seed": edit.seed,
        "parent": edit.parent,
        "outcomes": [_encode_outcome(outcome) for outcome in edit.outcomes],
        "deltas": list(edit.deltas),
        "sandboxes": list(edit.sandboxes),
        "metrics": encode_value(edit.metrics, "metrics"),
        "timings": encode_value(edit.timings, "timings"),
        "state_hash": edit.state_hash,
        "created_at": encode_time(edit.created_at),
        "status": edit.status.value,
        "revision": edit.revision,
        "checks": [encode_value(asdict(check), "checks") for check in edit.checks],
        "request_key": None if edit.request is None else edit.request.key,
        "fingerprint": None if edit.request is None else edit.request.fingerprint,
    }


def decode_edit(plain: Plain) -> Edit:
    return Edit(
        id=plain["id"],
        mode=Mode(plain["mode"]),
        method=plain["method"],
        hparams=decode_value(plain["hparams"]),
        seed=plain["seed"],
        parent=plain["parent"],
        outcomes=tuple(_decode_outcome(outcome) for outcome in plain["outcomes"]),
        deltas=tuple(plain["deltas"]),
        sandboxes=tuple(plain["sandboxes"]),
        metrics=decode_value(plain["metrics"]),
        timings=decode_value(plain["timings"]),
        state_hash=plain["state_hash"],
        created_at=decode_time(plain["created_at"]),
        status=EditStatus(plain["status"]),
        revision=plain["revision"],
        checks=tuple(Check(**decode_value(check)) for check in plain["checks"]),
        request=IdempotentRequest(plain["request_key"], plain["fingerprint"])
        if plain["request_key"] is not None
        else None,
    )


def _escape(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise JournalError(f"{where} has the key {key!r}; the journal only writes text keys.")
    return f"${key}" if key.startswith("$") else str(key)


def _encode_contribution(contribution: Contribution) -> Plain:
    facts = contribution.facts
    return {
        "edit": contribution.edit,
        "deltas": list(contribution.deltas),
        "facts": None if facts is None else list(facts),
    }


def _decode_contribution(plain: Plain) -> Contribution:
    facts = plain["facts"]
    return Contribution(
        plain["edit"], tuple(plain["deltas"]), None if facts is None else tuple(facts)
    )


def _encode_outcome(outcome: FactOutcome) -> Plain:
    return {
        "fact": _encode_fact(outcome.fact),
        "before": outcome.before,
        "after": outcome.after,
        "success": outcome.success,
        "sandbox": outcome.sandbox,
        "details": encode_value(outcome.details, "details"),
    }


def _decode_outcome(plain: Plain) -> FactOutcome:
    return FactOutcome(
        fact=_decode_fact(plain["fact"]),
        before=plain["before"],
        after=plain["after"],
        success=plain["success"],
        sandbox=plain["sandbox"],
        details=decode_value(plain["details"]),
    )


def _encode_fact(fact: Fact) -> Plain:
    return {
        "prompt": fact.prompt,
        "subject": fact.subject,
        "target": fact.target,
        "ground_truth": fact.ground_truth,
        "rephrase_prompts": list(fact.rephrase_prompts),
        "locality": [_encode_expectation(expectation) for expectation in fact.locality],
        "portability": [_encode_expectation(expectation) for expectation in fact.portability],
    }


def _decode_fact(plain: Plain) -> Fact:
    try:
        return Fact(
            prompt=plain["prompt"],
            subject=plain["subject"],
            target=plain["target"],
            ground_truth=plain["ground_truth"],
            rephrase_prompts=tuple(plain["rephrase_prompts"]),
            locality=tuple(_decode_expectation(item) for item in plain["locality"]),
            portability=tuple(_decode_expectation(item) for item in plain["portability"]),
        )
    except InvalidInput as error:
        raise JournalError(f"A stored fact is no longer valid: {error.detail}") from error


def _encode_expectation(expectation: Expectation) -> Plain:
    return {"prompt": expectation.prompt, "answer": expectation.answer}


def _decode_expectation(plain: Plain) -> Expectation:
    return Expectation(plain["prompt"], plain["answer"])
