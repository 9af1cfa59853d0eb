"""The private names of Flower that the library uses: here breaks what Flower moves.

A test that fails here names what to look for in the new version of flwr.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from typing import Any

import pytest
from flwr.app import DEFAULT_TTL, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedweight.messages import _flower

MOVED = "Flower has moved or changed {}: adapt fedweight/messages/_flower.py"


def private(module: str, name: str) -> Any:
    """Return something of Flower's, or fail with a message that says what is gone."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return pytest.fail(MOVED.format(f"{module}.{name}"))


def test_task_identity() -> None:
    identity = private("flwr.supercore.task_identity", "TaskIdentity")
    for name in ("_task_id", "_run_id", "_node_id"):
        assert hasattr(identity, name), MOVED.format(f"TaskIdentity.{name}")
    before = (identity._task_id, identity._run_id, identity._node_id)
    with _flower.task_identity(run_id=5):
        message = Message(RecordDict(), 1000, "train")
        with _flower.task_identity(run_id=6):
            assert identity.run_id == 6, MOVED.format("TaskIdentity.run_id")
        assert identity.run_id == 5
    assert message.metadata.run_id == 5, MOVED.format("TaskIdentity.run_id")
    assert message.metadata.src_node_id == _flower.SERVER_NODE_ID
    assert (identity._task_id, identity._run_id, identity._node_id) == before


def test_message_without_identity_is_refused() -> None:
    """Once Flower allows it, :func:`task_identity` can go."""
    identity = private("flwr.supercore.task_identity", "TaskIdentity")
    if identity._run_id is not None:
        pytest.skip("another test has left an identity")
    with pytest.raises(RuntimeError, match="is not set"):
        Message(RecordDict(), 1000, "train")


def test_message_id() -> None:
    with _flower.task_identity(0):
        message = Message(RecordDict(), 1000, "train")
        assert message.metadata.message_id == ""
        _flower.set_message_id(message, "message-1")
        reply = Message(RecordDict(), reply_to=message)
    why = MOVED.format("Metadata._message_id")
    assert message.metadata.message_id == "message-1", why
    assert reply.metadata.reply_to_message_id == "message-1", why


def test_message_of_metadata() -> None:
    with _flower.task_identity(0):
        sent = Message(RecordDict(), 1000, "train", group_id="3")
        _flower.set_message_id(sent, "message-1")
    content = RecordDict({"config": ConfigRecord({"a": 1})})
    try:
        received = _flower.message_of(content, copy.copy(sent.metadata))
    except (TypeError, ValueError):
        pytest.fail(MOVED.format("Message(content=..., metadata=...)"))
    assert received.content is content
    assert vars(received.metadata) == vars(sent.metadata)
    assert received.metadata is not sent.metadata


def test_empty_run() -> None:
    run = private("flwr.supercore.run", "Run")
    assert hasattr(run, "create_empty"), MOVED.format("Run.create_empty")
    assert _flower.empty_run(3).run_id == 3


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("CLIENT_APP_RAISED_EXCEPTION", "CLIENT_APP_RAISED_EXCEPTION"),
        ("MESSAGE_UNAVAILABLE", "MESSAGE_UNAVAILABLE"),
        ("REPLY_MESSAGE_UNAVAILABLE", "REPLY_UNAVAILABLE"),
        ("NODE_UNAVAILABLE", "NODE_UNAVAILABLE"),
    ],
)
def test_error_codes(theirs: str, ours: str) -> None:
    codes = private("flwr.common.constant", "ErrorCode")
    assert getattr(codes, theirs) == getattr(_flower, ours), MOVED.format(theirs)


def test_how_a_node_words_an_exception() -> None:
    module = importlib.import_module("flwr.supernode.runtime.run_clientapp")
    wording = """str(type(ex)) + ":<'" + str(ex) + "'>\""""
    assert wording in inspect.getsource(module), MOVED.format("run_clientapp's reason")
    try:
        raise LookupError("no <'column'>")
    except LookupError as ex:
        reason = str(type(ex)) + ":<'" + str(ex) + "'>"
    assert _flower.reason_of(Error(2, reason)) == "LookupError: no <'column'>"


def test_every_private_name_has_its_test() -> None:
    public = [n for n in vars(_flower) if not n.startswith("_")]
    own = {n for n in public if inspect.isfunction(getattr(_flower, n))}
    here = inspect.getsource(sys.modules[__name__])
    for name in own - {"contextmanager"}:
        assert f"_flower.{name}(" in here, name


def test_the_numbers_that_the_page_on_flower_tells() -> None:
    """Every 3 seconds a look for replies, a minute without a sign, 12 hours."""
    assert (
        private("flwr.supercore.constant", "DEFAULT_SIMULATION_CONFIG").num_supernodes
        == 2
    )
    port = private("flwr.supercore.constant", "SUPERLINK_UVICORN_DEFAULT_PORT")
    assert port == 8000
    local = inspect.getsource(importlib.import_module("flwr.cli.constant"))
    assert '"39091"' in local, MOVED.format("the local SuperLink's port")
    grid = private("flwr.superlink.grid.http_grid", "HttpGrid")
    polls = inspect.getsource(grid.send_and_receive)
    assert "time.sleep(3)" in polls, MOVED.format("HttpGrid.send_and_receive")
    interval = private("flwr.common.constant", "HEARTBEAT_DEFAULT_INTERVAL")
    patience = private("flwr.common.constant", "HEARTBEAT_PATIENCE")
    assert interval * patience == 60
    assert DEFAULT_TTL == 12 * 60 * 60


def test_server_node() -> None:
    number = private("flwr.common.constant", "SUPERLINK_NODE_ID")
    assert number == _flower.SERVER_NODE_ID, MOVED.format("SUPERLINK_NODE_ID")


def test_apps_are_called_with_two_arguments() -> None:
    """Our grids call both apps themselves, as Flower's runtimes do."""
    for app, names in (
        (ClientApp, ["self", "message", "context"]),
        (ServerApp, ["self", "grid", "context"]),
    ):
        found = list(inspect.signature(app.__call__).parameters)
        assert found == names, MOVED.format(f"{app.__name__}.__call__")


def test_context_of_a_client() -> None:
    context = Context(0, 1000, {"partition-id": 0}, RecordDict(), {"rate": 0.1})
    context.state = RecordDict({"x": ConfigRecord()})
    assert list(context.state) == ["x"], MOVED.format("Context.state")


def test_what_flowers_simulation_runtime_is_called_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = private("flwr.simulation.run_simulation", "_run_simulation")
    private("flwr.supercore.constant", "NOOP_FEDERATION_ID")
    event = private("flwr.supercore.telemetry", "EventType")
    assert hasattr(event, "PYTHON_API_RUN_SIMULATION_LEAVE"), MOVED.format("EventType")
    for name in ("primary_task_id", "federation_id", "override_config"):
        assert hasattr(_flower.empty_run(1), name), MOVED.format(f"Run.{name}")
    given: dict[str, Any] = {}
    module = importlib.import_module("flwr.simulation.run_simulation")
    monkeypatch.setattr(module, "_run_simulation", lambda **own: given.update(own))
    _flower.run_folder(
        print,
        "app:client_app",
        "/nowhere",
        run_config={"rate": 0.1, "more": 1},
        overrides={"rate": 0.1},
        num_supernodes=3,
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {}},
    )
    missing = given.keys() - inspect.signature(run).parameters.keys()
    assert not missing, MOVED.format("_run_simulation")
    assert given["run"].override_config == {"rate": 0.1}
    assert given["server_app_context"].run_config == {"rate": 0.1, "more": 1}
    assert given["server_app_context"].run_id == given["run"].run_id > 0
    assert given["backend_config"] == {"client_resources": {"num_cpus": 1}}
