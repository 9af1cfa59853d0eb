"""Runs' folders, made up: what a run writes, without running anything."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedweight.studies.folder import CHECKPOINT

ROUND_COLUMNS = (
    "round status reason asked ok rejected failed missing dropped effective_clients "
    "train_loss train_accuracy evaluate_loss evaluate_accuracy test_loss "
    "test_accuracy client_accuracy_mean client_accuracy_std client_accuracy_worst10 "
    "client_accuracy_best10 bytes_down bytes_up gamma"
)
CLIENT_COLUMNS = (
    "round client status reason weight examples steps train_loss train_accuracy "
    "held_out_examples loss accuracy bytes_down bytes_up discrepancy"
)

MakeRun = Callable[..., Path]


@pytest.fixture
def killed(ready_python: Any) -> Callable[..., None]:
    """Give a function that runs something until some time after its first checkpoint.

    Then the process is killed. ``first`` is what it does before.
    """

    def run(
        folder: Path, settings: dict[str, Any], seconds: float, first: str = ""
    ) -> None:
        process = ready_python.start(
            "import os, random, numpy as np\n"
            "from fedweight import run\n"
            f"os.chdir({os.getcwd()!r})\n"
            f"os.environ.update({dict(os.environ)!r})\n"
            f"{first}\n"
            "random.seed(5)\n"
            "np.random.seed(5)\n"
            f"run(settings={settings!r}, out={str(folder)!r}, report=False)\n"
        )
        try:
            deadline = time.monotonic() + 300
            while not (folder / CHECKPOINT).exists() and time.monotonic() < deadline:
                time.sleep(0.005)
            time.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            said = ready_python.finish()
        assert "Traceback" not in said, said

    return run


def write_csv(path: Path, columns: str, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns.split(), restval="")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a run's folder.

    Client 0 answers round 2 with an error, round 3 fails where there is one. The
    weights are shares of data: client k holds 10 (k + 1) examples.
    """

    def make(
        name: str = "made-up",
        clients: int = 4,
        rounds: int = 3,
        asked: int | None = None,
        classes: int = 3,
        weights: bool = True,
        evaluated: bool = True,
        model: bool = True,
        reason: str = "RuntimeError: <script>alert(1)</script>",
        class_names: list[str] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.toml").write_text(
            f'[run]\nname = "{name}"\nrounds = {asked or rounds}\nseed = 7\n'
            '[data]\nname = "digits"\n[strategy]\nname = "feddisco"\n'
            'note = "<b>&"\nnested = { deep = [1, 2] }\n'
        )
        names = class_names or [f"class {index}" for index in range(classes)]
        (folder / "environment.json").write_text(
            json.dumps(
                {"versions": {"torch": "2"}, "data": {"class_names": names}, "n": 1}
            )
        )
        sizes = [10 * (client + 1) for client in range(clients)]
        label_columns = [f"label_{label}" for label in range(classes)]
        write_csv(
            folder / "partition.csv",
            " ".join(["client", "train_examples", "held_out_examples", *label_columns]),
            [
                {
                    "client": client,
                    "train_examples": size,
                    "held_out_examples": 5,
                    f"label_{client % classes}": size - 5,
                    f"label_{(client + 1) % classes}": 5,
                }
                | {
                    column: 0
                    for column in label_columns
                    if column
                    not in (
                        f"label_{client % classes}",
                        f"label_{(client + 1) % classes}",
                    )
                }
                for client, size in enumerate(sizes)
            ],
        )
        round_rows: list[dict[str, Any]] = []
        client_rows: list[dict[str, Any]] = []
        for number in range(rounds + 1):
            failed_round = number == 3
            good = [] if number == 0 else list(range(clients))
            bad = [0] if number == 2 else []
            good = [client for client in good if client not in bad]
            total = sum(sizes[client] for client in good)
            accuracies = [
                min(0.1 * (number + 1) + 0.02 * client, 1.0)
                for client in range(clients)
            ]
            for client in range(clients):
                row: dict[str, Any] = {
                    "round": number,
                    "client": client,
                    "status": "evaluated",
                    "bytes_down": 100,
                    "bytes_up": 0,
                }
                if evaluated:
                    row |= {"held_out_examples": 5, "loss": 1.5}
                    row["accuracy"] = accuracies[client]
                if client in bad:
                    row |= {"status": "failed", "reason": reason}
                elif client in good:
                    row |= {"status": "ok", "examples": sizes[client], "steps": 3}
                    row |= {"bytes_up": 100, "discrepancy": 0.1 * client}
                    if weights and not failed_round:
                        row["weight"] = sizes[client] / total
                client_rows.append(row)
            round_row: dict[str, Any] = {
                "round": number,
                "status": "failed" if failed_round else "ok",
                "reason": "too few replies" if failed_round else "",
                "asked": clients if number else 0,
                "ok": len(good),
                "rejected": 0,
                "failed": len(bad),
                "missing": 0,
                "dropped": 0,
                "test_loss": 2.0 / (number + 1),
                "test_accuracy": [0.1, 0.5, 0.8, 0.7][min(number, 3)],
                "bytes_down": 100 * clients,
                "bytes_up": 100 * len(good),
            }
            if number:
                round_row |= {"effective_clients": 3.3, "gamma": 1 / number}
            if evaluated:
                round_row |= {
                    "client_accuracy_mean": np.mean(accuracies),
                    "client_accuracy_std": np.std(accuracies),
                    "client_accuracy_worst10": min(accuracies),
                    "client_accuracy_best10": max(accuracies),
                    "evaluate_accuracy": np.mean(accuracies),
                }
            round_rows.append(round_row)
        write_csv(folder / "rounds.csv", ROUND_COLUMNS, round_rows)
        write_csv(folder / "clients.csv", CLIENT_COLUMNS, client_rows)
        write_csv(
            folder / "timings.csv",
            "round seconds elapsed",
            [{"round": n, "seconds": 0.5, "elapsed": n} for n in range(rounds + 1)],
        )
        if model:
            save_file({"bias": torch.arange(3.0)}, folder / "model.safetensors")
        return folder

    return make
