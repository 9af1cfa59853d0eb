"""What kernels do beside summing, which the tests of the updates hold them to."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from fedweight.core import kernels

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


def test_who_compiled_a_kernel_does_not_change_a_bit(tmp_path):
    code = (
        "import torch\n"
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
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    compiled, loaded = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for _ in range(2)
    )
    assert list(tmp_path.rglob("*.nbc"))
    assert compiled == loaded
