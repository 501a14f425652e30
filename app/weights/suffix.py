"""Passes from the subject on: all that a change of one layer's output can still reach.

In a causal model a change at layer L and token t leaves the layers up to L and the tokens before
t as they were. So the whole pass runs once, and what it has seen is kept: the keys and values of
the tokens before t in the layers behind L, and what entered those layers from t on. Each later
pass runs these layers on these tokens only, and gives what the whole pass would give, up to
rounding. Texts that are alike up to t are one row, which branches behind t
(docs/decisions/suffix-passes.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from app.weights.architectures import Anatomy
from app.weights.spans import Span, group_alike, grow_trees, may_branch
from app.weights.suffix_group import Group, Kept, Site

log = structlog.get_logger(__name__)

MOST_OFF, COARSE_OFF = 1e-3, 0.1  # of the hidden states' spread; the latter in half precision
_CHECKED: dict[tuple[type, str], bool] = {}  # modelling code, and how it attends
CAUSAL_PATTERNS = {"full_attention", "sliding_attention", "global", "local"}


def why_whole(config: PreTrainedConfig) -> str | None:
    """Why earlier tokens can't be kept in a model like this; nothing if they can."""
    patterns = set(getattr(config, "layer_types", None) or ()) - CAUSAL_PATTERNS
    if patterns:
        return f"layers of type {', '.join(sorted(patterns))}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "layers that share keys and values"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention to later tokens"
    return None


class SuffixPass:
    """Texts of one private model whose layer ``layer`` is being changed at one token each.

    Making it runs the whole pass once, without gradients: ``keys`` ``(spans, d_ff)`` are the
    projection's input at the changed tokens, ``outputs`` ``(spans, d)`` the layer's output there
    (the projection's own where a norm stands behind it), ``unchanged`` ``(tokens, d)`` the body's
    output, true at the tokens that are read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        anatomy: Anatomy,
        layer: int,
        spans: Sequence[Span],
        *,
        pad_id: int,
        device: torch.device,
        whole: bool = False,
    ) -> None:
        self._all = self._spans = list(spans)
        site = Site(model, anatomy, layer, pad_id, device)
        longest = max(len(span.ids) for span in spans)
        trees = grow_trees(spans, branching=not whole and may_branch(model.config, longest))
        branched = next((tree for tree in trees if tree.branches), None)
        if branched is not None and not _branches_well(site, [spans[i] for i in branched.spans]):
            trees = grow_trees(spans, branching=False)
        self._recorded = []
        seen = []
        for members in group_alike(trees):
            group, first = Group.record(site, [trees[index] for index in members], whole=whole)
            self._recorded.append(group)
            seen.append(first)
        self._groups = self._recorded
        self._locate()
        self.keys = torch.cat([first.keys for first in seen])[self._tree_of]
        self.outputs = torch.cat([first.outputs for first in seen])[self._tree_of]
        self.unchanged = _joined([first.unchanged.flatten(0, 1) for first in seen])

    def run(self, deltas: Tensor) -> Tensor:
        """The body's output ``(tokens, d)`` with ``deltas`` ``(chosen spans, d)``, alike for spans
        of one owner, added to the projection's output at the changed tokens; differentiable in
        ``deltas`` until the next pass. It is true at the tokens that are read."""
        counts = [len(group.trees) for group in self._groups]
        parts = torch.split(deltas.index_select(0, self._leaders), counts)
        found = zip(self._groups, parts, strict=True)
        return _joined([group.run(part).flatten(0, 1) for group, part in found])

    @property
    def buffers(self) -> list[Tensor]:
        """What each pass writes to, over what the one before it wrote."""
        return [tensor for group in self._groups for tensor in group.buffers]

    def places(self, spans: Tensor, columns: Tensor) -> Tensor:
        """Where the output has the tokens in these ``columns``, counted from each span's start, of
        spans counted among the chosen ones."""
        return self._places[spans, columns]

    @property
    def tokens(self) -> int:
        """How many tokens each pass runs, padding included."""
        return sum(group.tokens for group in self._groups)

    def choose(self, spans: Tensor) -> None:
        """Run only these of all spans, in rising order, until others are chosen. What the first
        pass has seen of the others is kept; those chosen are grouped anew."""
        number = {old: new for new, old in enumerate(spans.tolist())}
        self._spans = [self._all[old] for old in number]
        if len(number) == len(self._all):
            self._groups = self._recorded
            self._locate()
            return
        kept = [
            Kept(tree, row, group, number, self._spans)
            for group in self._recorded
            for row, tree in enumerate(group.trees)
            if not number.keys().isdisjoint(tree.spans)
        ]
        self._groups = [
            Group.join([kept[index] for index in sorted(members)])
            for members in group_alike([each.tree for each in kept])
        ]
        self._locate()

    def run_whole(self) -> None:
        """Run every layer on every token from now on."""
        for group in (*self._recorded, *self._groups):
            group.run_whole()

    def _locate(self) -> None:
        """Find each span's tokens among those of all groups."""
        leaders: list[int] = []
        tree_of = [0] * len(self._spans)
        places: list[list[int]] = [[]] * len(self._spans)
        before = 0
        for group in self._groups:
            for row, tree in enumerate(group.trees):
                for span, path in zip(tree.spans, tree.columns, strict=True):
                    tree_of[span] = len(leaders)
                    places[span] = [before + row * group.width + column for column in path]
                leaders.append(tree.spans[0])
            before += len(group.trees) * group.width
        width = max(len(path) for path in places)
        device = self._groups[0].device
        self._leaders = torch.tensor(leaders, device=device)
        self._tree_of = torch.tensor(tree_of, device=device)
        self._places = torch.tensor([p + [0] * (width - len(p)) for p in places], device=device)


def _branches_well(site: Site, spans: Sequence[Span]) -> bool:
    """Whether the model's code goes by masks for each query, as these spans of one row show. They
    are read apart once for each such code."""
    code = type(site.model), site.model.config._attn_implementation
    if code not in _CHECKED:
        found = []
        for trees in (grow_trees(spans, branching=True), grow_trees(spans, branching=False)):
            group, seen = Group.record(site, trees, whole=False)
            hidden = seen.unchanged.float()
            ends = [
                (span, hidden[row, path[max(_read_of(spans[span]))]])
                for row, tree in enumerate(group.trees)
                for span, path in zip(tree.spans, tree.columns, strict=True)
            ]
            found.append(torch.stack([end for _, end in sorted(ends, key=lambda each: each[0])]))
        error = float((found[0] - found[1]).std() / found[1].std())
        _CHECKED[code] = error <= (MOST_OFF if site.model.dtype == torch.float32 else COARSE_OFF)
        if not _CHECKED[code]:
            log.warning("suffix passes: rows do not branch", model=code[0].__name__, error=error)
    return _CHECKED[code]


def _read_of(span: Span) -> list[int]:
    """The tokens read, from the span's start."""
    read = range(span.start, len(span.ids)) if span.read is None else span.read
    return [token - span.start for token in read]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
