"""Every private name of Flower that fedweight touches, and nothing else.

Each function has a test that fails with a clear message when Flower moves the name.
Written against flwr 1.41.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flwr.app import Message, Metadata, RecordDict

if TYPE_CHECKING:
    from flwr.supercore.run import Run

# Flower's codes for an error reply (flwr.common.constant.ErrorCode).
CLIENT_APP_RAISED_EXCEPTION = 2
MESSAGE_UNAVAILABLE = 3
NODE_UNAVAILABLE = 5

# The SuperLink's own node id; a client may not have it.
SERVER_NODE_ID = 1


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
