"""Tables of records and verdicts, for every benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from bench_records import Record, Verdict
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_NAMED_UNITS = ("MB", "s")  # in a table of several units, the rows that say theirs


def section_table(title: str, records: Sequence[Record]) -> Table:
    """Cases down, contenders across; median, and range of the repeats."""
    table = Table(title=title, show_lines=True)
    table.add_column("")
    contenders = list(dict.fromkeys(record.contender for record in records))
    for name in contenders:
        table.add_column(name, justify="right")
    units = {record.unit for record in records}
    for case in dict.fromkeys(record.case for record in records):
        found = {record.contender: record for record in records if record.case == case}
        unit = next(record.unit for record in found.values())
        label = f"{case}, {unit}" if unit in _NAMED_UNITS or len(units) > 1 else case
        table.add_row(label, *(_cell(found.get(name)) for name in contenders))
    return table


def _cell(record: Record | None) -> str:
    if record is None:
        return "not measured"
    if record.spread is None:
        return "[red]not run[/]"
    size = record.spread.median
    decimals = 2 if record.unit in ("s", "TB/s") or size < 10 else 1 if size < 1000 else 0
    return format(record.spread, f",.{decimals}f")


def show_notes(console: Console, records: Sequence[Record]) -> None:
    """Print what a reader should know of how contenders ran, and why others did not."""
    for note in dict.fromkeys(f"{r.contender}: {r.note}" for r in records if r.note):
        console.print(escape(note), highlight=False)
    for reason, names in _not_run(records).items():
        line = escape(f"{', '.join(names)}: {reason}")
        console.print(f"[bold red]not run[/]: {line}", highlight=False)


def _not_run(records: Sequence[Record]) -> dict[str, list[str]]:
    """Return, by reason, what was not run."""
    reasons: dict[str, list[str]] = {}
    for record in records:
        if record.spread is None:
            names = reasons.setdefault(record.not_run or "no measurement", [])
            name = f"{record.contender} ({record.section})"
            if name not in names:
                names.append(name)
    return reasons


def target_table(verdicts: Sequence[Verdict]) -> Table:
    """Target, what was found, and whether it holds or how far it is."""
    table = Table(title="Targets", show_lines=True)
    with_threads = any(verdict.threads is not None for verdict in verdicts)
    for column in ("target", *(["threads"] if with_threads else []), "measured", "outcome"):
        table.add_column(column)
    colours = {True: "green", False: "yellow", None: "red"}
    for verdict in verdicts:
        outcome = f"[{colours[verdict.holds]}]{escape(verdict.outcome)}[/]"
        threads = [str(verdict.threads)] if with_threads else []
        table.add_row(verdict.target, *threads, verdict.measured, outcome)
    return table
