"""Whether a row of the ledger that comes from elsewhere is one that an edit here could have made:
it may have to be told anew, from its words alone."""

from __future__ import annotations

import json

from pydantic import TypeAdapter, ValidationError

from app.domain import Fact
from app.editing.ledger import LedgerParameters
from app.errors import InvalidInput
from app.weights.delta import SubjectRow

FACTS = TypeAdapter(list[Fact])


def read_row_facts(row: SubjectRow, depth: int) -> list[Fact]:
    """The facts of a row, for a model of ``depth`` layers.

    Raises:
        InvalidInput: they are none, not facts, or not in a row's order; or its hyperparameters
            are not the ledger's.
    """
    words = [{"prompt": p, "subject": row.subject, "target": t} for p, t in row.facts]
    try:
        facts = FACTS.validate_json(json.dumps(words))  # JSON, which has no lone surrogates
        params = LedgerParameters.model_validate(row.hparams)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _refuse(row, f"{place}: {first['msg']}.") from None
    except InvalidInput as error:
        raise _refuse(row, error.detail) from None
    prompts = [fact.template for fact in facts]
    if not facts or prompts != sorted(set(prompts)) or prompts != [p for p, _ in row.facts]:
        raise _refuse(row, "it has no facts, or not each question once, in order.")
    if max(params.edited_layers) >= depth:
        raise _refuse(row, f"the model has layers 0 to {depth - 1} only.")
    return facts


def _refuse(row: SubjectRow, why: str) -> InvalidInput:
    return InvalidInput(f"The row of {row.subject!r} can't be one of the ledger's: {why}")
