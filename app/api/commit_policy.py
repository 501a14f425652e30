"""What a read's header asks for where a commit moves the live view under it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header

from app.reading import CommitPolicy

ON_COMMIT_HEADER = "Palimpsest-On-Commit"

OnCommit = Annotated[
    CommitPolicy | None,
    Header(
        alias=ON_COMMIT_HEADER,
        description="When a commit moves the live view: `pin` ends on the revision it began with, "
        "`drain` makes the commit wait, `restart` begins anew on the new revision. By "
        "default as the server is set.",
    ),
]
