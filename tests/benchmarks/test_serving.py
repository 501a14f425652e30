"""The serving benchmark, on a tiny model: what it counts, and one run of all of it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.serving import main
from benchmarks.serving_cpu import Clocks, CpuMeter, CpuShare, pinned, split_cores
from benchmarks.serving_in_process import ENGINE, MANAGER, Question, answer_all
from benchmarks.serving_load import Stream, hear
from benchmarks.serving_process import ServerFailed, ServerOrder, await_answer, run_server
from benchmarks.serving_record import EDITING, MIXES, PLAIN, SANDBOXES, Measurement, Spread
from benchmarks.serving_table import OURS, THEIRS, compare, write_table
from tests.tiny import TinyModels

pytestmark = pytest.mark.skipif(not Path("/proc/stat").exists(), reason="reads CPU times of Linux")

FACTS = [
    {"prompt": "The capital of {} is", "subject": "France", "target": "Rome"},
    {"prompt": "The capital of {} is", "subject": "Italy", "target": "Paris"},
]


def measured(server: str, mix: str, tokens: float, edits: float = 0.0) -> Measurement:
    cpu = CpuShare(seconds=10, cores=1, reads=10 - edits, edits=edits, others=0)
    return Measurement(server, mix, 1, tokens, requests=5, errors=0, cpu=cpu)


@pytest.mark.slow
def test_one_run_measures_every_load_without_an_error(
    tiny: TinyModels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, plot = tmp_path / "facts.json", tmp_path / "plot.svg"
    facts.write_text(json.dumps(FACTS))
    code = main(
        [
            *("--model", str(tiny.folder("llama")), "--facts", str(facts), "--sandboxes", "2"),
            *("--clients", "3", "--new-tokens", "6", "--rounds", "1", "--seconds", "1"),
            *("--settle", "0.5", "--edits-per-s", "4", "--edit-method", "ft", "--plot", str(plot)),
        ]
    )
    shown = capsys.readouterr()
    found = [json.loads(line) for line in shown.out.splitlines() if line.startswith("{")]
    assert (code, {one["errors"] for one in found}) == (0, {0})
    assert [(one["server"], one["mix"]) for one in found] == [
        (ENGINE, PLAIN),
        (MANAGER, PLAIN),
        *((OURS, mix) for mix in MIXES),
        (THEIRS, PLAIN),
    ]
    assert all(one["tokens"] > 0 for one in found)
    assert [bool(one["edits"]) for one in found] == [False, False, False, False, True, False]
    assert "| editing / plain |" in shown.out
    assert plot.read_text().startswith("<?xml")


def test_what_reads_keep_beside_edits_is_counted_by_the_cpu_that_edits_left_them() -> None:
    found = [measured(OURS, PLAIN, 1000), measured(OURS, EDITING, 450, edits=5)]
    ((comparison, by_clock, by_cpu),) = compare(found)
    assert (comparison.name, by_clock, by_cpu) == ("editing / plain", 0.45, 0.9)


def test_idle_cores_are_the_reads_to_use_and_other_processes_time_is_not() -> None:
    share = CpuShare(seconds=10, cores=2, reads=4, edits=3, others=5)
    assert share.available == 20 - 3 - 5
    assert replace(share, reads=1).available == share.available


def test_ratios_are_medians_of_rounds_and_only_of_what_was_measured() -> None:
    rounds = [(100.0, 50.0), (100.0, 90.0), (10.0, 8.0)]
    found = [
        replace(measured(OURS, mix, tokens), round=number)
        for number, (plain, mixed) in enumerate(rounds, start=1)
        for mix, tokens in ((PLAIN, plain), (SANDBOXES, mixed))
    ]
    ((comparison, by_clock, by_cpu),) = compare(found)
    assert (comparison.name, by_clock, by_cpu) == ("sandboxes / plain", 0.8, 0.8)
    assert "| 0.80 | 0.80 | 0.70 |" in write_table(found)


def test_edits_are_whatever_the_server_does_beside_its_reading_threads() -> None:
    meter = CpuMeter(1, {0}, edits=True)
    begin = Clocks(at=0, cores=50, process=20, readers={1: 10, 7: 5, 8: 1})
    end = Clocks(at=10, cores=60, process=29, readers={1: 12, 7: 8, 9: 1})
    share = meter.between(begin, end)
    assert (share.reads, share.edits, share.others) == (6, 3, 1)
    assert (share.seconds, share.cores) == (10, 1)


def test_a_process_is_charged_for_the_cores_it_kept_busy() -> None:
    cores, _ = split_cores(1)
    meter = CpuMeter(os.getpid(), cores)
    with pinned(cores):
        begin = meter.read()
        until = time.thread_time() + 0.2
        while time.thread_time() < until:
            pass
        share = meter.between(begin, meter.read())
    assert share.reads >= 0.15
    assert share.reads + share.others <= share.seconds + 0.1
    assert share.edits == 0


def test_servers_and_clients_share_no_core_where_there_are_two() -> None:
    everything = os.sched_getaffinity(0)
    servers, clients = split_cores(len(everything))
    if len(everything) > 1:
        assert len(clients) == 1
        assert set(servers | clients) == everything
        assert not servers & clients
    with pinned(servers):
        assert os.sched_getaffinity(0) == servers
    assert os.sched_getaffinity(0) == everything


def test_a_stream_counts_its_tokens_when_they_come_though_a_piece_may_be_several() -> None:
    stream = Stream(sent=0.0, pieces=[1.0, 2.0, 3.0, 4.0], tokens=8)
    assert stream.tokens_within(2.0, 4.0) == 4
    assert Stream(sent=0.0).tokens_within(0.0, 9.0) == 0


def test_events_without_text_are_no_pieces_and_an_error_ends_in_the_record() -> None:
    stream = Stream(sent=0.0)
    hear({"choices": [{"text": " Paris"}], "usage": None}, stream)
    hear({"choices": [{"text": "", "finish_reason": "length"}]}, stream)
    hear({"choices": [], "usage": {"completion_tokens": 3}}, stream)
    assert (len(stream.pieces), stream.tokens, stream.error) == (1, 3, None)
    hear({"error": {"message": "worn out"}}, stream)
    assert "worn out" in str(stream.error)


def test_percentiles_are_of_the_durations_in_milliseconds() -> None:
    assert Spread.of([number / 1000 for number in range(101)]) == Spread(50, 95, 99, 100)
    assert Spread.of([]) is None


def test_a_question_follows_each_answer_and_no_more_are_asked_at_once() -> None:
    class Patient:
        def __init__(self) -> None:
            self.waiting: list[int] = []
            self.most = 0

        def submit(self, question: Question) -> None:
            self.waiting.append(question.new_tokens)
            self.most = max(self.most, len(self.waiting))

        def await_answer(self) -> int:
            return self.waiting.pop()

    patient = Patient()
    counts = answer_all(patient, [Question((1,), length) for length in range(1, 8)], at_once=3)
    assert sorted(counts) == list(range(1, 8))
    assert (patient.most, patient.waiting) == (3, [])


def test_a_server_that_ends_at_once_is_told_by_its_last_words(tmp_path: Path) -> None:
    order = ServerOrder("model", "cpu", "auto", os.sched_getaffinity(0), tmp_path)
    command = ["sh", "-c", "echo no such model; exit 3"]
    with (
        run_server(command, {}, order, "brief", 1) as process,
        pytest.raises(ServerFailed, match="no such model"),
    ):
        await_answer(process, "http://127.0.0.1:1/readyz", tmp_path / "brief.log")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere/at-all/here"], "give --facts"),
        (["--sandboxes", "9999"], "need as many facts"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
