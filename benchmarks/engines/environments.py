"""An environment of its own for every peer, made when it is first asked for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from . import BENCHMARKS

ENVIRONMENTS = BENCHMARKS / ".environments"
TORCH = "torch==2.13.0"
# A constraint, not a requirement: the torchvision that goes with this PyTorch. The
# newest, which peers ask for, would exchange PyTorch for a build with CUDA, gigabytes.
FIXED = (TORCH, "torchvision==0.28.0")

ENGINES = ("floor", "local", "ray", "flwr", "jax", "pfl", "blazefl", "fedlab", "fluke")

# These can use a GPU. There peers run beside fedweight, with its PyTorch, where they
# are installed already.
USE_A_GPU = ("floor", "local", "ray", "flwr", "jax", "pfl", "triton")


class NotInstalledError(Exception):
    """A peer's environment could not be made; the message says why."""


@dataclass(frozen=True)
class Peer:
    """What a peer needs.

    Attributes
    ----------
    requirement : str
        Its package, at one version.
    python : tuple of int
        The Python that it needs, at least.
    newest : tuple of int
        The newest Python that it is known to run with.
    """

    requirement: str
    python: tuple[int, int] = (3, 11)
    newest: tuple[int, int] = (3, 14)

    def accepts(self, version: tuple[int, int]) -> bool:
        """Whether it runs with a Python."""
        return self.python <= version <= self.newest


# The others run in the environment of fedweight, which has Flower and Ray.
PEERS = {
    "jax": Peer("jax==0.10.2"),
    "pfl": Peer("pfl==0.6.0", newest=(3, 12)),
    "triton": Peer("triton==3.9.0"),  # Comes with a PyTorch for CUDA.
    "blazefl": Peer("blazefl[contrib,reproducibility]==3.0.0", python=(3, 14)),
    "fedlab": Peer("fedlab==1.3.0"),
    "fluke": Peer("fluke-fl==0.8.1"),
}


def python_of(engine: str, device: str = "cpu") -> str:
    """Return the Python that runs an engine, after installing the engine there.

    Raises
    ------
    NotInstalledError
        If that cannot be done, or the engine cannot use the device.
    """
    peer = PEERS.get(engine)
    if device != "cpu" and engine not in USE_A_GPU:
        raise NotInstalledError("measured on CPUs only")
    if device != "cpu" and peer and importlib.util.find_spec(engine) is None:
        raise NotInstalledError(f"no {engine} here: pip install {peer.requirement}")
    if device != "cpu" or peer is None:
        return sys.executable
    folder = ENVIRONMENTS / engine
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = "\n".join((*FIXED, peer.requirement, ""))
    done = folder / "installed.txt"
    if not (python.exists() and done.exists() and done.read_text() == wanted):
        _install(peer, _base(peer), folder, python)
        done.write_text(wanted)
    return str(python)


def _install(peer: Peer, base: str, folder: Path, python: Path) -> None:
    """Make an environment anew; PyTorch first and alone, then the peer beside it."""
    print(f"installing {peer.requirement} ...", file=sys.stderr, flush=True)
    _run([base, "-m", "venv", "--clear", str(folder)])
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join((*FIXED, "")))
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    for requirement in (TORCH, peer.requirement):
        _run([*pip, "-c", str(constraints), requirement])


def _base(peer: Peer) -> str:
    """Return an interpreter that the peer accepts, this one if it does."""
    if peer.accepts(sys.version_info[:2]):
        return sys.executable
    (major, oldest), (_, newest) = peer.python, peer.newest
    names = [f"python{major}.{minor}" for minor in range(oldest, newest + 1)]
    for name in names:
        python = shutil.which(name)
        if python is None:
            continue
        # One that is found may still be a shim without an interpreter behind it.
        works = subprocess.run([python, "-c", ""], capture_output=True, check=False)
        if works.returncode == 0:
            return python
    raise NotInstalledError(
        f"{peer.requirement} needs {' or '.join(names)}, not found on the path"
    )


def _run(command: list[str]) -> None:
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        said = [line.strip() for line in result.stdout.splitlines() if line.strip()]
        errors = [line for line in said if "ERROR" in line] or said
        reason = errors[-1][:200] if errors else "no reason given"
        raise NotInstalledError(f"installation failed: {reason}")
