"""What comes from elsewhere: the exported state's bytes, or a refusal that changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from app.domain import (
    BaseIdentity,
    Cause,
    Edit,
    EditStatus,
    ExportKind,
    ExportOrder,
    Fact,
    Guard,
    IdempotentRequest,
    ImportTarget,
    Progress,
    TextCheck,
    WriteTerms,
)
from app.errors import (
    Cancelled,
    Conflict,
    EditRejected,
    GuardFailed,
    InvalidInput,
    NotFound,
    PreconditionFailed,
)
from app.weights.delta import Change, Delta, Dense, LowRank, SubjectRow
from app.weights.exports.adapter import CONFIG_FILE
from app.weights.exports.manifest import Manifest
from tests.weights.exports.conftest import logits

from .bench import AGAIN, FACT, LEDGER, MORE, OTHER, TAUGHT, Bench, MakeBench, equal

BUNDLE, ADAPTER = ExportKind.BUNDLE, ExportKind.ADAPTER
UPLOAD = "upload"
LIVE, SANDBOX = ImportTarget.LIVE, ImportTarget.SANDBOX
THIRD = Fact("{} is the capital of", "Madrid", "Italy")
QUICK_FT: dict[str, Any] = {"method": "ft", "hparams": {"steps": 2, "layer": 2}}


def teach_rows(bench: Bench) -> None:
    for fact in (FACT, OTHER, AGAIN, MORE):
        bench.edit(fact, **LEDGER)


def teach_rome(bench: Bench) -> None:
    for fact in (FACT, OTHER):
        bench.edit(fact)


def teach_ft(bench: Bench) -> None:
    bench.edit(FACT, **QUICK_FT)


def teach_mixed(bench: Bench) -> None:
    bench.edit(FACT)
    bench.edit(OTHER, **LEDGER)
    gone = bench.edit(MORE, **LEDGER)
    bench.edit(THIRD, **QUICK_FT)
    bench.service.undo(gone.id).result(60)


Teach = Callable[[Bench], None]
every_state = pytest.mark.parametrize("teach", [teach_rows, teach_rome, teach_ft, teach_mixed])
every_target = pytest.mark.parametrize("into", list(ImportTarget))


def export(bench: Bench, kind: ExportKind = BUNDLE, view: str = "live") -> Path:
    made = bench.service.export(ExportOrder(view, kind)).result(60)
    return bench.service.export_file(made.name, kind.manifest).parent


def upload(bench: Bench, folder: Path, without: Sequence[str] = ()) -> str:
    for path in folder.iterdir():
        if path.name not in without:
            send(bench, path.name, path.read_bytes())
    return UPLOAD


def send(bench: Bench, file: str, payload: bytes) -> None:
    with bench.service.receive_upload(UPLOAD, file) as receiving:
        receiving.write(payload)
        receiving.finish()


def take(
    bench: Bench,
    source: str,
    into: ImportTarget = SANDBOX,
    guard: Guard | None = None,
    **terms: Any,
) -> Edit:
    return bench.service.import_state(source, into, guard, WriteTerms(**terms)).result(60)


def view_of(edit: Edit) -> str:
    return edit.sandboxes[0] if edit.sandboxes else f"r{edit.revision}"


@pytest.fixture
def other(make_bench: MakeBench) -> Bench:
    """Another server of the same base."""
    return make_bench(folder="other")


@every_target
@pytest.mark.parametrize(
    ("teach", "dtype"),
    [
        *((teach, "float32") for teach in (teach_rows, teach_rome, teach_ft, teach_mixed)),
        (teach_mixed, "bfloat16"),
    ],
)
def test_a_bundle_gives_another_server_the_same_bytes(
    make_bench: MakeBench, teach: Teach, dtype: str, into: ImportTarget
) -> None:
    source, other = make_bench(dtype=dtype), make_bench(dtype=dtype, folder="other")
    teach(source)
    made = take(other, upload(other, export(source)), into)
    assert made.state_hash == source.service.head.state_hash
    assert equal(other.matrices(view_of(made)), source.matrices())
    assert other.service.head.number == (1 if into is LIVE else 0)
    other.restart()
    assert other.views.state_hash(other.service.resolve(view_of(made)).composition) == (
        made.state_hash
    )
    assert other.journal.verify() == []
    assert other.store.verify() == []


@pytest.mark.parametrize("view", ["base", "r1", "sandbox"])
def test_any_view_comes_back(bench: Bench, other: Bench, view: str) -> None:
    bench.edit(FACT)
    sandbox = bench.service.create_sandbox("live").result(60)
    bench.edit(OTHER, sandbox=sandbox.id, **LEDGER)
    bench.edit(THIRD)
    view = sandbox.id if view == "sandbox" else view
    made = take(other, upload(other, export(bench, view=view)))
    assert equal(other.matrices(made.sandboxes[0]), bench.matrices(view))


def test_an_import_is_an_edit_on_record(bench: Bench, other: Bench) -> None:
    rich = replace(FACT, rephrase_prompts=("France's capital is",))
    bench.edit(rich, **TAUGHT)
    made = take(other, upload(other, export(bench)), LIVE)
    assert (made.method, made.status, made.revision) == ("import", EditStatus.COMMITTED, 1)
    assert made.hparams == {
        "source": "upload",
        "kind": "bundle",
        "base_checked": True,
        "only_facts": False,
    }
    assert [outcome.fact for outcome in made.outcomes] == [rich]
    assert made.outcomes[0].success
    assert made.metrics["efficacy"] == 1
    assert made.metrics["paraphrase"] is not None
    assert other.service.head.cause is Cause.IMPORT
    assert other.service.edit(made.id) == made


def test_an_upload_goes_once_it_is_in_and_an_export_stays(bench: Bench) -> None:
    bench.edit()
    folder = export(bench)
    take(bench, upload(bench, folder))
    with pytest.raises(NotFound):
        take(bench, "upload")
    take(bench, folder.name)
    take(bench, folder.name)


@every_state
def test_an_import_taken_out_was_never_there(bench: Bench, other: Bench, teach: Teach) -> None:
    """Under and over edits of its subjects, told by the ledger and written by others."""
    teach(bench)
    other.edit(FACT, **LEDGER)
    other.edit(THIRD)
    before = other.matrices()
    made = take(other, upload(other, export(bench)), LIVE)
    assert not equal(other.matrices(), before)
    undone = other.service.undo(made.id).result(60)
    assert undone.exact
    assert equal(other.matrices(), before)
    back = other.service.redo(made.id).result(60)
    assert back.revision.state_hash == made.state_hash
    assert other.journal.verify() == []


def test_edits_made_after_an_import_outlive_it(bench: Bench, other: Bench) -> None:
    bench.edit(FACT, OTHER, **LEDGER)
    made = take(other, upload(other, export(bench)), LIVE)
    other.edit(AGAIN, MORE, **LEDGER)
    other.service.undo(made.id).result(60)
    bench.service.reset().result(60)
    bench.edit(AGAIN, MORE, **LEDGER)
    assert equal(other.matrices(), bench.matrices())


def test_a_row_over_a_live_one_answers_anew_and_keeps_its_other_facts(
    bench: Bench, other: Bench
) -> None:
    """As if its facts had been edited here."""
    bench.edit(AGAIN, **LEDGER)
    other.edit(FACT, MORE, **LEDGER)
    take(other, upload(other, export(bench)), LIVE)
    bench.service.reset().result(60)
    for facts in ((FACT, MORE), (AGAIN,)):
        bench.edit(*facts, **LEDGER)
    assert equal(other.matrices(), bench.matrices())
    other.restart()
    assert equal(other.matrices(), bench.matrices())
    assert other.store.verify() == []


def test_an_imported_sandbox_is_continued_and_promoted(bench: Bench, other: Bench) -> None:
    teach_mixed(bench)
    made = take(other, upload(other, export(bench)))
    other.edit(MORE, sandbox=made.sandboxes[0], **LEDGER)
    bench.edit(MORE, **LEDGER)
    promoted = other.service.promote(made.sandboxes[0]).result(60)
    assert promoted.state_hash == bench.service.head.state_hash
    other.restart()
    assert equal(other.matrices(), bench.matrices())
    assert other.journal.verify() == []


def test_imported_facts_are_compacted_with_the_others(
    make_bench: MakeBench, bench: Bench, other: Bench
) -> None:
    bench.edit(FACT, **LEDGER)
    take(other, upload(other, export(bench)), LIVE)
    other.edit(OTHER)
    made = other.service.compact("ledger", LEDGER["hparams"], force=True).result(60)
    assert made.state_hash == make_bench(folder="third").edit(FACT, OTHER, **LEDGER).state_hash


@pytest.mark.parametrize("told", [True, False])
@every_target
def test_an_adapter_is_imported_by_what_it_does(
    bench: Bench, other: Bench, into: ImportTarget, told: bool
) -> None:
    """Ours with its manifest beside it, or as another program would have written it."""
    teach_mixed(bench)
    source = upload(other, export(bench, ADAPTER), without=() if told else (ADAPTER.manifest,))
    made = take(other, source, into)
    assert made.hparams["base_checked"] is told
    assert made.outcomes == ()
    live = logits(bench.views.get(bench.service.resolve("live").composition).model)
    there = other.views.get(other.service.resolve(view_of(made)).composition).model
    assert (logits(there) - live).abs().max() < 1e-4
    other.restart()
    assert other.journal.verify() == []
    if into is LIVE:
        other.service.undo(made.id).result(60)
        assert equal(other.matrices(), other.matrices("base"))


def test_what_is_live_already_is_not_imported_again(bench: Bench, other: Bench) -> None:
    bench.edit(FACT, **LEDGER)
    folder = export(bench)
    take(other, upload(other, folder), LIVE)
    before = other.everything()
    with pytest.raises(Conflict, match="already"):
        take(other, upload(other, folder), LIVE)
    assert other.everything() == before


# Refusals ------------------------------------------------------------------------------------


def refuse(bench: Bench, source: str, error: type[Exception], why: str, **asked: Any) -> Exception:
    """Refused, into a sandbox and onto the live model, and nothing has changed."""
    before, files = bench.everything(), bench.store.digests()
    for into in ImportTarget:
        with pytest.raises(error, match=why) as refused:
            take(bench, source, into, **asked)
    assert bench.everything() == before
    assert bench.store.digests() == files
    bench.restart()
    assert bench.everything() == before
    assert bench.journal.verify() == []
    return refused.value


def forge(bench: Bench, change: Callable[[Manifest], Manifest], folder: Path) -> str:
    """Upload a bundle whose manifest says something else, hashed as it should be."""
    upload(bench, folder)
    manifest = Manifest.from_bytes((folder / BUNDLE.manifest).read_bytes(), BUNDLE.manifest)
    send(bench, BUNDLE.manifest, change(manifest).to_bytes())
    return UPLOAD


def forge_deltas(bench: Bench, *deltas: Delta) -> str:
    """Upload a bundle of deltas with which nothing is wrong but what they hold."""
    payloads = {sha256(payload).hexdigest(): payload for payload in map(Delta.to_bytes, deltas)}
    for digest, payload in payloads.items():
        send(bench, f"{digest}.safetensors", payload)
    details = {"composition": list(payloads), "facts": []}
    files = {f"{digest}.safetensors": digest for digest in payloads}
    made = Manifest(BUNDLE, bench.views.base, "0" * 64, "r000001", files, details)
    send(bench, BUNDLE.manifest, made.to_bytes())
    return UPLOAD


def row_of(bench: Bench) -> SubjectRow:
    """A real row, of a subject with two facts."""
    (digest,) = bench.edit(FACT, MORE, **LEDGER).deltas
    row = bench.views.delta(digest).row
    assert row is not None
    return row


def test_a_state_hash_that_is_not_the_deltas_own_is_refused(bench: Bench, other: Bench) -> None:
    teach_mixed(bench)
    other.edit(OTHER)
    source = forge(other, lambda known: replace(known, state_hash="f" * 64), export(bench))
    error = refuse(other, source, InvalidInput, "state hash")
    assert isinstance(error, InvalidInput)
    assert error.field == "source"


def test_a_bundle_of_another_base_is_refused(bench: Bench, other: Bench) -> None:
    bench.edit()
    base = BaseIdentity("a" * 64, "elsewhere", "float32")
    source = forge(other, lambda known: replace(known, base=base), export(bench))
    refuse(other, source, InvalidInput, "elsewhere")


@pytest.mark.parametrize(
    "fact",
    [
        {"prompt": "The capital of {} is", "subject": "France"},
        {"prompt": "The capital of {} is", "subject": "France", "target": 7},
        {"prompt": "The capital is", "subject": "France", "target": "Rome"},
        {"prompt": "{} is", "subject": "\ud800", "target": "Rome"},
        {"prompt": "{} is", "subject": "France", "target": "Rome " * 200},
    ],
)
def test_facts_that_are_none_are_refused(
    bench: Bench, other: Bench, fact: Mapping[str, Any]
) -> None:
    bench.edit()
    source = forge(
        other,
        lambda known: replace(known, details={**known.details, "facts": [fact]}),
        export(bench),
    )
    error = refuse(other, source, InvalidInput, "import")
    assert isinstance(error, InvalidInput)
    assert error.field == "source"


@pytest.mark.parametrize("change", ["low-rank", "dense"])
def test_a_change_beyond_the_norm_bound_is_refused(bench: Bench, change: str) -> None:
    name = bench.views.loaded.anatomy.matrix_name(1)
    d, d_ff = bench.views.loaded.anatomy.shape(bench.views.loaded.model, 1)
    made: dict[str, Change] = {
        "low-rank": LowRank(torch.full((d, 1), 1e3), torch.ones(d_ff, 1)),
        "dense": Dense(torch.full((d, d_ff), 1e3)),
    }
    refuse(bench, forge_deltas(bench, Delta({name: made[change]})), EditRejected, "norm")


@pytest.mark.parametrize(
    "change",
    [
        {"hparams": {}, "facts": ()},
        {"hparams": {"layers": [1], "steps": -1}},
        {"hparams": {"layers": [99]}},
        {"hparams": {"unheard-of": 1}},
        {"subject": " "},
        {"subject": "\ud800"},
        {"facts": ((MORE.prompt, "Spain"), (FACT.prompt, "Rome"), (FACT.prompt, "Oslo"))},
        {"facts": (("{} borders", "Spain"), ("The capital of {} is", "Rome"))},
        {"facts": (("no subject", "Spain"),)},
        {"facts": (("{} is", "long " * 200),)},
    ],
)
def test_a_row_that_could_not_be_told_anew_is_refused(
    bench: Bench, other: Bench, change: dict[str, Any]
) -> None:
    row = replace(row_of(bench), **change)
    error = refuse(other, forge_deltas(other, Delta.of_row(row)), InvalidInput, "can't be")
    assert isinstance(error, InvalidInput)
    assert error.field == "source"


def test_two_rows_of_a_subject_are_refused(bench: Bench, other: Bench) -> None:
    row = row_of(bench)
    rows = [Delta.of_row(replace(row, facts=(pair,))) for pair in row.facts]
    refuse(other, forge_deltas(other, *rows), InvalidInput, "Two rows")


def test_a_guard_that_is_missed_changes_nothing_and_is_on_record(
    bench: Bench, other: Bench
) -> None:
    bench.edit(FACT, **TAUGHT)
    source = upload(other, export(bench))
    guard = Guard(must_not_contain=(TextCheck("The capital of France is", "Rome"),))
    error = refuse(other, source, GuardFailed, "must_not_contain", guard=guard)
    assert isinstance(error, GuardFailed)
    record = other.service.edit(error.edit)
    assert (record.method, record.status) == ("import", EditStatus.REFUSED)
    assert take(other, source, guard=Guard(min_efficacy=1.0)).checks[0].passed


def test_the_servers_guard_holds_for_imports(bench: Bench, other: Bench) -> None:
    bench.edit()
    source = upload(other, export(bench))
    other.default_guard = Guard(max_norm_growth=0.0)
    other.restart()
    refuse(other, source, GuardFailed, "max_norm_growth")


@pytest.mark.parametrize("name", ["min_efficacy", "min_paraphrase", "min_locality"])
def test_a_guard_on_facts_that_an_import_lacks_is_a_mistake(
    bench: Bench, other: Bench, name: str
) -> None:
    bench.edit()
    source = upload(other, export(bench, ADAPTER))
    asked: dict[str, Any] = {name: 0.5}
    refuse(other, source, InvalidInput, name, guard=Guard(**asked))


def test_a_cancelled_import_changes_nothing(bench: Bench, other: Bench) -> None:
    """At whichever of its steps."""
    teach_mixed(bench)
    source = upload(other, export(bench))
    for step in ("reading the import", "checking deltas", "measuring", "commit"):
        refuse(other, source, Cancelled, step, progress=stop_at(step))
    assert take(other, source, LIVE).state_hash == bench.service.head.state_hash


def stop_at(step: str) -> Progress:
    def stop(what: str, done: int, of: int) -> None:
        if what == step:
            raise Cancelled(f"Enough of {step}.")

    return stop


def test_an_import_waits_for_the_head_it_expects(bench: Bench, other: Bench) -> None:
    bench.edit()
    other.edit(OTHER)
    source = upload(other, export(bench))
    refuse(other, source, PreconditionFailed, "r1, not r0", expected=(0,))
    assert take(other, source, LIVE, expected=(1,)).revision == 2


def test_a_request_repeated_is_one_import(bench: Bench, other: Bench) -> None:
    bench.edit()
    source = upload(other, export(bench))
    request = IdempotentRequest("key", "said")
    made = take(other, source, LIVE, request=request)
    assert take(other, source, LIVE, request=request) == made
    assert other.service.head.number == 1


@pytest.mark.parametrize("source", ["nowhere", "..", ".", "", "../imports", "/etc"])
def test_nothing_is_read_from_elsewhere(bench: Bench, source: str) -> None:
    refuse(bench, source, NotFound, "no export")


def test_what_a_refusal_quotes_can_be_sent(bench: Bench, other: Bench) -> None:
    """Words of an import with half a character in them, which no JSON answer may hold."""
    bench.edit()
    folder = export(bench, ADAPTER)
    upload(other, folder, without=(ADAPTER.manifest,))
    config = json.loads((folder / CONFIG_FILE).read_bytes())
    send(other, CONFIG_FILE, json.dumps({**config, "\ud800": 1}).encode())
    error = refuse(other, UPLOAD, InvalidInput, "only plain LoRA can")
    assert str(error).encode()


def test_a_model_folder_is_no_import(bench: Bench) -> None:
    bench.edit()
    refuse(bench, export(bench, ExportKind.MODEL).name, InvalidInput, "neither")
