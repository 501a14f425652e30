"""Conversations as prompts, by the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import TemplateError

from app.errors import InvalidInput
from app.weights.loading import LoadedModel


def render_chat(loaded: LoadedModel, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
    """Token ids of a conversation, up to where the assistant's next answer begins.

    Raises:
        InvalidInput: the model has no chat template, or its template refuses the messages.
    """
    tokenizer = loaded.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidInput(
            f"{loaded.identity.name} has no chat template: it continues texts and was not taught "
            "to converse. Use completions instead.",
            field="messages",
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise InvalidInput(
            f"The model's chat template refuses these messages: {error}.", field="messages"
        ) from error
    return tuple(tokenizer(str(text), add_special_tokens=False)["input_ids"])
