"""What every test relies on; read by pytest before any test module is."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

# Before anything imports flwr or ray: both read these once, at import.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

# Nor does torch, later. Tests run side by side on all cores: with threads of their own,
# which wait for each other in loops, small operations took up to eight times as long.
# A test whose matter is threads sets their number itself.
os.environ["OMP_NUM_THREADS"] = "1"

# hypothesis comes after: its import is harmless, the order only stays plain.
from hypothesis import settings

from fedweight.core.lazy import kept_imports

# Training is slow the first time, so no deadline. In CI the examples are the same
# each time: a failure there is the change's, not the draw's.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# Flower apps, which are run as a user runs them, and have no tests in them.
collect_ignore_glob = ["apps/*"]

_homes = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests' state out of the user's ~/.flwr and ~/.cache."""
    home = tempfile.mkdtemp(prefix="fedweight-tests-")
    config.stash[_homes] = home
    os.environ["FLWR_HOME"] = os.path.join(home, "flwr")
    os.environ["XDG_CACHE_HOME"] = os.path.join(home, "cache")
    # No test cuts the power: files need not have reached the disk.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    # A script's background job ignores Ctrl-C, and so would all that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector from what stays: modules, and thousands of tests.

    A look at these takes half a second, and there were dozens.
    """
    with kept_imports():
        return (yield)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[_homes], ignore_errors=True)


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA device"


def _no_ray() -> str | None:
    if find_spec("ray"):
        return None
    return "Ray is not installed: pip install 'fedweight[simulation]'"


def _no_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    if any(shutil.which(name) for name in names):
        return None
    return f"no browser: none of {', '.join(names)} is on the path"


# marker -> why a test that carries it cannot run here, or None where it can
_NEEDS = {"gpu": _no_gpu, "ray": _no_ray, "browser": _no_browser}


def _put_into_group(item: pytest.Item, name: str) -> None:
    """Have xdist run a test in the process that runs the others of a group.

    It looks for ``@name`` at the end of the test's id, which it writes there itself
    where there is a marker: but xdist 3.8 in a way that pytest 9.2 does not read.
    """
    own = getattr(item, "_id", None)
    if own is None:
        item.add_marker(pytest.mark.xdist_group(name))
    else:
        item._id = type(own).parse(f"{item.nodeid}@{name}")  # type: ignore[attr-defined]


def _shares_with_its_module(item: pytest.Item) -> bool:
    """Tell whether a test uses what its module prepares once for several."""
    fixtures, module = (getattr(item, n, None) for n in ("_fixtureinfo", "module"))
    if fixtures is None or module is None:  # It is no function.
        return False
    return any(
        one.scope == "module" and one.func.__module__ == module.__name__
        for several in fixtures.name2fixturedefs.values()
        for one in several
    )


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Skip, with the reason, what this machine cannot run.

    Where tests run side by side, those that start Ray, worker processes or Flower's run
    one after another: they share these, and each of them takes all cores. Tests that
    share what their module prepares run in one process: another would prepare it again.
    """
    for item in items if config.getoption("loadgroup", False) else ():
        if any(map(item.get_closest_marker, ("ray", "deploy", "processes"))):
            _put_into_group(item, "processes")
        elif _shares_with_its_module(item):
            _put_into_group(item, f"{item.path.parent.name}/{item.path.stem}")
    for marker, missing in _NEEDS.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and (reason := missing()):
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


class Interpreter:
    """Runs texts of Python, each in a fork of a process that has imported what is slow.

    Parameters
    ----------
    imports : str
        The modules.
    folder : Path
        Where it stands.
    """

    TEXT = """
import contextlib, os, sys
for name in sys.argv[1].split():
    with contextlib.suppress(ImportError):
        __import__(name)
while size := sys.stdin.buffer.readline():
    code = sys.stdin.buffer.read(int(size))
    if not os.fork():
        print(os.getpid(), flush=True)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        status = 0
        try:
            exec(compile(code, "code", "exec"), {"__name__": "__main__"})
        except BaseException:
            import traceback
            traceback.print_exc(file=sys.stdout)
            status = 1
        sys.stdout.flush()
        os._exit(status)
    print("\\0", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""

    def __init__(self, imports: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.TEXT, imports],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, code: str) -> int:
        """Begin with a text; return the number of its process."""
        stream = self._process.stdin
        stream.write(b"%d\n" % len(code.encode()) + code.encode())
        stream.flush()
        return int(self._process.stdout.readline())

    def line(self) -> str:
        """Wait for a line that a text prints."""
        return self._process.stdout.readline().decode()

    def finish(self) -> str:
        """Wait for the end of a text; return what it has printed, and keep its status.

        ``status`` is what a process ends with: below 0 if a signal ended it.
        """
        said = b""
        while not (b"\0" in said and said.endswith(b"\n")):
            part = self._process.stdout.read1()
            assert part, f"the interpreter ended: {said.decode()}"
            said += part
        printed, _, status = said.rpartition(b"\0")
        self.status = int(status)
        return printed.decode()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[[str, Path], Interpreter]]:
    """Give a function that starts an interpreter, which ends with the session."""
    started: list[Interpreter] = []

    def start(imports: str, folder: Path) -> Interpreter:
        started.append(Interpreter(imports, folder))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture(scope="session")
def ready_python(interpreter: Callable[[str, Path], Interpreter]) -> Interpreter:
    """One that has imported what a run needs.

    But not Ray, which takes what it is told by the environment when it is imported.
    """
    root = Path(__file__).parents[1]
    return interpreter("numba torch fedweight.studies.runner", root)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Any]:
    """One Ray for all tests in this process, started when the first one asks."""
    import ray

    # The tests hold a grid of one worker, one of two, and at times another worker or
    # another grid of two, as a run in this process has. A worker needs a core of these.
    # A small store, as /dev/shm is small in containers.
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=200_000_000,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def session_grids(ray_session: Any) -> Iterator[list[Any]]:
    from flwr.clientapp import ClientApp

    from fedweight.simulations.ray.grid import RayGrid

    grids = [RayGrid(ClientApp(), 1, workers=n) for n in (1, 2)]
    yield grids
    for grid in grids:
        grid.close()


@pytest.fixture
def ready_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs on Ray, in a test that is marked ``ray``, have workers that are there.

    They are those of the session's grids: a run begins with them as a grid does that
    another app is loaded into, and leaves them to the next one. To import PyTorch in
    each run's own takes longer than the run. A module that clients import must not have
    the name of one of another test.
    """
    if request.node.get_closest_marker("ray") is None:
        return
    crews = [grid._pool.crew for grid in request.getfixturevalue("session_grids")]

    from fedweight.simulations.ray.actors import Actors

    class Lent(Actors):
        def __init__(self, lender: Actors, options: dict[str, Any]) -> None:
            super().__init__(0, options)
            assert self._options == lender._options
            # The lists themselves: who has ended is replaced for the lender, too.
            self.handles, self.places = lender.handles, lender.places

        def kill(self) -> None:
            """Leave them be."""

    def crew_of(count: int, options: dict[str, Any]) -> Actors:
        for crew in crews:
            if len(crew.handles) == count:
                return Lent(crew, options)
        return Actors(count, options)

    monkeypatch.setattr("fedweight.simulations.ray.grid.Actors", crew_of)
