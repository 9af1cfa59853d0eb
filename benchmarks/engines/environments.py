"""An environment of its own for every peer, made when it is first asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

from . import BENCHMARKS

ENVIRONMENTS = BENCHMARKS / ".environments"
TORCH = "torch==2.13.0"

ENGINES = ("floor", "local", "ray", "flwr", "pfl", "blazefl", "fedlab", "fluke")


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
    """

    requirement: str
    python: tuple[int, int] = (3, 11)


# The others run in the environment of fedweight, which has Flower and Ray.
PEERS = {
    "pfl": Peer("pfl==0.6.0"),
    "blazefl": Peer("blazefl==3.0.0", python=(3, 14)),
    "fedlab": Peer("fedlab==1.3.0"),
    "fluke": Peer("fluke-fl==0.8.1"),
}


def python_of(engine: str) -> str:
    """Return the Python that runs an engine, after installing the engine there.

    Raises
    ------
    NotInstalledError
        If that cannot be done.
    """
    peer = PEERS.get(engine)
    if peer is None:
        return sys.executable
    folder = ENVIRONMENTS / engine
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    done = folder / "installed.txt"
    if not (done.exists() and done.read_text() == peer.requirement):
        base = _base(peer)
        print(f"installing {peer.requirement} ...", file=sys.stderr, flush=True)
        _run([base, "-m", "venv", "--clear", str(folder)])
        # PyTorch first, alone and fixed: what a peer requires besides (torchvision)
        # would else exchange it for the newest, with gigabytes of CUDA libraries.
        fixed = folder / "constraints.txt"
        fixed.write_text(TORCH + "\n")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        for requirement in (TORCH, peer.requirement):
            _run([*pip, "-c", str(fixed), requirement])
        done.write_text(peer.requirement)
    return str(python)


def _base(peer: Peer) -> str:
    """Return an interpreter that is new enough."""
    if sys.version_info >= peer.python:
        return sys.executable
    major, minor = peer.python
    python = shutil.which(f"python{major}.{minor}")
    if python is not None:
        works = subprocess.run([python, "-c", ""], capture_output=True, check=False)
        if works.returncode == 0:
            return python
    raise NotInstalledError(
        f"{peer.requirement} needs Python {major}.{minor} or newer, which is not "
        f"installed here as python{major}.{minor}"
    )


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "ERROR" in line]
        errors = errors or result.stderr.splitlines() or ["no reason given"]
        raise NotInstalledError(f"installation failed: {errors[-1].strip()[:200]}")
