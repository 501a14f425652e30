"""What a view's name stands for."""

from __future__ import annotations

from app.domain import Composition, ResolvedView, Sandbox, compose, parse_revision
from app.errors import InvalidInput, NotFound
from app.ports import Journal
from app.service.live_model import LiveModel

LIVE = frozenset({"live", "head"})
RESERVED = LIVE | {"base"}


class ViewNames:
    """Resolves names to states, each held against its recorded hash. Thread-safe."""

    def __init__(self, journal: Journal, live: LiveModel) -> None:
        self._journal = journal
        self._live = live

    def resolve(self, view: str, field: str = "view") -> ResolvedView:
        """The state a view's name stands for now: ``live``, ``base``, ``rN``, a checkpoint's
        name or a sandbox's id. ``field`` is the input that names it, for the error.

        Raises:
            NotFound: no such view. JournalError: its weights aren't those recorded.
        """
        if view in LIVE:
            head = self._live.head
            return ResolvedView(view, head.composition, revision=head.revision.number)
        if view == "base":
            return ResolvedView(view, (), revision=0)
        number = self.find_revision(view)
        if number is not None:
            return self._resolve_revision(view, number, field)
        sandbox = self._journal.sandbox(view)
        if sandbox is None:
            raise NotFound(
                f"No view is called {view!r}; use 'live', 'base', a revision such as 'r3', "
                "a checkpoint's name or a sandbox's id.",
                field=field,
            )
        composition = self.sandbox_state(sandbox)
        self._live.verify_once(sandbox.id, composition, sandbox.state_hash)
        return ResolvedView(view, composition, sandbox=sandbox.id)

    def resolve_number(self, view: str, field: str, otherwise: str) -> int:
        """The number of a revision or of a checkpoint's revision.

        Raises:
            NotFound. InvalidInput: a sandbox; ``otherwise`` says what to do instead.
        """
        number = self.resolve(view, field).revision
        if number is None:
            raise InvalidInput(otherwise, field=field)
        return number

    def find_revision(self, view: str) -> int | None:
        """``r3`` or a checkpoint's name → the number; ``None`` for anything else."""
        number = parse_revision(view)
        if number is None:
            checkpoint = self._journal.checkpoint(view)
            number = checkpoint.revision if checkpoint else None
        return number

    def sandbox_state(self, sandbox: Sandbox) -> Composition:
        root = self._journal.composition(sandbox.root)
        return compose(root, sandbox.removed, sandbox.deltas)

    def _resolve_revision(self, view: str, number: int, field: str) -> ResolvedView:
        try:
            recorded = self._journal.revision(number)
        except NotFound as error:
            error.field = field
            raise
        composition = self._journal.composition(number)
        self._live.verify_once(recorded.id, composition, recorded.state_hash)
        return ResolvedView(view, composition, revision=number)
