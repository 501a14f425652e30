"""The typed client against a real server on loopback."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import errors
from app.api.schemas import CompletionOut, DoneEvent, FailedEvent, PieceEvent, Token, name_event
from app.client import Client, error_from, error_types
from tests.fakes import BASE, FakeWorld, build_world, running_server

PROMPT = "The capital of France is"
FACT = {"prompt": "The capital of {} is", "subject": "France", "target": "Rome"}


@pytest.fixture
def world(tmp_path: Path) -> FakeWorld:
    return build_world(tmp_path)


@pytest.fixture
def client(world: FakeWorld) -> Iterator[Client]:
    with running_server(world) as url, Client(url) as client:
        yield client


def say(client: Client, view: str = "live") -> str:
    return client.generate(PROMPT, views=[view]).completions[0].text


def test_a_session_edits_checkpoints_reverts_and_resets(client: Client) -> None:
    assert say(client) == " Paris."
    edit = client.edit([FACT], method="rome", hparams={"strength": 2})
    assert (edit.revision, edit.facts[0].after, edit.hparams) == ("r1", " Rome.", {"strength": 2})
    assert client.get_edit(edit.id) == edit
    assert client.edits(method="rome").items == [edit]
    assert client.create_checkpoint("edited").revision == "r1"
    assert client.reset().revision == "r2"
    assert (say(client), say(client, "edited")) == (" Paris.", " Rome.")
    moved = client.revert("edited")
    assert (moved.revision, moved.restored, say(client)) == ("r3", "r1", " Rome.")
    assert len(client.revisions(limit=2).items) == 2
    assert client.revision("r3").state_hash == client.revision("r1").state_hash
    client.delete_checkpoint("edited")
    assert client.checkpoints().items == []


def test_what_a_revision_or_a_sandbox_replaces_is_told(client: Client, world: FakeWorld) -> None:
    client.edit([FACT])
    before = client.revision("r1").deltas
    world.editor.replaced.update(before)
    sandbox = client.create_sandbox(root="live").id
    client.edit([{**FACT, "target": "Oslo"}], sandbox=sandbox)
    client.edit([{**FACT, "target": "Lima"}])
    assert client.sandbox(sandbox).removed == client.revision("r2").removed == before
    assert (say(client), say(client, sandbox), say(client, "r1")) == (" Lima.", " Oslo.", " Rome.")


def test_a_session_with_sandboxes(client: Client) -> None:
    (first,) = client.edit([FACT], mode="independent").sandboxes
    second = client.create_sandbox(root="live").id
    client.edit([{**FACT, "target": "Oslo"}], sandbox=second)
    result = client.probe([PROMPT], candidates=["Rome", "Oslo"], views=[first, second])
    assert [[c.rank for c in r.prompts[0].candidates] for r in result.results] == [[1, 2], [2, 1]]
    assert client.promote(second).revision == "r1"
    assert say(client) == " Oslo."
    client.delete_sandbox(first)
    assert [sandbox.id for sandbox in client.sandboxes().items] == [second]
    assert client.sandbox(second).root == "r0"


def test_the_server_describes_itself(client: Client) -> None:
    assert client.model().name == BASE.name
    assert [method.name for method in client.methods().items] == ["rome", "ft"]
    assert (client.livez().status, client.readyz().revision) == ("ok", "r0")


def test_a_problem_answer_raises_the_error_the_server_raised(client: Client) -> None:
    with pytest.raises(errors.UnknownMethod) as unknown:
        client.edit([FACT], method="magic")
    assert unknown.value.field == "method"
    assert "rome" in unknown.value.detail
    with pytest.raises(errors.ContextExceeded):
        client.generate("a " * 99)
    with pytest.raises(errors.NotFound):
        client.revert("nowhere")
    with pytest.raises(errors.EditRejected):
        client.edit([FACT], hparams={"strength": 0})
    client.create_checkpoint("taken")
    with pytest.raises(errors.Conflict):
        client.create_checkpoint("taken")
    with pytest.raises(errors.InvalidInput, match="larger than"):
        client.generate("a" * (10 << 20))
    with pytest.raises(errors.NotFound):
        client.get_edit("a/b?c")


def test_keys_travel(world: FakeWorld) -> None:
    with running_server(world, api_keys={"k": "read"}) as url:
        with Client(url) as nobody, pytest.raises(errors.Unauthorized):
            nobody.model()
        with Client(url, "k") as reader:
            assert reader.model().revision == "r0"
            with pytest.raises(errors.Forbidden):
                reader.reset()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_no_server_says_where_it_looked_and_how_to_start_one() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url) as client, pytest.raises(errors.Unreachable) as caught:
        client.model()
    assert url in caught.value.detail
    assert "palimpsest serve" in caught.value.detail


@pytest.mark.parametrize(
    ("status", "body", "headers", "expected"),
    [
        (429, {"type": "about:blank"}, {"Retry-After": "7"}, errors.Overloaded),
        (503, {"type": "about:blank"}, {}, errors.ShuttingDown),
        (413, {"type": "about:blank"}, {}, errors.InvalidInput),
        (409, {"type": "about:blank"}, {}, errors.Conflict),
        (502, {"type": "about:blank"}, {}, errors.PalimpsestError),
        (500, {"type": "urn:palimpsest:problem:journal-error"}, {}, errors.JournalError),
        (500, None, {}, errors.PalimpsestError),
        (200, {"what": "is this"}, {}, errors.Unreachable),
    ],
)
def test_any_answer_becomes_an_error_of_ours(
    status: int,
    body: dict[str, str] | None,
    headers: dict[str, str],
    expected: type[errors.PalimpsestError],
) -> None:
    problem = {"title": "t", "status": status, "detail": "A detail.", **(body or {})}
    content = json.dumps(problem) if body else "<html>"

    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(status, content=content, headers=headers)

    client = Client("http://fake", transport=httpx.MockTransport(answer))
    with client, pytest.raises(errors.PalimpsestError) as caught:
        client.model()
    assert type(caught.value) is expected
    if isinstance(caught.value, errors.Overloaded):
        assert caught.value.retry_after == int(headers.get("Retry-After", 1))


def test_the_client_knows_every_error_by_its_type() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    ours = {kind for kind in kinds if issubclass(kind, errors.PalimpsestError)}
    assert set(error_types().values()) == ours


def test_a_stream_is_the_answer_in_pieces(client: Client) -> None:
    client.edit([{"prompt": "{} goes", "subject": "It", "target": "on and on"}])
    asked: dict[str, Any] = {"views": ["live", "base"], "top_logprobs": 1}
    whole = client.generate("It goes", **asked)
    events = list(client.generate_stream("It goes", **asked))
    for index, completion in enumerate(whole.completions):
        (done,) = [e for e in events if isinstance(e, DoneEvent) and e.index == index]
        pieces = [e for e in events if isinstance(e, PieceEvent) and e.index == index]
        assert CompletionOut.model_validate(done.model_dump()) == completion
        assert [token for piece in pieces for token in piece.tokens] == completion.tokens
        assert "".join(piece.text for piece in pieces) == completion.text
        assert pieces[0].tokens[0].top == [Token(id=100, text=" top0", logprob=0.0)]


def test_what_happens_to_a_stream_is_told(client: Client, world: FakeWorld) -> None:
    world.engine.restarts = True
    world.engine.failure = errors.Conflict("It is worn out.", field="view")
    events = list(client.generate_stream(PROMPT, on_commit="restart"))
    assert [name_event(event) for event in events] == ["piece", "restart", "piece", "error"]
    assert isinstance(events[-1], FailedEvent)
    assert isinstance(error_from(events[-1].problem), errors.Conflict)
    with pytest.raises(errors.NotFound):
        next(client.generate_stream(PROMPT, views=["nowhere"]))
    with pytest.raises(errors.InvalidInput):
        client.generate(PROMPT, on_commit="wait")


def test_a_stream_that_is_closed_is_given_up(client: Client, world: FakeWorld) -> None:
    world.engine.gate.clear()
    stream = client.generate_stream(PROMPT)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while not world.engine.futures[0].cancelled():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("application/json", "{}"),
        ("text/event-stream", ""),
        ("text/event-stream", 'event: new\ndata: {"x": 1}\n\n'),
    ],
)
def test_a_stream_that_is_none_or_breaks_off_is_no_answer(kind: str, content: str) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=content, headers={"Content-Type": kind})

    with (
        Client("http://fake", transport=httpx.MockTransport(answer)) as client,
        pytest.raises(errors.Unreachable),
    ):
        list(client.generate_stream(PROMPT))
