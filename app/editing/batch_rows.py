"""The rows of a batch's facts, and which of them a step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from app.editing.targets import Spots


@dataclass(frozen=True, slots=True)
class Read:
    """What a step reads. ``rows`` and ``places`` are the numbers of its rows and spots among all;
    ``owners`` ``(rows,)`` are the rows' facts, by their place among those still sought. ``spots``
    have the numbers of what is read and these owners, one more than there are if they don't
    count. ``unchanged`` are the unedited model's log-probabilities at the essence spots
    ``(spots, vocabulary)``, which are to stay."""

    rows: Tensor
    places: Tensor
    spots: Spots
    owners: Tensor
    unchanged: Tensor


class BatchRows:
    """All rows of a batch of facts."""

    def __init__(self, spots: Spots, owners: Tensor, bare: Tensor, said: Tensor) -> None:
        """``spots`` and ``owners`` as ``gather_spots`` gives them, ``bare`` the rows without a
        context, ``said`` ``(spots, vocabulary)`` the unedited model's log-probabilities."""
        self._spots = spots
        self._owners = owners
        self._is_bare = torch.zeros_like(owners, dtype=torch.bool)
        self._is_bare[bare] = True
        self._unchanged = said[spots.targets :].clone()
        at_targets = said[: spots.targets]
        self._answers = at_targets.argmax(dim=-1)
        self._target_losses = -at_targets.gather(1, spots.wanted[:, None])[:, 0]
        self._counts = torch.ones_like(spots.row, dtype=torch.bool)

    def bare_losses(self, facts: int) -> Tensor:
        """For each of so many facts, the target's mean negative log-likelihood (nats per token)
        in the unedited model, bare."""
        of_bare = self._is_bare[self._spots.row[: self._spots.targets]]
        owners = self._spots.owner[: self._spots.targets][of_bare]
        return mean_by_owner(self._target_losses[of_bare], owners, facts)

    def read(
        self, active: Sequence[int], near: Sequence[bool], compared: int | None = None
    ) -> Read:
        """All rows of facts that are ``near`` (a boolean for each of the batch), the bare ones of
        the others, as far as they are ``active`` (their numbers, in rising order). All rows of
        the one ``compared`` are read, but only count if it is near."""
        device = self._owners.device
        places = {fact: place for place, fact in enumerate(active)}
        numbers = [places.get(fact, -1) for fact in range(len(near))]
        new_owner = torch.tensor(numbers, device=device)
        counting = self._is_bare | torch.tensor(near, device=device)[self._owners]
        chosen = counting if compared is None else counting | (self._owners == compared)
        kept = self._counts & (chosen & (new_owner[self._owners] >= 0))[self._spots.row]
        needed = torch.zeros_like(chosen)
        needed[self._spots.row[kept]] = True
        spots = self._spots.take(kept)
        owner = new_owner[spots.owner].masked_fill(~counting[spots.row], len(active))
        stays = kept[self._spots.targets :]
        return Read(
            needed.nonzero()[:, 0],
            kept.nonzero()[:, 0],
            replace(spots, row=(needed.cumsum(dim=0) - 1)[spots.row], owner=owner),
            new_owner[self._owners[needed]],
            self._unchanged if bool(stays.all()) else self._unchanged[stays],
        )

    def leave_out_answers(self) -> None:
        """Ask no essence row to keep an answer that is to change. Rows that tell it go, so that
        a subject costs little more for each further fact. Where all of a subject's rows do, only
        the predictions that begin the answer go."""
        spots, telling = self._spots, self._find_telling()
        if not telling:
            return
        owners, rows = spots.owner.tolist(), spots.row.tolist()
        told = {rows[place] for place in telling}
        essence = range(spots.targets, len(rows))
        others = {owners[place] for place in essence if rows[place] not in told}
        gone = {rows[place] for place in telling if owners[place] in others}
        left = set(range(len(rows))) - set(telling)
        counts = [place in left and row not in gone for place, row in enumerate(rows)]
        self._counts = torch.tensor(counts, device=self._counts.device)

    def _find_telling(self) -> list[int]:
        """The essence spots at which the unedited model would begin the answer that it gives to
        one of the subject's facts."""
        spots = self._spots
        likeliest = [*self._answers.tolist(), *self._unchanged.argmax(dim=-1).tolist()]
        owners, rows = spots.owner.tolist(), spots.row.tolist()
        answers = {
            (owners[place], likeliest[place])
            for place in range(spots.targets)
            if place == 0 or rows[place] != rows[place - 1]
        }
        essence = range(spots.targets, len(likeliest))
        return [place for place in essence if (owners[place], likeliest[place]) in answers]


def mean_by_owner(values: Tensor, owners: Tensor, count: int) -> Tensor:
    """Mean of ``values`` for each of ``count`` owners; zero for one that has none."""
    total = torch.zeros(count + 1, device=values.device, dtype=values.dtype)  # and for nobody
    number = torch.zeros_like(total)
    total = total.index_add(0, owners, values)
    number = number.index_add(0, owners, torch.ones_like(values))
    return (total / number.clamp(min=1))[:count]
