"""Moving tensors between replicas: one process group of one's own, never the default one.

Every operation starts at once and returns a `PendingWork`; a tensor given to one must not be touched until `wait` returns.
"""

import datetime
import gc
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh

LOCAL_FAULTS = ("Invalid scalar type", "out of memory", "must be contiguous", "nsupported")
"""Parts of the messages of errors that this replica makes by itself, and would make again."""


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""The network interface that leads nowhere but to this machine."""

MAX_MEMBERS = 1024
"""How many may ask for a connection to the store at once."""


class PeerLostError(RuntimeError):
    """An operation failed because another replica died, hung or left; this replica itself did nothing wrong."""


class PendingWork(Protocol):
    """An operation under way.

    Attributes:
        bytes_sent: what this replica puts on the wire for it.
    """

    bytes_sent: int

    @property
    def seconds(self) -> float:
        """From its start to its arrival; known after `wait`."""
        ...

    def poll(self) -> bool:
        """Do what can be done without waiting, and return whether the result has arrived."""
        ...

    def wait(self) -> Tensor:
        """Return the result once it has arrived.

        Raises:
            PeerLostError: it will not arrive.
        """
        ...


class Transport(Protocol):
    """A group of replicas.

    Attributes:
        rank: this replica's place in `members`.
        members: the replicas of the group, in order.
        device: where tensors must be.
    """

    rank: int
    members: tuple[int, ...]
    device: torch.device

    @property
    def is_waiting(self) -> bool:
        """Whether this replica stands still for others just now."""
        ...

    def all_reduce(self, flat: Tensor) -> PendingWork:
        """Sum `flat` over the replicas, in place; the result is equal to the bit on all of them."""
        ...

    def all_gather(self, flat: Tensor) -> PendingWork:
        """Return the `flat` of each replica, all of one shape, as shape (members, *flat.shape)."""
        ...

    def all_to_all(self, rows: Tensor) -> PendingWork:
        """Send row i of `rows`, shape (members, n), to replica i; return the rows that came, in the replicas' order."""
        ...

    def broadcast(self, flat: Tensor) -> PendingWork:
        """Overwrite `flat` with that of the first replica."""
        ...

    def new_channel(self) -> "Transport":
        """Return the same replicas, for operations that each of them may start before or after others' on this one.

        Every replica asks for its lanes in the same order; they close with this one.
        """
        ...

    def close(self) -> None:
        """Leave the group; replicas that still wait for this one learn that it is lost."""
        ...


class CompletedWork:
    """A `PendingWork` that has nothing to wait for."""

    bytes_sent = 0
    seconds = 0.0

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def poll(self) -> bool:
        """Return that it has arrived."""
        return True

    def wait(self) -> Tensor:
        """Return the result."""
        return self._result


class LocalTransport:
    """The group of a replica that is alone."""

    rank: int = 0
    members: tuple[int, ...] = (0,)
    is_waiting = False

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def all_reduce(self, flat: Tensor) -> PendingWork:
        """Return `flat`: the sum over one replica."""
        return CompletedWork(flat)

    def all_gather(self, flat: Tensor) -> PendingWork:
        """Return `flat` with a dimension for the one replica."""
        return CompletedWork(flat.unsqueeze(0))

    def all_to_all(self, rows: Tensor) -> PendingWork:
        """Return `rows`: the one replica's own."""
        return CompletedWork(rows)

    def broadcast(self, flat: Tensor) -> PendingWork:
        """Return `flat`."""
        return CompletedWork(flat)

    def new_channel(self) -> "LocalTransport":
        """Return itself: nothing is ever under way."""
        return self

    def close(self) -> None:
        """Do nothing: nobody waits."""


def join_group(
    backend: str, rank: int, members: int, address: tuple[str, int], timeout_seconds: float, secret: str
) -> None:
    """Make the default process group of torch.distributed, which has to be there for there to be others.

    Its members find each other through a store in the process of rank 0, which listens on `address` and not, as torch's
    own would, on all of the machine's. All keys of the run begin with its secret, so that neither a stranger nor
    another run, which do not know it, can be taken for a member.

    Args:
        backend: of torch.distributed.
        rank: this process's place among the members.
        members: how many there are.
        address: host and port, which are free at rank 0.
        timeout_seconds: how long the others may take to come.
        secret: the same for all members, and known to them alone.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    host, port = address
    listener = _listening(host, port) if rank == 0 else None
    store = TCPStore(
        host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, master_listen_fd=listener
    )
    dist.init_process_group(backend, store=PrefixStore(secret, store), rank=rank, world_size=members, timeout=timeout)


def _listening(host: str, port: int) -> int:
    """Return the file descriptor of a socket that takes connections at one address, for a store to own."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=MAX_MEMBERS).detach()


class GroupTransport:
    """A process group over all ranks of torch.distributed, made for this purpose (gloo on CPUs, NCCL on GPUs).

    Args:
        device: where tensors are.
        timeout_seconds: how long an operation may take before its peers count as lost.
    """

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        self.rank = dist.get_rank()
        self.members = tuple(range(dist.get_world_size()))
        self.device = device
        self._is_waiting = False
        self._channels: list[GroupTransport] = []
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        self._group: dist.ProcessGroup | None = dist.new_group(timeout=self._timeout)
        self._mesh_group: dist.ProcessGroup | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether this replica stands still, here or in a lane."""
        return self._is_waiting or any(lane.is_waiting for lane in self._channels)

    def new_channel(self) -> "GroupTransport":
        """Return another process group."""
        self._channels.append(GroupTransport(self.device, self._timeout.total_seconds()))
        return self._channels[-1]

    def all_reduce(self, flat: Tensor) -> PendingWork:
        """Sum `flat` in place (a ring moves each byte 2 (n - 1) / n times)."""
        size = len(self.members)
        return self._start(
            lambda: dist.all_reduce(flat, group=self._group, async_op=True), flat, 2 * (size - 1) / size * _bytes(flat)
        )

    def all_gather(self, flat: Tensor) -> PendingWork:
        """Return all `flat`, stacked."""
        size = len(self.members)
        all_flat = flat.new_empty((size, *flat.shape))
        parts = list(all_flat.unbind(0))
        return self._start(
            lambda: dist.all_gather(parts, flat, group=self._group, async_op=True), all_flat, (size - 1) * _bytes(flat)
        )

    def all_to_all(self, rows: Tensor) -> PendingWork:
        """Send each row to its replica."""
        size, received = len(self.members), torch.empty_like(rows)
        return self._start(
            lambda: dist.all_to_all_single(received, rows, group=self._group, async_op=True),
            received,
            (size - 1) / size * _bytes(rows),
        )

    def broadcast(self, flat: Tensor) -> PendingWork:
        """Overwrite `flat` with rank 0's."""
        sent = _bytes(flat) if self.rank == 0 else 0
        # As bytes, because gloo knows few types; what is not contiguous is of a type that it knows, or gloo will say.
        raw = flat.view(-1).view(torch.uint8) if flat.is_contiguous() and flat.numel() else flat
        return self._start(lambda: dist.broadcast(raw, 0, group=self._group, async_op=True), flat, sent)

    def gather_into(self, whole: Tensor, part: Tensor) -> int:
        """Put the `part` of each replica into `whole`, one after the other, before anything else can read it.

        Returns:
            The bytes sent. On a GPU the call returns at once, and what comes after it on the GPU waits.
        """
        with self.waiting_since(time.monotonic()):
            # As bytes, because gloo knows few types.
            dist.all_gather_single(whole.view(torch.uint8), part.view(torch.uint8), group=self._group)
        return (len(self.members) - 1) * _bytes(part)

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> int:
        """Put this replica's part of the sum of all `whole` into `part`; otherwise like `gather_into`."""
        with self.waiting_since(time.monotonic()):
            if self.device.type == "cpu":  # gloo's own sums everything everywhere: twice the bytes
                received = torch.empty_like(whole)
                dist.all_to_all_single(received, whole, group=self._group)
                torch.sum(received.view(len(self.members), -1), dim=0, out=part)
            else:
                dist.reduce_scatter_single(part, whole, group=self._group)
        return (len(self.members) - 1) * _bytes(part)

    def mesh(self) -> DeviceMesh:
        """Return the replicas as torch's FSDP wants them described.

        A group that FSDP keeps would not close when this replica leaves, so the description is of a group apart: what
        is sent goes through the transport.
        """
        if self._mesh_group is None:
            with self.waiting_since(time.monotonic()):
                self._mesh_group = dist.new_group(timeout=self._timeout)
        return DeviceMesh.from_group(self._mesh_group, self.device.type)

    def close(self) -> None:
        """Close the connections, which gloo does when nothing refers to the group any more."""
        for lane in self._channels:
            lane.close()
        group, self._group = self._group, None
        dist.destroy_process_group(group)
        del group
        if self._mesh_group is not None:
            dist.destroy_process_group(self._mesh_group)
        gc.collect()  # the hooks on parameters refer to exchanges under way, and these to the group

    def _start(self, launch: Callable[[], dist.Work], result: Tensor, bytes_sent: float) -> PendingWork:
        started = time.monotonic()
        with _lost(started):
            return _GroupWork(self, launch(), result, int(bytes_sent), started)

    @contextmanager
    def waiting_since(self, started: float) -> Iterator[None]:
        """Say inside the `with` block that this replica waits, and what it means if that fails."""
        self._is_waiting = True
        try:
            with _lost(started):
                yield
        finally:
            self._is_waiting = False


class _GroupWork:
    def __init__(
        self, transport: GroupTransport, work: dist.Work, result: Tensor, bytes_sent: int, started: float
    ) -> None:
        self.bytes_sent = bytes_sent
        self.seconds = 0.0
        self._transport = transport
        self._work: dist.Work | None = work
        self._result = result
        self._started = started
        if not result.is_cuda:
            work.get_future().add_done_callback(self._arrive)

    def _arrive(self, _: object) -> None:
        self.seconds = time.monotonic() - self._started

    def poll(self) -> bool:
        return self._work is None or self._work.is_completed()

    def wait(self) -> Tensor:
        work, self._work = self._work, None  # a finished operation must not keep the connections open
        with self._transport.waiting_since(self._started):
            if work is not None:
                work.wait()
            # NCCL's wait only holds the GPU; a hang of another must be seen to be no hang of ours.
            if self._result.is_cuda:
                torch.cuda.current_stream(self._result.device).synchronize()
        self.seconds = self.seconds or time.monotonic() - self._started
        return self._result


@contextmanager
def _lost(started: float) -> Iterator[None]:
    """Tell an operation that failed because of another replica from one that failed because of this one."""
    try:
        yield
    except RuntimeError as error:
        if any(sign in str(error) for sign in LOCAL_FAULTS):
            raise
        waited = time.monotonic() - started
        raise PeerLostError(
            f"another worker died, hung or left during an exchange ({waited:.1f} s after its start): {error}"
        ) from error


def _bytes(flat: Tensor) -> int:
    return flat.numel() * flat.element_size()
