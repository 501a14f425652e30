"""A state as a whole Hugging Face model folder, which transformers loads by itself."""

from __future__ import annotations

import copy
from pathlib import Path

from app.domain import Composition, Progress, no_progress
from app.weights.exports.folder import draft_folder, seal
from app.weights.exports.manifest import Kind, Manifest
from app.weights.views import ViewCache

SHARD_SIZE = "4GB"


def write_model(
    views: ViewCache,
    composition: Composition,
    target: Path,
    *,
    label: str,
    progress: Progress = no_progress,
) -> Manifest:
    """Write a state as the folder ``target``: configurations, tokenizer, and all weights in the
    dtype they are loaded in.

    Raises:
        Conflict: ``target`` is there already, or can't be written.
    """
    with draft_folder(target) as draft:
        progress("writing the model", 0, 2)
        model = views.private(composition)
        model.config = copy.deepcopy(model.config)  # writing it sets entries of it
        model.save_pretrained(draft, max_shard_size=SHARD_SIZE)
        progress("writing the model", 1, 2)
        views.loaded.tokenizer.save_pretrained(draft)
        progress("writing the model", 2, 2)
        state = views.state_hash(composition)
        return seal(draft, Manifest(Kind.MODEL, views.base, state, label, {}), progress)
