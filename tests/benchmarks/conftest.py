"""Programs of the benchmarks, run as a user runs them, and code beside them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each program starts several processes that import PyTorch, which a machine whose disk
# is busy may take a minute for.
PATIENCE = 280


@pytest.fixture
def run():
    """Give a function that runs a program and returns what it wrote."""

    def run(program, *arguments, file):
        try:
            subprocess.run(
                [
                    sys.executable,
                    f"benchmarks/{program}.py",
                    *arguments,
                    f"--json={file}",
                ],
                cwd=ROOT,
                check=True,
                capture_output=True,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired as late:
            pytest.fail(f"{program} took too long, and had said: {late.stderr!r}")
        return json.loads(file.read_text())

    return run


@pytest.fixture(scope="module")
def in_benchmarks(interpreter):
    """Give a function that runs code beside the benchmarks; it returns the words."""
    imports = "numpy torch flwr.simulation fedweight.clients fedweight.simulations"
    process = interpreter(imports, ROOT / "benchmarks")

    def call(code):
        process.start(f"import sys; sys.path.insert(0, '')\n{code}")
        words = process.finish()
        assert "Traceback" not in words, words
        return words.split()

    return call
