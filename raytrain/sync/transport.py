"""Collectives between replicas, in a process group of our own and never in the default one.

Every collective starts at once and returns `PendingWork`; its tensors must not be touched until `wait` returns.
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
"""Parts of the messages of errors that this replica caused itself, and would cause again."""


LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""The loopback network interface."""

MAX_MEMBERS = 1024
"""Simultaneous connection requests to the store."""


class PeerLostError(RuntimeError):
    """A collective failed because another replica died, hung or left."""


class PendingWork(Protocol):
    """A collective in flight, as `torch.distributed.Work`.

    Attributes:
        bytes_sent: by this replica.
    """

    bytes_sent: int

    @property
    def seconds(self) -> float:
        """Seconds from start to completion; known after `wait`."""
        ...

    def poll(self) -> bool:
        """Make progress without blocking, and return whether the result is there."""
        ...

    def wait(self) -> Tensor:
        """Block until the result is there, and return it.

        Raises:
            PeerLostError: another replica is lost.
        """
        ...


class Transport(Protocol):
    """Collectives of a group of replicas.

    Attributes:
        rank: of this replica in `members`.
        members: ranks of the group, in order.
        device: of all tensors.
    """

    rank: int
    members: tuple[int, ...]
    device: torch.device

    @property
    def is_waiting(self) -> bool:
        """Whether this replica is blocked in a collective."""
        ...

    def all_reduce(self, flat: Tensor) -> PendingWork:
        """Sum `flat` over the replicas, in place; the result is bit-identical on all of them."""
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
        """Return an independent channel to the same replicas, whose collectives are not ordered with this one's.

        Every replica creates its channels in the same order; they close with this one.
        """
        ...

    def close(self) -> None:
        """Leave the group; replicas that wait for this one get a `PeerLostError`."""
        ...


class CompletedWork:
    """A collective that is complete."""

    bytes_sent = 0
    seconds = 0.0

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def poll(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> Tensor:
        """Return the result."""
        return self._result


class LocalTransport:
    """The group of a single replica."""

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
        """Return itself: nothing is ever in flight."""
        return self

    def close(self) -> None:
        """Do nothing: nobody waits."""


def join_group(
    backend: str, rank: int, members: int, address: tuple[str, int], timeout_seconds: float, secret: str
) -> None:
    """Create the default process group of torch.distributed, which other groups require.

    Its members meet through a store in the process of rank 0, which listens on `address` and not, as torch's
    own would, on all of the machine's. All keys of the run begin with its secret, so that neither a stranger nor
    another run, which do not know it, can be taken for a member.

    Args:
        backend: of torch.distributed.
        rank: of this process.
        members: world size.
        address: host and free port of rank 0.
        timeout_seconds: until all members have to be there.
        secret: the same for all members, and known to them alone.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    host, port = address
    listener = _listening(host, port) if rank == 0 else None
    store = TCPStore(
        host, port, is_master=rank == 0, timeout=timeout, wait_for_workers=False, master_listen_fd=listener
    )
    dist.init_process_group(backend, store=PrefixStore(secret, store), rank=rank, world_size=members, timeout=timeout)


def free_address(host: str) -> tuple[str, int]:
    """Return an address of this machine with a port that nobody listens on yet.

    >>> free_address("127.0.0.1")[0]
    '127.0.0.1'
    """
    with socket.create_server((host, 0), family=_family(host)) as listener:
        return host, listener.getsockname()[1]


def _listening(host: str, port: int) -> int:
    """Return the file descriptor of a socket that listens on one address, for a store to own."""
    return socket.create_server((host, port), family=_family(host), backlog=MAX_MEMBERS).detach()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


class GroupTransport:
    """A process group over all ranks of torch.distributed (gloo on CPUs, NCCL on GPUs).

    Args:
        device: of all tensors.
        timeout_seconds: of a collective, after which its peers count as lost.
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
        """Whether this replica is blocked, here or in a channel."""
        return self._is_waiting or any(channel.is_waiting for channel in self._channels)

    def new_channel(self) -> "GroupTransport":
        """Return a channel with a process group of its own."""
        self._channels.append(GroupTransport(self.device, self._timeout.total_seconds()))
        return self._channels[-1]

    def all_reduce(self, flat: Tensor) -> PendingWork:
        """Sum `flat` in place (a ring sends each byte 2 (n - 1) / n times)."""
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
        """All-gather `part` into `whole`, for FSDP.

        Returns:
            Bytes sent. On a GPU the call returns at once, and later work of the stream waits.
        """
        with self.waiting_since(time.monotonic()):
            # As bytes, because gloo knows few types.
            dist.all_gather_single(whole.view(torch.uint8), part.view(torch.uint8), group=self._group)
        return (len(self.members) - 1) * _bytes(part)

    def reduce_scatter(self, part: Tensor, whole: Tensor) -> int:
        """Reduce-scatter `whole` into `part`; otherwise like `gather_into`."""
        with self.waiting_since(time.monotonic()):
            if self.device.type == "cpu":  # gloo's own sums everything everywhere: twice the bytes
                received = torch.empty_like(whole)
                dist.all_to_all_single(received, whole, group=self._group)
                torch.sum(received.view(len(self.members), -1), dim=0, out=part)
            else:
                dist.reduce_scatter_single(part, whole, group=self._group)
        return (len(self.members) - 1) * _bytes(part)

    def mesh(self) -> DeviceMesh:
        """Return the device mesh for torch's FSDP.

        It has a process group of its own, because one that FSDP keeps would not close when this replica leaves. What
        FSDP sends goes through this transport.
        """
        if self._mesh_group is None:
            with self.waiting_since(time.monotonic()):
                self._mesh_group = dist.new_group(timeout=self._timeout)
        return DeviceMesh.from_group(self._mesh_group, self.device.type)

    def close(self) -> None:
        """Close the connections, which gloo does when nothing refers to the group."""
        for channel in self._channels:
            channel.close()
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
        """Mark this replica as blocked inside the `with` block, and attribute failures."""
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
    """Raise `PeerLostError` for a failure that another replica caused."""
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
