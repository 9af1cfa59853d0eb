"""What is said of the data at the end of a run."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedweight import data
from fedweight.data import DataSet, Examples, federate, notes
from fedweight.studies.configuration import Configuration
from fedweight.studies.runner import prepare

ROOT = Path(__file__).parents[2]


def table(n=200, widths=(1.0, 1.0, 1.0, 1.0), num_classes=2, **more):
    x = np.random.default_rng(0).normal(size=(n, len(widths))) * widths
    part = Examples(x.astype(np.float32), np.arange(n) % 2)
    return DataSet("own", part, part.take(slice(0, 5)), num_classes, **more)


def said(dataset, clients=4):
    return notes(federate(dataset, "iid", clients, proxy=0.0))


def test_usual_data_give_no_notes():
    assert said(table()) == []
    assert said(table(widths=(1, 1, 1, 900))) == []


@pytest.mark.parametrize(
    ("widths", "place"),
    [((1, 1, 1, 5000), 3), ((5000, 1), 0), ((1, 5000, 5000), 1), ((0, 1, 0, 9e3), 3)],
)
def test_a_feature_that_is_much_wider_is_named(widths, place):
    (line,) = said(table(widths=widths))
    assert line.startswith("feature '")
    named = said(table(widths=widths, feature_names=tuple("abcd"[: len(widths)])))[0]
    other = "abcd"[place]
    assert f"feature '{place}'" in line or len(set(widths)) < len(widths)
    assert f"feature '{other}'" in named or len(set(widths)) < len(widths)
    assert "standardise = true" in line


def test_the_scale_of_images_and_tokens_says_nothing():
    image = np.random.default_rng(0).normal(size=(50, 1, 4, 4)).astype(np.float32)
    image[:, :, 0, 0] *= 1e5
    part = Examples(image, np.arange(50) % 2)
    assert said(DataSet("own", part, part, 2)) == []
    part = Examples(np.arange(100).reshape(50, 2) * [1, 10**6], np.arange(50) % 2)
    assert said(DataSet("own", part, part, 40)) == []


def test_more_clients_than_examples():
    (line,) = said(table(n=20), clients=50)
    assert "more clients, 50, than training examples, 20: 30 clients have none" in line
    lazy = federate(table(n=20), "dirichlet-sampled", 5000, examples_per_client=5)
    assert notes(lazy) == []


def test_classes_that_nobody_has():
    own = table(num_classes=5, class_names=tuple("abcde"))
    assert said(own) == ["3 of 5 classes have no training example: c, d and e"]


def test_what_the_data_say_of_themselves_comes_first():
    own = table(num_classes=3, notes=("own: left out 3 rows",))
    assert said(own)[0] == "own: left out 3 rows"
    assert len(said(own)) == 2


def test_a_file_whose_features_are_not_standardised(tmp_path):
    path = tmp_path / "own.csv"
    body = "".join(f"{i % 7},{i * 9000 % 99991},{i % 2}\n" for i in range(150))
    path.write_text("dose,steps,y\n" + body)
    assert said(data.load("csv", path)) == []
    (line,) = said(data.load("csv", path, standardise=False))
    assert line.startswith("feature 'steps' is ")


@pytest.mark.parametrize(
    "file",
    [
        path
        for path in sorted((ROOT / "simulations").glob("*.toml"))
        if "[compare]" not in path.read_text("utf-8")
    ],
    ids=lambda path: path.stem,
)
def test_what_ships_gives_no_notes(file):
    configuration = Configuration.read(file)
    if configuration["data"]["name"] == "fashion-mnist" and not os.environ.get(
        "FEDWEIGHT_DATA"
    ):
        pytest.skip("FEDWEIGHT_DATA does not name a folder with the real data sets")
    assert notes(prepare(configuration).data) == []
