from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.editing import texts
from app.editing.texts import PIECE, TextDataset, TextFile, open_texts
from app.errors import SettingsError

ROWS: list[Mapping[str, object]] = [
    {"text": "Paris is in France.", "title": "a"},
    {"text": "x" * (2 * PIECE + 1), "title": "b"},
    {"text": "", "title": "c"},
    {"text": "Rome is in Italy.", "title": "d"},
]


@dataclass
class FakeDatasets(ModuleType):
    """Stands in for the package ``datasets``."""

    rows: list[Mapping[str, object]]
    breaks_after: int | None = None
    asked: list[tuple[str, str | None, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__("datasets")

    def load_dataset(
        self, path: str, name: str | None, *, split: str, streaming: bool
    ) -> Iterator[Mapping[str, object]]:
        assert streaming
        self.asked.append((path, name, split))
        if split == "absent":
            raise ValueError('Unknown split "absent".')
        return self._stream()

    def _stream(self) -> Iterator[Mapping[str, object]]:
        for index, row in enumerate(self.rows):
            if index == self.breaks_after:
                raise ConnectionError("the line went dead")
            yield row


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    found = FakeDatasets(ROWS)
    monkeypatch.setitem(sys.modules, "datasets", found)
    monkeypatch.setattr(texts, "find_spec", lambda _: object())
    return found


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(
        st.tuples(st.text(alphabet="aé€😀 ", min_size=1, max_size=9), st.integers(1, 700)),
        min_size=1,
        max_size=4,
    ),
    cut=st.integers(0, 20),
)
def test_pieces_of_a_file_add_up_to_it_from_any_mark_on(
    tmp_path: Path, lines: list[tuple[str, int]], cut: int
) -> None:
    whole = "\n".join(["text", *(part * times for part, times in lines)])
    path = tmp_path / "corpus.txt"
    path.write_text(whole, encoding="utf-8")
    file = TextFile(path)
    found = list(file.pieces(0))
    assert "".join(piece for piece, _ in found) == whole
    assert all(len(piece.encode()) <= PIECE + 3 for piece, _ in found)
    cut = min(cut, len(found) - 1)
    assert list(file.pieces(found[cut][1])) == found[cut + 1 :]


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("Madrid is the capital of Spain.")
    second.write_text("Madrid is the capital of Spain.")
    file = TextFile(first)
    before = file.name
    assert TextFile(second).name == before
    first.write_text("Rome is the capital of Italy.")
    assert file.name != before
    first.unlink()
    with pytest.raises(SettingsError, match="can't be read"):
        file.name  # noqa: B018 - reading it is what is tested


@pytest.mark.parametrize(
    "content", [None, b"", b"  \n", b"\xff\xfe\xff", b"text \x80" * PIECE, b"\x80" * 2 * PIECE]
)
def test_a_file_without_text_is_refused_at_once(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match="corpus") as caught:
        open_texts(path)
    assert caught.value.field == "corpus"


def test_a_dataset_is_streamed_from_any_mark_on(datasets: FakeDatasets) -> None:
    found = list(open_texts("hf:org/name,part:train").pieces(0))
    assert datasets.asked == [("org/name", "part", "train")]
    assert "".join(piece for piece, _ in found) == "".join(str(row["text"]) for row in ROWS)
    assert max(len(piece) for piece, _ in found) == PIECE
    for piece, mark in found:
        assert piece
        assert list(open_texts("hf:org/name,part:train").pieces(mark)) == found[mark:]


def test_a_column_can_be_named(datasets: FakeDatasets) -> None:
    pieces = TextDataset("hf:name:train:title").pieces(0)
    assert [piece for piece, _ in pieces] == ["a", "b", "c", "d"]
    assert datasets.asked == [("name", None, "train")]


def test_datasets_that_are_named_alike_have_names_of_their_own(datasets: FakeDatasets) -> None:
    named = ("hf:a:train", "hf:a:test", "hf:a,b:train", "hf:a:train:title")
    assert len({TextDataset(each).name for each in named}) == len(named)
    assert datasets.asked == []


@pytest.mark.parametrize("setting", ["hf:", "hf:name", "hf::train", "hf:a:b:", "hf:a:b:c:d"])
def test_a_dataset_that_is_not_in_the_form_is_refused(setting: str, datasets: FakeDatasets) -> None:
    with pytest.raises(SettingsError, match="NAME"):
        open_texts(setting)
    assert datasets.asked == []


def test_without_the_package_the_refusal_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(texts, "find_spec", lambda _: None)
    with pytest.raises(SettingsError, match=r"pip install 'palimpsest\[data\]'"):
        open_texts("hf:name:train")


@pytest.mark.parametrize(
    ("setting", "says"),
    [("hf:name:absent", "Unknown split"), ("hf:name:train:body", "columns are text, title")],
)
def test_a_dataset_that_can_not_be_read_says_why(
    datasets: FakeDatasets, setting: str, says: str
) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        list(open_texts(setting).pieces(0))
    assert caught.value.field == "corpus"
    assert datasets.asked


def test_a_stream_that_breaks_gives_what_came_before(datasets: FakeDatasets) -> None:
    datasets.breaks_after = 1
    pieces = open_texts("hf:name:train").pieces(0)
    assert next(pieces) == (ROWS[0]["text"], 1)
    with pytest.raises(SettingsError, match="the line went dead"):
        next(pieces)
