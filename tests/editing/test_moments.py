"""Second moments: one run for all layers, resumed to the same bytes, stored or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
import torch
from safetensors.torch import load_file, save_file

from app.editing import moments as moments_module
from app.editing import passes as passes_module
from app.editing.moment import Moment
from app.editing.moment_store import Label, MomentStore
from app.editing.moments import Moments
from app.editing.passes import Passes, ReadPasses, SampledPasses
from app.editing.texts import TextFile
from app.errors import EditRejected
from app.weights.fork import fork, graft
from app.weights.loading import LoadedModel, assemble
from app.weights.tracing import tracing_input
from tests.tiny import TEXT, TinyModels

TOKENS = 700
Make = Callable[[Path], Moments]


class Killed(Exception):
    """Stands in for the end of the process: what was stored by then is all that is left."""


class Ear:
    """Hears progress, and breaks off after so many reports."""

    def __init__(self, breaks_after: int | None = None) -> None:
        self.heard: list[tuple[str, int, int]] = []
        self._breaks_after = breaks_after

    def __call__(self, stage: str, done: int, of: int) -> None:
        self.heard.append((stage, done, of))
        if len(self.heard) == self._breaks_after:
            raise Killed


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes_module, "SAMPLED_ROWS", 8)
    monkeypatch.setattr(passes_module, "SAMPLED_LENGTH", 16)
    monkeypatch.setattr(passes_module, "BATCH_TOKENS", 128)


@pytest.fixture(params=["sampled", "read"])
def make(request: pytest.FixtureRequest, tiny: TinyModels, tmp_path: Path) -> Make:
    loaded = tiny.load()
    passes: Passes = SampledPasses(loaded)
    if request.param == "read":
        corpus = tmp_path / "corpus.txt"
        corpus.write_text("\n".join(f"{TEXT} {index}" for index in range(30)))
        passes = ReadPasses(loaded, TextFile(corpus))
    return lambda folder: Moments(loaded, passes, folder=folder, tokens=TOKENS)


def test_all_layers_are_filled_by_one_run_and_each_as_if_it_were_alone(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [make(tmp_path / str(layer)).mean(layer) for layer in (0, 1, 3)]
    together = make(tmp_path / "together")
    ear = Ear()
    together.prepare([3, 0, 1], ear)
    monkeypatch.setattr(Moments, "_compute", lambda *_: pytest.fail("computed again"))
    together.prepare([0, 1, 3])
    for layer, expected in zip((0, 1, 3), alone, strict=True):
        assert torch.equal(together.mean(layer), expected)
    counts = [done for _, done, _ in ear.heard]
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (0, TOKENS)
    assert {(stage, of) for stage, _, of in ear.heard} == {("statistics", TOKENS)}


@pytest.mark.parametrize("reports", [1, 2, 4])
def test_a_run_that_was_broken_off_ends_with_the_same_bytes(
    make: Make, tmp_path: Path, reports: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    make(whole).prepare([1, 2])
    with pytest.raises(Killed):
        make(broken).prepare([1, 2], Ear(breaks_after=reports))
    assert not list(broken.glob("*.safetensors"))
    ear = Ear()
    make(broken).prepare([1, 2], ear)
    assert (ear.heard[0][1] > 0) == (reports > 1)
    assert folder_bytes(broken) == folder_bytes(whole)


def test_progress_is_heard_inside_a_batch_and_a_run_may_be_broken_off_there(
    tiny: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "TELL_EVERY", 0.0)
    loaded = tiny.load()

    def make(name: str) -> Moments:
        return Moments(loaded, SampledPasses(loaded), folder=tmp_path / name, tokens=TOKENS)

    whole = Ear()
    make("whole").mean(1, whole)
    counts = [done for _, done, _ in whole.heard]
    assert counts == sorted(counts)
    assert len(set(counts)) > TOKENS // 10  # a batch has 128 tokens, each of its passes 8
    with pytest.raises(Killed):
        make("broken").mean(1, Ear(breaks_after=40))
    rest = Ear()
    make("broken").mean(1, rest)
    assert rest.heard[0][1] == 2 * 128
    assert folder_bytes(tmp_path / "broken") == folder_bytes(tmp_path / "whole")


def test_a_layer_that_joins_a_resumed_run_starts_from_the_beginning(
    make: Make, tmp_path: Path
) -> None:
    alone = make(tmp_path / "alone").mean(2)
    with pytest.raises(Killed):
        make(tmp_path / "broken").mean(1, Ear(breaks_after=3))
    later = make(tmp_path / "broken")
    later.prepare([1, 2])
    assert torch.equal(later.mean(2), alone)
    assert torch.equal(later.mean(1), make(tmp_path / "alone").mean(1))


def test_sums_are_stored_on_the_way(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "STORE_EVERY", 0.0)
    monkeypatch.setattr(moments_module, "STORE_SHARE", 1e9)
    stored: list[int] = []
    keep = MomentStore.keep_partial

    def watch(store: MomentStore, label: Label, moment: Moment) -> bool:
        stored.append(moment.count)
        return keep(store, label, moment)

    monkeypatch.setattr(MomentStore, "keep_partial", watch)
    make(tmp_path / "folder").mean(1)
    assert len(stored) > 3
    assert not list((tmp_path / "folder").glob("*.partial"))


@pytest.mark.parametrize("make", ["read"], indirect=True)  # files are the same of any text
@pytest.mark.parametrize("suffix", ["partial", "safetensors"])
@pytest.mark.parametrize("damage", ["emptied", "one bit", "another model's"])
def test_a_file_that_is_damaged_or_not_ours_is_computed_anew_with_a_warning(
    make: Make, tmp_path: Path, suffix: str, damage: str
) -> None:
    whole = make(tmp_path / "whole").mean(1)
    folder = tmp_path / "folder"
    ear = Ear(breaks_after=3 if suffix == "partial" else None)
    try:
        make(folder).mean(1, ear)
    except Killed:
        assert suffix == "partial"
    (path,) = folder.glob(f"*.{suffix}")
    spoil(path, damage)
    with structlog.testing.capture_logs() as logs:
        assert torch.equal(make(folder).mean(1), whole)
    assert any(line["log_level"] == "warning" for line in logs)


def test_a_run_says_that_it_begins_how_long_it_takes_and_that_it_is_done(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "ESTIMATE_AFTER", 0.0)
    with structlog.testing.capture_logs() as logs:
        make(tmp_path).prepare([0, 1])
    first, estimate, *_, last = logs
    assert (first["layers"], first["tokens"], first["resumed_at"]) == ([0, 1], TOKENS, 0)
    assert estimate["seconds_left"] >= 0
    assert last["event"] == "statistics: done"
    assert last["tokens"] >= TOKENS
    assert len(logs) == 3  # the next line of progress is due after seconds


def test_a_folder_that_can_not_be_written_costs_a_warning_and_nothing_else(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "occupied").write_text("a file where the folder should be")
    found = make(tmp_path / "occupied")
    with structlog.testing.capture_logs() as logs:
        found.prepare([1, 2])
    assert [line["log_level"] for line in logs if "stored" in line["event"]] == ["warning"] * 2
    expected = make(tmp_path / "folder").mean(1)
    monkeypatch.setattr(Moments, "_compute", lambda *_: pytest.fail("computed again"))
    assert torch.equal(found.mean(1), expected)


def test_where_a_sum_can_not_be_stored_the_run_goes_on_and_tries_no_more(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments_module, "STORE_EVERY", 0.0)
    (tmp_path / "occupied").write_text("a file where the folder should be")
    with structlog.testing.capture_logs() as logs:
        make(tmp_path / "occupied").mean(1)
    refused = [line["file"] for line in logs if line["log_level"] == "warning"]
    assert [Path(file).suffix for file in refused] == [".partial", ".safetensors"]


def test_another_budget_or_source_has_a_file_of_its_own(tiny: TinyModels, tmp_path: Path) -> None:
    loaded = tiny.load()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT)
    for passes in (SampledPasses(loaded), ReadPasses(loaded, TextFile(corpus))):
        for tokens in (200, 300):
            Moments(loaded, passes, folder=tmp_path, tokens=tokens).mean(1)
    assert len(list(tmp_path.glob("layer-001-*.safetensors"))) == 4


def test_a_text_shorter_than_the_budget_is_read_whole(tiny: TinyModels, tmp_path: Path) -> None:
    loaded = tiny.load()
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT)
    ear = Ear()
    passes = ReadPasses(loaded, TextFile(corpus))
    Moments(loaded, passes, folder=tmp_path, tokens=9_999).mean(1, ear)
    assert ear.heard[-1] == ("statistics", len(loaded.encode(TEXT)), 9_999)


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1030])
def test_a_moment_is_the_mean_outer_product_however_the_keys_were_cut(width: int) -> None:
    keys = torch.randn(40, width, generator=torch.Generator().manual_seed(width))
    moment = Moment.empty(width)
    for start in range(0, 40, 13):
        moment.add(keys[start : start + 13], moment.mark + 1)
    assert (moment.count, moment.mark) == (40, 4)
    torch.testing.assert_close(moment.mean(), keys.T @ keys / 40)
    assert torch.equal(moment.mean(), moment.mean().T)


def test_keys_that_are_not_finite_are_refused_and_not_stored(
    tiny: TinyModels, tmp_path: Path
) -> None:
    loaded = spoiled(tiny.load())
    found = Moments(loaded, SampledPasses(loaded), folder=tmp_path, tokens=100)
    with pytest.raises(EditRejected, match="aren't finite"):
        found.mean(1)
    assert not list(tmp_path.iterdir())


def spoiled(loaded: LoadedModel) -> LoadedModel:
    """A model whose first layer puts out what is not a number."""
    model = fork(loaded.model)
    name = loaded.anatomy.matrix_name(0)
    graft(model, {name: torch.full_like(model.get_parameter(name), torch.nan)})
    return assemble(model, loaded.tokenizer, loaded.anatomy, name="spoiled")


def spoil(path: Path, damage: str) -> None:
    if damage == "emptied":
        path.write_bytes(b"")
    elif damage == "one bit":
        content = bytearray(path.read_bytes())
        content[-9] ^= 1
        path.write_bytes(content)
    else:
        save_file({"second_moment": load_file(path)["second_moment"] * 2}, path, {"model": "x"})


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_the_mean_is_that_of_the_keys_of_each_text_alone(
    tiny: TinyModels, tmp_path: Path, model_type: str
) -> None:
    """OPT flattens rows and tokens on the way to its projection."""
    loaded = tiny.load(model_type)
    pieces = ["Berlin lies in Germany.", "France borders Spain and Italy", "Madrid"]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(pieces))
    moments = Moments(loaded, ReadPasses(loaded, TextFile(corpus)), folder=tmp_path, tokens=TOKENS)
    read: list[torch.Tensor] = []
    model = fork(loaded.model)
    with torch.no_grad(), tracing_input(loaded.anatomy.projection(model, 1), read.append):
        for piece in pieces:
            model(input_ids=torch.tensor([loaded.encode(piece)]))
    keys = torch.cat([part.flatten(0, -2) for part in read])
    torch.testing.assert_close(moments.mean(1), keys.T @ keys / len(keys), rtol=1e-4, atol=1e-6)
