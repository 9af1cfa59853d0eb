"""The small U-Net."""

import pytest
import torch
from torch import nn

from fedweight import models
from fedweight.core.errors import ConfigurationError


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 32, 32), {}),
        ((3, 8, 24), {"width": 6, "groups": 3, "depth": 3}),
        ((1, 2, 4), {"depth": 1}),
    ],
)
def test_a_logit_for_each_class_and_pixel(shape, options):
    model = models.build("unet", shape, 4, seed=0, **options)
    assert model(torch.zeros(2, *shape)).shape == (2, 4, *shape[1:])
    assert not list(model.buffers())


def test_widths_double_with_each_halving():
    model = models.build("unet", (1, 16, 16), 3, width=4, depth=3)
    widths = [block[0].out_channels for block in model.down]
    assert widths == [4, 8, 16, 32]
    assert [block[0].in_channels for block in model.join] == [8, 16, 32]
    # Two convolutions a block without a bias, norms, what doubles, and the last layer.
    assert sum(isinstance(part, nn.GroupNorm) for part in model.modules()) == 14


def test_examples_do_not_see_each_other_and_far_pixels_are_seen():
    model = models.build("unet", (1, 16, 16), 2, seed=0).double()
    x = torch.randn(3, 1, 16, 16, dtype=torch.float64)
    whole = model(x)
    torch.testing.assert_close(whole[1:2], model(x[1:2]))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[0, 0, 0, 0], x)
    assert gradient[0, 0, 15, 15] != 0
    assert not gradient[1:].any()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 30, 32), {}, "30 pixels cannot be halved so often. Pad images to multip"),
        ((1, 32, 30), {}, "30 pixels"),
        ((4,), {}, r"images of shape \(c, h, w\)"),
        ((28, 28, 1), {}, "Transpose them first"),
        ((1, 8, 8), {"width": 3}, "groups must divide width, got groups = 2"),
        ((1, 8, 8), {"depth": 0}, r"depth must be in \[1, 8\]"),
    ],
)
def test_errors_say_what_is_wrong(shape, options, message):
    with pytest.raises(ConfigurationError, match=message):
        models.build("unet", shape, 2, **options)
