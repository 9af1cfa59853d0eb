"""All that is to be known of a GPU, by one command in a few minutes.

    python benchmarks/gpu.py --json benchmarks/results/gpu-DATE.json
    python benchmarks/gpu.py --device cpu --small --json rows.json    # to try it

Each row is measured by a process of its own and written as soon as it is there, the
most important first. See README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from engines import BENCHMARKS, environments, results
from engines.cases import Case, all_cases, small
from engines.page import section
from engines.processes import EngineFailedError, EngineProcess
from engines.turns import TOLERANCE, Turn, difference
from engines.work import Work

ROOT = BENCHMARKS.parent

COLUMNS = (
    "row",
    "updates_per_second",
    "seconds",
    "difference",
    "card_mb",
    "host_us",
    "launches_per_step",
    "plan",
    "note",
)

# Rows whose notes begin so are measured again where the file is gone on with; the later
# in this order say more.
AGAIN = ("not measured", "failed")

# A longer round may have millions of launches, which take long to count.
PROFILED = 0.3

# A row is not begun where less than so many seconds are left.
LEAST = 5.0

# Between these lines of the README stands what was measured.
BEGIN, END = "<!-- by benchmarks/gpu.py -->", "<!-- end of gpu.py -->"


class Memory:
    """The card's memory while something runs on it, by ``nvidia-smi``; Linux only."""

    def __init__(self, device: str) -> None:
        self._process: subprocess.Popen[str] | None = None
        number = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
        if device != "cpu":
            with contextlib.suppress(OSError):
                self._process = subprocess.Popen(
                    f"nvidia-smi -i {number} -lms 200 --query-gpu=memory.used "
                    "--format=csv,noheader,nounits".split(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )

    def end(self) -> float | None:
        """Return by how many MB the most was above the first; None if unknown."""
        if self._process is None:
            return None
        self._process.terminate()
        lines, _ = self._process.communicate()
        # The last line may be cut off.
        seen = [float(n) for n in lines.split("\n")[:-1] if n.strip().isdigit()]
        return (max(seen) - seen[0]) * 2**20 / 1e6 if seen else None


class Measuring:
    """Measures cases one after another; the next one's process imports meanwhile.

    Parameters
    ----------
    device : {"cuda", "cpu"}
        Where clients train.
    content : dict
        What the file holds; rows are added, and the card's speeds.
    file : Path
        Is written whole after every row. What failed is told at length in a file of the
        same name that ends in ``.log``.
    seconds : float
        How long a speed is measured.
    small : bool
        Whether the quick start has one round instead of ten.
    folder : Path
        For the works' files.
    """

    def __init__(
        self,
        device: str,
        content: dict[str, Any],
        file: Path,
        seconds: float,
        small: bool,
        folder: Path,
    ) -> None:
        self.device, self.content, self.file = device, content, file
        self.seconds, self.small, self.folder = seconds, small, folder
        self._written: dict[str, Path] = {}

    def measure(self, cases: Sequence[Case], minutes: float) -> None:
        """Measure what there is time for, in this order; say what is left out."""
        end = time.perf_counter() + 60 * minutes
        waiting: EngineProcess | str | None = None
        for case, following in zip(cases, [*cases[1:], None], strict=True):
            process, waiting = waiting, None
            left = end - time.perf_counter()
            row = case.row()
            if left < LEAST:
                row["note"] = f"not measured: {minutes:g} minutes were over"
                if isinstance(process, EngineProcess):
                    process.close()
            elif case.kind == "tests":
                self._test(row, min(left, case.limit))
            elif case.kind == "plans":
                self._plan(case, row, min(left, case.limit))
            else:
                process = process or self._start(case)
                # The quick start counts from its first moment on: nothing beside it.
                if case.kind != "quick start" and following and following.is_engine:
                    waiting = self._start(following)
                if isinstance(process, str):
                    row["note"] = process
                else:
                    deadline = min(end, time.perf_counter() + case.limit)
                    self._take(case, row, process, deadline)
            self._keep(row)

    def _start(self, case: Case) -> EngineProcess | str:
        """Start a case's process, which waits once it has imported; or say why not."""
        device = self.device if case.device == "card" else case.device
        place = Path(tempfile.mkdtemp(dir=self.folder))
        # Of its own, so that what an earlier row measured is not known.
        cache = {"XDG_CACHE_HOME": str(place)}
        if case.kind == "card":
            return EngineProcess(sys.executable, "card", place, device)
        of_trainer = (case.work[:1], case.work[1:], device)
        if case.kind == "trainer" and not case.engine:
            return EngineProcess(sys.executable, "trainer", place, *of_trainer)
        if case.kind == "quick start":
            told = (case.work, "1" if self.small else "10", device, case.plan)
            return EngineProcess(
                *(sys.executable, "quickstart", place, *told), environment=cache
            )
        try:
            # As on a card, also where this is tried on a CPU: nothing is installed.
            python = environments.python_of(case.engine, "cuda")
        except environments.NotInstalledError as error:
            return str(error)
        if case.kind == "trainer":
            told = (*of_trainer, case.plan)
            return EngineProcess(python, case.engine, place, *told)
        if case.work not in self._written:
            self._written[case.work] = Path(tempfile.mkdtemp(dir=self.folder))
            try:
                Work.parse(case.work).write(self._written[case.work])
            except subprocess.CalledProcessError:
                return "failed: the work could not be written"
        for name in ("x.npy", "y.npy", "orders.npy", "start.pt"):
            (place / name).symlink_to(self._written[case.work] / name)
        Work.parse(case.work).tell(
            place, case.workers or os.cpu_count() or 1, case.plan, device, case.strategy
        )
        return EngineProcess(python, case.engine, place, environment=cache)

    def _take(
        self, case: Case, row: results.Row, process: EngineProcess, deadline: float
    ) -> None:
        """Fill a row as far as the process comes."""
        turn, facts = Turn(), {}
        file = self.folder / f"{case.name}.npy"
        memory = Memory(self.device)
        process.deadline = deadline
        process.started = time.perf_counter()
        try:
            with process:
                try:
                    if case.kind == "card":
                        process.run(1)
                    elif case.kind == "quick start":
                        row["seconds"] = process.run(1)
                        row["version"] = process.version
                        process.weights(file)
                    else:
                        turn.take(process, file, self.seconds)
                        facts = process.facts()
                        if case.kind == "trainer" or (
                            case.engine == "local" and turn.round < PROFILED
                        ):
                            process.profile()
                    facts = process.facts()
                except EngineFailedError:
                    self._log(case.name, process.errors())
                    raise
        except EngineFailedError as error:
            row["note"] = f"failed: {error}"
        finally:
            row["card_mb"] = memory.end()
        if case.kind == "card" and row["note"]:
            sys.exit(row["note"].removeprefix("failed: "))  # And nothing is measured.
        if case.kind == "card":
            before = self.content.get("device", facts["device"])
            if before != facts["device"]:
                sys.exit(f"{self.file} is of {before}, and this is {facts['device']}.")
            self.content |= facts
        elif case.kind != "quick start":
            row |= self._speeds(case, turn, facts)
        row |= {n: facts[n] for n in ("plan", "chunk", "difference") if n in facts}
        told = int(case.work[1:]) if case.kind == "trainer" else 0
        if facts.get("chunk", told) < told and not row["note"]:
            row["note"] = f"{facts['chunk']} at once: {told} were too many"

    def _speeds(
        self, case: Case, turn: Turn, facts: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return what a turn says, as far as it came."""
        if math.isnan(turn.startup):
            return {}
        found: dict[str, Any] = {"version": turn.version, "startup_s": turn.startup}
        if math.isnan(turn.round) or (case.kind == "trainer" and not facts):
            return found
        updates = facts.get("chunk") or Work.parse(case.work).cohort
        found |= {"round_s": turn.round, "updates_per_second": updates / turn.round}
        if facts.get("launches"):
            found["launches"] = facts["launches"]
            found["card_us"] = 1e6 * facts["busy_s"] / updates
            found["host_us"] = 1e6 * (turn.round - facts["busy_s"]) / updates
            if "steps" in facts:
                found["launches_per_step"] = facts["launches"] / facts["steps"]
        if case.kind == "trainer":
            found |= over_bounds(self.content.get("card") or {}, turn.round, facts)
        return found

    def _test(self, row: results.Row, seconds: float) -> None:
        """Run the tests that need a card for so long, and count."""
        files = [
            str(file)
            for file in sorted(ROOT.glob("tests/**/test_*.py"))
            if "mark.gpu" in file.read_text("utf-8")
        ]
        command = ["-m", "pytest", "-m", "gpu", "-v", "--tb=short"]
        command += ["-p", "no:cacheprovider", *files]
        row |= counts_of(self._program(row, command, seconds))

    def _plan(self, case: Case, row: results.Row, seconds: float) -> None:
        """Hold the plan that auto chooses against plans by hand, for so long."""
        file = self.folder / f"{case.name}.json"
        name, cohort = {"G": "char-gru"}.get(case.work[0], case.work[0]), case.work[1:]
        command = [str(BENCHMARKS / "plans.py"), f"--json={file}", "--turns=1"]
        command += [f"--works={name}", f"--cohorts={cohort}", "--devices", "cpu"]
        command += [] if self.device == "cpu" else [self.device]
        self._program(row, [*command, f"--seconds={self.seconds / 2}"], seconds)
        if file.is_file():
            row["plans"] = json.loads(file.read_text("utf-8"))
            for plan in row["plans"]:
                if plan["chosen"]:
                    row["plan"] = f"{plan['plan']} on {plan['device']}"
                    row["ratio_to_best"] = plan["ratio_to_best"]

    def _program(
        self, row: results.Row, arguments: Sequence[str], seconds: float
    ) -> str:
        """Run a Python program for so long; return its words, and note a failure."""
        # Into a file: what a program leaves running would keep a pipe open.
        with (
            tempfile.TemporaryFile() as said,
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                row["note"] = f"failed: not done within {seconds:.0f} s"
            process.wait()
            said.seek(0)
            words = said.read().decode(errors="replace")
        if not row["note"] and process.returncode not in (0, 5):  # 5: no such test.
            last = words.strip().split("\n")[-1].strip("= ")
            row["note"] = f"failed: {last or process.returncode}"
        if row["note"]:
            self._log(row["row"], words)
        return words

    def _log(self, name: str, words: str) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.with_suffix(".log").open("a", encoding="utf-8") as log:
            log.write(f"---- {name}\n{words[-20_000:]}\n")

    def _keep(self, row: results.Row) -> None:
        """Add a row, or put it in the place of one that says less; write and say it."""
        row["date"] = results.today()
        rows = {other["row"]: other for other in self.content["rows"]}
        before = rows.pop(row["row"], None)
        best = row if before is None or worth(before) <= worth(row) else before
        self.content["rows"] = [*rows.values(), best]
        self._compare()
        about = {name: own for name, own in self.content.items() if name != "rows"}
        results.write_study(self.content["rows"], self.file, **about)
        told = (*COLUMNS[1:], "ratio_to_best", "passed", "failed", "skipped", "error")
        said = [f"{name} {results.text(row[name])}" for name in told if row.get(name)]
        if not row["note"].startswith("not measured"):
            print(f"{row['row']}: {', '.join(said)}", file=sys.stderr, flush=True)

    def _compare(self) -> None:
        """Say how far each row's weights are from the plain loop's of the same work."""
        for row in self.content["rows"]:
            file = self.folder / f"{row['row']}.npy"
            base = reference(row, self.content["rows"])
            if base is None or not file.exists():
                continue
            other = self.folder / f"{base}.npy"
            if other.exists():
                row["difference"] = difference(np.load(file), np.load(other))
                if row["kind"] == "rounds":  # Ten rounds may part by more.
                    row["agrees"] = row["difference"] <= TOLERANCE


def worth(row: results.Row) -> int:
    """Return how much a row says: nothing, why it failed, or what was measured."""
    noted = [k for k, words in enumerate(AGAIN) if row["note"].startswith(words)]
    return noted[0] if noted else len(AGAIN)


def reference(row: results.Row, rows: Sequence[results.Row]) -> str | None:
    """Return the row whose weights a row's should be, if there is one."""
    alike = ("kind", "work", "strategy")
    for other in rows if row["kind"] in ("rounds", "quick start") else ():
        if other is row or any(other.get(n) != row.get(n) for n in alike):
            continue
        plain = other["engine"] == "floor"
        if other["kind"] == "quick start" or other["strategy"] != "fedavg":
            plain = other["device"] == "cpu"
        if plain:
            return str(other["row"])
    return None


def over_bounds(
    card: Mapping[str, float], seconds: float, counts: Mapping[str, float]
) -> dict[str, float]:
    """Return a time in times of what each count would take the card by itself.

    The smallest of the three names what bounds it. What is not known is left out.
    """
    names = {"launches": "launches", "memory": "bytes", "arithmetic": "operations"}
    return {
        f"over_{name}": seconds * card[of] / counts[of]
        for name, of in names.items()
        if card.get(of) and counts.get(of)
    }


def counts_of(words: str) -> dict[str, Any]:
    """Return how many tests passed, failed and so on, of what ``pytest -v`` said."""
    said = re.findall(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", words, re.M)
    counts = Counter(how.lower() for _, how in said)
    which = sorted({test for test, how in said if how in ("FAILED", "ERROR")})
    return {**counts, "which_failed": which} if which else dict(counts)


def write_readme(content: Mapping[str, Any], file: Path) -> None:
    """Put what was measured into the README, between its two marks."""
    before, rest = file.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    text = "\n".join([before + BEGIN, "", *section(content), "", END + after])
    file.write_text(text, "utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        default=results.RESULTS / f"gpu-{results.today()}.json",
        help="the rows' file (default: results/gpu-DATE.json); what it has is not "
        "measured again, but for what failed",
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="then the rest is left out"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help="rows with one of these in their names, such as trainer or 'rounds, S100'",
    )
    parser.add_argument("--list", action="store_true", help="the rows, and do nothing")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--small", action="store_true", help="with so little work that it can be tried"
    )
    parser.add_argument("--seconds", type=float, help="of each speed (default: 1)")
    parser.add_argument(
        "--readme", action="store_true", help="measure nothing: write the README's part"
    )
    given = parser.parse_args(arguments)
    content: dict[str, Any] = {"rows": []}
    if given.json.is_file():
        content = json.loads(given.json.read_text("utf-8"))
    if given.readme:
        write_readme(content, ROOT / "README.md")
        return
    cases = [small(case) if given.small else case for case in all_cases()]
    card, *others = cases
    if given.only:
        others = [c for c in others if any(word in c.name for word in given.only)]
    done = {row["row"] for row in content["rows"] if not row["note"].startswith(AGAIN)}
    left = [case for case in others if case.name not in done]
    # Their weights are compared with those of rows that may have been measured before.
    compared = {reference(case.row(), content["rows"]) for case in left}
    others = [case for case in others if case in left or case.name in compared]
    if given.list:
        print(*(case.name for case in others), sep="\n")
        return
    seconds = given.seconds or (0.05 if given.small else 1.0)
    with tempfile.TemporaryDirectory(prefix="fedweight-benchmark-") as name:
        measuring = Measuring(
            *(given.device, content, given.json, seconds, given.small, Path(name))
        )
        measuring.measure([card, *others], given.minutes)
    results.show(content["rows"], COLUMNS)
    print(f"written to {given.json}")


if __name__ == "__main__":
    main()
