"""The recommended hyperparameters: valid, found by shape, laid under what is known better.

``python -m tests.editing.test_hyperparameters`` writes the tables in docs/methods.md anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.editing.editor import Editor
from app.editing.hyperparameters import FOLDER, Row, Shape, default_layers, read_table
from app.editing.registry import METHODS
from app.editing.tuned import TUNED_FILE, read_tuned, write_tuned
from app.errors import SettingsError
from tests.editing.conftest import MakeEditor
from tests.tiny import MemoryDeltas, TinyModels

DOCS = Path(__file__).parents[2] / "docs" / "methods.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
ROWS = [(name, row) for name in METHODS for row in read_table(name).rows]
LLAMA_3 = Shape("llama", 4096, 14336, 32)


def complete(method: str, row: Row) -> dict[str, Any]:
    """The row's hyperparameters, with default layers where it names none."""
    return read_table(method).recommend(row.shape, METHODS[method].parameters.model_fields)


@pytest.mark.parametrize(("method", "row"), ROWS, ids=lambda value: getattr(value, "title", value))
def test_every_row_is_valid_for_its_method_and_model(method: str, row: Row) -> None:
    params = METHODS[method].parameters.model_validate(complete(method, row))
    assert max(params.edited_layers) < row.shape.depth
    assert row.hparams.items() <= complete(method, row).items()


def test_every_file_is_a_methods() -> None:
    assert {path.stem for path in FOLDER.glob("*.toml")} <= {*METHODS, "models"}


@pytest.mark.parametrize("method", METHODS)
def test_no_two_rows_of_a_method_are_for_one_shape(method: str) -> None:
    shapes = [row.shape for row in read_table(method).rows]
    assert len(set(shapes)) == len(shapes)


def test_a_model_is_known_by_its_shape() -> None:
    table = read_table("memit")
    assert table.recommend(LLAMA_3, ["layers"])["layers"] == [4, 5, 6, 7, 8]
    other = replace(LLAMA_3, depth=31)
    assert table.recommend(other, ["layers"]) == {"layers": (3, 4, 5, 6, 7)}


@pytest.mark.parametrize("method", ["memit", "memit_seq", "alphaedit"])
def test_an_unknown_model_of_a_known_depth_gets_the_published_layers(method: str) -> None:
    unknown = replace(LLAMA_3, width=4095)
    assert read_table(method).recommend(unknown, ["layers"])["layers"] == (4, 5, 6, 7, 8)


@pytest.mark.parametrize("method", ["memit", "memit_seq", "ledger"])
def test_the_weight_of_ordinary_text_grows_with_the_keys_of_an_unknown_model(method: str) -> None:
    def weight(shape: Shape) -> float:
        found = read_table(method).recommend(shape, ["covariance_weight"])
        return float(found["covariance_weight"])

    unknown = replace(LLAMA_3, width=64, inner_width=500)
    assert weight(replace(unknown, inner_width=5_000)) == 10 * weight(unknown)
    assert weight(LLAMA_3) == 15_000


@pytest.mark.parametrize("method", ["memit_seq", "ledger"])
def test_a_method_can_take_the_rows_of_another(method: str) -> None:
    assert read_table(method).rows == read_table("memit").rows


def test_the_ledger_edits_one_layer_of_an_unknown_model() -> None:
    table, unknown = read_table("ledger"), replace(LLAMA_3, width=64, inner_width=1_000)
    found = table.recommend(unknown, METHODS["ledger"].parameters.model_fields)
    assert found == {"layers": (6,), "covariance_weight": 30.0, "anchor_weight": 0.03}
    assert "anchor_weight" not in table.recommend(
        LLAMA_3, METHODS["ledger"].parameters.model_fields
    )


def test_a_method_without_a_file_has_a_default_depth() -> None:
    assert read_table("no-such-method").recommend(LLAMA_3, ["layer"]) == {"layer": 6}


@pytest.mark.parametrize("widest", [None, 1, 5])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("depth", [1, 4, 32, 80])
def test_default_layers_are_layers_of_the_model(
    depth: int, share: float, widest: int | None
) -> None:
    layers = default_layers(depth, share, widest)
    assert list(layers) == list(range(layers[0], layers[-1] + 1))
    assert 0 <= layers[0] <= layers[-1] < depth
    assert abs(layers[-1] - share * depth) <= 1
    assert len(layers) <= (widest or 5)
    assert layers[0] > 0 or layers == (0,)


def test_what_is_known_better_comes_last(
    tiny: TinyModels, deltas: MemoryDeltas, tmp_path: Path
) -> None:
    """Schema, model folder, tuning, caller: each overrules the one before."""
    advised = replace(
        tiny.load(),
        recommendations={
            "default_method": "ft",
            "methods": {"rome": {"layer": 2, "steps": 7, "clamp": 2.0}},
        },
    )
    editor = Editor(deltas.views(advised), data=tmp_path)
    assert editor.plan(None, {}).method == "ft"
    assert editor.plan("rome", {}).hparams["layer"] == 2
    folder = tmp_path / advised.identity.digest[:16]
    write_tuned(folder, {"rome": {"layer": 3, "steps": 8}}, default_method="rome")
    plan = editor.plan(None, {"steps": 9})
    assert plan.method == "rome"
    found = {name: plan.hparams[name] for name in ("layer", "steps", "clamp", "kl_weight")}
    assert found == {"layer": 3, "steps": 9, "clamp": 2.0, "kl_weight": 0.0625}


def test_tuning_one_model_says_nothing_of_another(make_editor: MakeEditor, tmp_path: Path) -> None:
    editor, _ = make_editor("llama")
    _, other = make_editor("gpt2")
    before = editor.plan("rome", {})
    write_tuned(tmp_path / other.base.digest[:16], {"rome": {"layer": 3}})
    assert editor.plan("rome", {}) == before


def test_tuned_methods_are_kept_beside_each_other(tmp_path: Path) -> None:
    assert read_tuned(tmp_path) == {}
    write_tuned(tmp_path, {"rome": {"layer": 1}, "ft": {"layer": 2}}, default_method="rome")
    write_tuned(tmp_path, {"ft": {"layer": 3}})
    assert read_tuned(tmp_path) == {
        "default_method": "rome",
        "methods": {"rome": {"layer": 1}, "ft": {"layer": 3}},
    }
    assert [path.name for path in tmp_path.iterdir()] == [TUNED_FILE]


@pytest.mark.parametrize("content", ["{", "[]", '{"methods": [1]}', '{"methods": {"rome": 1}}'])
def test_a_damaged_tuning_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / TUNED_FILE).write_text(content)
    with pytest.raises(SettingsError, match=TUNED_FILE):
        read_tuned(tmp_path)


def test_the_documented_tables_are_those_in_use() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert {name for _, name, _ in TABLE.findall(text)} == {name for name, _ in ROWS}
    assert documented(text) == text


def documented(text: str) -> str:
    """The documentation with its tables written anew."""
    return TABLE.sub(lambda found: f"{found[1]}{render(found[2])}{found[3]}", text)


def render(method: str) -> str:
    """A method's table in Markdown: one row per model, one column per hyperparameter."""
    rows = read_table(method).rows
    used = list(dict.fromkeys(name for row in rows for name in row.hparams))
    unused = list(dict.fromkeys(name for row in rows for name in row.published))
    header = ["model", *(f"`{name}`" for name in used), *(f"*{name}*" for name in unused)]
    lines = [line(header), line(["---"] * len(header))]
    for row in rows:
        cells = [cell(row.hparams, name) for name in used]
        lines.append(line([row.title, *cells, *(cell(row.published, name) for name in unused)]))
    return "\n" + "\n".join(lines) + "\n"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name, "")
    if isinstance(value, list):
        return f"{value[0]}–{value[-1]}" if len(value) > 1 else str(value[0])
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    DOCS.write_text(documented(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
