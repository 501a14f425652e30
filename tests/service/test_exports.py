"""Exports of the service, read by programs that know nothing of it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from app.domain import Export, ExportKind, ExportOrder, Fact, Mode
from app.errors import Cancelled, Conflict, InvalidInput, NotFound, ShuttingDown
from tests.tiny import TinyModels
from tests.weights.exports.conftest import FACTS, logits

from .bench import AGAIN, FACT, LEDGER, MORE, OTHER, Bench, MakeBench

# PEFT 0.21 asks transformers 5.24 a question by a name that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ADAPTER, MODEL, BUNDLE = ExportKind.ADAPTER, ExportKind.MODEL, ExportKind.BUNDLE
every_kind = pytest.mark.parametrize("kind", list(ExportKind))


def export(bench: Bench, kind: ExportKind, view: str = "live") -> Export:
    return bench.service.export(ExportOrder(view, kind)).result(60)


def folder(bench: Bench, made: Export) -> Path:
    return bench.service.export_file(made.name, made.kind.manifest).parent


def live_model(bench: Bench) -> torch.nn.Module:
    return bench.views.get(bench.service.resolve("live").composition).model


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox"])
def test_twenty_live_edits_are_an_adapter_and_a_model_that_say_the_same(
    make_bench: MakeBench, tiny: TinyModels, model_type: str
) -> None:
    """Done when: PEFT on the base within 1e-4 of the live model, transformers alone equal."""
    bench = make_bench(model_type)
    for fact in FACTS[:20]:
        bench.edit(fact)
    live = logits(live_model(bench))
    base = AutoModelForCausalLM.from_pretrained(tiny.folder(model_type))
    assert (live - logits(base)).abs().max() > 0.1
    whole = AutoModelForCausalLM.from_pretrained(folder(bench, export(bench, MODEL)))
    assert torch.equal(logits(whole), live)
    adapter = export(bench, ADAPTER)
    assert (adapter.label, adapter.details["rank"]) == ("r000020", 20)
    adapted = PeftModel.from_pretrained(base, str(folder(bench, adapter)))
    assert (logits(adapted) - live).abs().max() < 1e-4


@every_kind
def test_an_export_tells_what_it_is_of_and_is_found_again(bench: Bench, kind: ExportKind) -> None:
    bench.edit()
    made = export(bench, kind)
    assert (made.kind, made.label, made.base) == (kind, "r000001", bench.views.base)
    assert made.state_hash == bench.service.head.state_hash
    assert made.name.endswith("-r000001")
    bench.restart()
    assert bench.service.find_export(made.name) == made
    assert bench.service.exports(10, None).items == (made,)
    for file in made.files:
        assert bench.service.export_file(made.name, file.name).stat().st_size == file.size


@every_kind
def test_a_state_is_exported_once(bench: Bench, kind: ExportKind) -> None:
    bench.edit()
    made = export(bench, kind)
    with pytest.raises(Conflict, match="there already"):
        export(bench, kind)
    bench.service.delete_export(made.name)
    with pytest.raises(NotFound):
        bench.service.find_export(made.name)
    assert export(bench, kind) == made


def test_an_export_is_of_the_state_when_it_was_asked_for(bench: Bench) -> None:
    first = bench.edit(FACT)
    making = bench.service.export(ExportOrder("live", BUNDLE))
    bench.edit(OTHER)
    assert making.result(60).state_hash == first.state_hash


def test_edits_do_not_wait_for_an_export(bench: Bench) -> None:
    bench.edit(FACT)
    begun, go_on = threading.Event(), threading.Event()

    def hold(what: str, done: int, of: int) -> None:
        begun.set()
        go_on.wait(60)

    making = bench.service.export(ExportOrder("live", BUNDLE), hold)
    assert begun.wait(10)
    assert bench.edit(OTHER).revision == 2
    assert not making.done()
    go_on.set()
    assert making.result(60).label == "r000001"


@every_kind
def test_a_cancelled_export_leaves_nothing(bench: Bench, kind: ExportKind) -> None:
    bench.edit()
    steps: list[str] = []

    def stop(what: str, done: int, of: int) -> None:
        steps.append(what)
        if len(steps) > 2:
            raise Cancelled("Enough.")

    with pytest.raises(Cancelled):
        bench.service.export(ExportOrder("live", kind), stop).result(60)
    assert bench.service.exports(10, None).items == ()
    assert export(bench, kind).kind is kind


def test_a_stopping_server_gives_an_export_up(bench: Bench) -> None:
    bench.edit()
    begun = threading.Event()

    def hold(what: str, done: int, of: int) -> None:
        begun.set()
        stopped.wait(60)

    stopped = threading.Event()
    making = bench.service.export(ExportOrder("live", MODEL), hold)
    waiting = bench.service.export(ExportOrder("base", MODEL))
    assert begun.wait(10)
    bench.service.stop_accepting()
    stopped.set()
    with pytest.raises(ShuttingDown):
        making.result(60)
    assert waiting.cancelled()
    bench.restart()
    assert bench.service.exports(10, None).items == ()


def test_errors_come_at_once_where_they_can(bench: Bench) -> None:
    with pytest.raises(NotFound):
        bench.service.export(ExportOrder("nowhere", BUNDLE))
    with pytest.raises(InvalidInput, match="edited view"):
        export(bench, ADAPTER, "base")
    bench.edit()
    with pytest.raises(InvalidInput, match="max_rank"):
        bench.service.export(ExportOrder("live", ADAPTER, max_rank=0)).result(60)


def facts_of(bench: Bench, view: str) -> list[Fact]:
    made = export(bench, BUNDLE, view)
    facts = list(bench.exporter.read(made.name).facts)
    bench.service.delete_export(made.name)
    return facts


def test_a_bundle_tells_the_live_facts_with_all_their_prompts(bench: Bench) -> None:
    rich = replace(MORE, rephrase_prompts=("Next to {} lies",), ground_truth="Italy")
    bench.edit(FACT)
    bench.edit(rich, **LEDGER)
    gone = bench.edit(OTHER)
    bench.edit(AGAIN)
    bench.service.undo(gone.id).result(60)
    assert facts_of(bench, "live") == [rich, AGAIN]
    assert facts_of(bench, "r1") == [FACT]
    assert facts_of(bench, "base") == []


def test_a_sandboxs_bundle_tells_its_roots_facts_and_its_own(bench: Bench) -> None:
    bench.edit(FACT)
    sandbox = bench.service.create_sandbox("live").result(60)
    bench.edit(OTHER, sandbox=sandbox.id)
    bench.edit(MORE)
    assert facts_of(bench, sandbox.id) == [FACT, OTHER]
    made = bench.edit(FACT, OTHER, mode=Mode.INDEPENDENT)
    assert [facts_of(bench, name) for name in made.sandboxes] == [[FACT], [OTHER]]
    assert export(bench, BUNDLE, made.sandboxes[0]).label == made.sandboxes[0]


def test_exports_are_listed_by_name_page_by_page(bench: Bench) -> None:
    bench.edit()
    made = sorted(
        export(bench, kind, view).name for kind in (MODEL, BUNDLE) for view in ("live", "base")
    )
    found, cursor = [], None
    while True:
        page = bench.service.exports(3, cursor)
        found += [one.name for one in page.items]
        cursor = page.next
        if cursor is None:
            break
    assert found == made


def test_only_an_exports_own_files_are_given(bench: Bench) -> None:
    bench.edit()
    made = export(bench, BUNDLE)
    inside = folder(bench, made)
    (inside / "extra").write_text("not ours")
    for file in ("extra", "../../journal.db", "/etc/passwd", "..", ""):
        with pytest.raises(NotFound):
            bench.service.export_file(made.name, file)
    for name in ("..", ".", "", "../exports", f"../exports/{made.name}", "nowhere"):
        with pytest.raises(NotFound):
            bench.service.find_export(name)
        with pytest.raises(NotFound):
            bench.service.delete_export(name)
    assert inside.is_dir()


def test_a_damaged_export_is_named_not_listed_and_can_be_deleted(bench: Bench) -> None:
    bench.edit()
    made = export(bench, BUNDLE)
    manifest = folder(bench, made) / BUNDLE.manifest
    manifest.write_bytes(manifest.read_bytes().replace(b"r000001", b"r000002"))
    assert bench.service.exports(10, None).items == ()
    with pytest.raises(Conflict, match="damaged"):
        bench.service.find_export(made.name)
    bench.service.delete_export(made.name)
    assert export(bench, BUNDLE) == made
