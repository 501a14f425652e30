"""A word-like byte-level BPE: names take one to three tokens, a leading space belongs to a word.

Text always starts after a beginning-of-text token, and its first word is read as if a space
stood before it, so that a name is the same token at the start of a text and inside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

BEGIN: Final = "<s>"
END: Final = "</s>"
PAD: Final = "<pad>"
# Words keep their leading space (byte-level "Ġ"); marks and a genitive's 's stand alone.
WORDS: Final = Regex(r"'s(?![a-z])|Ġ?(?:(?!'s(?![a-z]))[^Ġ.,;:!?])+|[.,;:!?]|Ġ")


def train_tokenizer(texts: Iterable[str], size: int, context: int) -> PreTrainedTokenizerFast:
    """Learn at most ``size`` tokens from ``texts``; ``context`` is the model's window in tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False),
            pre_tokenizers.Split(WORDS, behavior="isolated"),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=AddedToken(BEGIN, special=True),
        eos_token=AddedToken(END, special=True),
        pad_token=AddedToken(PAD, special=True),
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
