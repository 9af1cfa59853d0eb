"""A comparison's runs: one after another in this process, or side by side in others."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..core.errors import DataError, FedweightError
from ..core.signals import interruptible
from ..core.texts import plain
from ..core.threads import limit_cores
from ..data import DATA_SETS, DataSet, digest_of_files, load
from .configuration import Configuration
from .failures import in_full, why_it_stopped
from .folder import CHECKPOINT, ERRORS, LOCK
from .reader import table_of
from .result import Run
from .runner import resume, run_configured

log = logging.getLogger("fedweight")

# How long a process that was asked to end may write what it has.
PATIENCE = 15.0

# By which a process is told which GPUs there are.
VISIBLE = "CUDA_VISIBLE_DEVICES"

How = Literal["new", "anew", "resume", "done"]


# What [engine] leaves open, and is chosen before cells are run.
CHOSEN = ("plan", "device")


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes
    ----------
    name : str
        What its folder is called.
    folder : str
        Where it is.
    config : str
        Its simulation file.
    how : str
        ``"new"``; ``"anew"``, for what is there holds no checkpoint; ``"resume"``; or
        ``"done"``.
    preface : str
        Comments that its ``config.toml`` begins with.
    """

    name: str
    folder: str
    config: str
    how: How
    preface: str = ""


@dataclass(frozen=True)
class Ended:
    """How a cell has ended; ``reason`` is empty where all went well."""

    cell: Cell
    number: int
    of: int
    seconds: float
    reason: str = ""

    def __str__(self) -> str:
        """Return a line for a terminal or a log."""
        what = {"resume": "gone on with", "done": "was there"}.get(self.cell.how, "run")
        said = f"failed: {self.reason}" if self.reason else what
        return (
            f"{self.number}/{self.of}  {self.cell.name}  {said}  {self.seconds:.1f} s"
        )


def what_is_there(
    folder: Path, wanted: Mapping[str, Any]
) -> tuple[How, dict[str, Any], str]:
    """Look at the folder of a cell: what to do, what was chosen, how it differs.

    Parameters
    ----------
    folder : Path
        It need not exist.
    wanted : Mapping
        The tables of the cell's configuration. Where its plan or device is ``"auto"``
        any is right.

    Returns
    -------
    tuple
        What to do; the plan and the device that are there; and the key that differs,
        in words, or empty.
    """
    if not folder.is_dir() or not {*os.listdir(folder)} - {LOCK}:
        return "new", {}, ""
    try:
        there = tomllib.loads((folder / "config.toml").read_text("utf-8"))
    except (OSError, ValueError):
        return "anew", {}, ""
    engine = table_of(there, "engine")
    chosen = {key: engine[key] for key in CHOSEN if key in engine}
    for key in chosen:
        if wanted["engine"][key] == "auto":
            there["engine"][key] = "auto"
    for table in {**wanted, **there}:
        mine, other = table_of(wanted, table), table_of(there, table)
        for key in {**mine, **other}:
            if (table, key) == ("run", "name"):  # As the file is called: no number's.
                continue
            if key not in other:
                return "done", chosen, f"it has no {table}.{key}"
            if key not in mine:
                return "done", chosen, f"it has {table}.{key}, which this one has not"
            if mine[key] != other[key]:
                values = (plain(other[key]), plain(mine[key]))
                return (
                    "done",
                    chosen,
                    f"its {table}.{key} is {values[0]}, not {values[1]}",
                )
    if is_complete(folder):
        return "done", chosen, ""
    return ("resume" if (folder / CHECKPOINT).is_file() else "anew"), chosen, ""


def is_complete(folder: Path) -> bool:
    """Tell whether a folder holds a run that came to its end."""
    try:
        return Run(folder).complete
    except DataError:
        return False


def runs_beside(folder: Path, names: Container[str]) -> list[tuple[str, str, int]]:
    """Return the runs of a comparison's folder but those that are named.

    Returns
    -------
    list of tuple
        What its folder is called, what that begins with, and the seed.
    """
    found = []
    for config in folder.glob("*-seed*/config.toml"):
        name = config.parent.name
        method, _, seed = name.rpartition("-seed")
        if name not in names and seed.isdecimal():
            found.append((name, method, int(seed)))
    return sorted(found, key=lambda run: (run[1], run[2]))


class LastData:
    """The data set that was loaded last: the next cell's is often the same."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._dataset: DataSet | None = None

    def of(self, configuration: Configuration) -> DataSet:
        """Return a configuration's data set."""
        data, key = configuration["data"], _key_of(configuration)
        if self._dataset is None or key != self._key:
            self._dataset = None  # Never two at a time.
            self._dataset = load(
                data["name"],
                data["path"] or None,
                configuration.seed("partition"),
                **configuration.options("data"),
            )
            self._key = key
        return self._dataset

    def digest(self, configuration: Configuration) -> str:
        """Return the digest of a configuration's data set, which files may tell."""
        return _of_files(configuration) or self.of(configuration).digest


def _key_of(configuration: Configuration) -> tuple[Any, ...]:
    """Return what tells a configuration's data set from others."""
    data, options = configuration["data"], configuration.options("data")
    function = DATA_SETS.resolve(data["name"])
    draws = "seed" in inspect.signature(function).parameters
    seed = configuration.seed("partition") if draws else None
    return data["name"], data["path"], repr(options), seed


def alike_data(configuration: Configuration) -> tuple[Any, ...]:
    """Return what is equal for data sets that have the same digest."""
    key = _key_of(configuration)
    return key[:-1] if _of_files(configuration) else key  # Whatever a seed draws.


def _of_files(configuration: Configuration) -> str:
    data, options = configuration["data"], configuration.options("data")
    return digest_of_files(data["name"], data["path"] or None, **options)


def run_cell(cell: Cell, dataset: DataSet) -> str:
    """Run a cell; return why it failed, in a line, or an empty text.

    Its own report is written by who wants to see it: it takes longer than a short run.
    """
    try:
        if cell.how == "resume":
            resume(cell.folder, report=False, progress=False)
        else:
            tables = tomllib.loads(cell.config)
            run_configured(
                Configuration(tables),
                cell.folder,
                cell.name,
                dataset=dataset,
                preface=cell.preface,
                report=False,
                progress=False,
                overwrite="unfinished" if cell.how == "anew" else False,
                tried=True,
            )
    except Exception as error:
        return _why(error, cell)
    return ""


def _why(error: Exception, cell: Cell) -> str:
    folder = Path(cell.folder)
    if not (isinstance(error, FedweightError) or (folder / ERRORS).is_file()):
        log.error("%s: %s", cell.name, in_full(error))  # It stands nowhere else.
    return why_it_stopped(error, folder)


def run_here(
    cells: Sequence[Cell],
    dataset: DataSet | None,
    last: LastData,
    tell: Callable[[Ended], None],
    done: int = 0,
) -> list[Ended]:
    """Run cells one after another; ``done`` were there already."""
    ended = []
    for number, cell in enumerate(cells, done + 1):
        began = time.perf_counter()
        why = _ran(cell, last) if dataset is None else run_cell(cell, dataset)
        seconds = time.perf_counter() - began
        ended.append(Ended(cell, number, done + len(cells), seconds, why))
        tell(ended[-1])
    return ended


def visible_cards() -> list[str]:
    """Return the GPUs that this process sees, as it may show them to another."""
    count = torch.cuda.device_count()
    told = os.environ.get(VISIBLE, "")
    names = [name.strip() for name in told.split(",") if name.strip()]
    return names[:count] if names else [str(number) for number in range(count)]


def run_side_by_side(
    cells: Sequence[Cell],
    workers: int,
    cores: int,
    tell: Callable[[Ended], None],
    done: int = 0,
    cards: Sequence[str] = (),
) -> list[Ended]:
    """Run cells in processes of their own, so many side by side on so many cores.

    The cores are shared evenly; the last cells, where fewer are left than processes,
    share them among these, which changes no bit. Each process sees one of the ``cards``
    only, in turn, if there are any: GPUs, as ``CUDA_VISIBLE_DEVICES`` names them.
    However it ends, no process is left.
    """
    waiting = deque(cells)
    ended: list[Ended] = []
    seen = [cards[k % len(cards)] if cards else None for k in range(workers)]
    processes = [_Process(card) for card in seen]
    over, lock = threading.Event(), threading.Lock()

    def work(process: _Process) -> None:
        while True:
            with lock:
                if over.is_set() or not waiting:
                    break
                last = len(cells) % workers
                sharing = last if len(waiting) <= last else workers
                cell = waiting.popleft()
            began = time.perf_counter()
            why = process.run(cell, max(1, cores // sharing))
            seconds = time.perf_counter() - began
            with lock:
                if over.is_set():  # It did not fail: it was asked to end.
                    break
                number = done + len(ended) + 1
                ended.append(Ended(cell, number, done + len(cells), seconds, why))
                tell(ended[-1])
        process.close()

    with ThreadPoolExecutor(workers, thread_name_prefix="fedweight-cells") as pool:
        try:
            for future in as_completed([pool.submit(work, p) for p in processes]):
                future.result()
        finally:
            over.set()
            # All at once: each may have a checkpoint to write.
            for process in processes:
                process.ask_to_end()
            until = time.monotonic() + PATIENCE
            for process in processes:
                process.end(until)
    return ended


class _Process:
    """A process that runs cells, one after another; it starts with the first."""

    def __init__(self, card: str | None = None) -> None:
        self.card = card
        self._child: subprocess.Popen[str] | None = None
        self._ended = False

    def run(self, cell: Cell, cores: int) -> str:
        """Have a cell run on so many cores; return why it failed, or an empty text."""
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        answer = ""
        with contextlib.suppress(OSError, ValueError):
            told = {"cell": asdict(cell), "cores": cores}
            child.stdin.write(json.dumps(told) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        if answer.endswith("\n"):
            return str(json.loads(answer))
        self.close()
        status = child.returncode
        self._child = None
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"

    def _start(self) -> subprocess.Popen[str]:
        here = dict.fromkeys(os.path.abspath(path) for path in sys.path)
        card = {} if self.card is None else {VISIBLE: self.card}
        child = self._child = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(here), **card},
            start_new_session=True,  # Who asks us to end does not ask it, too.
        )
        if self._ended:
            child.kill()
        return child

    def close(self) -> None:
        """Let the process end, which has nothing to do."""
        child = self._child
        if child is None:
            return
        for stream in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                if stream is not None:
                    stream.close()
        child.wait()

    def ask_to_end(self) -> None:
        """Tell the process to end, whatever it does; it may write what it has."""
        self._ended = True
        child = self._child
        if child is not None and child.poll() is None:
            child.terminate()

    def end(self, until: float) -> None:
        """Wait for the process to end; after a moment of ``time.monotonic`` kill it."""
        child = self._child
        if child is None:
            return
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


_CODE = "from fedweight.studies.cells import serve; serve()"


def serve() -> None:
    """Be a process that runs cells: a line in is a cell, a line out how it ended.

    When the other side is gone, this ends at once, as if killed: the next one goes on
    from the checkpoint.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # What models and strategies print is no answer.
    sys.stdout = sys.stderr
    handler = logging.StreamHandler()
    ours = logging.getLogger("fedweight")
    ours.addHandler(handler)
    ours.propagate = False
    cells: queue.SimpleQueue[str] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(cells, busy), daemon=True).start()
    last = LastData()
    with contextlib.suppress(KeyboardInterrupt), interruptible():
        while line := cells.get():
            told = json.loads(line)
            limit_cores(told["cores"])
            cell = Cell(**told["cell"])
            handler.setFormatter(logging.Formatter(f"{cell.name}: %(message)s"))
            why = _ran(cell, last)
            busy.clear()
            answers.write(json.dumps(why) + "\n")
            answers.flush()


def _ran(cell: Cell, last: LastData) -> str:
    try:
        dataset = last.of(Configuration(tomllib.loads(cell.config)))
    except Exception as error:
        return _why(error, cell)
    return run_cell(cell, dataset)


def _listen(cells: queue.SimpleQueue[str], busy: threading.Event) -> None:
    for line in sys.stdin:
        busy.set()
        cells.put(line)
    if busy.is_set():
        os._exit(1)
    cells.put("")
