"""The server's settings: command line over environment (``PALIMPSEST_*``) over ``.env``."""

from __future__ import annotations

import ipaddress
import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.domain import BaseIdentity, Guard
from app.errors import SettingsError
from app.reading import CommitPolicy

ENVIRONMENT_PREFIX = "PALIMPSEST_"
DATABASE_FILE = "journal.sqlite3"
DELTA_FOLDER = "deltas"
EXPORT_FOLDER = "exports"
UPLOAD_FOLDER = "imports"

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Bound = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Scope(StrEnum):
    """What an API key may do; each scope includes the ones before it."""

    READ = "read"
    EDIT = "edit"
    ADMIN = "admin"


class GuardLimits(BaseModel):
    """What every edit must meet that doesn't say otherwise: the server's guard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_efficacy: Share | None = None
    min_paraphrase: Share | None = None
    min_locality: Share | None = None
    max_canary_kl: Bound | None = None
    max_norm_growth: Bound | None = None

    def to_domain(self) -> Guard:
        return Guard(**self.model_dump())


class DriftThresholds(BaseModel):
    """Where drift becomes worth a warning in edit answers; ``retention`` is the least share of
    facts that must still be answered."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    relative_norm: Bound | None = None
    canary_kl: Bound | None = None
    perplexity_ratio: Bound | None = None
    retention: Share | None = None


class Settings(BaseSettings):
    """Everything ``palimpsest serve`` can be told. ``api_keys`` maps a key to its scope;
    ``corpus`` is a text file or ``hf:NAME[,CONFIG]:SPLIT[:COLUMN]``; ``canaries`` a text file
    with a prompt a line, about nothing that is ever edited."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_file=".env", extra="ignore", env_ignore_empty=True
    )

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    device_map: str | None = None
    threads: Count | None = None

    data: Path | None = None
    database_url: str | None = Field(default=None, repr=False)
    corpus: str | None = None
    statistics_tokens: Annotated[int, Field(ge=1_000)] | None = None

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    api_keys: dict[str, Scope] = Field(default_factory=dict, repr=False)

    guard: GuardLimits = Field(default_factory=GuardLimits)
    canaries: Path | None = None
    drift_limits: DriftThresholds = Field(default_factory=DriftThresholds)

    max_body_bytes: Count = 1 << 20
    max_import_bytes: Count = 4 << 30
    max_pending_reads: Count = 256
    max_batch_rows: Count = 64
    prefill_tokens: Count = 512
    kv_cache_bytes: Count = 2 << 30
    prefix_cache_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    on_commit: CommitPolicy = CommitPolicy.PIN
    drain_seconds: Annotated[float, Field(ge=0, le=3_600)] = 30.0
    max_pending_edits: Count = 64
    edit_threads: Count | None = None
    edit_nice: Annotated[int, Field(ge=0, le=19)] = 0
    view_cache_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    snapshot_bytes: Annotated[int, Field(ge=0)] = 1 << 30

    log_json: bool = False
    log_prompts: bool = False

    @field_validator("api_keys")
    @classmethod
    def _refuse_blank_keys(cls, keys: dict[str, Scope]) -> dict[str, Scope]:
        for key in keys:
            if not key.isascii() or not key.isprintable() or not key or " " in key:
                raise ValueError("a key is one or more printable ASCII characters, no spaces")
        return keys

    @field_validator("corpus", mode="before")
    @classmethod
    def _write_path_out(cls, corpus: object) -> object:
        return str(corpus) if isinstance(corpus, Path) else corpus

    @model_validator(mode="after")
    def _refuse_open_network(self) -> Self:
        if not self.api_keys and not is_loopback(self.host):
            raise SettingsError(
                f"Host {self.host} can be reached from other machines but no API key is "
                f'configured; set {ENVIRONMENT_PREFIX}API_KEYS=\'{{"<key>": "admin"}}\' or use '
                "host 127.0.0.1.",
                field="host",
            )
        return self

    def data_folder(self, base: BaseIdentity) -> Path:
        """``--data`` as it is; otherwise one folder for each base model."""
        if self.data is not None:
            return self.data
        return default_data_root() / f"{_safe_name(base.name)}-{base.digest[:8]}"

    def canary_prompts(self) -> list[str]:
        """The server's own canary prompts; none where it has no file of them.

        Raises:
            SettingsError: the file can't be read, or has none.
        """
        if self.canaries is None:
            return []
        try:
            lines = self.canaries.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(
                f"The canary prompts in {self.canaries} can't be read as text: {error}.",
                field="canaries",
            ) from error
        prompts = [line.strip() for line in lines if line.strip()]
        if not prompts:
            raise SettingsError(
                f"{self.canaries} has no canary prompts; write one a line.", field="canaries"
            )
        return prompts

    def journal_url(self, folder: Path) -> str:
        """The configured database, or SQLite in the data folder."""
        return self.database_url or f"sqlite:///{folder.resolve() / DATABASE_FILE}"


def load_settings(**flags: Any) -> Settings:
    """Settings with the given flags on top; a flag that is ``None`` was not given.

    Raises:
        SettingsError: a value that can't be used, named by its field.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"] if not _is_secret(first["loc"], part))
        raise SettingsError(f"Setting {name!r}: {first['msg']}.", field=name) from None
    except ValueError as error:
        raise SettingsError(f"The settings can't be read: {error}.") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def default_data_root() -> Path:
    """``$XDG_DATA_HOME/palimpsest``, by default ``~/.local/share/palimpsest``."""
    configured = os.environ.get("XDG_DATA_HOME")
    root = Path(configured) if configured else Path.home() / ".local" / "share"
    return root / "palimpsest"


def _safe_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _is_secret(location: tuple[int | str, ...], part: int | str) -> bool:
    """An error inside ``api_keys`` has the key itself in its location."""
    return location[0] == "api_keys" and part != "api_keys"
