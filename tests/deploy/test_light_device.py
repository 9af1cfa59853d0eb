"""A SuperNode in an environment of its own, without any extra of fedweight."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedweight
from fedweight.core.extras import EXTRAS

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package alone; return the folder of its programs."""
    place = tmp_path_factory.mktemp("device")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    torch = f"torch=={version('torch').partition('+')[0]}"  # as the Makefile does
    for package in (torch, str(ROOT)):
        subprocess.run([*pip, package], check=True, timeout=600)
    return place / "bin"


def write_site(path: Path, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = rng.normal(size=(n, 2)) + 3 * np.eye(3)[y, :2]
    np.savez(path, x=x.astype(np.float32), y=y)


def test_a_node_trains_without_any_extra(
    device: Path, flower: Any, ports: Callable[[int], list[int]]
) -> None:
    packages = sorted({name for extra in EXTRAS.values() for name in extra})
    code = (
        "from fedweight.core.extras import is_installed\n"
        f"print([p for p in {packages} if is_installed(p)])"
    )
    done = subprocess.run(
        [str(device / "python"), "-I", "-c", code], capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr

    link, node = ports(2)
    address = f"127.0.0.1:{link}"
    (flower.home / "config.toml").write_text(
        f'[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    flower.start("flower-superlink", "--insecure", "--port", str(link))
    site, test = flower.folder / "site.npz", flower.folder / "test.npz"
    write_site(site, 60, 0)
    write_site(test, 90, 1)
    flower.start(
        *("flower-supernode", "--insecure", "--superlink", address),
        *("--port", str(node), "--node-config", f"data-path='{site}'"),
        programs=device,
    )
    out = flower.folder / "flower"
    flower.wait_for(address)
    run = flower.run(
        "-c",
        f"num-classes=3 data.name='npz' data.path='{test}' model.name='softmax' "
        f"run.rounds=2 out='{out}'",
        connection="here",
    )
    assert run["status"] == "finished:completed", run["log"]
    clients = fedweight.Run(out).clients
    assert clients["status"].tolist() == ["ok", "ok"], clients["reason"].tolist()
    assert clients["examples"].tolist() == [48, 48]
