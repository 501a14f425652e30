"""Exports and imports as they travel."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field

from app.api.schemas.answers import PageOut
from app.api.schemas.base import Answer, Request, ViewName
from app.api.schemas.requests import GuardIn
from app.domain import (
    EXPORT_RANK,
    BaseIdentity,
    Export,
    ExportFile,
    ExportKind,
    ExportOrder,
    ImportTarget,
)

FOLDER_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}$"
FILE_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,199}){0,3}$"
MAX_RANK = 65_536

FolderName = Annotated[str, Field(pattern=FOLDER_PATTERN, examples=["my-edits"])]


class ExportRequest(Request):
    """A view to write as a folder, and in which form."""

    model_config = ConfigDict(strict=True)

    view: ViewName = "live"
    kind: Annotated[ExportKind, Field(strict=False)] = Field(
        description="`adapter`: a LoRA adapter for PEFT, vLLM, SGLang; `model`: a whole Hugging "
        "Face folder; `bundle`: the deltas, for another server of the same base."
    )
    max_rank: int = Field(
        default=EXPORT_RANK, ge=1, le=MAX_RANK, description="Of an adapter; above it: refused."
    )
    truncate: bool = Field(
        default=False,
        description="Cut ranks above `max_rank` off; the answer's `details` have the error.",
    )

    def to_domain(self) -> ExportOrder:
        return ExportOrder(self.view, self.kind, self.max_rank, self.truncate)


class BaseOut(Answer):
    """The base model that an export belongs to; ``digest`` hashes its parameters as loaded."""

    name: str
    dtype: str
    digest: str

    @classmethod
    def of(cls, base: BaseIdentity) -> Self:
        return cls(name=base.name, dtype=base.dtype, digest=base.digest)


class ExportFileOut(Answer):
    name: str = Field(pattern=FILE_PATTERN, examples=["adapter_model.safetensors"])
    size: int = Field(description="Bytes.")
    sha256: str

    @classmethod
    def of(cls, file: ExportFile) -> Self:
        return cls(name=file.name, size=file.size, sha256=file.digest)


class ExportOut(Answer):
    """A state as a folder, which never changes. ``label`` is the revision or sandbox it is of."""

    name: str = Field(pattern=FOLDER_PATTERN)
    kind: ExportKind
    label: str
    state_hash: str
    base: BaseOut
    size: int = Field(description="Bytes, of all its files.")
    details: dict[str, Any] = Field(
        default_factory=dict,
        description="Of an adapter its `rank`, and by matrix the `ranks` used, those `needed`, and "
        "the relative `errors`; of a bundle how many `deltas` and `facts` it has.",
    )

    @classmethod
    def of(cls, export: Export) -> Self:
        return cls(
            name=export.name,
            kind=export.kind,
            label=export.label,
            state_hash=export.state_hash,
            base=BaseOut.of(export.base),
            size=sum(file.size for file in export.files),
            details=dict(export.details),
        )


class ExportFilesOut(ExportOut):
    """The same, with its files."""

    files: list[ExportFileOut]

    @classmethod
    def of(cls, export: Export) -> Self:
        files = [ExportFileOut.of(file) for file in export.files]
        return cls(**ExportOut.of(export).model_dump(), files=files)


class ExportPage(PageOut[ExportOut]):
    pass


class UploadOut(Answer):
    """A file that was received, to be imported."""

    name: str
    file: str
    size: int = Field(description="Bytes.")


class ImportRequest(Request):
    """An upload, or an export of this server, to make an edit of."""

    model_config = ConfigDict(strict=True)

    source: FolderName = Field(description="The upload's name, or else the export's.")
    into: Annotated[ImportTarget, Field(strict=False)] = Field(
        default=ImportTarget.SANDBOX,
        description="`sandbox`: one of its own, on the base; `live`: onto the live model.",
    )
    guard: GuardIn = Field(
        default_factory=GuardIn, description="What the state must meet; missed: 422, no change."
    )
