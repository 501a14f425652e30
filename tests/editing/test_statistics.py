from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from app.editing.moments import Moments
from app.editing.statistics import KEPT_FACTORS, Statistics
from app.errors import SettingsError
from tests.tiny import TinyModels


def statistics(tiny: TinyModels, folder: Path, corpus: Path | None = None) -> Statistics:
    return Statistics(tiny.load(), folder=folder, corpus=corpus, tokens=500)


def test_the_second_moment_is_the_mean_outer_product_of_the_keys(
    tiny: TinyModels, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The capital of France is Paris.\nBerlin lies in Germany.\n")
    found = statistics(tiny, tmp_path, corpus)._second_moment(1)
    loaded = tiny.load()
    keys: list[torch.Tensor] = []
    projection = loaded.anatomy.projection(loaded.model, 1)
    handle = projection.register_forward_pre_hook(lambda _, inputs: keys.append(inputs[0][0]))
    try:
        for line in corpus.read_text().splitlines():
            loaded.model(torch.tensor([loaded.tokenizer(line)["input_ids"]]))
    finally:
        handle.remove()
    everything = torch.cat(keys)
    torch.testing.assert_close(found, everything.T @ everything / len(everything))


def test_statistics_are_computed_once_and_read_back_the_same(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = statistics(tiny, tmp_path).covariance(1, 0.01)
    monkeypatch.setattr(Moments, "_compute", lambda *_: pytest.fail("computed again"))
    again = statistics(tiny, tmp_path).covariance(1, 0.01)
    assert torch.equal(first.factor, again.factor)
    assert first.identity == again.identity


def test_sampled_statistics_are_the_same_on_every_run(tiny: TinyModels, tmp_path: Path) -> None:
    a = statistics(tiny, tmp_path / "a")._second_moment(2)
    b = statistics(tiny, tmp_path / "b")._second_moment(2)
    assert torch.equal(a, b)


def test_layers_prepared_together_are_read_from_disk_later(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, int, int]] = []
    found = Statistics(
        tiny.load(), folder=tmp_path, tokens=500, progress=lambda *report: heard.append(report)
    )
    found.prepare([0, 2])
    assert heard[0] == ("statistics", 0, 500)
    assert heard[-1] == ("statistics", 500, 500)
    monkeypatch.setattr(Moments, "_compute", lambda *_: pytest.fail("computed again"))
    later = statistics(tiny, tmp_path)
    later.prepare([0, 2])
    assert later.covariance(0, 0.01).identity != later.covariance(2, 0.01).identity


def test_the_identity_names_second_moment_and_ridge(tiny: TinyModels, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Madrid is the capital of Spain.\n")
    sampled, read = statistics(tiny, tmp_path), statistics(tiny, tmp_path, corpus)
    identities = [
        sampled.covariance(1, 0.01).identity,
        sampled.covariance(1, 0.02).identity,
        sampled.covariance(2, 0.01).identity,
        read.covariance(1, 0.01).identity,
    ]
    assert len(set(identities)) == 4
    assert all(len(bytes.fromhex(identity)) == 8 for identity in identities)


def test_solving_inverts_the_covariance_with_its_ridge(tiny: TinyModels, tmp_path: Path) -> None:
    source = statistics(tiny, tmp_path)
    covariance = source.covariance(1, 0.1)
    moment = source._second_moment(1).double()
    key = torch.randn(len(moment), 1, generator=torch.Generator().manual_seed(0))
    solved = covariance.solve(key)
    ridge = 0.1 * covariance.scale * torch.eye(len(moment), dtype=torch.float64)
    torch.testing.assert_close((moment + ridge) @ solved, key.double())


def test_factors_in_memory_are_bounded_and_the_last_used_stay(
    tiny: TinyModels, tmp_path: Path
) -> None:
    source = statistics(tiny, tmp_path)
    first = source.covariance(1, 1.0)
    for ridge in range(2, KEPT_FACTORS + 4):
        source.covariance(1, float(ridge))
        assert source.covariance(1, 1.0) is first
    assert len(source._factors) == KEPT_FACTORS


def test_each_source_and_model_has_statistics_of_its_own(tiny: TinyModels, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Madrid is the capital of Spain.\n")
    sampled = statistics(tiny, tmp_path)._second_moment(1)
    read = statistics(tiny, tmp_path, corpus)._second_moment(1)
    assert not torch.equal(sampled, read)
    other = Statistics(tiny.load("mistral"), folder=tmp_path, tokens=500)
    assert other._folder != statistics(tiny, tmp_path)._folder


def test_the_default_budget_is_ten_tokens_for_each_dimension_of_a_key(
    tiny: TinyModels, tmp_path: Path
) -> None:
    loaded = tiny.load()
    heard: list[int] = []
    Statistics(loaded, folder=tmp_path).prepare([1], lambda _stage, _done, of: heard.append(of))
    assert heard[-1] == 10 * loaded.anatomy.shape(loaded.model, 1)[1]


def test_a_corpus_that_is_not_there_is_refused_at_once(tiny: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="corpus"):
        statistics(tiny, tmp_path, tmp_path / "absent.txt")


def test_nothing_is_computed_for_layers_nobody_asked_for(tiny: TinyModels, tmp_path: Path) -> None:
    loaded = replace(tiny.load(), recommendations={})
    Statistics(loaded, folder=tmp_path, tokens=500).prepare([])
    assert not list(tmp_path.rglob("*"))
