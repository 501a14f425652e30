from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.domain import Fact
from app.evaluation.retention import (
    BUCKETS,
    AgeBucket,
    AgedFact,
    Retention,
    count_kept,
    sample_facts,
)


def age(*ages: int) -> list[AgedFact]:
    return [AgedFact(Fact("{} lies in", f"Place {i}", "Spain"), a) for i, a in enumerate(ages)]


AGES = st.lists(st.integers(0, 30), max_size=60)


def test_buckets_are_fifths_of_the_facts_the_oldest_first() -> None:
    facts = age(*range(10))
    found = count_kept(facts, [fact.age < 7 for fact in facts])
    assert found == Retention(
        (
            AgeBucket(9, 8, asked=2, kept=0),
            AgeBucket(7, 6, asked=2, kept=1),
            AgeBucket(5, 4, asked=2, kept=2),
            AgeBucket(3, 2, asked=2, kept=2),
            AgeBucket(1, 0, asked=2, kept=2),
        )
    )
    assert found.share == 0.7


def test_facts_of_one_edit_stay_in_one_bucket() -> None:
    assert count_kept(age(*[4] * 9), [True] * 8 + [False]).buckets == (AgeBucket(4, 4, 9, 8),)


def test_without_facts_there_is_no_share() -> None:
    assert count_kept([], []) == Retention()
    assert Retention().share is None


@given(AGES, st.data())
def test_every_fact_is_counted_once_in_the_bucket_of_its_age(
    ages: list[int], data: st.DataObject
) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(ages), max_size=len(ages)))
    found = count_kept(age(*ages), kept)
    assert len(found.buckets) <= BUCKETS
    assert found.asked == len(ages)
    for bucket in found.buckets:
        inside = [k for a, k in zip(ages, kept, strict=True) if bucket.newest <= a <= bucket.oldest]
        assert (bucket.asked, bucket.kept) == (len(inside), sum(inside))
    bounds = [bound for bucket in found.buckets for bound in (bucket.oldest, bucket.newest)]
    assert bounds == sorted(bounds, reverse=True)


@given(AGES, st.integers(1, 20), st.integers(0, 9))
def test_a_sample_is_spread_over_the_ages_and_decided_by_its_seed(
    ages: list[int], count: int, seed: int
) -> None:
    facts = age(*ages)
    sample = sample_facts(facts, count, seed)
    assert sample == sample_facts(facts, count, seed)
    assert len(sample) == min(count, len(facts))
    assert all(fact in facts for fact in sample)
    assert len({fact.fact.subject for fact in sample}) == len(sample)
    ordered = sorted(ages, reverse=True)
    for part, fact in enumerate(sample):
        start, end = (p * len(ages) // len(sample) for p in (part, part + 1))
        assert fact.age in ordered[start:end]


def test_another_seed_draws_other_facts() -> None:
    facts = age(*range(100))
    assert sample_facts(facts, 10, seed=1) != sample_facts(facts, 10, seed=2)
