"""FedLEx and AutoFLIP: what is explored once, and what it changes from then on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fedweight
from fedweight.clients.objectives import Plain
from fedweight.clients.objectives.base import Facts
from fedweight.core.errors import ConfigurationError
from fedweight.core.layout import FlatModel, Layout
from fedweight.core.updates import StackedUpdates
from fedweight.strategies import Round
from fedweight.strategies.autoflip import AutoFLIP, Pruned, kept
from fedweight.strategies.fedlex import FedLEx, Guided, guidance_of, scaled

LAYOUT = Layout.of({"a": ((3,), "float32"), "b": ((2,), "float32")}, buffers=())


def explored(scouts: list[list[float]], base: list[float]) -> Round:
    start = torch.tensor(base)
    models = [torch.tensor(scout) for scout in scouts]
    return Round(
        number=0,
        clients=tuple(range(len(scouts))),
        model=FlatModel(LAYOUT, start, torch.empty(0)),
        updates=StackedUpdates(models, start, LAYOUT.offsets),
        num_examples=torch.ones(len(scouts)),
        metrics=({},) * len(scouts),
        profiles=({},) * len(scouts),
    )


def test_the_guidance_by_hand():
    # From 0 to (.1, .3, 0) and (.3, .3, .2): .05, .09 and .02 in the mean square.
    # The second tensor moves alike.
    scouts = [[0.1, 0.3, 0.0, 1.0, 1.0], [0.3, 0.3, 0.2, -1.0, 1.0]]
    found = guidance_of(explored(scouts, [0.0] * 5))
    np.testing.assert_allclose(found, [0.42857143, 1, 0, 1, 1], rtol=1e-6)
    # It is of what the explorers add, wherever they begin.
    moved = [[v + 2 for v in scout] for scout in scouts]
    again = guidance_of(explored(moved, [2.0] * 5))
    np.testing.assert_allclose(again, found, atol=1e-5)


def test_scaling_like_numpy():
    values = np.random.default_rng(0).gamma(1.0, size=50)
    expected = (values - values.min()) / np.ptp(values)
    np.testing.assert_allclose(scaled(torch.from_numpy(values)), expected, rtol=1e-12)


def test_the_mask_is_of_all_tensors_together():
    guidance = torch.tensor([0.42857143, 1, 0, 1, 1])
    assert kept(guidance, 0.0).tolist() == [True] * 5
    assert kept(guidance, 0.2).tolist() == [True, True, False, True, True]
    values = torch.rand(1001, generator=torch.Generator().manual_seed(0))
    assert int(kept(values, 0.5).sum()) == 500
    assert int(kept(values, 0.9).sum()) == 100
    with pytest.raises(ConfigurationError, match="keeps no parameter"):
        kept(torch.ones(4), 0.5)


def test_what_clients_minimise():
    facts = Facts(torch.zeros(2), shared={"guidance": torch.tensor([0.5, 0.0])})
    one = Guided(Plain())
    assert one.hears == ("guidance",)
    found = one.gradient(lambda at: at + 1, torch.ones(2), facts)
    assert found.tolist() == [1.0, 0.0]
    facts = Facts(torch.zeros(2), shared={"mask": torch.tensor([1.0, 0.0])})
    assert Pruned(Plain()).after_step(torch.ones(2), facts).tolist() == [1.0, 0.0]


SETTINGS: dict[str, Any] = {
    "partition.clients": 6,
    "run.rounds": 3,
    "training.epochs": 1,
    "model.name": "mlp",
    "strategy.fraction-train": 0.5,
    "strategy.explore-epochs": 1,
    "strategy.explorers": 0.5,
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(strategy: str, **more: Any) -> fedweight.Run:
    keys = {key.replace("__", ".").replace("_", "-"): v for key, v in more.items()}
    settings = {**SETTINGS, "strategy.name": strategy, **keys}
    return fedweight.run(settings=settings, report=False, progress=False)


def parameters(result: fedweight.Run) -> dict[str, Tensor]:
    return load_file(result.folder / "model.safetensors")


def same_files(one: fedweight.Run, other: fedweight.Run) -> None:
    for name in ("model.safetensors", "rounds.csv", "clients.csv"):
        mine, theirs = one.folder / name, other.folder / name
        assert mine.read_bytes() == theirs.read_bytes(), name


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("strategy", ["fedlex", "autoflip"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_clients_at_once_are_as_each_alone(strategy, optimizer):
    more = {"training__optimizer": optimizer}
    if optimizer == "adam":
        more |= {"training__learning_rate": 0.001, "training__momentum": None}
        more = {key: value for key, value in more.items() if value is not None}
    loop = run(strategy, engine__plan="loop", **more)
    batched = run(strategy, engine__plan="batched-3", **more)
    close(parameters(loop), parameters(batched))
    eager = run(strategy, engine__plan="batched-3", engine__trace=False, **more)
    close(parameters(loop), parameters(eager))


def test_one_client_trains_the_common_model_whatever_min_replies_is():
    result = run("fedlex", strategy__min_replies=3)
    assert set(result.rounds["status"].iloc[1:]) == {"ok"}
    assert len(result.clients[result.clients["round"] == 0]) in (3, 4)


@pytest.mark.parametrize("strategy", ["fedlex", "autoflip"])
def test_explorers_are_told_the_class_totals(strategy):
    result = run(strategy, objective__name="balanced-softmax", run__rounds=1)
    assert set(result.clients["status"]) == {"ok", "evaluated"}
    # Which count: four explore, three train.
    plain = run(strategy, run__rounds=1)
    more = result.clients["bytes_down"].sum() - plain.clients["bytes_down"].sum()
    assert more == (4 + 3) * 10 * 8


def share_of_zeros(result: fedweight.Run) -> tuple[int, int]:
    tensors = parameters(result).values()
    return sum(int((t == 0).sum()) for t in tensors), sum(t.numel() for t in tensors)


@pytest.mark.parametrize("server", ["none", "momentum", "adam"])
@pytest.mark.parametrize("more", [{}, {"codec__name": "low-bits"}])
def test_what_is_pruned_stays_0(server, more):
    result = run("autoflip", server__name=server, strategy__prune=0.7, **more)
    zeros, of = share_of_zeros(result)
    assert 0.7 <= zeros / of < 0.72
    fedavg = {"strategy.name": "fedavg", "server.name": server}
    plain = {k: v for k, v in SETTINGS.items() if "explore" not in k}
    other = fedweight.run(settings={**plain, **fedavg}, report=False, progress=False)
    assert share_of_zeros(other)[0] < 0.01 * of


def test_bytes_are_those_of_the_mask():
    result = run("autoflip", strategy__prune=0.5)
    layout = parameters(result)
    size = sum(t.numel() for t in layout.values())
    left = size - share_of_zeros(result)[0]
    # What is explored before, by four in all, is in the sums of the first round.
    before = 4 * 4 * size
    sums = [before + 3 * 4 * left, *[3 * 4 * left] * 2]
    assert result.rounds.bytes_up.tolist()[1:] == sums
    # The mask comes along, with training and with evaluation of all six.
    bits = -(-size // 8)
    down = (3 + 6) * (4 * left + bits)
    sums = [before + 4 * bits + down, *[down] * 2]
    assert result.rounds.bytes_down.tolist()[1:] == sums
    first = result.clients[result.clients["round"] == 0]
    # One client trains the common model, half of six explore, with all parameters.
    trained = first.bytes_up.sum() / (4 * size)
    assert trained == 4
    assert set(first.status) == {"ok"}


def test_bytes_of_a_mask_and_few_bits_go_together():
    more = {"codec__name": "low-bits", "codec__bits": 4}
    dense, few = run("autoflip"), run("autoflip", **more)
    zeros, size = share_of_zeros(few)
    whole = dense.rounds.bytes_up.iloc[-1]
    tensors = len(parameters(few))
    assert few.rounds.bytes_up.iloc[-1] <= 3 * ((size - zeros) / 2 + 5 * tensors)
    assert few.rounds.bytes_up.iloc[-1] < whole / 7


def test_guidance_is_sent_with_the_model():
    result = run("fedlex")
    size = sum(t.numel() for t in parameters(result).values())
    up, down = 3 * 4 * size, (2 * 3 + 6) * 4 * size
    assert result.rounds.bytes_up.tolist()[2:] == [up] * 2
    assert result.rounds.bytes_down.tolist()[2:] == [down] * 2
    first = result.rounds.iloc[1]
    assert first.bytes_up == up + 4 * 4 * size
    assert first.bytes_down == down + 4 * 2 * 4 * size


def test_limits_are_fedavg():
    plain = {k: v for k, v in SETTINGS.items() if "explore" not in k}
    fedavg = fedweight.run(
        settings={**plain, "strategy.name": "fedavg"}, report=False, progress=False
    )
    found = run("autoflip", strategy__prune=0.0)
    for name, tensor in parameters(found).items():
        assert torch.equal(tensor, parameters(fedavg)[name])
    assert not torch.equal(
        *(next(iter(parameters(r).values())) for r in (run("fedlex"), fedavg))
    )


@pytest.mark.parametrize("strategy", ["fedlex", "autoflip"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(strategy):
    class Stop(Exception):
        pass

    def stops(state: Any) -> None:
        if state.round == 2:
            raise Stop

    settings = {**SETTINGS, "strategy.name": strategy, "run.checkpoint-rounds": 1}
    settings["server.name"] = "momentum"

    def go(out: str, **more: Any) -> fedweight.Run:
        return fedweight.run(
            settings=settings, out=out, report=False, progress=False, **more
        )

    whole = go("whole")
    with pytest.raises(Stop):
        go("stopped", callbacks=[stops])
    same_files(whole, fedweight.resume("stopped", report=False, progress=False))


@pytest.mark.usefixtures("ready_ray")
@pytest.mark.ray
@pytest.mark.parametrize("strategy", ["fedlex", "autoflip"])
def test_bytes_and_bits_are_the_same_on_ray(strategy):
    here = run(strategy, engine__plan="batched-2")
    for workers in (1, 2):
        more = {"engine__name": "ray", "engine__workers": workers}
        same_files(here, run(strategy, engine__plan="batched-2", **more))


def test_personal_models_go_along():
    result = run("autoflip", personal__name="ditto")
    assert result.rounds.bytes_up.iloc[-1] > 0


def test_options_are_checked():
    with pytest.raises(ConfigurationError, match="prune must be"):
        AutoFLIP(prune=1.0)
    with pytest.raises(ConfigurationError, match="explorers must be"):
        FedLEx(explorers=0.0)


def test_the_readmes_method_trains_half_of_the_model(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "strategies" / "README.md").read_text("utf-8")
    [code] = [c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "Most" in c]
    (tmp_path / "readme_moved.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    settings = {k: v for k, v in SETTINGS.items() if "explore" not in k}
    settings |= {"strategy.name": "readme_moved:MovedMost", "run.rounds": 2}
    result = fedweight.run(settings=settings, report=False, progress=False)
    before = load_first(result)
    found = parameters(result)
    # A mean of equal numbers may differ from them in the last bit.
    near = [(found[name] - tensor).abs() < 1e-6 for name, tensor in before.items()]
    still = sum(int(one.sum()) for one in near)
    size = sum(t.numel() for t in before.values())
    assert 0.5 <= still / size < 0.6
    assert result.rounds.bytes_down.iloc[-1] < 9 * 4.2 * size


def load_first(result: fedweight.Run) -> dict[str, Tensor]:
    """Return the weights that a run began with."""
    from fedweight.studies.components import prepare
    from fedweight.studies.configuration import Configuration

    configuration = Configuration.read(result.folder / "config.toml")
    return dict(prepare(configuration).make_model().state_dict())
