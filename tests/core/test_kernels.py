"""What kernels do beside summing, which the tests of the updates hold them to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedweight.core import kernels, plain_kernels, rows
from fedweight.core.updates import StackedUpdates

CODE = """
import sys
import numpy as np
{before}
sys.path.insert(0, {folder!r})
import kernels
rows = [np.full(3, float(k)) for k in range(5)]
total, addresses = np.empty(3), np.array([r.ctypes.data for r in rows], np.uint64)
kernels.combine(total, (addresses, np.array([0, 5]), rows[0], 32), 0, np.ones(5))
print(total.tolist(), sum(kernels.combine.stats.cache_hits.values()))
"""


def start(folder, before=""):
    """Start a process that sums with a copy of the kernels in a folder."""
    shutil.copy2(kernels.__file__, folder)
    code = CODE.format(folder=str(folder), before=before)
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def files(folder):
    return [*Path(folder).rglob("*.nbc")]


def said(process):
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return out.strip()


def test_what_one_process_compiled_the_next_one_loads(tmp_path):
    both = [start(tmp_path) for _ in range(2)]  # At once, as Ray's workers do.
    assert [said(process)[:18] for process in both] == ["[10.0, 10.0, 10.0]"] * 2
    assert list(Path(tmp_path).rglob("*.nbc"))
    assert said(start(tmp_path)) == "[10.0, 10.0, 10.0] 1"


def test_without_a_folder_for_the_cache_kernels_are_compiled_anew(tmp_path):
    nowhere = "import numba.core.caching as c; c.CacheImpl._locator_classes = []"
    assert said(start(tmp_path, nowhere)) == "[10.0, 10.0, 10.0] 0"
    assert not list(Path(tmp_path).rglob("*.nbc"))


def test_who_compiled_a_kernel_does_not_change_a_bit(tmp_path, ready_python):
    code = (
        "import numba, torch\n"
        f"numba.config.CACHE_DIR = {str(tmp_path)!r}\n"
        "from fedweight.core.updates import StackedUpdates\n"
        "stream = torch.Generator().manual_seed(0)\n"
        "rows = torch.randn(10, 5003, generator=stream).unbind()\n"
        "origin, point = torch.randn(2, 5003, generator=stream).unbind()\n"
        "updates = StackedUpdates(rows, origin)\n"
        "for order in (1, 2):\n"
        "    print(updates.distances(point, order=order).tolist())\n"
        "own = torch.linspace(0, 2, 10)\n"
        "print(updates.dot(point).tolist())\n"
        "print([x.tolist() for x in updates.dot_rest(point, own=own)])\n"
        "print(updates.distances(weights=torch.linspace(0, 1, 10)).tolist())\n"
        "print(updates.combine(torch.linspace(0, 1, 10)).tolist())\n"
    )
    found = []
    for _ in range(2):
        ready_python.start(code)
        found.append(ready_python.finish())
        # The second process loads what the first has compiled, and writes nothing.
        found.append(sorted((p.name, p.stat().st_mtime_ns) for p in files(tmp_path)))
    compiled, written, loaded, there = found
    assert "Traceback" not in compiled
    assert written == there != []
    assert compiled == loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_without_numba_there_is_the_same_to_rounding(k, dtype, monkeypatch, caplog):
    stream = torch.Generator().manual_seed(k)
    # Of one sign: what is added up is not small beside what it is made of.
    models = torch.rand(k, 9001, generator=stream).to(dtype) + 1
    origin, vector = torch.rand(2, 9001, generator=stream).to(dtype)
    weights = torch.rand(k, generator=stream).double()

    def everything():
        updates = StackedUpdates(models.unbind(), origin)
        return {
            "combine": updates.combine(weights),
            "dot": updates.dot(vector),
            "dot with a sum": updates.dot(weights=weights),
            "rest": torch.stack(list(updates.dot_rest(vector, own=weights))),
            "l1": updates.distances(vector, order=1),
            "l2": updates.distances(weights=weights),
            "norms": updates.norms(),
        }

    rows.kernels.cache_clear()
    assert rows.kernels() is kernels
    compiled = everything()
    rows.kernels.cache_clear()
    monkeypatch.setattr(rows, "is_installed", lambda package: False)
    try:
        assert rows.kernels() is plain_kernels
        plain = everything()
    finally:
        rows.kernels.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "Numba is not installed: sums over clients take longer, and differ in their "
        "last bits from those with it. Install fedweight[server]."
    ]
    rtol = 5e-6 if dtype == torch.float32 else 1e-14
    for name, values in compiled.items():
        torch.testing.assert_close(plain[name], values, rtol=rtol, atol=0, msg=name)
