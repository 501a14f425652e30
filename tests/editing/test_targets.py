"""What a value is sought on."""

from __future__ import annotations

from app.domain import Fact
from app.editing.targets import trace_facts
from tests.tiny import TinyModels

CONTEXTS = ("{}", "A. {}", "B. {}", "C. {}")
FACTS = [
    Fact(f"{{}} {relation}", "France", "Rome") for relation in ("is", "has", "was", "sees", "says")
]


def test_each_fact_is_read_bare_and_contexts_are_dealt_out_one_fewer_for_each_further_fact(
    tiny: TinyModels,
) -> None:
    loaded = tiny.load("llama")

    def read(count: int) -> list[str]:
        rows = trace_facts(loaded, FACTS[:count], CONTEXTS, ())
        texts = [row.ids[: row.prompt_length] for row in rows.targets]
        return [
            str(loaded.tokenizer.decode(list(text), skip_special_tokens=True)) for text in texts
        ]

    one = ["France is", "A. France is", "B. France is", "C. France is"]
    two = ["France is", "France has", "A. France is", "B. France has"]
    assert (read(1), read(2)) == (one, two)
    assert read(3)[3:] == ["A. France is"]
    assert read(5)[5:] == ["A. France is"]
