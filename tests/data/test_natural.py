"""Natural clients: their names, and numbers that no draw moves."""

from __future__ import annotations

import numpy as np
import pytest

from fedweight import data
from fedweight.core.errors import DataError
from fedweight.data import DataSet, Examples, FederatedData, federate
from fedweight.data.partitions import natural_choice

SITES = ["north", "south", "east", "west", "up", "down", "tiny"]


@pytest.fixture
def sites(tmp_path):
    """Seven sites; one has a single row, and one two more than another."""
    path = tmp_path / "sites.csv"
    rng = np.random.default_rng(0)
    sizes = {"tiny": 1, "north": 12, "south": 10}
    lines = ["a,b,site,y"]
    for site in SITES:
        for i in range(sizes.get(site, 8)):
            lines.append(f"{rng.normal():.3f},{rng.normal():.3f},{site},{i % 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("seed", range(12))
def test_a_clients_number_and_name_do_not_depend_on_the_seed(sites, seed):
    own = data.load("csv", sites, seed=seed, client="site")
    assert own.natural_names == tuple(sorted(SITES))
    assert own.natural_sizes.tolist() == [8, 8, 12, 10, 1, 8, 8]
    fed = federate(own, "natural", None, proxy=0.3, seed=seed)
    assert fed.num_clients == 7
    assert [fed.name_of(k) for k in range(7)] == sorted(SITES)
    table = own.train.x
    for k in range(7):
        mine = own.natural_clients == k
        rows = {row.tobytes() for row in table[mine]}
        client = fed.client(k)
        for part in (client.train, client.held_out):
            assert {row.tobytes() for row in part.x} <= rows


def test_a_client_that_a_draw_leaves_empty_stays(sites):
    tiny = sorted(SITES).index("tiny")
    sizes = []
    for seed in range(12):
        own = data.load("csv", sites, seed=seed, client="site")
        fed = federate(own, "natural", None, seed=seed)
        sizes.append(int(fed.sizes[tiny]))
        assert fed.sizes.sum() > 0
    assert set(sizes) == {0, 1}


@pytest.mark.parametrize("seed", range(12))
def test_the_largest_clients_are_the_largest_whatever_is_drawn(sites, seed):
    own = data.load("csv", sites, seed=seed, client="site", test_fraction=0.5)
    fed = federate(own, "natural", 2, proxy=0.3, seed=seed)
    assert [fed.name_of(k) for k in range(2)] == ["north", "south"]
    assert natural_choice(own, None).tolist() == list(range(7))


def test_clients_of_a_test_file_keep_everything(sites):
    own = data.load("csv", sites, client="site", test=sites)
    assert np.bincount(own.natural_clients).tolist() == [8, 8, 12, 10, 1, 8, 8]
    assert own.natural_sizes.tolist() == [8, 8, 12, 10, 1, 8, 8]


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_clients_of_arrays_have_names_too(tmp_path, seed):
    names = np.array(["b"] * 9 + ["a"] * 9 + ["only"])
    path = tmp_path / "own.npz"
    np.savez(path, x=np.ones((19, 2)), y=np.arange(19) % 2, client=names)
    own = data.load("npz", path, seed=seed, test_fraction=0.5)
    assert own.natural_names == ("a", "b", "only")
    assert own.natural_sizes.tolist() == [9, 9, 1]
    assert len(own.natural_clients) == len(own.train)
    np.savez(path, x=np.ones((4, 2)), y=np.arange(4) % 2, client=[30, 4, 30, 4])
    assert data.load("npz", path).natural_names == ("4", "30")


def test_roles_are_called_by_play_and_name(tmp_path):
    speech = "\n\nBer.\nWho's there?\n\nFran.\nNay.\n\nBer.\nHe.\n\nFran.\nYes, he.\n"
    for play in ("hamlet", "othello"):
        (tmp_path / f"{play}.txt").write_text("A PLAY" + speech)
    own = data.load("shakespeare", tmp_path, sequence_length=3)
    assert own.natural_names == (
        *("hamlet: Ber", "hamlet: Fran", "othello: Ber", "othello: Fran"),
    )
    fed = federate(own, "natural", 3)
    assert fed.num_clients == 3
    assert fed.name_of(0) in own.natural_names


def toy(natural, **more):
    n = len(natural)
    part = Examples(np.arange(n, dtype=np.float32)[:, None], np.arange(n) % 2)
    return DataSet("toy", part, part, 2, np.asarray(natural), **more)


def test_clients_of_a_data_set_from_python():
    fed = federate(toy([7, 3, 7, 5, 5, 5]), "natural", None, 0.0, 0.0)
    assert [fed.client(k).train.x[:, 0].tolist() for k in range(3)] == [
        *([1], [3, 4, 5], [0, 2])
    ]
    assert [fed.name_of(k) for k in range(3)] == ["3", "5", "7"]
    plain = federate(toy([0, 1, 0, 1, 2]), "natural", None, 0.0, 0.0)
    assert plain.names == ()
    assert plain.name_of(2) == "2"
    some = federate(toy([0, 1, 0, 1, 2, 2, 2]), "natural", 1, 0.0, 0.0)
    assert some.name_of(0) == "2"
    named = toy([0, 2, 0], natural_names=("a", "b", "c"))
    fed = federate(named, "natural", None, 0.0, 0.0)
    assert [fed.name_of(k) for k in range(3)] == ["a", "b", "c"]
    assert fed.sizes.tolist() == [2, 0, 1]


def test_other_clients_go_by_their_numbers():
    own = toy([0, 0, 1, 1])
    fed = federate(own, "iid", 2)
    assert (fed.names, fed.name_of(1)) == ((), "1")
    lazy = federate(own, "dirichlet-sampled", 10**8, examples_per_client=1)
    assert lazy.names == ()
    assert lazy.name_of(99_999_999) == "99999999"
    with pytest.raises(DataError, match="names has 1 entries for 2 clients"):
        FederatedData(own, [np.array([0]), np.array([1])], names=["a"])
    both = FederatedData(own, [np.array([0]), np.array([1])], names=["a", "b"])
    assert both.name_of(1) == "b"
    assert both.name_of(5) == "5"


@pytest.mark.parametrize("name", ["iid", "dirichlet", "quantity"])
def test_far_more_clients_than_examples_are_refused(name):
    assert federate(toy([0] * 8), name, 80, 0.0, 0.0).num_clients == 80
    with pytest.raises(ValueError, match=r"at most 80.*'dirichlet-sampled'"):
        federate(toy([0] * 8), name, 10**9, 0.0, 0.0)
