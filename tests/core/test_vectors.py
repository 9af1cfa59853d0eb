import torch

from fedweight.core import vectors


def test_a_vector_that_was_let_go_is_used_again_and_no_other(monkeypatch):
    monkeypatch.setattr(vectors, "LARGE_BYTES", 1)
    one, other = vectors.empty(100, torch.float32), vectors.empty(100, torch.float32)
    assert one.data_ptr() != other.data_ptr()
    place, view = one.data_ptr(), one[:5]
    del one
    assert vectors.empty(100, torch.float32).data_ptr() != place
    del view
    assert vectors.empty(50, torch.float64).data_ptr() == place
