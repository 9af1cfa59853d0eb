"""The command line: run, compare, resume, check, list, schema, report, data."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import logging
import os
import signal
import sys
import tomllib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .studies.progress import Progress, Wanted
    from .studies.result import Run

# A program that a signal has ended has this exit status, plus the signal's number.
SIGNALLED = 128

EXAMPLES = """examples:
  fedweight run                                         the quick start
  fedweight run simulations/label_skew.toml --strategy feddisco --seed 1
  fedweight run --set partition.alpha=0.1 --set run.rounds=50
  fedweight compare --strategies fedavg,ida --seeds 0-9 which is better, and is it real
  fedweight check patients.csv --set data.label=outcome what a run would say of it
  fedweight app my-app --clients 10                     a Flower App as it is
  fedweight list                                        what there is to choose from
  fedweight list strategy ida                           and the options of one of them
  fedweight report runs/quickstart-fedavg-seed0
  fedweight data fashion-mnist                          fetch a data set
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        prog="fedweight",
        description="Simulate federated clients, and decide how much each one counts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="store_true", help="print the version")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        return sub

    run = command(
        "run",
        "run a simulation and write its folder",
        "fedweight run simulations/label_skew.toml --strategy ida --seed 1",
    )
    run.add_argument("file", nargs="?", help="a simulation file; none: quick start")
    run.add_argument("--strategy", help="short for --set strategy.name=...")
    run.add_argument("--engine", help="auto, local or ray")
    run.add_argument("--seed", type=int, help="short for --set run.seed=...")
    run.add_argument("--out", help="the run's folder (default: a new one in runs/)")
    check = command(
        "check",
        "say what a data or simulation file holds, and what a run would refuse",
        "fedweight check patients.csv --set data.label=outcome --set data.client=site",
    )
    run.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the run that is in the folder already, as after a crash",
    )
    check.add_argument("file", help="a CSV, NPZ or simulation file (.toml)")
    check.add_argument(
        "--schema", help="check a site's file against what --write-schema wrote"
    )
    check.add_argument(
        "--write-schema",
        metavar="FILE",
        help="write the file's columns and classes, for other sites to check theirs",
    )
    compared = command(
        "compare",
        "run several strategies with the same seeds, and say what differs for real",
        "fedweight compare simulations/label_skew.toml "
        "--strategies fedavg,feddisco:a=0.2 --seeds 0,1,2",
    )
    compared.add_argument("file", nargs="?", help="a simulation file")
    compared.add_argument(
        "--strategies",
        metavar="NAMES",
        help="names, separated by commas, with options: fedavg,feddisco:a=0.2:b=0.1; "
        "all are held against the first",
    )
    compared.add_argument(
        "--seeds", help="whole numbers: 0,1,2 or 0-9 (default: 0); 10 or more tell"
    )
    compared.add_argument(
        "--objectives",
        metavar="NAMES",
        help="local objectives, likewise: every strategy is run with each",
    )
    compared.add_argument(
        "--data-sets",
        metavar="NAMES",
        help="data sets, likewise: everything is run on each, and compared on each and "
        "over all of them",
    )
    compared.add_argument(
        "--vary",
        "--settings",
        action="append",
        metavar="TABLE.KEY=A,B",
        help="values of another key: everything is run with each; may be repeated",
    )
    compared.add_argument(
        "--sweep",
        action="append",
        metavar="TABLE.KEY=A,B",
        help="likewise, but each strategy is compared with the values that are best on "
        "data.validation, which must be given: -s data.validation=0.1",
    )
    compared.add_argument(
        "--target",
        type=float,
        metavar="ACCURACY",
        help="count rounds and bytes to this test accuracy (default: what the first "
        "strategy ends with)",
    )
    compared.add_argument(
        "--out", help="the folder of all runs (default: runs/<name>-comparison)"
    )
    compared.add_argument(
        "--workers",
        type=int,
        help="how many runs side by side (default: as many as cores, or GPUs where "
        "clients train on those; 1 on Ray); changes no result",
    )
    for sub in (run, check, compared):
        sub.add_argument(
            "-s",
            "--set",
            action="append",
            default=[],
            metavar="TABLE.KEY=VALUE",
            dest="settings",
            help="override a key of the simulation file; may be repeated",
        )
    app = command(
        "app",
        "run a Flower App's folder as it is, as flwr run would simulate it",
        'fedweight app my-app --clients 10 -c "num-server-rounds=3"',
    )
    app.add_argument("folder", nargs="?", default=".", help="default: this one")
    app.add_argument("--clients", type=int, help="how many (default: Flower's 2)")
    for names, meaning in {
        ("-c", "--run-config"): "override settings of the app, as flwr run does",
        ("--federation-config",): 'as flwr run takes it: "num-supernodes=10 ..."',
        (
            "--node-config",
        ): "what clients' node_config hold besides: \"0.path='a' ...\"",
    }.items():
        app.add_argument(
            *names,
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"{meaning}; or a TOML file; may be repeated",
        )
    app.add_argument("--engine", default="auto", help="auto, local or ray")
    app.add_argument("--workers", type=int, help="processes (default: one a core)")
    app.add_argument(
        "--gpus-per-worker", type=float, default=0.0, help="share of a GPU; means Ray"
    )
    app.add_argument("--seed", type=int, help="what clients draw begins from it")
    app.add_argument(
        "--isolation",
        default="auto",
        help="none: clients run in this process, for a debugger",
    )
    app.add_argument(
        "--compare-with-flower",
        action="store_true",
        help="run it on Flower's own runtime, too; say both times and what differs",
    )
    listing = command(
        "list",
        "list what there is to choose from, or the options of one choice",
        "fedweight list strategy ida",
    )
    listing.add_argument(
        "kind",
        nargs="?",
        help="a table of a simulation file, such as strategy; or probe, or query",
    )
    listing.add_argument("name", nargs="?", help="one name of it, to see its options")
    command(
        "schema",
        "print the JSON schema of simulation files, which editors read",
        "fedweight schema > fedweight.schema.json",
    )
    resumed = command(
        "resume",
        "go on with a run that was stopped, from its last checkpoint",
        "fedweight resume runs/my-run",
    )
    resumed.add_argument("folder", help="a run's folder")
    report = command(
        "report",
        "write the report of a run or a comparison again",
        "fedweight report runs/my-run",
    )
    report.add_argument("folder", help="the folder of a run or a comparison")
    data = command(
        "data",
        "fetch a public data set and verify it",
        "fedweight data fashion-mnist --folder data/",
    )
    data.add_argument("name", help="fashion-mnist, adult or shakespeare")
    data.add_argument("--folder", help="where to put it (default: the cache)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status.

    0 is success; 1, something went wrong in the run; 2, what was asked for is not
    allowed or not there; 130, Ctrl-C; 143, SIGTERM; 129, the terminal was closed.
    """
    # Flower reports usage and looks for updates unless told before its import.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    given = parser().parse_args(arguments)
    if given.version:
        from . import __version__

        print(__version__)
        return 0
    if given.command is None:
        parser().print_help()
        return 2
    from .core.errors import ConfigurationError, DataError, FedweightError
    from .core.signals import interruptible

    try:
        with interruptible():
            try:
                status: int = COMMANDS[given.command](given)
                if sys.stdout is not None:
                    sys.stdout.flush()  # Here, where a reader that has gone is noticed.
            except KeyboardInterrupt as stop:
                return _interrupted(stop)
    except FedweightError as error:
        recorded = _recorded(error)
        _say(f"fedweight: {' '.join(str(error).split())} {recorded}".rstrip())
        refused = isinstance(error, ConfigurationError | DataError) and not recorded
        return 2 if refused else 1
    except OSError as error:
        # Where the reader of our output has gone there is nobody left to tell.
        if not isinstance(error, BrokenPipeError):
            what = error.filename or "the output"
            _say(f"fedweight: {what} cannot be used: {error.strerror or error}")
        _drop_output()
        return 1
    return status


def _interrupted(stop: KeyboardInterrupt) -> int:
    """Say what was recorded when a signal came; return the exit status."""
    number = getattr(stop, "number", signal.SIGINT)
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    _say(f"\nfedweight: interrupted{by}. {_recorded(stop)}".rstrip())
    return SIGNALLED + number


def _recorded(stop: BaseException) -> str:
    """Say where what was recorded is, if a run had begun."""
    return " ".join(getattr(stop, "__notes__", ()))


def _say(text: str) -> None:
    """Print to a terminal that may be closed by now, or a file on a full disk."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _drop_output() -> None:
    """Let go of what cannot be written, which the interpreter would try at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(given: argparse.Namespace) -> int:
    from .core.lazy import kept_imports

    with kept_imports():
        from .studies.runner import run

    _show_warnings()
    result = run(
        given.file,
        strategy=given.strategy,
        engine=given.engine,
        seed=given.seed,
        out=given.out,
        settings=given.settings,
        progress=_progress(given),
        overwrite=given.overwrite,
    )
    return _tell(given, result)


def _compare(given: argparse.Namespace) -> int:
    from .core.paths import address
    from .studies.comparing import LINES, compare

    _show_warnings()
    found = compare(
        given.file,
        given.strategies,
        given.seeds,
        objectives=given.objectives,
        data_sets=given.data_sets,
        vary=given.vary,
        sweep=given.sweep,
        target=given.target,
        settings=given.settings,
        out=given.out,
        workers=given.workers,
        progress=None if given.json else LINES,
    )
    if given.json:
        print(json.dumps(found.to_dict()))
    else:
        print(found)
        print(f"\nresults  {found.folder}")
        if (report := found.folder / "report.html").is_file():
            print(f"report   {address(report)}")
    return 1 if found.failures or found.failed_rounds else 0


def _tell(given: argparse.Namespace, result: Run) -> int:
    """Print what a run has reached; return the exit status."""
    summary = result.summary()
    if given.json:
        print(json.dumps({"folder": str(result.folder), **_no_nan(summary)}))
    else:
        _print_summary(result, summary)
    return 1 if summary.get("failed_rounds") else 0


def _resume(given: argparse.Namespace) -> int:
    from .core.lazy import kept_imports

    with kept_imports():
        from .studies.runner import resume

    _show_warnings()
    result = resume(given.folder, progress=_progress(given))
    return _tell(given, result)


def _app(given: argparse.Namespace) -> int:
    from .core.errors import EngineError
    from .simulations.workers.forking import start_early

    apart = given.engine != "ray" and given.isolation != "none"
    module = _client_module(given.folder)
    if apart and module and not given.gpus_per_worker:
        start_early(os.path.abspath(given.folder), module)
    from .simulations.folder_run import run_folder, trace_of

    _show_warnings()
    logging.getLogger("fedweight").setLevel(logging.INFO)
    named = {k: v for k, v in vars(given).items() if k not in ("command", "version")}
    as_json = named.pop("json")
    try:
        done = run_folder(**named)
    except EngineError as error:
        _say(trace_of(error))
        raise
    print(json.dumps(done.to_dict()) if as_json else "\n".join(done.lines()))
    return 0


def _client_module(folder: str) -> str:
    """Return the module of a Flower App's clients, empty where it cannot be read."""
    try:
        with open(os.path.join(folder, "pyproject.toml"), "rb") as file:
            app = tomllib.load(file)["tool"]["flwr"]["app"]
        return str(app["components"]["clientapp"]).partition(":")[0]
    except (OSError, ValueError, KeyError, TypeError):
        return ""  # What is wrong is said where it is read again.


def _check(given: argparse.Namespace) -> int:
    from .core.errors import DataError
    from .studies.check import check_file

    checked = check_file(
        given.file,
        given.settings,
        schema=given.schema,
        write_schema=given.write_schema,
    )
    if given.json:
        print(json.dumps(checked.to_dict()))
    else:
        print("\n".join(checked.lines()))
    if checked.refused:
        raise DataError(checked.refused[0])
    return 0


def _list(given: argparse.Namespace) -> int:
    from .studies.catalogue import catalogue, names_page, options_page

    names = names_page(given.kind, given.name or "") if given.kind else None
    if names is not None:
        if given.json:
            print(json.dumps(names))
            return 0
        width = max(map(len, names))
        for name, line in names.items():
            print(f"{name:<{width}}  {line}")
        return 0
    if given.kind:
        page = options_page(given.kind, given.name or "")
        if given.json:
            print(json.dumps(page, default=str))
            return 0
        width = max(map(len, page), default=0)
        for key, row in page.items():
            default = f"default {row['default']!r}" if "default" in row else "required"
            default = "optional" if default == "default None" else default
            print(f"{key:<{width}}  {row['allowed']}; {default}")
            print(f"{'':<{width}}  {row['meaning']}")
        return 0
    kinds = catalogue()
    if given.json:
        print(json.dumps(kinds))
        return 0
    width = max(len(name) for names in kinds.values() for name in names)
    for kind, names in kinds.items():
        print(kind)
        for name, line in names.items():
            print(f"  {name:<{width}}  {line}")
    return 0


def _schema(given: argparse.Namespace) -> int:
    from .studies.catalogue import json_schema

    print(json.dumps(json_schema(), indent=None if given.json else 2, default=str))
    return 0


def _report(given: argparse.Namespace) -> int:
    from .core.paths import address
    from .studies.comparison import Comparison
    from .studies.reader import PLAN
    from .studies.result import Run

    compared = os.path.isfile(os.path.join(given.folder, PLAN))
    path = (Comparison if compared else Run)(given.folder).report()
    print(json.dumps({"report": str(path)}) if given.json else address(path))
    return 0


def _data(given: argparse.Namespace) -> int:
    from .data import default_folder, fetch

    folder = fetch(given.name, given.folder or default_folder(given.name))
    print(json.dumps({"folder": str(folder)}) if given.json else folder)
    return 0


COMMANDS = {
    "run": _run,
    "compare": _compare,
    "resume": _resume,
    "app": _app,
    "check": _check,
    "list": _list,
    "schema": _schema,
    "report": _report,
    "data": _data,
}


def _show_warnings() -> None:
    """Show our warnings and errors, plainly."""
    ours = logging.getLogger("fedweight")
    if not ours.handlers:
        handler = _ToStderr()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        ours.addHandler(handler)
    ours.propagate = False


class _ToStderr(logging.Handler):
    """Writes to what ``sys.stderr`` is by then, as a live line may have replaced it."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:
            print(self.format(record), file=sys.stderr)


def _progress(given: argparse.Namespace) -> Wanted:
    """Return how rounds are shown: a bar where one can be, plain lines elsewhere."""
    from .studies.progress import watched

    if given.json:
        return False
    return True if watched() else _print_round


def _print_round(progress: Progress) -> None:
    print(progress, file=sys.stderr, flush=True)


def _print_summary(result: Run, summary: dict[str, Any]) -> None:
    from .core.paths import address

    warnings = summary.pop("warnings")
    averaged = summary.pop("test_accuracies_in_mean")
    for name, value in summary.items():
        label = name.replace("_", " ").replace("worst10", "worst tenth")
        label = label.replace("best10", "best tenth")
        if name == "mean_test_accuracy_last_10":
            label = f"mean test accuracy last {averaged}"
        if isinstance(value, float):
            print(f"{label:<27} {value:.4f}")
        elif value is not None:
            print(f"{label:<27} {value}")
    print(f"{'results':<27} {result.folder}")
    if (report := result.folder / "report.html").is_file():
        print(f"{'report':<27} {address(report)}")
    for warning in warnings:
        print(f"warning: {warning}")


def _no_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not known is null."""
    return {
        k: None if isinstance(v, float) and v != v else v for k, v in values.items()
    }


def console() -> None:
    """Run the command line as a program, and end at once.

    By then everything is written and no worker is left; taking PyTorch and Ray apart
    piece by piece would only keep the user waiting for another second.
    """
    status = main()
    if status <= SIGNALLED:
        atexit._run_exitfuncs()
    if sys.stdout is not None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    console()
