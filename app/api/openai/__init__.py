"""``/v1``: every view as a model, in the forms that OpenAI's clients speak."""
