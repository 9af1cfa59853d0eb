"""What a strategy's tell, ask and assign, and its questions, may not be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedweight.clients import Answer
from fedweight.core.errors import ConfigurationError
from fedweight.core.layout import FlatModel, Layout
from fedweight.messages import _flower
from fedweight.server import Population, Question
from fedweight.strategies import PerParameter, Selection, Vector, WeightingStrategy
from fedweight.strategies.checks import asked_names, assigned, masked, told_apart

CHOSEN = Selection(1, (3, 5), None, 6)
LAYOUT = Layout.of({"w": ((3,), "float32")}, buffers=())
MODEL = FlatModel(LAYOUT, torch.tensor([1.0, -2.0, 3.0]), torch.empty(0))


@pytest.fixture(autouse=True)
def _may_make_messages() -> Iterator[None]:
    with _flower.task_identity(1):
        yield


class Odd(WeightingStrategy):
    """Gives whatever it is told to."""

    gives: Any = None

    def weights(self, round: Any) -> Any:
        return round.size_weights

    def tell(self, selection: Selection) -> Any:
        return self.gives

    ask = assign = tell

    def mask(self, state: Any) -> Any:
        return self.gives


TELLS: list[tuple[Any, str]] = [
    (None, "Odd.tell must return a dictionary by names, which are texts, got None."),
    ([("a", 1)], "Odd.tell must return a dictionary by names"),
    ({1: 1.0}, "Odd.tell must return a dictionary by names, which are texts, got {1"),
    ({"a": None}, "Odd.tell gave None for 'a'. Give a number of at most 64 bits or a"),
    ({"a": 2**70}, "Odd.tell gave 1180591620717411303424 for 'a'. Give a number of"),
    ({"a": 1j}, "Odd.tell gave 1j for 'a'."),
    ({"a": [1.0]}, "Odd.tell gave 1 values for 'a' and 2 clients. Give one each"),
    ({"a": {3: 1.0}}, "Odd.tell must give a list, a value for each of the 2 clients"),
    ({"a": [1.0, [2.0]]}, "Odd.tell gave [2.0] for 'a'."),
    ({"a": torch.ones(2, 3)}, "Odd.tell gave [1.0, 1.0, 1.0] for 'a'."),
    ({"server-round": 3}, "Odd.tell gave 'server-round', which the server tells"),
    ({"request": "loss"}, "Odd.tell gave 'request', which the server tells clients"),
    ({"mask": PerParameter(torch.ones(3))}, "Odd.tell gave 'mask', which the server"),
    ({"a": Vector([])}, "'a'. Give a Vector of 1 to 1,000,000 finite numbers."),
    ({"a": Vector([1.0, float("nan")])}, "Give a Vector of 1 to 1,000,000 finite"),
    ({"a": PerParameter(torch.ones(2))}, "a floating or bool tensor of shape [3]."),
    ({"a": PerParameter(torch.ones(3).int())}, "Give a PerParameter of a floating"),
    ({"a": PerParameter([1.0, 2.0, 3.0])}, "Odd.tell gave [1.0, 2.0, 3.0] for 'a'."),
]


@pytest.mark.parametrize(("gives", "said"), TELLS)
def test_what_cannot_be_told_is_refused(gives: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)) as caught:
        told_apart(Odd(gives=gives), CHOSEN, MODEL)
    assert "\n" not in str(caught.value)


def test_numbers_of_every_library_can_be_told() -> None:
    gives = {
        "a": np.float32(0.5),
        "b": [np.int64(3), None],
        "c": torch.tensor([1.0, 2.0]),
        "d": "exp",
        "e": (k for k in (1, 2)),
    }
    plain, columns, long = told_apart(Odd(gives=gives), CHOSEN, MODEL)
    assert plain == {"a": 0.5, "d": "exp"}
    assert columns == {"b": [3, None], "c": [1.0, 2.0], "e": [1, 2]}
    assert type(columns["b"][0]) is int
    assert long == {}


def test_what_is_long_is_told_apart() -> None:
    gives = {
        "a": Vector(np.float32([0.5, 1.0])),
        "b": PerParameter(torch.ones(3, dtype=torch.float64)),
        "c": PerParameter(torch.tensor([True, False, True])),
    }
    plain, columns, long = told_apart(Odd(gives=gives), CHOSEN, MODEL)
    assert plain == columns == {}
    assert long["a"] == [0.5, 1.0]
    assert [long[name].dtype for name in "bc"] == [torch.float32, torch.bool]


def test_what_is_no_mask_is_refused() -> None:
    for gives in (torch.ones(3), torch.ones(2, dtype=torch.bool), [True] * 3):
        with pytest.raises(ConfigurationError, match=r"Odd\.mask must return a bool"):
            masked(Odd(gives=gives), MODEL.parameters, None)
    assert masked(Odd(gives=None), MODEL.parameters, None) is MODEL.parameters
    kept = masked(Odd(gives=MODEL.parameters > 0), MODEL.parameters, None)
    assert kept.tolist() == [1.0, 0.0, 3.0]


ASKS: list[tuple[Any, str]] = [
    (("loss-before",), "Odd.ask must return a dictionary by names, which are texts"),
    ({2: True}, "Odd.ask must return a dictionary by names, which are texts"),
    ({"gain": [True]}, "Odd.ask gave 1 values for 'gain' and 2 clients."),
    ({"gain": "yes"}, "Odd.ask must give a list, a value for each of the 2 clients"),
    ({"gain": ["yes", "no"]}, "Odd.ask gave 'yes' for 'gain'. Give True or False, one"),
    ({"gain": [0.3, 1]}, "Odd.ask gave 0.3 for 'gain'. Give True or False"),
    ({"gain": None}, "Odd.ask must give a list"),
]


@pytest.mark.parametrize(("gives", "said"), ASKS)
def test_what_cannot_be_asked_is_refused(gives: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        asked_names(Odd(gives=gives), CHOSEN)


def test_each_client_may_be_asked_for_something_else() -> None:
    gives = {"a": torch.tensor([True, False]), "b": np.True_, "c": [0, 1]}
    assert asked_names(Odd(gives=gives), CHOSEN) == [("a", "b"), ("b", "c")]


@pytest.mark.parametrize("gives", [[0, True], [0, -1], [0, 0.5], [0, 10**9], [0, "a"]])
def test_what_is_no_model_is_not_assigned(gives: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"Odd\.assign must give whole numbers"
    ):
        assigned(Odd(gives=gives), CHOSEN)


@pytest.mark.parametrize("request_", [None, 3, ("gain", 3), {"gain": 1}])
def test_a_request_is_a_tuple_of_names(request_: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"Bad\.request must be a tuple of"):
        type("Bad", (Odd,), {"request": request_})


class Nobody:
    """A grid of three clients that never answer; ``sent`` is what was sent."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    def client_of(self, node: int) -> int:
        return node - 100

    def get_node_ids(self) -> list[int]:
        return [100, 101, 102]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        self.sent = list(messages)
        return []


ASKED = "population.ask: "
QUESTIONS: list[tuple[Any, Any, Any, str]] = [
    ("halff", {}, 1, "there is no query 'halff'. Did you mean 'half'? There are half"),
    (7, {}, 1, "there is no query 7."),
    ("half", [0, 1], 1, "questions must be a dictionary of Question by client, got [0"),
    ("half", {9: Question()}, 1, "there is no client 9 with examples."),
    ("half", {"0": Question()}, 1, "there is no client '0' with examples."),
    ("half", {0: {}}, 1, "each client is asked a Question, got {} for client 0."),
    ("half", {0: Question()}, 0, "timeout must be a number of seconds above 0"),
    ("half", {0: Question()}, "1", "timeout must be a number of seconds above 0"),
    ("half", {0: Question({"query": "x"})}, 1, "the Question to client 0 must tell a"),
    ("half", {0: Question({"a": None})}, 1, "the Question to client 0 fits no messag"),
    ("half", {0: Question({1: 2})}, 1, "the Question to client 0 fits no message: Ke"),
    ("half", {0: Question(3)}, 1, "the Question to client 0 must tell a dictionary"),  # type: ignore[arg-type]
    ("half", {0: Question({}, [1])}, 1, "the Question to client 0 fits no message"),  # type: ignore[arg-type]
    ("half", {0: Question({}, {"a": object()})}, 1, "the Question to client 0 fits no"),  # type: ignore[dict-item]
]


@pytest.mark.parametrize(("query", "questions", "timeout", "said"), QUESTIONS)
def test_what_no_client_can_be_asked_is_refused(
    query: Any, questions: Any, timeout: Any, said: str
) -> None:
    grid: Any = Nobody()
    population = Population(grid, 0, ["half"])
    with pytest.raises(ConfigurationError, match=re.escape(ASKED + said)) as caught:
        population.ask(query, questions, timeout)
    assert "\n" not in str(caught.value)
    assert not grid.sent


def test_numbers_of_numpy_may_be_in_a_question() -> None:
    grid: Any = Nobody()
    told = {"step": np.int64(3), "rates": np.ones(2), "all": True}
    asked = {np.int64(1): Question(told, {"x": [1.0, 2.0]})}  # type: ignore[dict-item]
    assert Population(grid, 0, ["half"]).ask("half", asked) == {}  # type: ignore[arg-type]
    [message] = grid.sent
    config = dict(message.content.config_records["config"])
    assert config == {"step": 3, "rates": [1.0, 1.0], "all": True, "query": "half"}


def test_a_strategy_may_ask_its_own_queries_only_by_name() -> None:
    class Asks(Odd):
        queries: ClassVar[dict[str, Any]] = {"half": lambda asked: Answer()}

        def prepare(self, population: Population) -> Any:
            return population.ask("third", {})

    with pytest.raises(ConfigurationError, match="no query 'third'"):
        Asks().configure_train(1, _arrays(), _config(), Nobody())  # type: ignore[arg-type]


def _arrays() -> Any:
    from flwr.app import ArrayRecord

    return ArrayRecord(torch.nn.Linear(2, 2).state_dict())


def _config() -> Any:
    from flwr.app import ConfigRecord

    return ConfigRecord()
