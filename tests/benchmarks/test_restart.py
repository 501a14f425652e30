"""The restart benchmark's table, on a tiny model."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from benchmarks.restart import CLOCKS, FIGURES, Inventor, Prepared, main, measure, running
from tests.tiny import TinyModels


def test_the_table_has_a_row_for_each_kind_and_number_and_leaves_no_folder(
    tiny: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            *("--model", str(tiny.folder("llama")), "--at", "2,6", "--kinds", "changes,mixed"),
            *("--repeat", "1", "--work", str(tmp_path)),
        ]
    )
    by_wall, by_cpu = capsys.readouterr().out.split("By cpu time:")
    assert code == 0
    for table in (by_wall, by_cpu):
        check_table([line.split("|")[1:-1] for line in table.splitlines() if "|" in line])
    assert list(tmp_path.iterdir()) == []


def check_table(rows: list[list[str]]) -> None:
    assert [(row[0].strip(), row[1].strip()) for row in rows[2:]] == [
        ("changes", "2"),
        ("changes", "6"),
        ("mixed", "2"),
        ("mixed", "6"),
    ]
    assert {len(row) for row in rows} == {2 + 2 * len(FIGURES) + 1}
    assert [float(row[3]) for row in rows[2::2]] == [1, 1]


@pytest.mark.parametrize("kind", ["changes", "ledger", "mixed"])
def test_what_is_timed_starts_with_the_recorded_head_and_reverts_to_the_middle(
    tiny: TinyModels, tmp_path: Path, kind: str
) -> None:
    """The service itself compares every state with the hash on record."""
    prepared = Prepared.make(tiny.load(), kind, 21, tmp_path)
    removed = {"changes": 0, "ledger": 2, "mixed": 2}[kind]
    for path in (prepared.killed, prepared.closed):
        with running(path, prepared.loaded) as start:
            service = start()
            assert service.head.number == 21
            assert len(service.resolve("live").composition) == 21 - removed
            assert service.revert("r10").result().restored == 10


def test_deltas_are_drawn_the_same_each_time(tiny: TinyModels) -> None:
    inventor = Inventor(tiny.load(), "mixed")
    assert inventor.draw(3).to_bytes() == inventor.draw(3).to_bytes()
    assert inventor.draw(3).row is None
    assert inventor.draw(4).row is not None


def test_figures_are_medians_of_positive_times(tiny: TinyModels, tmp_path: Path) -> None:
    first, second = measure(tiny.load(), "ledger", [2, 4], 2, tmp_path)
    assert (first.edits, second.edits) == (2, 4)
    for found in (first, second):
        assert set(found.milliseconds) == set(product(FIGURES, CLOCKS))
        assert all(milliseconds > 0 for milliseconds in found.milliseconds.values())
    assert second.snapshot_megabytes > first.snapshot_megabytes > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--at", "1"], "2 or more"), (["--kinds", "magic"], "choose from changes")],
)
def test_an_option_that_makes_no_sense_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "nowhere/at-all/here"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
