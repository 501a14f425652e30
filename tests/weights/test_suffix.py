"""Passes from the subject on give what whole passes give, on every architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from app.weights import suffix as suffix_module
from app.weights.architectures import dissect, recognise
from app.weights.attention import LEAST_HEADS
from app.weights.body import run_body
from app.weights.fork import fork
from app.weights.language_model import LanguageModel
from app.weights.spans import (
    RUN_COST,
    Span,
    Tree,
    align_rows,
    find_beginnings,
    group_alike,
    group_near,
    grow_trees,
    may_branch,
)
from app.weights.suffix import SuffixPass, why_whole
from tests.tiny import CONFIGS, VOCABULARY, TinyModels

CPU = torch.device("cpu")
WIDTH = 48
# Beyond the tiny models' own: windows that rows outgrow, biases by distance, a norm behind the
# residual sum.
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mistral, short window": ("mistral", {"sliding_window": 4}),
    "gemma2, short window": ("gemma2", {"sliding_window": 4}),
    "gemma3_text, short window": ("gemma3_text", {"sliding_window": 4}),
    "gpt_neo, short window": ("gpt_neo", {"window_size": 4}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "opt, norm behind": ("opt", {"do_layer_norm_before": False}),
    "gpt_neox, one after another": ("gpt_neox", {"use_parallel_residual": False}),
    "qwen2, fewer key heads": ("qwen2", {"num_key_value_heads": 2}),
}


def spans() -> list[Span]:
    """Rows of several lengths, one without anything before it, some with a shared beginning."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()

    shared = draw(7)
    alone = [Span(draw(n), start, changed) for n, start, changed in ((9, 4, 4), (5, 1, 2))]
    alike = [Span(shared + draw(n), 7 + extra, 7 + extra) for n, extra in ((5, 1), (6, 2), (4, 0))]
    return [*alone, *alike, Span(draw(3), 0, 0)]


def build(name: str, more: Mapping[str, Any] | None = None) -> LanguageModel:
    model_type, options = VARIANTS.get(name, (name, {}))
    config = AutoConfig.for_model(
        model_type,
        **{**CONFIGS[model_type], **options, **(more or {})},
        vocab_size=VOCABULARY,
        initializer_range=0.15,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: LanguageModel = AutoModelForCausalLM.from_config(config)
    model.train(False).requires_grad_(False)
    return model


def make_pass(model: LanguageModel, layer: int, rows: list[Span], **options: Any) -> SuffixPass:
    anatomy = dissect(model, recognise(model.config))
    return SuffixPass(model, anatomy, layer, rows, pad_id=0, device=CPU, **options)


def places(made: SuffixPass, lengths: Iterable[int]) -> list[Tensor]:
    """Where the output has each span's tokens."""
    return [
        made.places(torch.full((length,), span), torch.arange(length))
        for span, length in enumerate(lengths)
    ]


def run_alone(model: LanguageModel, layer: int, span: Span, delta: Tensor) -> Tensor:
    """The body's output ``(suffix, d)`` of one row, unpadded, through the whole model."""
    projection = dissect(model, recognise(model.config)).projection(model, layer)

    def add(_: object, __: object, output: Tensor) -> Tensor:
        moved = output.reshape(len(span.ids), -1).clone()
        moved[span.changed] += delta
        return moved.reshape(output.shape)

    handle = projection.register_forward_hook(add)
    try:
        hidden: Tensor = model.base_model(torch.tensor([list(span.ids)])).last_hidden_state
    finally:
        handle.remove()
    return hidden[0, span.start :]


@pytest.mark.parametrize("least_heads", [1, LEAST_HEADS])
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("name", [*sorted(CONFIGS), *VARIANTS])
def test_a_suffix_pass_is_the_whole_pass_of_each_row_alone(
    name: str, layer: int, least_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the attention that many rows get."""
    monkeypatch.setattr("app.weights.attention.LEAST_HEADS", least_heads)
    model, rows = build(name), spans()
    deltas = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(1))
    mine = deltas.clone().requires_grad_(True)
    made = make_pass(model, layer, rows)
    found = made.run(mine)
    theirs = deltas.clone().requires_grad_(True)
    expected = [
        run_alone(model, layer, span, delta) for span, delta in zip(rows, theirs, strict=True)
    ]
    lengths = [len(part) for part in expected]
    real = torch.cat([found[at] for at in places(made, lengths)])
    torch.testing.assert_close(real, torch.cat(expected), rtol=1e-4, atol=1e-4)
    weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad((weights * real).sum(), mine)
    (plain,) = torch.autograd.grad((weights * torch.cat(expected)).sum(), theirs)
    torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-3)


def test_many_rows_attend_by_one_product() -> None:
    rows = [Span([5, 6 + n, 7, 8], 2, 2) for n in range(LEAST_HEADS)]
    deltas = torch.zeros(len(rows), WIDTH, requires_grad=True)
    found = make_pass(build("llama"), 1, rows).run(deltas)
    assert "_AttendedBackward" in names_of(found.grad_fn)


def names_of(node: Any) -> set[str]:
    """What a graph's nodes are called."""
    waiting, seen = [node], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("least_heads", [1, LEAST_HEADS])
def test_a_gradient_holds_until_the_next_pass(
    least_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.weights.attention.LEAST_HEADS", least_heads)
    made = make_pass(build("gpt2"), 1, spans())
    z = torch.randn(len(spans()), WIDTH, generator=torch.Generator().manual_seed(1))
    first = made.run(z.requires_grad_(True))
    made.run(-z)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first.sum(), z)


def branching_spans() -> list[Span]:
    """Two owners' spans, of which the first four, and the next two, begin alike; and one that is
    changed by the same amount as those elsewhere."""
    shared, other = [7, 8, 9, 10], [20]
    return [
        Span([*shared, 11, 12, 13], 3, 3, owner=0),
        Span([*shared, 11, 14], 3, 3, owner=0),
        Span([*shared, 15], 3, 3, owner=0),
        Span([*shared, 11, 12, 16, 17], 3, 3, owner=0),
        Span([*other, 21, 22], 0, 0, owner=1),
        Span([*other, 23], 0, 0, owner=1),
        Span([30, 31, 32, *shared, 33], 6, 6, owner=0),
    ]


@pytest.mark.parametrize("least_heads", [1, LEAST_HEADS])
@pytest.mark.parametrize("name", [*sorted(CONFIGS), *VARIANTS])
def test_branches_are_the_whole_passes_of_each_span_alone(
    name: str, least_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of those that are chosen of a row, and by the attention that many rows get."""
    monkeypatch.setattr("app.weights.attention.LEAST_HEADS", least_heads)
    model, rows = build(name), branching_spans()
    amounts = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    made = make_pass(model, 1, rows)
    for kept in ([0, 1, 2, 3, 4, 5, 6], [1, 3, 4, 6], [0, 3, 6], [0, 1, 2, 3, 4, 5, 6]):
        made.choose(torch.tensor(kept))
        rows = [branching_spans()[index] for index in kept]
        owners = torch.tensor([span.owner for span in rows])
        mine = amounts.clone().requires_grad_(True)
        found = made.run(mine[owners])
        theirs = amounts.clone().requires_grad_(True)
        expected = [
            run_alone(model, 1, span, theirs[owner])
            for span, owner in zip(rows, owners.tolist(), strict=True)
        ]
        real = torch.cat([found[at] for at in places(made, map(len, expected))])
        torch.testing.assert_close(real, torch.cat(expected), rtol=1e-4, atol=1e-4)
        weights = torch.randn(real.shape, generator=torch.Generator().manual_seed(2))
        (gradient,) = torch.autograd.grad((weights * real).sum(), mine)
        (plain,) = torch.autograd.grad((weights * torch.cat(expected)).sum(), theirs)
        torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-3)


def test_what_branches_have_in_common_is_run_once() -> None:
    made = make_pass(build("llama"), 1, branching_spans())
    alone = make_pass(build("llama"), 1, [replace(s, owner=None) for s in branching_spans()])
    assert (made.tokens, alone.tokens) == (3 * 8, 7 * 5)
    torch.testing.assert_close(made.keys, alone.keys)
    torch.testing.assert_close(made.outputs, alone.outputs)


def test_code_that_goes_by_no_such_mask_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here masks that let branches see each other, as a model that ignores them would."""
    rows = branching_spans()
    amounts = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(suffix_module, "_CHECKED", {})

    def see_all(parents: Sequence[Sequence[int]]) -> Tensor:
        width = len(parents[0])
        return torch.ones(len(parents), width, width, dtype=torch.bool).tril()

    monkeypatch.setattr("app.weights.spans._draw_lines", see_all)
    with capture_logs() as logs:
        made = make_pass(build("llama"), 1, rows)
    assert [line["event"] for line in logs] == ["suffix passes: rows do not branch"]
    found = made.run(amounts[[span.owner or 0 for span in rows]])
    for index, span in enumerate(rows):
        expected = run_alone(build("llama"), 1, span, amounts[span.owner or 0])
        (at,) = places(made, [len(expected)] * (index + 1))[index:]
        torch.testing.assert_close(found[at], expected, rtol=1e-4, atol=1e-4)


def test_rows_that_share_little_for_their_length_run_apart() -> None:
    tails = [list(range(10 * n, 10 * n + 9)) for n in range(1, 5)]
    little = [Span([5, *tail], 0, 0, owner=0) for tail in tails]
    assert len(grow_trees(little, branching=True)) == 4  # 3 of 37 columns
    much = [Span([5, 6, 7, *tail], 0, 0, owner=0) for tail in tails]
    assert len(grow_trees(much, branching=True)) == 1  # 9 of 39


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_many_short_branches_outgrow_no_text(model_type: str) -> None:
    """A row has more columns than the context window, or a sliding one, has tokens."""
    longest = {
        "max_position_embeddings": 8,
        "n_positions": 8,
        "sliding_window": 8,
        "window_size": 8,
    }
    options = {
        name: value for name, value in longest.items() if hasattr(build(model_type).config, name)
    }
    model = build(model_type, options)
    start = [5, 6, 7, 8, 9]
    rows = [Span([*start, 10 + n, 30 + n, 50 + n], 3, 3, owner=0) for n in range(10)]
    amount = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    made = make_pass(model, 1, rows)
    found = made.run(amount.expand(len(rows), -1))
    expected = [run_alone(model, 1, span, amount[0]) for span in rows]
    real = torch.cat([found[at] for at in places(made, map(len, expected))])
    torch.testing.assert_close(real, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_eager_attention_branches_as_well(implementation: str) -> None:
    model = build("llama")
    model.set_attn_implementation(implementation)
    assert may_branch(model.config, 8)
    amount = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))
    rows = branching_spans()[:4]
    made = make_pass(model, 1, rows)
    found = made.run(amount.expand(4, -1))
    expected = [run_alone(model, 1, span, amount[0]) for span in rows]
    real = torch.cat([found[at] for at in places(made, map(len, expected))])
    torch.testing.assert_close(real, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "longest", "branches"),
    [
        ("llama", 1_000, True),
        ("mistral, short window", 4, True),
        ("mistral, short window", 5, False),
        ("gpt_neo", 5, False),  # it cuts masks of its own by columns
        ("falcon", 9, True),
        ("falcon, alibi", 9, False),
    ],
)
def test_rows_branch_where_attention_counts_no_columns(
    name: str, longest: int, branches: bool
) -> None:
    assert may_branch(build(name).config, longest) == branches


@pytest.mark.parametrize("model_type", ["gpt2", "falcon", "gemma2", "llama", "opt"])
def test_groups_of_few_rows_are_joined_once_others_are_left_out(model_type: str) -> None:
    model = build(model_type)
    generator = torch.Generator().manual_seed(0)
    rows = [
        Span(
            torch.randint(3, VOCABULARY, (start + length,), generator=generator).tolist(),
            start,
            start,
        )
        for start, length in [(3, 2), (0, 2), (5, 9), (1, 9)] * 8
    ]
    deltas = torch.randn(len(rows), WIDTH, generator=generator)
    made = make_pass(model, 1, rows)
    assert made.tokens == 16 * 2 + 16 * 9
    made.choose(torch.tensor([0, 1, 2, 3, 6]))
    assert made.tokens == 5 * 9
    chosen = [rows[index] for index in (0, 1, 2, 3, 6)]
    found = made.run(deltas[[0, 1, 2, 3, 6]])
    expected = [
        run_alone(model, 1, span, delta)
        for span, delta in zip(chosen, deltas[[0, 1, 2, 3, 6]], strict=True)
    ]
    real = torch.cat([found[at] for at in places(made, map(len, expected))])
    torch.testing.assert_close(real, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_what_is_read_is_true_also_where_nothing_else_is_run_to_the_end(model_type: str) -> None:
    model = build(model_type)
    rows = [replace(span, read=[len(span.ids) - 1]) for span in spans()]
    deltas = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(1))
    made = make_pass(model, 1, rows)
    for kept in (range(len(rows)), [0, 2, 3, 5]):
        chosen = torch.tensor(kept)
        made.choose(chosen)
        found = made.run(deltas[chosen])
        for index, row in enumerate(kept):
            expected = run_alone(model, 1, rows[row], deltas[row])
            last = made.places(torch.tensor(index), torch.tensor(len(expected) - 1))
            torch.testing.assert_close(found[last], expected[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "opt", "falcon"])
def test_the_first_pass_sees_keys_and_outputs_where_the_layer_changes(model_type: str) -> None:
    model, rows = build(model_type), spans()
    anatomy = dissect(model, recognise(model.config))
    made = make_pass(model, 1, rows)
    own = anatomy.architecture.norm_after_mlp
    watched = anatomy.projection(model, 1) if own else anatomy.layer(model, 1)
    for index, span in enumerate(rows):
        seen: list[Tensor] = []
        handles = [
            anatomy.projection(model, 1).register_forward_pre_hook(
                lambda _, inputs, seen=seen: seen.append(inputs[0])
            ),
            watched.register_forward_hook(
                lambda _, __, output, seen=seen: seen.append(
                    output[0] if isinstance(output, tuple) else output
                )
            ),
        ]
        try:
            model.base_model(torch.tensor([list(span.ids)]))
        finally:
            for handle in handles:
                handle.remove()
        keys, outputs = (part.reshape(len(span.ids), -1)[span.changed] for part in seen)
        torch.testing.assert_close(made.keys[index], keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made.outputs[index], outputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "falcon", "gemma2", "llama", "opt"])
def test_rows_recorded_in_several_passes_keep_their_order(
    monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    model, rows = build(model_type), spans()
    together = make_pass(model, 1, rows)
    monkeypatch.setattr("app.weights.spans.RUN_COST", 0)  # each start runs by itself
    made = make_pass(model, 1, rows)
    torch.testing.assert_close(made.keys, together.keys, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.outputs, together.outputs, rtol=1e-4, atol=1e-4)
    deltas = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = [len(span.ids) - span.start for span in rows]
    found = made.run(deltas)
    for index, (span, at) in enumerate(zip(rows, places(made, lengths), strict=True)):
        changed = run_alone(model, 1, span, deltas[index])
        torch.testing.assert_close(found[at], changed, rtol=1e-4, atol=1e-4)
        columns = torch.arange(lengths[index])
        unchanged = made.unchanged(torch.full_like(columns, index), columns)
        as_it_was = run_alone(model, 1, span, torch.zeros(WIDTH))
        torch.testing.assert_close(unchanged, as_it_was, rtol=1e-4, atol=1e-4)


def test_whole_passes_begin_with_whole_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tokens see later ones, what texts begin with must not run by itself."""
    runs: list[tuple[int, ...]] = []

    def noted(model: LanguageModel, ids: Tensor, *rest: Any) -> Tensor:
        runs.append(tuple(ids.shape))
        return run_body(model, ids, *rest)

    monkeypatch.setattr("app.weights.first_pass.run_body", noted)
    rows = [Span([*range(3, 33), 40 + n], 30, 30) for n in range(8)]
    make_pass(build("llama"), 1, rows)
    assert runs == [(1, 30), (8, 1)]
    runs.clear()
    make_pass(build("llama"), 1, rows, whole=True)
    assert runs == [(8, 31)]


def test_only_what_is_read_of_the_chosen_runs_through_the_last_mlp() -> None:
    model = build("llama")
    anatomy = dissect(model, recognise(model.config))
    tokens: list[int] = []

    def count(plain: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        tokens.append(hidden.shape[:-1].numel())
        return plain(hidden)

    for layer in (2, 3):
        mlp = anatomy.layer(model, layer).get_submodule("mlp")
        mlp.forward = partial(count, mlp.forward)
    rows = [Span(range(3, 12), 4, 4, [7, 8]), Span(range(3, 8), 1, 2, [4])] * 2
    suffix = make_pass(model, 1, rows)
    for kept, counts in (([0, 1, 2, 3], [18, 6]), ([1, 2], [9, 3])):
        suffix.choose(torch.tensor(kept))
        tokens.clear()
        suffix.run(torch.zeros(len(kept), WIDTH))
        assert tokens == counts


def test_rows_that_are_chosen_give_what_they_give_among_all() -> None:
    model, rows = build("llama"), spans()
    deltas = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(1))
    made = make_pass(model, 1, rows)
    lengths = [len(span.ids) - span.start for span in rows]
    found = made.run(deltas)
    before = [found[at] for at in places(made, lengths)]
    for kept in ([0, 2, 3, 5], [2], [1, 2, 4], [0, 1, 2, 3, 4, 5]):
        chosen = torch.tensor(kept)
        made.choose(chosen)
        found = made.run(deltas[chosen])
        after = [found[at] for at in places(made, [lengths[row] for row in kept])]
        torch.testing.assert_close(after, [before[row] for row in kept])


def test_whole_passes_on_request_give_the_same() -> None:
    model, rows = build("gpt2"), spans()
    deltas = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(1))
    made = make_pass(model, 1, rows)
    suffix = made.run(deltas)
    made.run_whole()
    real = torch.cat(places(made, (len(span.ids) - span.start for span in rows)))
    torch.testing.assert_close(made.run(deltas)[real], suffix[real], rtol=1e-4, atol=1e-4)


def test_whole_passes_on_request_stay_whole_whatever_is_chosen() -> None:
    rows = spans()
    made = make_pass(build("gpt2"), 1, rows)
    made.choose(torch.tensor([0, 2]))
    made.run_whole()
    for kept in ([0, 2, 3], range(len(rows))):
        made.choose(torch.tensor(kept))
        assert made.tokens >= sum(len(rows[index].ids) for index in kept)


def test_a_pass_leaves_the_model_as_it_was(tiny: TinyModels) -> None:
    model = fork(tiny.load("gpt2").model)
    before = [dict(module.__dict__) for module in model.modules()]
    make_pass(model, 1, spans()).run(torch.zeros(6, WIDTH))
    after = [dict(module.__dict__) for module in model.modules()]
    assert [set(old) for old in before] == [set(new) for new in after]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_padding_is_not_run_through_an_mlp_whose_own_forward_comes_back() -> None:
    """Accelerate puts a ``forward`` on the modules that it moves."""
    model = build("llama")
    mlp = dissect(model, recognise(model.config)).layer(model, 2).get_submodule("mlp")
    plain, tokens = mlp.forward, []

    def own(hidden: Tensor) -> Tensor:
        tokens.append(hidden.shape[:-1].numel())
        found: Tensor = plain(hidden)
        return found

    mlp.forward = own
    rows = [Span(range(3, 12), 4, 4), Span(range(3, 8), 1, 2)]  # five tokens and four
    suffix = make_pass(model, 1, rows)
    tokens.clear()
    suffix.run(torch.zeros(2, WIDTH))
    assert tokens == [9]
    assert mlp.__dict__["forward"] is own


def test_aligned_rows_have_their_starts_in_one_column() -> None:
    rows = align_rows(alone([Span([5, 6, 7], 2, 2), Span([8, 9], 0, 1)]), 0, CPU)
    assert rows.ids.tolist() == [[5, 6, 7, 0], [0, 0, 8, 9]]
    assert rows.mask.tolist() == [[1, 1, 1, 0], [0, 0, 1, 1]]
    assert rows.positions.tolist() == [[0, 1, 2, 2], [0, 0, 0, 1]]
    assert (rows.prefix, rows.changed.tolist(), rows.lines) == (2, [0, 1], None)


def alone(spans: Sequence[Span]) -> list[Tree]:
    return grow_trees(spans, branching=False)


def test_spans_of_one_owner_branch_behind_what_they_have_in_common() -> None:
    spans = [
        Span([1, 2, 3, 4], 1, 1, [3], owner=0),
        Span([1, 2, 3, 5, 6], 1, 1, [3, 4], owner=0),
        Span([1, 2, 3, 4], 1, 1, owner=1),  # changed by something else
        Span([1, 2, 7], 1, 2, owner=0),  # changed elsewhere
        Span([1, 2, 3], 1, 1),
    ]
    first, *others = grow_trees(spans, branching=True)
    assert [tree.spans for tree in others] == [(2,), (3,), (4,)]
    assert (first.ids, first.parents) == ((1, 2, 3, 4, 5, 6), (-1, 0, 1, 1, 3))
    assert (first.spans, first.columns) == ((0, 1), ((0, 1, 2), (0, 1, 3, 4)))
    assert (first.positions, first.changed) == ([1, 2, 3, 3, 4], 0)
    assert first.read == {2, 3, 4}
    assert [tree.spans for tree in grow_trees(spans, branching=False)] == [(n,) for n in range(5)]


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_branch_sees_its_own_line_and_nothing_of_the_others(done: int) -> None:
    spans = [Span([1, 2, 3, 4], 2, 2, owner=0), Span([1, 2, 3, 5, 6], 2, 2, owner=0)]
    shorter = Span([3, 4], 1, 1)
    rows = align_rows(grow_trees([*spans, shorter], branching=True), 0, CPU)
    assert rows.ids.tolist() == [[1, 2, 3, 4, 5, 6], [0, 3, 4, 0, 0, 0]]
    seen = rows.sight(done)
    assert seen.shape == (2, 1, 6 - done, 6)
    branched = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 4, 5]]
    padded = [[0], [1], [1, 2], [1, 3], [1, 4], [1, 5]]
    for row, expected in enumerate((branched, padded)):
        for query, columns in enumerate(expected[done:]):
            assert seen[row, 0, query].nonzero()[:, 0].tolist() == columns


def test_shared_beginnings_are_run_once_and_only_where_that_saves_work() -> None:
    beginning = list(range(10, 30))
    alike = [Span([*beginning, 40 + i, 50 + i], 21, 21) for i in range(8)]
    found = find_beginnings(alone(alike), 0, CPU)
    assert found is not None
    assert found.ids.tolist() == [beginning]
    assert found.tokens.tolist() == [list(range(20))] * 8
    apart = [Span([i * 30 + c for c in range(22)], 21, 21) for i in range(8)]
    assert find_beginnings(alone(apart), 0, CPU) is None


def test_rows_run_apart_only_where_padding_would_cost_more() -> None:
    short, long = Span([1] * 3, 0, 0), Span([1] * 9, 0, 0)
    assert group_alike(alone([long, short, long])) == [[0, 1, 2]]
    assert group_alike(alone([short] * 20 + [long] * 10)) == [
        list(range(20)),
        list(range(20, 30)),
    ]


def cost_of(trees: Sequence[Tree], groups: Iterable[Sequence[int]]) -> int:
    """Tokens that whole passes of these groups run, padding included, and the passes' own cost."""
    return sum(
        len(group)
        * (
            max(trees[index].start for index in group)
            + max(len(trees[index].parents) for index in group)
        )
        + RUN_COST
        for group in groups
    )


def test_a_long_row_pads_no_short_ones_that_start_where_it_does() -> None:
    short, long = Span([1] * 11, 3, 3), Span([1] * 203, 3, 3)
    assert group_near(alone([short, long, *[short] * 10])) == [[0, *range(2, 12)], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_rows_run_whole_in_the_groups_that_cost_least(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kinds = [  # few rows, whose suffixes are alike enough to run together
        torch.randint(1, most + 1, (5,), generator=generator).tolist() for most in (200, 5, 3)
    ]
    spans = [
        Span([1] * (start + n), start, start)
        for start, n, rows in zip(*kinds, strict=True)
        for _ in range(rows)
    ]
    order = torch.randperm(len(spans), generator=generator).tolist()
    trees = alone([spans[index] for index in order])
    groups = group_near(trees)
    assert sorted(index for group in groups for index in group) == list(range(len(trees)))
    starts = sorted({tree.start for tree in trees})
    for cuts in product([False, True], repeat=len(starts) - 1):
        parts = [[starts[0]]]
        for start, cut in zip(starts[1:], cuts, strict=True):
            parts = [*parts, [start]] if cut else [*parts[:-1], [*parts[-1], start]]
        others = [[i for i, tree in enumerate(trees) if tree.start in part] for part in parts]
        assert cost_of(trees, groups) <= cost_of(trees, others)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, None),
        ({"layer_types": ["full_attention", "sliding_attention"]}, None),
        ({"layer_types": ["linear_attention"]}, "linear_attention"),
        ({"num_kv_shared_layers": 2}, "share"),
        ({"use_bidirectional_attention": True}, "later tokens"),
    ],
)
def test_attention_that_forbids_it_is_named(options: dict[str, Any], reason: str | None) -> None:
    config = AutoConfig.for_model("gpt2")
    for name, value in options.items():
        setattr(config, name, value)
    found = why_whole(config)
    assert (found is None) if reason is None else (found is not None and reason in found)
