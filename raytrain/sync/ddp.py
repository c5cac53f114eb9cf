"""Gradient averaging: every replica takes the step that one replica with all the examples would take."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from raytrain.errors import TrainingError
from raytrain.sync.averaging import Exchange
from raytrain.sync.buffers import persistent
from raytrain.sync.options import DdpOptions
from raytrain.sync.step_message import Rest
from raytrain.sync.synchroniser import EveryStep, Totals
from raytrain.sync.transport import Pending


def ddp(exchange: Exchange, options: DdpOptions) -> "GradientAveraging":
    """Return the synchroniser that all-reduces gradients in every step."""
    return GradientAveraging(exchange, options.bucket_bytes)


class GradientAveraging(EveryStep):
    """Average gradients over replicas, piece by piece while the backward pass runs.

    The result is the exact weighted mean: sum of weight * gradient over sum of weight, so uneven shards count by what
    they hold. A parameter that no replica used keeps its gradient None, as it would on one replica. Buffers that the
    forward pass moves (the running means of BatchNorm) move by the mean of the replicas' movements.

    Args:
        exchange: how to average; with a single replica nothing is sent or copied.
        bucket_bytes: size of a piece; 0: by the size of the model.
    """

    def __init__(self, exchange: Exchange, bucket_bytes: int) -> None:
        super().__init__()
        self._exchange = exchange
        self._alone = len(exchange.transport.members) == 1
        self._bucket_bytes = bucket_bytes
        self._buckets: list[_Bucket] = []
        self._weight = 0.0
        self._armed = False

    def start(self, module: nn.Module) -> None:
        """Copy the first replica's parameters and buffers, and watch for gradients."""
        if self._alone:
            return
        for tensor in persistent(module):
            self._await(self._exchange.transport.broadcast(tensor.data))
        self._rest = Rest(module, self._exchange.transport.device)
        # The backward pass fills gradients from the last layer to the first.
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad][::-1]
        sixteenth = sum(_bytes(parameter) for parameter in trainable) // 16
        piece = self._bucket_bytes or min(max(sixteenth, 1 << 20), 25 << 20)
        self._buckets = [_Bucket(part) for part in cut(trainable, piece)]
        for bucket in self._buckets:
            for place, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket, place))

    def begin(self, weight: float) -> float:
        """Return the weight itself: each replica's gradient is that of its own mean."""
        self._weight = weight
        return weight

    def before_backward(self) -> None:
        """Send each piece during the backward pass that comes now."""
        self._armed = not self._alone
        for bucket in self._buckets:
            bucket.clear()

    def before_step(self, loss: float, stop: bool) -> Totals:
        """Send what is left, wait for all pieces, and put the means in place."""
        if self._alone:
            return Totals(self._weight, loss, stop)
        self._armed = False
        for bucket in self._buckets:
            bucket.fill_rest()
        self._launch_ready()
        used = [float(flag) for bucket in self._buckets for flag in bucket.used]
        rest = self._rest.pack([self._weight, loss, float(stop), *used])
        pending = self._exchange.transport.all_reduce(rest)
        for bucket in self._buckets:
            if bucket.pending:
                self._await(bucket.pending)
        self._await(pending)
        weight, loss, stops, *users = self._rest.take(rest)
        self._put_in_place(users)
        return Totals(weight, loss, bool(stops))

    def _on_gradient(self, bucket: "_Bucket", place: int, parameter: Tensor) -> None:
        if self._armed:
            if bucket.used[place]:
                raise TrainingError(
                    f"a parameter of shape {tuple(parameter.shape)} got its gradient in two parts, as re-entrant "
                    "activation checkpointing does to shared layers; checkpoint them with use_reentrant=False"
                )
            bucket.take(place, parameter)
            self._launch_ready()

    def _launch_ready(self) -> None:
        """Launch full pieces, always in the same order: replicas must agree on it."""
        for bucket in self._buckets:
            if bucket.pending is None:
                if bucket.missing:
                    return
                bucket.pending = self._exchange.mean(bucket.flat, self._weight)

    def _put_in_place(self, users: Sequence[float]) -> None:
        """Give each parameter its mean gradient, or none if no replica used it."""
        parameters = [parameter for bucket in self._buckets for parameter in bucket.parameters]
        views = [view for bucket in self._buckets for view in bucket.views]
        for parameter, view, count in zip(parameters, views, users, strict=True):
            parameter.grad = view.to(parameter.dtype) if count else None


def cut(tensors: Iterable[Tensor], limit_bytes: int) -> list[list[Tensor]]:
    """Cut a list of tensors into runs of one type of at most `limit_bytes`, or of one tensor if that alone is larger.

    Joining the runs gives the list back: no tensor is lost, whatever the sizes.
    """
    runs: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        own = _bytes(tensor)
        if not runs or size + own > limit_bytes or tensor.dtype != runs[-1][0].dtype:
            runs.append([])
            size = 0
        runs[-1].append(tensor)
        size += own
    return runs


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Bucket:
    """Some gradients in one flat buffer, with room for the weight at the end; narrow types are summed in float32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        sizes = [parameter.numel() for parameter in parameters]
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        self.flat = torch.zeros(sum(sizes) + 1, dtype=dtype, device=parameters[0].device)
        self.views = [part.view_as(like) for part, like in zip(self.flat[:-1].split(sizes), parameters, strict=True)]
        self.clear()

    def clear(self) -> None:
        self.missing = len(self.parameters)
        self.used = [False] * len(self.parameters)
        self.pending: Pending | None = None

    def take(self, place: int, parameter: Tensor) -> None:
        if not self.used[place] and parameter.grad is not None:
            self.views[place].copy_(parameter.grad)
            parameter.grad = None  # the copy is enough: never hold gradients twice
            self.used[place] = True
            self.missing -= 1

    def fill_rest(self) -> None:
        """Take gradients that an earlier micro-batch left, and zeros where there is none."""
        for place, parameter in enumerate(self.parameters):
            self.take(place, parameter)
            if not self.used[place]:
                self.views[place].zero_()
        self.missing = 0
