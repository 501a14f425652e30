"""The sequential benchmark beside the trial it must agree with, and what it writes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from app.domain import Digest, Expectation, Fact, Mode
from app.editing.editor import Editor
from app.errors import EditRejected, InvalidInput
from app.evaluation.trial import TrialSettings, run_trial
from app.weights.loading import LoadedModel
from app.weights.views import ViewCache
from benchmarks.sequence_plot import draw
from benchmarks.sequence_record import Point, Record, Run, load_record
from benchmarks.sequence_run import Gauges, make_gauges, retention, run_sequence
from benchmarks.sequence_table import write_table
from benchmarks.sequential import main
from tests.tiny import TinyModels

HPARAMS = {"layer": 3, "steps": 15, "learning_rate": 0.01}
FACTS = [
    Fact(
        "The capital of {} is",
        "France",
        "Rome",
        rephrase_prompts=("France has its capital in",),
        locality=(Expectation("Madrid"), Expectation("France borders")),
    ),
    Fact("{} lies in", "Berlin", "Spain", locality=(Expectation("The capital of Spain is"),)),
    Fact("{} borders", "Italy", "Madrid", locality=(Expectation("Berlin lies in"),)),
    Fact("{} is the capital of", "Madrid", "Germany"),
    Fact("{} borders", "Spain", "Berlin"),
]

pytestmark = pytest.mark.usefixtures("short_texts")


@pytest.fixture
def loaded(tiny: TinyModels) -> LoadedModel:
    return tiny.load()


@pytest.fixture(scope="module")
def gauges(tiny: TinyModels, short_texts: None) -> Gauges:
    return make_gauges(tiny.load(), 0)


@pytest.fixture
def run_on(loaded: LoadedModel, gauges: Gauges, tmp_path: Path) -> Callable[..., Run]:
    """Runs fine-tuning over facts, in batches of two unless told otherwise."""

    def run(facts: Sequence[Fact] = FACTS, size: int = 2, points: Sequence[int] = ()) -> Run:
        unread: dict[Digest, bytes] = {}
        editor = Editor(ViewCache(loaded, load_delta=unread.__getitem__), data=tmp_path)
        return run_sequence(
            loaded,
            facts,
            editor.plan("ft", HPARAMS),
            batch_size=size,
            points=points,
            gauges=gauges,
            data=tmp_path,
            progress=lambda _what, _done, _of: None,
        )

    return run


def make_point(edits: int, **others: Any) -> Point:
    figures: dict[str, Any] = {
        "refused": 0,
        "efficacy": 0.9,
        "paraphrase": 0.5,
        "other_subjects": None,
        "same_subject": 1.0,
        "efficacy_teacher_forced": 0.95,
        "fluency": 5.0,
        "perplexity": None,
        "canary": 0.01,
        "drift": {"a": 0.1, "b": 0.2},
        "retention": [0.1 * tenth for tenth in range(10)],
        "resident_mb": 500.0,
    }
    return Point(edits, **{**figures, **others})


def make_run(method: str, seconds: Sequence[float]) -> Run:
    points = [make_point(10), make_point(10 * len(seconds))]
    return Run(method, {"layer": 1}, 10, points, seconds, seconds, 0.0)


@pytest.fixture
def record() -> Record:
    found = Record({"n": 300, "seed": 0}, {"fluency": 5.2, "perplexity": 4.7})
    for method in ("ledger", "memit", "a_new_one"):
        found.add(make_run(method, [1.0] * 29 + [2.0]))
    return found


# The run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_the_last_point_is_a_sequential_trial_of_all_facts(
    run_on: Callable[..., Run], loaded: LoadedModel, size: int
) -> None:
    last = run_on(size=size).points[-1]
    trial = run_trial(loaded, FACTS, TrialSettings("ft", Mode.SEQUENTIAL, size, HPARAMS))
    assert last.edits == len(FACTS)
    assert last.efficacy == pytest.approx(trial.efficacy)
    assert last.paraphrase == pytest.approx(trial.paraphrase)
    assert last.other_subjects == pytest.approx(trial.other_subjects)
    assert last.same_subject == pytest.approx(trial.same_subject)
    assert last.efficacy_teacher_forced == pytest.approx(trial.efficacy_teacher_forced)
    assert last.fluency == pytest.approx(trial.fluency)


def test_an_earlier_point_is_what_a_run_that_ends_there_finds(run_on: Callable[..., Run]) -> None:
    whole, short = run_on(points=[3]), run_on(FACTS[:4])
    assert [point.edits for point in whole.points] == [4, 5]
    early, end = whole.points[0], short.points[-1]
    # Fact 5 edits none of the prompts of those before it, so the same prompts are asked.
    assert early.retention == end.retention
    assert early.drift == end.drift
    assert (early.canary, early.perplexity) == (end.canary, end.perplexity)
    assert len(whole.seconds) == len(whole.cpu_seconds) == 3


def test_a_refused_batch_is_counted_and_leaves_the_state_as_it_was(
    run_on: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run_on(FACTS[:2]).points[-1]
    propose = Editor.propose

    def refuse_italy(self: Editor, plan: Any, state: Any, facts: Any, **others: Any) -> Any:
        if any(fact.subject == "Italy" for fact in facts):
            raise EditRejected("Not Italy.")
        return propose(self, plan, state, facts, **others)

    monkeypatch.setattr(Editor, "propose", refuse_italy)
    last = run_on(FACTS[:4]).points[-1]
    assert last.refused == 2
    assert last.drift == expected.drift
    assert list(last.retention[:2]) == list(expected.retention)


def test_only_the_newest_state_stays_in_memory(
    run_on: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ViewCache] = []

    class Watched(ViewCache):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("benchmarks.sequence_run.ViewCache", Watched)
    run_on(size=1, points=[1, 2, 3])
    (views,) = made
    assert views.describe()["views_resident"] == 2  # the base, and the last state


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([True, False, True], [1, 0, 1]),
        ([True] * 10 + [False] * 10, [1] * 5 + [0] * 5),
        ([True, False] * 50, [0.5] * 10),
        ([True] * 13, [1] * 10),
    ],
)
def test_retention_is_by_tenths_the_oldest_first(held: list[bool], expected: list[float]) -> None:
    assert retention(held) == expected


# What is kept of it ------------------------------------------------------------------------


def test_an_edits_time_is_the_median_of_the_batches_around_it() -> None:
    run = make_run("ft", [float(number) for number in range(1, 31)])
    assert run.seconds_at(10) == 3  # batches 1 to 5
    assert run.seconds_at(100) == run.cpu_seconds_at(95) == 10  # batches 6 to 14
    assert run.seconds_at(300) == 28  # batches 26 to 30


def test_cost_is_the_last_ten_batches_over_the_second_to_the_tenth() -> None:
    assert make_run("ft", [99.0] + [2.0] * 9 + [7.0] * 20 + [3.0] * 10).slowdown == 1.5
    assert make_run("ft", [1.0] * 19).slowdown is None


def test_a_record_goes_on_where_it_stopped(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    assert load_record(file, record.setup, record.base).runs == {}
    record.save(file)
    found = load_record(file, record.setup, {"fluency": 0.0})
    assert found == record
    assert found.has("memit", {"layer": 1})
    assert not found.has("memit", {"layer": 2})
    assert not found.has("rome", {"layer": 1})


def test_a_record_of_another_setup_is_not_mixed_with_this_one(
    record: Record, tmp_path: Path
) -> None:
    record.save(tmp_path / "record.json")
    with pytest.raises(InvalidInput, match="another seed") as caught:
        load_record(tmp_path / "record.json", {**record.setup, "seed": 1}, record.base)
    assert caught.value.field == "output"


def test_the_table_shows_every_point_and_every_age(record: Record) -> None:
    lines = write_table(record).splitlines()
    rows = [line for line in lines if line.startswith("| `memit`")]
    assert rows[0] == (
        "| `memit` | 10 | .900 | .500 | – | 1.000 | .950 | 5.00 | ∞ | 0.200 | 0.01 "
        "| 1.000 | 1.000 | 0 |"
    )
    assert rows[1].startswith("| `memit` | 300 |")
    assert rows[2].startswith("| `memit` | .000 | .100 |")
    assert rows[2].endswith("| .900 | 1.00 | 500 |")
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {14, 15}  # every row of a table has all of its columns


def test_the_plot_names_every_method_and_equal_records_give_equal_files(
    record: Record, tmp_path: Path
) -> None:
    first, second, picture = (tmp_path / name for name in ("a.svg", "b.svg", "c.png"))
    for file in (first, second, picture):
        draw(record, file)
    assert first.read_bytes() == second.read_bytes()
    for method in record.runs:
        assert f"<!-- {method} -->" in first.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


# The command -------------------------------------------------------------------------------


@pytest.fixture
def command(
    tiny: TinyModels,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs the benchmark on a tiny model, little text and four facts; gives exit code, stdout,
    stderr."""
    monkeypatch.setattr("benchmarks.sequence_run.PASSAGES", 4)
    facts = tmp_path / "given.json"
    facts.write_text(
        json.dumps([{"prompt": f.prompt, "subject": f.subject, "target": f.target} for f in FACTS])
    )
    handlers = logging.getLogger().handlers[:]

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(
            [
                *("--model", str(tiny.folder("gpt2")), "--facts", str(facts), "--methods", "ft"),
                *("--hparams", json.dumps({"ft": HPARAMS}), "--n", "4", "--batch-size", "2"),
                *("--at", "2", "--output", str(tmp_path / "out"), *arguments),
            ]
        )
        told = capsys.readouterr()
        return code, told.out, told.err

    yield run
    logging.getLogger().handlers[:] = handlers
    structlog.reset_defaults()


def test_a_run_leaves_record_table_plot_and_facts_and_is_not_made_twice(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, told, _ = command()
    assert code == 0
    folder = tmp_path / "out"
    assert told == (folder / "table.md").read_text()
    stored = (folder / "record.json").read_text()
    assert [point["edits"] for point in json.loads(stored)["runs"]["ft"]["points"]] == [2, 4]
    assert {file.name for file in folder.iterdir()} >= {"facts.json", "plot.png", "plot.svg"}
    code, again, said = command()
    assert (code, again) == (0, told)
    assert "ft: in the record already" in said
    assert (folder / "record.json").read_text() == stored
    assert command("--again", "ft")[0] == 0
    assert (
        json.loads((folder / "record.json").read_text())["runs"]["ft"]["seconds"]
        != (json.loads(stored)["runs"]["ft"]["seconds"])
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "magic"], "magic"),
        (["--hparams", '{"rome": {"speed": 1}}'], "speed"),
        (["--hparams", '{"ft": {"layer": 99}}'], "layers 0 to 3"),
        (["--hparams", "nowhere.json"], "nowhere.json"),
        (["--hparams", '{"ft": 1}'], "object of objects"),
        (["--facts", "nowhere.json"], "nowhere.json"),
        (["--model", "nowhere/at-all/here"], "nowhere"),
    ],
)
def test_a_request_that_cannot_be_carried_out_is_one_line_and_writes_nothing(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path, arguments: list[str], said: str
) -> None:
    code, told, error = command(*arguments)
    assert (code, told) == (2, "")
    assert said in " ".join(error.split())
    assert not (tmp_path / "out" / "record.json").exists()


def test_facts_longer_than_the_context_window_are_refused_before_any_edit(
    command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    long = tmp_path / "long.json"
    facts = [replace(FACTS[0], prompt="far " * 200 + "{}")]
    long.write_text(
        json.dumps([{"prompt": f.prompt, "subject": f.subject, "target": f.target} for f in facts])
    )
    code, _, error = command("--facts", str(long))
    assert code == 2
    assert "context window" in " ".join(error.split())
