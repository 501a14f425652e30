"""Logits only where they are needed: the body once (``run_body``), the head at a few positions.

Scoring a target needs a handful of positions; at a vocabulary of 100,000 the head over every
position would cost more than the layers of a small model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel


def logits_of(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits ``(…, vocabulary)`` in fp32 for hidden states ``(…, d)``."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits.float()
