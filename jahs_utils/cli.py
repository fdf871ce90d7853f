"""The command `jahs`: run chapters, compute experiments, build the book, look after data."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

Profile = Annotated[str, typer.Option(help="quick, standard, gpu or paper")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="a parameter of the chapter, as name=value")
]
Scheduler = Annotated[str | None, typer.Option(help="address of a Dask scheduler")]
Limit = Annotated[float | None, typer.Option(help="start what ends in so many seconds")]
Retry = Annotated[bool, typer.Option(help="compute failed rows again")]
Chapters = Annotated[list[str] | None, typer.Argument(help="chapters; all when none is named")]

plain = {"no_args_is_help": True, "rich_markup_mode": None, "pretty_exceptions_enable": False}
app = typer.Typer(help=__doc__, add_completion=False, **plain)
experiment = typer.Typer(help="Recorded experiments: list, run, show.", **plain)
data = typer.Typer(help="Data sets: list them, import a copy.", **plain)
app.add_typer(experiment, name="experiment")
app.add_typer(data, name="data")

# Each command imports what it needs: torch takes seconds, an error message should not.


@app.command()
def run(
    chapter: str,
    profile: Profile = "quick",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="where the executed notebook goes")] = None,
) -> None:
    """Execute a chapter with papermill; the notebook in chapters/ stays as it is."""
    from jahs_utils.chapters import chapter_path
    from jahs_utils.checks import PROFILES, one_of

    one_of(profile, PROFILES, "profile")
    chapter_path(chapter)
    from jahs_utils.book import run_chapter

    target = out or Path("runs") / f"{chapter}-{profile}.ipynb"
    seconds = run_chapter(chapter, target, profile, _parse(settings))
    typer.echo(f"{target} ({seconds:.0f} s)")


@app.command()
def refresh(chapters: Chapters = None) -> None:
    """Execute chapters in the quick profile and store their outputs in chapters/."""
    from jahs_utils.book import refresh_chapter

    for name in _named(chapters):
        refresh_chapter(name)
        typer.echo(f"chapters/{name}.ipynb refreshed")


@app.command()
def check(chapters: Chapters = None) -> None:
    """Execute chapters and compare their outputs with the stored ones (nbval)."""
    from jahs_utils.book import check_chapters

    raise typer.Exit(check_chapters(_named(chapters)))


@app.command()
def book(
    strict: Annotated[bool, typer.Option(help="warnings are errors")] = False,
    settings: Settings = None,
) -> None:
    """Run every chapter in the quick profile and build the HTML."""
    from jahs_utils.book import build

    build(strict=strict, parameters=_parse(settings))


@experiment.command("list")
def list_experiments() -> None:
    """Every experiment with its recorded and wanted rows per profile."""
    from jahs_utils.chapters import chapter_names, load_chapter
    from jahs_utils.experiments import Results, key_id, results_path

    for chapter in chapter_names():
        for name, declared in getattr(load_chapter(chapter), "EXPERIMENTS", {}).items():
            counts = []
            for profile, keys in declared.grids.items():
                rows = Results(results_path(chapter, name, profile)).rows()
                good = {key_id(r.key) for r in rows if r.status == "ok"}
                found = sum(key_id(key) in good for key in keys)
                counts.append(f"{profile} {found}/{len(keys)}")
            typer.echo(f"{chapter}/{name}: {', '.join(counts)}")


@experiment.command("run")
def run_one(
    address: Annotated[str, typer.Argument(metavar="CHAPTER/NAME")],
    profile: Profile = "quick",
    workers: Annotated[int, typer.Option(help="processes on this machine")] = 1,
    scheduler: Scheduler = None,
    limit_seconds: Limit = None,
    retry_failed: Retry = False,
) -> None:
    """Compute the rows that are missing and record them; it can be stopped at any moment."""
    from jahs_utils.record import run_experiment

    how = {"workers": workers, "scheduler": scheduler, "limit_seconds": limit_seconds}
    _echo(run_experiment(address, profile, **how, retry_failed=retry_failed, report=typer.echo))


@app.command()
def record(
    addresses: Annotated[list[str] | None, typer.Argument(metavar="[CHAPTER/NAME]...")] = None,
    profile: Profile = "standard",
    workers: Annotated[int | None, typer.Option(help="processes, instead of what suits")] = None,
    scheduler: Scheduler = None,
    limit_seconds: Limit = None,
    dry_run: Annotated[bool, typer.Option(help="only say what it would take")] = False,
    retry_failed: Retry = False,
) -> None:
    """Compute the missing rows of all chapters, most worth per second first, in the time given."""
    from jahs_utils.record import record as compute

    how = {"workers": workers, "scheduler": scheduler, "limit_seconds": limit_seconds}
    how |= {"dry_run": dry_run, "retry_failed": retry_failed, "report": typer.echo}
    _echo(compute(profile, addresses or (), **how))


def _echo(summary: Any) -> None:
    typer.echo(f"{summary.ok} rows, {summary.failed} failed, {summary.left} left: {summary.reason}")


@experiment.command("show")
def show(
    address: Annotated[str, typer.Argument(metavar="CHAPTER/NAME")], profile: Profile = "standard"
) -> None:
    """The rows as a table, how many come from older code, and the errors of failed ones."""
    from jahs_utils.chapters import code_version
    from jahs_utils.experiments import Results, find_experiment, read_results, results_path

    chapter, name, declared = find_experiment(address)
    declared.keys(profile)
    rows = Results(results_path(chapter, name, profile)).rows()
    typer.echo(read_results(chapter, name, profile).to_string())
    older = sum(row.code != code_version(declared.unit) for row in rows)
    typer.echo(f"{len(rows)} rows, {older} of them computed by older code")
    for row in rows:
        if row.status == "failed":
            typer.echo(f"failed: {row.key}: {row.error}")


@app.command()
def claims(
    chapter: Annotated[str | None, typer.Argument(help="a chapter; all when none is named")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="every claim, for programs")] = False,
) -> None:
    """How many numbers and findings have which verdict, and what is open."""
    import json

    from jahs_utils.chapters import chapter_path
    from jahs_utils.scoreboard import claims_json, counts

    if chapter is not None:
        chapter_path(chapter)
    entries = claims_json(chapter)
    if as_json:
        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    typer.echo(counts(chapter).to_string())
    for entry in entries:
        if entry["verdict"] in ("undecided", "not yet run"):
            where = f"{entry['chapter']}  {entry['id']}"
            typer.echo(f"{entry['verdict']:12} {where}: {entry['statement']}")


@data.command("list")
def list_data() -> None:
    """The data sets that `load` knows and the folders where it looks."""
    from jahs_utils.data import DATASETS
    from jahs_utils.data_files import SYSTEM_FOLDER, data_roots

    typer.echo("\n".join(DATASETS))
    typer.echo("searched: " + ", ".join(map(str, [*data_roots(), SYSTEM_FOLDER])))


@data.command("import")
def import_data(path: Path) -> None:
    """Bring a JPEG copy of CIFAR-10 (.npz) into the cache, where `load("cifar10")` finds it."""
    from jahs_utils.data_files import import_cifar10_copy

    typer.echo(f"cifar10 is now at {import_cifar10_copy(path)}")


@app.command()
def doctor(measure: Annotated[bool, typer.Option(help="measure formats again")] = False) -> None:
    """What this machine is, which number format is fast on it, and what would be used."""
    import torch

    from jahs_utils.chapters import book_root
    from jahs_utils.data_files import data_roots
    from jahs_utils.device import cache_folder, describe_device, fastest_format, pick_device

    device = pick_device()
    form = fastest_format(device, measure=measure)
    layout = "channels-last" if form.channels_last else "channels-first"
    typer.echo(f"python    {sys.version.split()[0]}, torch {torch.__version__}")
    typer.echo(f"device    {device}: {describe_device(device)}")
    typer.echo(f"format    {form.precision}, {layout} (fastest when measured)")
    typer.echo(f"book      {book_root()}")
    typer.echo(f"cache     {cache_folder()}")
    typer.echo(f"data      {', '.join(map(str, data_roots()))}")


def _named(chapters: list[str] | None) -> list[str]:
    from jahs_utils.chapters import chapter_names, chapter_path

    for name in chapters or []:
        chapter_path(name)
    return chapters or chapter_names()


def _parse(settings: list[str] | None) -> dict[str, object]:
    """name=value pairs as a dict; a value is a literal of Python (1, 0.1, [8, 8]), else text."""
    parsed: dict[str, object] = {}
    for setting in settings or []:
        name, equals, value = map(str.strip, setting.partition("="))
        if not equals or not name:
            raise ValueError(f"--set takes name=value, got {setting!r}")
        try:
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            parsed[name] = value
    return parsed


def main() -> None:
    """Entry point: user errors are one line on standard error and exit status 2."""
    if sys.getfilesystemencoding() != "utf-8":  # pages, paths and notebooks need it
        program = [sys.executable, "-m", "jahs_utils.cli", *sys.argv[1:]]
        os.execve(sys.executable, program, os.environ | {"PYTHONUTF8": "1"})
    try:
        status = app(standalone_mode=False)
    except typer.Exit as end:
        status = end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except (ValueError, OSError) as error:
        status = _fail(str(error))
    except Exception as error:
        # Depending on its version, typer's usage errors are click's or those of its own copy.
        if hasattr(error, "format_message"):
            status = _fail(error.format_message())
        elif type(error).__name__ == "BookError":  # its module needs papermill
            status = _fail(str(error), status=1)
        else:
            raise
    sys.exit(status)


def _fail(message: str, status: int = 2) -> int:
    print("jahs:", " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
