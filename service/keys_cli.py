"""``tarflow keys``: make keys, and see which there are."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from service.access.caller import Scope
from service.jobs import Priority
from training.commands import clear_errors

app = typer.Typer(help="API keys: who may call a service, and how much.", no_args_is_help=True)

KeysFile = Annotated[
    Path, typer.Option("--keys", envvar="TARFLOW_KEYS", help="File with the keys, as --keys of the service names it.")
]


def _moment(text: str) -> datetime | date:
    try:
        return date.fromisoformat(text) if len(text) == 10 else datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"expires: got {text[:100]!r}, allowed is a date like 2027-01-31, or one with a time: 2027-01-31T12:00:00Z"
        ) from None


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is: the caller's name in logs and in the list of jobs.")],
    keys: KeysFile,
    scope: Annotated[list[Scope], typer.Option(help="What it opens; once for each scope.")],
    priority: Annotated[Priority, typer.Option(help="Share of the workers while others wait, too.")] = Priority.NORMAL,
    rate: Annotated[str | None, typer.Option(help="Most requests in a window, as 600/minute.")] = None,
    concurrent_cost: Annotated[
        int | None, typer.Option(min=1, help="Most images x patches x passes in flight at once.")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="Date from which on it is refused, as 2027-01-31 (UTC).")] = None,
) -> None:
    """Make a key: its secret is printed, once, and its hash added to the file."""
    with clear_errors():
        from service.access.keyring import append
        from service.access.keys import digest, made, new_secret

        secret = new_secret()
        entry = made(
            sha256=digest(secret).hex(),
            scopes=list(dict.fromkeys(scope)),
            priority=priority,
            rate=rate,
            concurrent_cost=concurrent_cost,
            expires=None if expires is None else _moment(expires),
        )
        append(keys, name, entry)
    typer.echo(f"{keys}: added {name!r}; its secret is shown only now:", err=True)
    # Alone on standard output, for scripts.
    typer.echo(secret)


@app.command("list")
def list_(keys: KeysFile) -> None:
    """Show the keys of a file, and whether the service would take it."""
    with clear_errors():
        from service.access.keyring import Keyring

        entries = Keyring.of_file(keys).entries
    table = Table("name", "scopes", "priority", "rate", "concurrent cost", "expires")
    for name, entry in entries.items():
        moment = entry.expires_at
        shown = "" if moment is None else f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"
        table.add_row(
            name,
            ", ".join(entry.scopes),
            entry.priority,
            entry.rate or "",
            str(entry.concurrent_cost or ""),
            shown,
        )
    Console().print(table)
