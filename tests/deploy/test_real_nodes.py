"""A SuperLink and two SuperNodes, each with a file of its own, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedweight

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(240)]


def write_site(path: Path, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    x = (rng.normal(size=(n, 2)) + 3 * np.eye(3)[y, :2]).astype(np.float32)
    if path.suffix == ".npz":
        np.savez(path, x=x, y=y)
    else:
        lines = [f"{a},{b},{c}" for (a, b), c in zip(x, y, strict=True)]
        path.write_text("\n".join(["left,right,class", *lines]))


def test_nodes_train_on_their_own_files(
    flower: Any, ports: Callable[[int], list[int]]
) -> None:
    link, *nodes = ports(3)
    address = f"127.0.0.1:{link}"
    (flower.home / "config.toml").write_text(
        f'[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    flower.start("flower-superlink", "--insecure", "--port", str(link))
    sites = [flower.folder / "site-a.csv", flower.folder / "site-b.npz"]
    for seed, (path, n, port) in enumerate(zip(sites, (60, 40), nodes, strict=True)):
        write_site(path, n, seed)
        flower.start(
            *("flower-supernode", "--insecure", "--superlink", address),
            *("--port", str(port), "--node-config", f"data-path='{path}'"),
        )
    test, out = flower.folder / "test.csv", flower.folder / "flower"
    write_site(test, 90, 2)
    flower.wait_for(address)

    run = flower.run(
        "-c",
        f"num-classes=3 data.name='csv' data.path='{test}' model.name='softmax' "
        f"run.rounds=1 out='{out}' settings='strategy.min-available-nodes=2'",
        connection="here",
    )
    assert run["status"] == "finished:completed", run["log"]

    result = fedweight.Run(out)
    clients = result.clients.sort_values("examples")
    assert clients["status"].tolist() == ["ok", "ok"], clients["reason"].tolist()
    assert clients["examples"].tolist() == [32, 48]
    assert clients["held_out_examples"].tolist() == [8, 12]
    rows = (out / "clients.csv").read_text().splitlines()[1:]
    assert all(int(row.split(",")[1]) > 2**32 for row in rows)  # node ids
    np.testing.assert_allclose(clients["weight"], [0.4, 0.6])
    assert result.summary()["test_accuracy"] > 0.6
