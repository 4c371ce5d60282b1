"""Run the benchmarks: `make bench`, or `python -m benchmarks` in the folder `tests`."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path

import click

from benchmarks import cores, plots, report, servers
from benchmarks.scenarios import FULL, SCENARIOS, SMALL, Numbers, Run

RESULTS = Path(__file__).with_name("results")


def words(given: str, known: list[str], what: str) -> list[str]:
    """Names separated by spaces or commas, in our order; none given: all."""
    asked = given.replace(",", " ").split()
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise click.BadParameter(f"{what} {unknown[0]!r}: expected {', '.join(known)}")
    return [name for name in known if not asked or name in asked]


def limited(numbers: Numbers, history: int) -> Numbers:
    """The same with at most so many stored labels."""
    return dataclasses.replace(
        numbers,
        d_rows=tuple(dict.fromkeys(min(rows, history) for rows in numbers.d_rows)),
        h_rows=tuple(dict.fromkeys(min(rows, history) for rows in numbers.h_rows)),
        n_rows=min(numbers.n_rows, history),
        n_read=min(numbers.n_read, history // len(numbers.n_strangers)),
        s_rows=max(200, min(numbers.s_rows, history) // 200 * 200),
    )


@click.command()
@click.option("--only", default="", help="Scenarios; none: all.")
@click.option("--peers", default="", help="Peers beside the service; none: all; -: nobody.")
@click.option("--size", type=click.Choice(["full", "small"]), default="full")
@click.option("--history", type=int, help="Most labels stored, in D, H and S.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for what was found.")
@click.option("--command", default="", help="What to say that this was run by.")
def main(
    only: str, peers: str, size: str, history: int | None, out: Path | None, command: str
) -> None:
    """Measure the service, and its peers, on the same work."""
    chosen = words(only, list(SCENARIOS), "scenario")
    beside = [] if peers.strip() == "-" else words(peers, list(servers.PEERS), "peer")
    numbers = FULL if size == "full" else SMALL
    if history is not None:
        numbers = limited(numbers, history)
    folder = out or RESULTS / "latest"
    server_core, load_core = cores.choose()
    files = cores.raise_files()
    if files < cores.FILES:
        click.echo(f"only {files} files may be open: large scenarios will fall short", err=True)
    if server_core == load_core:
        click.echo("one core: the load takes from the servers what they would need", err=True)
    began = time.monotonic()

    def tell(text: str) -> None:
        click.echo(f"{time.monotonic() - began:7.1f} s  {text}", err=True)

    where = report.machine(server_core, load_core)
    spoken = command or "python -m benchmarks " + " ".join(sys.argv[1:])
    with cores.on(load_core), servers.place(server_core) as place:
        run = Run(place, numbers, load_core, beside, tell)
        for name in chosen:
            SCENARIOS[name](run)
            # After each: what was measured is kept when somebody loses patience.
            found = report.document(spoken, size, where, run.results)
            report.write(folder, found, report.table(run.results))
    click.echo(report.table(run.results))
    if importlib.util.find_spec("matplotlib"):
        for path in plots.draw(folder, found):
            click.echo(path)
    else:
        click.echo("no figures: matplotlib is not installed", err=True)
    click.echo(folder / "results.json")
    if any(result.verdict == "wrong" for result in run.results):
        sys.exit("events were lost, doubled or out of order")


if __name__ == "__main__":
    main()
