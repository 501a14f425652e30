"""Compositions against what links mean, step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Composition, compose
from app.errors import JournalError
from app.journal.compositions import CACHED, Compositions, Link

DIGESTS = st.sampled_from("abcdef")
DRAWN = st.lists(
    st.tuples(st.integers(0, 50), st.booleans(), st.lists(DIGESTS), st.lists(DIGESTS)),
    min_size=1,
    max_size=30,
)


def make_links(drawn: list[tuple[int, bool, list[str], list[str]]]) -> list[Link]:
    """Revisions on their predecessors, or with an earlier composition restored."""
    links = [Link(0, None, None, (), ())]
    for number, (source, restores, removed, added) in enumerate(drawn, 1):
        if restores:
            links.append(Link(number, number - 1, source % number, (), ()))
        else:
            links.append(Link(number, number - 1, None, removed, added))
    return links


@given(DRAWN, st.randoms())
def test_a_revision_is_its_source_without_what_it_removed_and_then_its_deltas(
    drawn: list[tuple[int, bool, list[str], list[str]]], random: st.DataObject
) -> None:
    """Digests may stand in several places, and revisions be asked for in any order."""
    links = make_links(drawn)
    expected: list[Composition] = [()]
    for link in links[1:]:
        source = link.number - 1 if link.restored is None else link.restored
        expected.append(compose(expected[source], link.removed, link.deltas))
    compositions = Compositions()
    compositions.extend(links[: len(links) // 2])
    compositions.extend(links)
    order = list(range(len(links)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert [compositions.of(number) for number in order] == [expected[n] for n in order]
    assert compositions.known == len(links)


def test_revisions_are_told_again_after_many_others_were() -> None:
    compositions = Compositions()
    compositions.extend(
        [Link(0, None, None, (), ())]
        + [Link(number, number - 1, None, (), (f"d{number}",)) for number in range(1, 3 * CACHED)]
    )
    for _ in range(2):
        for number in range(3 * CACHED):
            assert compositions.of(number) == tuple(f"d{n}" for n in range(1, number + 1))


@pytest.mark.parametrize(
    "link", [Link(2, 1, None, (), ("b",)), Link(1, 1, None, (), ("b",)), Link(1, 0, 5, (), ())]
)
def test_a_revision_that_does_not_build_on_earlier_ones_is_refused(link: Link) -> None:
    compositions = Compositions()
    with pytest.raises(JournalError, match=f"r{link.number} does not build on earlier ones"):
        compositions.extend([Link(0, None, None, (), ()), link])
