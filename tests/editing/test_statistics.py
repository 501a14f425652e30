from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.editing.statistics import Statistics
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

    def fail(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Statistics, "_accumulate", fail)
    again = statistics(tiny, tmp_path).covariance(1, 0.01)
    assert torch.equal(first.factor, again.factor)


def test_sampled_statistics_are_the_same_on_every_run(tiny: TinyModels, tmp_path: Path) -> None:
    a = statistics(tiny, tmp_path / "a")._second_moment(2)
    b = statistics(tiny, tmp_path / "b")._second_moment(2)
    assert torch.equal(a, b)


def test_solving_inverts_the_covariance_with_its_ridge(tiny: TinyModels, tmp_path: Path) -> None:
    source = statistics(tiny, tmp_path)
    covariance = source.covariance(1, 0.1)
    moment = source._second_moment(1).double()
    key = torch.randn(len(moment), 1, generator=torch.Generator().manual_seed(0))
    solved = covariance.solve(key)
    ridge = 0.1 * covariance.scale * torch.eye(len(moment), dtype=torch.float64)
    torch.testing.assert_close((moment + ridge) @ solved, key.double())


def test_each_source_and_model_has_statistics_of_its_own(tiny: TinyModels, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Madrid is the capital of Spain.\n")
    sampled = statistics(tiny, tmp_path)._second_moment(1)
    read = statistics(tiny, tmp_path, corpus)._second_moment(1)
    assert not torch.equal(sampled, read)
    other = Statistics(tiny.load("mistral"), folder=tmp_path, tokens=500)
    assert other._folder != statistics(tiny, tmp_path)._folder


@pytest.mark.parametrize("content", [None, b"", b"  \n", b"\xff\xfe\xff"])
def test_a_corpus_without_text_is_refused_at_once(
    tiny: TinyModels, tmp_path: Path, content: bytes | None
) -> None:
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    with pytest.raises(SettingsError, match="corpus"):
        statistics(tiny, tmp_path, corpus)


def test_a_damaged_file_is_computed_anew(tiny: TinyModels, tmp_path: Path) -> None:
    before = statistics(tiny, tmp_path)._second_moment(1)
    (path,) = tmp_path.rglob("layer-001-*.safetensors")
    path.write_bytes(b"")
    assert torch.equal(statistics(tiny, tmp_path)._second_moment(1), before)
