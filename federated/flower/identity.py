"""The identity that Flower gives a process, without which it cannot construct a `Message`.

Nothing public in Flower 1.41 sets it.
"""

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity

FIRST_NODE = SUPERLINK_NODE_ID + 1
"""Node of client 0 where the nodes are not real: client i is node i + FIRST_NODE."""

TASK = 1  # Flower's own simulation has one task, too


def assume_identity(run_id: int, node_id: int = SUPERLINK_NODE_ID, task_id: int = TASK) -> None:
    """Make this process a node of a run: the source of the messages that it constructs.

    Args:
        run_id: of the run.
        node_id: of a client, or that of the server.
        task_id: of the process; a deployment draws 64 bits.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id
