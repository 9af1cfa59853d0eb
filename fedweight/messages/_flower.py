"""Every private name of Flower that fedweight touches, and nothing else.

Each function has a test that fails with a clear message when Flower moves the name.
Written against flwr 1.41 and 1.42.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flwr.app import Error, Message, Metadata, RecordDict

if TYPE_CHECKING:
    from flwr.supercore.run import Run

# Flower's codes for an error reply (flwr.common.constant.ErrorCode).
CLIENT_APP_RAISED_EXCEPTION = 2
MESSAGE_UNAVAILABLE = 3
REPLY_UNAVAILABLE = 4
NODE_UNAVAILABLE = 5

# The codes that say that a client's reply will not come, and why.
NO_REPLY = {
    MESSAGE_UNAVAILABLE: "no reply: the message expired before the node answered it",
    REPLY_UNAVAILABLE: "no reply: it expired before it was fetched",
    NODE_UNAVAILABLE: "no reply: the node is not connected any more",
}

# How a node words an exception of its ClientApp.
_RAISED = re.compile(r"<class '(?:\w+\.)*(?P<kind>\w+)'>:<'(?P<text>.*)'>", re.DOTALL)

# The SuperLink's own node id; a client may not have it.
SERVER_NODE_ID = 1


def reason_of(error: Error) -> str:
    """Return why a client failed, in words.

    Examples
    --------
    >>> reason_of(Error(code=2, reason="<class 'ValueError'>:<'no such column'>"))
    'ValueError: no such column'
    >>> reason_of(Error(code=5, reason="Error: Node Unavailable"))
    'no reply: the node is not connected any more'
    """
    if error.code in NO_REPLY:
        return NO_REPLY[error.code]
    reason = error.reason or "an error without a reason"
    raised = _RAISED.fullmatch(reason.strip())
    return f"{raised['kind']}: {raised['text']}" if raised else reason


@contextmanager
def task_identity(run_id: int) -> Iterator[None]:
    """Let this process make messages, as a ServerApp of the given run.

    Flower's runtimes set this identity before they call an app; outside them
    ``Message(...)`` raises. What was set before is put back.
    """
    from flwr.supercore.task_identity import TaskIdentity

    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id = run_id
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SERVER_NODE_ID
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, as the SuperLink does when it is pushed."""
    message.metadata.__dict__["_message_id"] = message_id


def message_of(content: RecordDict, metadata: Metadata) -> Message:
    """Make a message with metadata as given, as a node does with what it received."""
    make: Any = Message  # Flower leaves this way of making one out of its types.
    message: Message = make(content=content, metadata=metadata)
    return message


def empty_run(run_id: int) -> Run:
    """Return the description of a run that has no app bundle."""
    from flwr.supercore.run import Run

    return Run.create_empty(run_id)


def run_folder(
    server_app: Any,
    client_app: str,
    folder: str,
    *,
    run_config: Mapping[str, Any],
    overrides: Mapping[str, Any],
    num_supernodes: int,
    backend_config: Mapping[str, Any],
) -> None:
    """Run an app's folder on Flower's simulation runtime, in this process.

    As ``flwr run`` does in the end, without its daemon: clients are loaded from the
    folder, and read their settings there. Flower ends the process's Ray.

    Parameters
    ----------
    server_app : Callable
        What is called with a grid and a context.
    client_app : str
        The ClientApp, as ``module:attribute``.
    folder : str
        Where that is.
    run_config : Mapping
        The ServerApp's settings.
    overrides : Mapping
        Those of them that are not the folder's.
    num_supernodes : int
        How many clients.
    backend_config : Mapping
        As Flower's ``run_simulation`` takes it.
    """
    from flwr.app import Context
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.telemetry import EventType

    run_id = secrets.randbits(62) + 1
    run = empty_run(run_id)
    run.primary_task_id = secrets.randbits(62) + 1
    run.federation_id = NOOP_FEDERATION_ID
    run.override_config = dict(overrides)
    context = Context(
        run_id=run_id,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    with task_identity(run_id):
        _run_simulation(
            num_supernodes=num_supernodes,
            exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
            client_app_attr=client_app,
            server_app=server_app,
            server_app_context=context,
            backend_config={k: dict(v) for k, v in backend_config.items() if v},
            app_dir=folder,
            run=run,
            is_app=True,
        )
