"""The one name by which layers above know a loaded model's class."""

from __future__ import annotations

from transformers import PreTrainedModel as LanguageModel

__all__ = ["LanguageModel"]
