"""The ledger's sum against its equation, and as a function of the set of rows."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from app.domain import Digest
from app.weights.delta import Delta, RowVectors, SubjectRow
from app.weights.ledger import Ledger
from app.weights.loading import LoadedModel
from tests.tiny import MemoryDeltas, TinyModels

NAME, D, D_FF, WEIGHT = "layers.1.down", 6, 20, 0.3


def make_row(number: int, *names: str, d: int = D, d_ff: int = D_FF) -> SubjectRow:
    """A random row; ``A₀`` is diagonal, the same for all rows of a basis. Rows share the anchor
    of their number's tens digit, and some have another of their own."""
    basis = f"basis-{number % 2}"
    lifted = (f"tens {number // 10}",) if number % 3 else (f"tens {number // 10}", f"own {number}")
    vectors = {name: make_vectors(number, lifted, d, d_ff) for name in names or (NAME,)}
    facts = (("{} is", f"target {number}"),)
    return SubjectRow(
        f"subject {number}", facts, basis, lifted, WEIGHT, {"steps": 3}, 0.25, 7, vectors
    )


def make_vectors(number: int, lifted: Sequence[str], d: int, d_ff: int) -> RowVectors:
    generator = torch.Generator().manual_seed(number)
    key, residual = torch.randn(d_ff, generator=generator), torch.randn(d, generator=generator)
    anchors = torch.stack([draw_key(name, d_ff) for name in lifted])
    diagonal = torch.linspace(0.5, 2, d_ff) * (4 + number % 2) * WEIGHT * d_ff
    return RowVectors(key, key / diagonal, residual, anchors, anchors / diagonal)


def draw_key(name: str, d_ff: int) -> Tensor:
    return torch.randn(d_ff, generator=torch.Generator().manual_seed(crc32(name.encode())))


def digest_of(number: int) -> Digest:
    return f"{(number * 7919) % 997:064x}"


ROWS = {digest_of(number): make_row(number) for number in range(4, 16)}


def plain_sum(rows: dict[Digest, SubjectRow]) -> Tensor:
    """``Σ_bases R Kᵀ (A₀ + KKᵀ − ν Σ_lifted kkᵀ)⁻¹`` as it is written."""
    total = torch.zeros(D, D_FF, dtype=torch.float64)
    for basis in {row.basis for row in rows.values()}:
        members = [row for row in rows.values() if row.basis == basis]
        parts = [row.vectors[NAME] for row in members]
        keys = torch.stack([part.key for part in parts], dim=1).double()
        residuals = torch.stack([part.residual for part in parts], dim=1).double()
        first = parts[0]
        system = torch.diag((first.key / first.solved).double()) + keys @ keys.T
        for name in {name for row in members for name in row.anchors}:
            anchor = draw_key(name, D_FF).double()
            system -= WEIGHT * torch.outer(anchor, anchor)
        total += residuals @ keys.T @ torch.linalg.inv(system)
    return total


def test_the_sum_is_the_least_squares_solution() -> None:
    total = Ledger().sum(ROWS)[NAME]
    torch.testing.assert_close(total.double(), plain_sum(ROWS), rtol=1e-5, atol=1e-6)


def test_the_factors_of_a_set_are_its_sum() -> None:
    """Two bases' systems side by side, a rank a row and a lifted anchor."""
    factor = Ledger().factors(ROWS)[NAME]
    torch.testing.assert_close(
        factor.left.double() @ factor.right.double().T, plain_sum(ROWS), rtol=1e-4, atol=1e-5
    )
    columns = {name for row in ROWS.values() for name in (*row.anchors, row.subject)}
    assert len(columns) <= factor.rank <= 2 * len(columns)


def test_no_rows_add_nothing() -> None:
    assert Ledger().sum({}) == {}
    assert Ledger().factors({}) == {}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(sorted(ROWS)), unique=True), min_size=1, max_size=8),
)
def test_a_sum_depends_on_the_set_alone(visited: list[list[Digest]]) -> None:
    """Whatever sets one ledger saw before, and in whatever order the rows are given."""
    ledger = Ledger()
    for chosen in visited:
        rows = {digest: ROWS[digest] for digest in chosen}
        fresh = Ledger().sum({digest: ROWS[digest] for digest in sorted(chosen)})
        seen = ledger.sum(rows)
        assert seen.keys() == fresh.keys()
        assert all(torch.equal(seen[name], fresh[name]) for name in fresh)


def test_each_matrix_is_solved_alone() -> None:
    both = {digest_of(n): make_row(n, NAME, "layers.2.down") for n in (0, 2)}
    one = {digest_of(4): make_row(4)}
    sums = Ledger().sum({**both, **one})
    assert set(sums) == {NAME, "layers.2.down"}
    assert torch.equal(sums["layers.2.down"], Ledger().sum(both)["layers.2.down"])
    assert not torch.equal(sums[NAME], Ledger().sum(both)[NAME])


def test_a_row_is_read_as_it_was_written() -> None:
    row = make_row(3, NAME, "layers.2.down")
    payload = Delta.of_row(row).to_bytes()
    read = Delta.from_bytes(payload)
    assert read.row is not None
    assert read.to_bytes() == payload
    for name in ("subject", "facts", "basis", "anchors", "anchor_weight", "hparams", "loss"):
        assert getattr(read.row, name) == getattr(row, name)
    assert read.changes == {}
    assert torch.equal(read.keys[NAME][:, 0], row.vectors[NAME].key)


def add_row(deltas: MemoryDeltas, loaded: LoadedModel, number: int) -> Digest:
    d, d_ff = loaded.anatomy.shape(loaded.model, 1)
    row = make_row(number, loaded.anatomy.matrix_name(1), d=d, d_ff=d_ff)
    return deltas.add(Delta.of_row(row).to_bytes())


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(8)), removed=st.sets(st.integers(0, 7)))
def test_rows_taken_out_of_a_view_were_never_there(
    tiny: TinyModels, deltas: MemoryDeltas, order: list[int], removed: set[int]
) -> None:
    """One after another, at once, in any order, and some taken out again: the same bytes."""
    for dtype in ("float32", "bfloat16"):
        loaded = tiny.load("llama", dtype)
        digests = [add_row(deltas, loaded, number) for number in range(8)]
        views = deltas.views(loaded)
        state: tuple[Digest, ...] = ()
        for number in order:
            state = (*state, digests[number])
            views.get(state)
        for number in sorted(removed, key=order.index):
            state = tuple(digest for digest in state if digest != digests[number])
            views.get(state)
        kept = tuple(digests[number] for number in range(8) if number not in removed)
        assert views.state_hash(state) == deltas.views(loaded).state_hash(kept)
