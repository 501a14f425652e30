"""The command line: ``palimpsest serve`` and everything one asks a running server.

Heavy imports stay inside the commands, so that ``palimpsest --help`` answers at once.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from app import __version__
from app.domain import Mode
from app.errors import InvalidInput, PalimpsestError, SettingsError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from app.api.schemas import EditOut, HeadMoved
    from app.client import Client
    from app.settings import Settings

ERROR_EXIT = 2
PAGE = 200


class ErrorsInOneLine(TyperGroup):
    """Every error raised on purpose becomes one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PalimpsestError as error:
            line = " ".join(f"{error.title}: {error.detail}".split())
            typer.echo(line, err=True)
            raise typer.Exit(ERROR_EXIT) from None


cli = typer.Typer(
    name="palimpsest",
    cls=ErrorsInOneLine,
    no_args_is_help=True,
    help="Serve one live language model and edit what it knows.",
    pretty_exceptions_enable=False,
)
almanac = typer.Typer(no_args_is_help=True, help="Train or check the embedded default model.")
cli.add_typer(almanac, name="almanac")

Url = Annotated[str, typer.Option("--url", envvar="PALIMPSEST_URL", help="The server to talk to.")]
Key = Annotated[
    str | None, typer.Option("--api-key", envvar="PALIMPSEST_API_KEY", help="An API key.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Views = Annotated[
    list[str] | None, typer.Option("--view", help="live, base, r3, a checkpoint, a sandbox.")
]
DEFAULT_URL = "http://127.0.0.1:8000"


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@cli.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Say it.")
    ] = False,
) -> None:
    """Serve one live language model and edit what it knows."""


# The server --------------------------------------------------------------------------------


@cli.command()
def serve(
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; the almanac by default.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Spread a large model: auto.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of journal and deltas.")] = None,
    database_url: Annotated[str | None, typer.Option(help="Any SQLAlchemy URL.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 takes a free one.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text to take covariance statistics from.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for the model.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Log JSON lines.")] = None,
) -> None:
    """Start the server. Every option is also a setting, PALIMPSEST_<NAME>."""
    from app.settings import load_settings

    start(
        load_settings(
            model=model,
            device=device,
            dtype=dtype,
            device_map=device_map,
            data=data,
            database_url=database_url,
            host=host,
            port=port,
            corpus=corpus,
            threads=threads,
            log_json=log_json,
        )
    )


def start(settings: Settings) -> None:
    """Bind, build, show what is served, and serve until told to stop."""
    import uvicorn
    from rich.console import Console

    from app.main import build_service, configure_logging, create_app
    from app.serving import Server

    console = Console(stderr=True)
    configure_logging(as_json=settings.log_json)
    with bind(settings.host, settings.port) as listener:
        url = url_of(settings.host, listener.getsockname()[1])
        with console.status("starting") as status:

            def report(stage: str) -> None:
                status.update(stage)
                console.print(stage, style="dim", markup=False, highlight=False)

            service = build_service(settings, report)
        try:
            console.print(banner(service.describe_model(), service.folder, url))
            config = uvicorn.Config(create_app(service, settings), log_config=None, ws="none")
            Server(config, service).run(sockets=[listener])
        finally:
            service.close()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before the minutes a large model may take to load."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise SettingsError(
            f"Can't listen on {host}:{port}: {reason}; choose another --host or --port."
        ) from error
    return listener


def url_of(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def banner(model: Mapping[str, Any], folder: Path, url: str) -> Table:
    return facts_table(
        "Palimpsest",
        {
            "model": f"{model['name']} ({model['architecture']}, {model['dtype']})",
            "device": model["device"],
            "layers": model["layers"],
            "parameters": f"{model['parameters']:,}",
            "method": model["default_method"],
            "head": model["revision"],
            "data": folder,
            "listening at": url,
        },
    )


# Edits and reads ---------------------------------------------------------------------------


@cli.command()
def edit(
    prompt: Annotated[
        str | None, typer.Option(help="With {} for the subject, or containing it.")
    ] = None,
    subject: Annotated[str | None, typer.Option(help="What the fact is about.")] = None,
    target: Annotated[str | None, typer.Option(help="What the model should say.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="JSON list of facts, ours or EasyEdit's.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="The model's default if left out.")] = None,
    mode: Annotated[str, typer.Option(help="sequential or independent.")] = "sequential",
    sandbox: Annotated[str | None, typer.Option(help="Continue this sandbox.")] = None,
    hparam: Annotated[
        list[str] | None, typer.Option(help="key=value, repeatable; values as JSON.")
    ] = None,
    seed: int = 0,
    keep: Annotated[
        bool, typer.Option("--keep/--measure-only", help="Independent mode: drop afterwards.")
    ] = True,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write facts into the model and show what it said before and says now."""
    facts = read_facts(file, prompt, subject, target)
    with connect(url, api_key) as client:
        made = client.edit(
            facts,
            method=method,
            mode=mode,
            sandbox=sandbox,
            hparams=read_hparams(hparam or []),
            seed=seed,
            keep=keep,
        )
    show(made, as_json, edit_parts(made))


@cli.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    view: Views = None,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: list[str] | None = None,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt under one or more views, side by side."""
    with connect(url, api_key) as client:
        answer = client.generate(
            prompt,
            views=view or ["live"],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop or [],
        )
    heads = [f"{c.view} ({c.revision or c.sandbox})" for c in answer.completions]
    texts = [c.text for c in answer.completions]
    show(answer, as_json, [rows_table(answer.prompt, heads, [texts])])


@cli.command()
def probe(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts.")],
    candidate: Annotated[
        list[str] | None, typer.Option(help="A continuation to score, repeatable.")
    ] = None,
    view: Views = None,
    top_k: int = 3,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Probabilities of candidate continuations and the likeliest next tokens."""
    with connect(url, api_key) as client:
        answer = client.probe(
            prompt, candidates=candidate or [], views=view or ["live"], top_k=top_k
        )
    rows = [
        [one.prompt, result.view, scored.text, f"{scored.probability:.4f}", scored.rank]
        for result in answer.results
        for one in result.prompts
        for scored in one.candidates
    ]
    tops = [
        [
            one.prompt,
            result.view,
            "  ".join(f"{t.text!r} {math.exp(t.logprob):.3f}" for t in one.top),
        ]
        for result in answer.results
        for one in result.prompts
    ]
    tables = [rows_table("likeliest next tokens", ["prompt", "view", "tokens"], tops)]
    if rows:
        heads = ["prompt", "view", "candidate", "probability", "rank"]
        tables.insert(0, rows_table("candidates", heads, rows))
    show(answer, as_json, tables)


# History -----------------------------------------------------------------------------------


@cli.command()
def revert(
    to: Annotated[str, typer.Argument(help="A revision (r3) or a checkpoint's name.")],
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Go back to a revision or checkpoint, as a new revision."""
    with connect(url, api_key) as client:
        moved = client.revert(to)
    show(moved, as_json, [moved_table(moved)])


@cli.command()
def reset(url: Url = DEFAULT_URL, api_key: Key = None, as_json: AsJson = False) -> None:
    """Back to the original weights, as a new revision."""
    with connect(url, api_key) as client:
        moved = client.reset()
    show(moved, as_json, [moved_table(moved)])


@cli.command()
def checkpoint(
    name: Annotated[str, typer.Argument(help="The name to give.")],
    revision: Annotated[str | None, typer.Option(help="The live revision by default.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Forget the name instead.")] = False,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Name a revision, or forget a name."""
    with connect(url, api_key) as client:
        if delete:
            client.delete_checkpoint(name)
            typer.echo(json.dumps({"deleted": name}) if as_json else f"Forgot {name}.")
            return
        made = client.create_checkpoint(name, revision)
    show(made, as_json, [facts_table("checkpoint", {"name": name, "revision": made.revision})])


@cli.command("log")
def show_log(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="Revisions to show.")] = 50,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The history: revisions, what caused them, and the checkpoints on them."""
    with connect(url, api_key) as client:
        page = client.revisions(limit=limit)
        names = checkpoint_names(client)
        facts = {
            found.edit: summarise(client.get_edit(found.edit))
            for found in page.items
            if found.edit and not as_json
        }
    rows = [
        [
            found.id,
            found.parent or "",
            f"{found.cause} {found.restored or found.sandbox or ''}".strip(),
            found.edit or "",
            facts.get(found.edit or "", ""),
            ", ".join(names.get(found.id, [])),
            f"{found.created_at:%Y-%m-%d %H:%M:%S}",
        ]
        for found in page.items
    ]
    heads = ["revision", "parent", "cause", "edit", "facts", "checkpoints", "made (UTC)"]
    show(page, as_json, [rows_table("history", heads, rows)])


@cli.command()
def sandboxes(
    limit: Annotated[int, typer.Option(min=1, max=PAGE, help="Sandboxes to show.")] = 50,
    url: Url = DEFAULT_URL,
    api_key: Key = None,
    as_json: AsJson = False,
) -> None:
    """The sandboxes: their roots and edits."""
    with connect(url, api_key) as client:
        page = client.sandboxes(limit=limit)
    rows = [
        [found.id, found.root, ", ".join(found.edits), f"{found.created_at:%Y-%m-%d %H:%M:%S}"]
        for found in page.items
    ]
    show(page, as_json, [rows_table("sandboxes", ["sandbox", "root", "edits", "made (UTC)"], rows)])


# The almanac -------------------------------------------------------------------------------


@cli.command()
def verify(
    data: Annotated[
        Path | None, typer.Option(help="A server's data folder; the only one there by default.")
    ] = None,
    database_url: Annotated[str | None, typer.Option(help="The journal, if elsewhere.")] = None,
) -> None:
    """Hash a journal and its delta files again, and name what doesn't agree."""
    from app.journal.journal import Journal
    from app.journal.store import DeltaStore
    from app.settings import DATABASE_FILE, DELTA_FOLDER

    folder = data or only_data_folder()
    if database_url is None and not (folder / DATABASE_FILE).is_file():
        raise InvalidInput(f"There is no journal in {folder}; name a server's folder with --data.")
    journal = Journal.open(database_url or f"sqlite:///{(folder / DATABASE_FILE).resolve()}")
    store = DeltaStore(folder / DELTA_FOLDER)
    try:
        missing = sorted(set(journal.deltas()) - set(store.digests()))
        problems = [*journal.verify(), *store.verify()]
        problems += [f"the delta file {digest} is missing" for digest in missing]
    finally:
        journal.close()
    for problem in problems:
        typer.echo(problem)
    typer.echo(f"{folder}: {len(problems)} problems" if problems else f"{folder}: sound")
    raise typer.Exit(1 if problems else 0)


def only_data_folder() -> Path:
    """Raises:
    InvalidInput: none, or several to choose from.
    """
    from app.settings import DATABASE_FILE, default_data_root

    found = sorted(path.parent for path in default_data_root().glob(f"*/{DATABASE_FILE}"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InvalidInput(f"There is no server's data in {default_data_root()}; use --data.")
    raise InvalidInput(f"Name one with --data: {', '.join(str(path) for path in found)}.")


@almanac.command("train")
def train_almanac(
    output: Annotated[Path | None, typer.Option(help="Where to write the model folder.")] = None,
    seed: int = 0,
) -> None:
    """Train the embedded model anew; by default into its own place in the package."""
    from rich.console import Console

    from app.almanac import MODEL_FOLDER
    from app.almanac.train import train

    console = Console()
    made = train(output or MODEL_FOLDER, seed=seed, console=console)
    console.print(f"written to {made}", markup=False)


@almanac.command("check")
def check_almanac(
    model: Annotated[Path | None, typer.Option(help="Model folder to check.")] = None,
    edits: Annotated[int, typer.Option(min=1, help="Single edits to try.")] = 100,
    sequential: Annotated[int, typer.Option(min=0, help="Edits in sequence to try.")] = 50,
    method: Annotated[str | None, typer.Option(help="The model's default if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what the model knows and how well it takes edits; exit code 1 below the gate."""
    from rich.console import Console

    from app.almanac import MODEL_FOLDER
    from app.almanac.check import check
    from app.main import configure_logging

    configure_logging(as_json=False)
    with Console(stderr=True).status("checking") as status:
        found = check(
            model or MODEL_FOLDER,
            edits=edits,
            sequential=sequential,
            method=method,
            progress=lambda what, done, of: status.update(f"checking: {what} {done}/{of}"),
        )
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        Console().print(found.table())
    if not found.passed:
        raise typer.Exit(1)


# Evaluation --------------------------------------------------------------------------------


@cli.command()
def evaluate(
    facts: Annotated[
        Path, typer.Option(help="JSON or JSON lines: CounterFact, zsRE, EasyEdit's or our facts.")
    ],
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub id; the almanac by default.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="The model's default if left out.")] = None,
    mode: Annotated[str, typer.Option(help="independent or sequential.")] = "independent",
    batch_size: Annotated[
        int | None, typer.Option(help="Facts in one edit; independent: computed side by side.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the file's first so many.")] = None,
    hparam: Annotated[
        list[str] | None, typer.Option(help="key=value, repeatable; values as JSON.")
    ] = None,
    seed: int = 0,
    data: Annotated[Path | None, typer.Option(help="Folder to keep statistics in.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Try a method out on a file of facts, without a server: does it write them, and what else?"""
    from app.evaluation.datasets import read_facts as read_data_set

    hparams = read_hparams(hparam or [])
    chosen = read_mode(mode)
    known = read_data_set(facts, limit)

    from rich.console import Console

    from app.almanac import MODEL_FOLDER
    from app.evaluation.trial import TrialSettings, run_trial
    from app.main import configure_logging
    from app.weights.loading import load_model

    settings = TrialSettings(method, chosen, batch_size, hparams, seed)
    with progress_bar() as progress:
        configure_logging(as_json=False)  # in here, so that log lines go above the bar
        progress("loading", 0, 1)
        loaded = load_model(model or str(MODEL_FOLDER), device=device, dtype=dtype)
        found = run_trial(loaded, known, settings, data=data, progress=progress)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        show_table(Console(), found.table())


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr that is gone when the work is done: call it with what is going on, how
    much of it is done, and of how much."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")

        def advance(what: str, done: int, of: int) -> None:
            if bar.tasks[0].description != what:  # the time left is another one, too
                bar.reset(task, description=what, completed=done, total=of)
            bar.update(task, completed=done, total=of)

        yield advance


# What goes in ------------------------------------------------------------------------------


def connect(url: str, api_key: str | None) -> Client:
    from app.client import Client

    return Client(url, api_key)


def read_facts(
    file: Path | None, prompt: str | None, subject: str | None, target: str | None
) -> list[dict[str, Any]]:
    """Facts from a JSON file (a list, or one object) or from the three options."""
    if file is None:
        if prompt is None or subject is None or target is None:
            raise InvalidInput("Give --prompt, --subject and --target, or --file facts.json.")
        return [{"prompt": prompt, "subject": subject, "target": target}]
    if prompt or subject or target:
        raise InvalidInput("Give either --file or --prompt, --subject and --target.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInput(f"{file} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise InvalidInput(f"{file} is not valid JSON: {error}.") from error
    facts = found if isinstance(found, list) else [found]
    if not facts or not all(isinstance(fact, dict) for fact in facts):
        raise InvalidInput(f"{file} must hold a JSON list of facts.")
    return facts


def read_hparams(pairs: Sequence[str]) -> dict[str, Any]:
    """``layer=3`` → ``{"layer": 3}``; what isn't JSON is a string."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--hparam {pair!r} is not written key=value.")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
        if isinstance(found[key], float) and not math.isfinite(found[key]):
            raise InvalidInput(f"--hparam {pair!r} is not a finite number.")
    return found


def read_mode(text: str) -> Mode:
    try:
        return Mode(text)
    except ValueError:
        known = " or ".join(Mode)
        raise InvalidInput(f"There is no mode {text!r}; use {known}.", field="mode") from None


def checkpoint_names(client: Client) -> dict[str, list[str]]:
    """Checkpoint names by revision, from every page."""
    names: dict[str, list[str]] = {}
    cursor: str | None = None
    while True:
        page = client.checkpoints(limit=PAGE, cursor=cursor)
        for found in page.items:
            names.setdefault(found.revision, []).append(found.name)
        cursor = page.next
        if cursor is None:
            return names


# What comes out ----------------------------------------------------------------------------


def show(answer: BaseModel, as_json: bool, parts: Sequence[Table | Text]) -> None:
    if as_json:
        typer.echo(answer.model_dump_json())
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for part in parts:
        if isinstance(part, Table):
            show_table(console, part)
        else:
            console.print(part)


def show_table(console: Console, table: Table) -> None:
    """The title on a line of its own: inside, it would be folded to the table's width."""
    console.print(table.title, style="italic", highlight=False)
    table.title = None
    console.print(table)


def summarise(made: EditOut) -> str:
    """The facts of an edit in a line: the first two, and how many more."""
    said = [f"{fact.subject} → {fact.target}" for fact in made.facts[:2]]
    more = len(made.facts) - len(said)
    return ", ".join(said) + (f" and {more} more" if more else "")


def edit_parts(made: EditOut) -> list[Table | Text]:
    rows = [
        [
            fact.prompt.replace("{}", fact.subject),
            fact.target,
            fact.before,
            fact.after,
            "yes" if fact.success else "no",
            fact.sandbox or "",
        ]
        for fact in made.facts
    ]
    heads = ["prompt", "target", "before", "after", "success", "sandbox"]
    place = made.revision or ", ".join(made.sandboxes) or "nowhere (measured only)"
    return [
        rows_table(f"{made.id}: {made.method}, {made.mode} → {place}", heads, rows),
        figures_line(made.metrics),
        figures_line(made.timings),
    ]


def moved_table(moved: HeadMoved) -> Table:
    return facts_table(
        moved.cause,
        {
            "revision": moved.revision,
            "weights of": moved.restored or moved.sandbox or "",
            "parent": moved.parent or "",
            "state hash": moved.state_hash,
        },
    )


def rows_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table of plain text: what a model or a user wrote is never taken as markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for head in heads:
        table.add_column(Text(head), overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def figures_line(figures: Mapping[str, float | None]) -> Text:
    """``name 1.000 · name 0.250``, without the figures that were not measured."""
    from rich.text import Text

    known = [(name, value) for name, value in figures.items() if value is not None]
    return Text(" · ").join(
        Text.assemble((f"{name} ", "bold"), f"{value:.3f}") for name, value in known
    )


def facts_table(title: str, facts: Mapping[str, object]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(str(value)))
    return table


def main() -> None:
    cli()


if __name__ == "__main__":
    main()
