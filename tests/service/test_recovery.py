"""A data folder with damage in it: what can still be served is, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from app.domain import Sampling
from app.errors import ReadOnly

from .bench import FACT, LEDGER, MORE, OTHER, Bench, equal


def delta_file(bench: Bench, digest: str) -> Path:
    (path,) = (bench._folder / "deltas").rglob(f"{digest}*")
    return path


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = [flip_a_bit, cut_short, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_last_good_revision_is_served_read_only_and_the_file_is_named(
    bench: Bench, damage: Callable[[Path], None]
) -> None:
    bench.edit(OTHER)
    good = bench.matrices()
    bad = bench.edit(FACT)
    bench.edit(MORE, **LEDGER)
    live = bench.matrices()
    bench.service.close()
    path = delta_file(bench, bad.deltas[0])
    content = path.read_bytes()
    damage(path)
    bench.open()
    assert bench.service.head.number == 1
    assert bad.deltas[0] in (bench.service.read_only or "")
    assert equal(bench.matrices(), good)
    (read,) = bench.service.generate(FACT.text, ["live"], Sampling(3))
    assert read.view.revision == 1
    assert read.future.result(30).tokens
    writes = (
        lambda: bench.edit(OTHER),
        bench.service.reset,
        lambda: bench.service.revert("r0"),
        lambda: bench.service.undo(bad.id),
        lambda: bench.service.create_checkpoint("now"),
        bench.service.create_sandbox,
    )
    for write in writes:
        with pytest.raises(ReadOnly, match=bad.deltas[0]):
            write()
    path.write_bytes(content)
    bench.restart()
    assert bench.service.read_only is None
    assert bench.service.head.number == 3
    assert equal(bench.matrices(), live)
    assert bench.journal.verify() == []


def test_a_delta_that_the_head_does_not_need_does_not_hold_up_the_start(bench: Bench) -> None:
    edit = bench.edit(FACT)
    bench.service.reset().result(30)
    bench.service.close()
    delta_file(bench, edit.deltas[0]).unlink()
    bench.open()
    assert bench.service.read_only is None
    assert bench.service.head.number == 2


def test_where_no_edit_can_be_made_the_base_is_served(bench: Bench) -> None:
    for fact in (FACT, OTHER):
        bench.edit(fact)
    bench.service.close()
    for path in (bench._folder / "deltas").rglob("*.safetensors"):
        flip_a_bit(path)
    bench.open()
    assert bench.service.head.number == 0
    assert bench.service.read_only is not None
