"""Two servers on one data folder or one journal: the second is refused, the first unharmed."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from app.settings import DATABASE_FILE
from app.weights.loading import LoadedModel
from tests.crash.examination import Examination
from tests.crash.server_process import Zygote
from tests.crash.template import CAPITAL, ROME, Template
from tests.crash.traffic import Caller


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ("the same folder", "Another server uses the data folder"),
        ("another folder, the same journal", "Another server writes to this journal"),
    ],
)
def test_a_second_server_is_refused_in_one_line_and_the_first_goes_on(
    zygote: Zygote,
    loaded: LoadedModel,
    template: Template,
    tmp_path: Path,
    second: str,
    said: str,
) -> None:
    folder = tmp_path / "data"
    book = template.copy(folder)
    first = zygote.start(folder)
    if second == "the same folder":
        refused = zygote.launch(folder)
    else:
        url = f"sqlite:///{folder / DATABASE_FILE}"
        refused = zygote.launch(tmp_path / "other", "--database-url", url)
    assert refused.wait() == 2
    assert "Traceback" not in refused.said
    assert refused.last_line.startswith(f"Settings error: {said}")
    with Caller(first.url, book, 1) as caller:
        caller.edit(facts=[CAPITAL], **ROME)
    assert book.acknowledged == template.book.acknowledged + 1
    Examination(folder, loaded, book).run()
    first.kill()


def test_the_locks_of_a_killed_server_bar_nobody(
    zygote: Zygote, template: Template, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    template.copy(folder)
    first = zygote.start(folder)
    head = httpx.get(f"{first.url}/model", verify=False).json()["revision"]
    first.kill()
    assert {path.name for path in folder.glob("*lock")} == {"lock", f"{DATABASE_FILE}.lock"}
    second = zygote.start(folder)
    assert httpx.get(f"{second.url}/model", verify=False).json()["revision"] == head
    second.kill()


@pytest.mark.parametrize("url", ["no url at all", "sqlite:///{file}/below/journal.db"])
def test_a_journal_that_cannot_be_got_at_is_told_in_one_line(
    zygote: Zygote, tmp_path: Path, url: str
) -> None:
    (tmp_path / "file").touch()
    url = url.format(file=tmp_path / "file")
    refused = zygote.launch(tmp_path / "data", "--database-url", url)
    assert refused.wait() == 2
    assert "Traceback" not in refused.said
    assert refused.last_line.startswith("Journal error: The journal can't be opened")
