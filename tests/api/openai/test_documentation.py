"""``docs/openai.md`` is executed, but for the harness, which is installed apart."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import lm_eval_capitals
from tests.almanac_servers import AlmanacServers
from tests.test_docs import ROOT, URL, read_session, run

PAGE = ROOT / "docs" / "openai.md"
TASK = ROOT / "docs" / "examples" / "lm_eval" / "capitals.yaml"


def test_the_pages_session_answers_as_documented(
    almanac_servers: AlmanacServers, tmp_path: Path
) -> None:
    blocks = re.findall(r"```(?:console|python)\n.*?```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    almanac_servers.prepare(data := tmp_path / "data")
    server = almanac_servers.start(data)
    try:
        for block in blocks:
            for step in read_session(block):
                run(step, server)
            if block.startswith("```python"):
                exec(block.strip("`").removeprefix("python").replace(URL, server.url), {})
    finally:
        server.stop()


def test_the_harness_task_names_the_file_that_is_written(tmp_path: Path) -> None:
    named = lm_eval_capitals.TASK.relative_to(ROOT).as_posix()
    assert f"    test: {named}\n" in TASK.read_text()
    written = lm_eval_capitals.TASK.read_bytes()
    file = tmp_path / "capitals.jsonl"
    assert lm_eval_capitals.write_task(file) == len(written.splitlines())
    assert file.read_bytes() == written
