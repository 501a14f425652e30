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
from app.weights.first_pass import FirstPass
from app.weights.spans import Span, group_alike, grow_trees, may_branch
from app.weights.suffix_group import Group, Kept
from app.weights.suffix_site import Site

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
    (the projection's own where a norm stands behind it). All spans are chosen at first.
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
        self._all = list(spans)
        self._whole = whole
        self._site = site = Site(model, anatomy, layer, pad_id, device)
        longest = max(len(span.ids) for span in spans)
        trees = grow_trees(spans, branching=not whole and may_branch(model.config, longest))
        branched = next((tree for tree in trees if tree.branches), None)
        if branched is not None and not _branches_well(site, [spans[i] for i in branched.spans]):
            trees = grow_trees(spans, branching=False)
        self._trees = trees
        self._first = FirstPass(site, trees, whole=whole)
        self._paths: list[Sequence[int]] = [()] * len(spans)
        tree_of = [0] * len(spans)
        for index, (tree, begins_at) in enumerate(zip(trees, self._first.begin_at, strict=True)):
            for span, path in zip(tree.spans, tree.columns, strict=True):
                tree_of[span] = index
                self._paths[span] = [begins_at + tree.start + column for column in path]
        of_span = torch.tensor(tree_of, device=device)
        self.keys = self._first.keys[of_span]
        self.outputs = self._first.outputs[of_span]
        self._groups: list[Group] = []

    def unchanged(self, spans: Tensor, columns: Tensor) -> Tensor:
        """The unchanged body's output ``(tokens, d)`` at these tokens, that are read, of all
        spans, as ``places`` counts them."""
        return self._first.unchanged.index_select(
            0, _as_table(self._paths, spans.device)[spans, columns]
        )

    def run(self, deltas: Tensor) -> Tensor:
        """The body's output ``(tokens, d)`` with ``deltas`` ``(chosen spans, d)``, alike for spans
        of one owner, added to the projection's output at the changed tokens; differentiable in
        ``deltas`` until the next pass. It is true at the tokens that are read."""
        groups = self._chosen()
        counts = [len(group.trees) for group in groups]
        parts = torch.split(deltas.index_select(0, self._leaders), counts)
        found = [group.run(part).flatten(0, 1) for group, part in zip(groups, parts, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found)

    @property
    def buffers(self) -> list[Tensor]:
        """What each pass writes to, over what the one before it wrote."""
        return [tensor for group in self._chosen() for tensor in group.buffers]

    def places(self, spans: Tensor, columns: Tensor) -> Tensor:
        """Where the output has the tokens in these ``columns``, counted from each span's start, of
        spans counted among the chosen ones."""
        self._chosen()
        return self._places[spans, columns]

    @property
    def tokens(self) -> int:
        """How many tokens each pass runs, padding included."""
        return sum(group.tokens for group in self._chosen())

    def choose(self, spans: Tensor) -> None:
        """Run only these of all spans, in rising order, until others are chosen."""
        self._groups = []  # lets go of what they hold before others take as much
        number = {old: new for new, old in enumerate(spans.tolist())}
        chosen = [self._all[old] for old in number]
        kept = [
            Kept(tree, begins_at, number, chosen)
            for tree, begins_at in zip(self._trees, self._first.begin_at, strict=True)
            if not number.keys().isdisjoint(tree.spans)
        ]
        self._groups = [
            Group(self._site, self._first, [kept[index] for index in members], whole=self._whole)
            for members in group_alike([each.tree for each in kept])
        ]
        self._locate(len(chosen))

    def run_whole(self) -> None:
        """Run every layer on every token from now on."""
        self._whole = True
        for group in self._groups:
            group.run_whole()

    def _chosen(self) -> list[Group]:
        if not self._groups:
            self.choose(torch.arange(len(self._all)))
        return self._groups

    def _locate(self, count: int) -> None:
        """Find each span's tokens among those of all groups."""
        leaders: list[int] = []
        places: list[Sequence[int]] = [()] * count
        before = 0
        for group in self._groups:
            for tree in group.trees:
                for span, path in zip(tree.spans, tree.columns, strict=True):
                    places[span] = [before + column for column in path]
                leaders.append(tree.spans[0])
                before += group.width
        self._leaders = torch.tensor(leaders, device=self._site.device)
        self._places = _as_table(places, self._site.device)


def _as_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def _branches_well(site: Site, spans: Sequence[Span]) -> bool:
    """Whether the model's code goes by masks for each query, as these spans of one row show. They
    are read apart once for each such code."""
    code = type(site.model), site.model.config._attn_implementation
    if code not in _CHECKED:
        found = []
        for branching in (True, False):
            trees = grow_trees(spans, branching=branching)
            first = FirstPass(site, trees, whole=False)
            ends = {
                span: begins_at + tree.start + path[max(_read_of(spans[span]))]
                for tree, begins_at in zip(trees, first.begin_at, strict=True)
                for span, path in zip(tree.spans, tree.columns, strict=True)
            }
            found.append(first.unchanged[[ends[span] for span in range(len(spans))]].float())
        error = float((found[0] - found[1]).std() / found[1].std())
        _CHECKED[code] = error <= (MOST_OFF if site.model.dtype == torch.float32 else COARSE_OFF)
        if not _CHECKED[code]:
            log.warning("suffix passes: rows do not branch", model=code[0].__name__, error=error)
    return _CHECKED[code]


def _read_of(span: Span) -> list[int]:
    """The tokens read, from the span's start."""
    read = range(span.start, len(span.ids)) if span.read is None else span.read
    return [token - span.start for token in read]
