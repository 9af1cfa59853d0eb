"""Checkpoints as files."""

from __future__ import annotations

from pathlib import Path

import torch

from fedweight.server import checkpoint


def test_an_empty_tensor_of_any_strides_is_written(tmp_path: Path) -> None:
    """As an array of no values is that comes from another process."""
    state = {"buffers": torch.empty(0).as_strided((0,), (0,)), "w": torch.ones(2)}
    (tmp_path / "checkpoint").write_bytes(checkpoint.write(state))
    read = checkpoint.read(tmp_path / "checkpoint")
    assert read["buffers"].shape == (0,)
    assert read["w"].tolist() == [1, 1]
