"""A checkpoint that was read can be written again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedweight.server import checkpoint


def test_what_was_read_can_be_written_again(tmp_path: Path) -> None:
    content = {
        "empty": torch.empty(0),
        "nothing": np.empty((0, 3)),
        "scalar": torch.tensor(2.0),
        "model": {3: torch.arange(4.0)},
    }
    path = tmp_path / "checkpoint.safetensors"
    for _ in range(3):
        path.write_bytes(checkpoint.write(content))
        content = checkpoint.read(path)
    assert content["empty"].shape == (0,)
    assert content["nothing"].shape == (0, 3)
    assert content["scalar"].item() == 2.0
    assert content["model"][3].tolist() == [0, 1, 2, 3]
