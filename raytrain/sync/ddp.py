"""Data parallelism: every replica takes the step that one replica with all examples would take."""

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from raytrain.errors import TrainingError
from raytrain.sync.averaging import Averager
from raytrain.sync.buffers import state_tensors
from raytrain.sync.options import DdpOptions
from raytrain.sync.step_message import StepMessage
from raytrain.sync.synchroniser import StepSynchroniser, StepTotals
from raytrain.sync.transport import PendingWork


def ddp(averager: Averager, options: DdpOptions) -> "DataParallel":
    """Return the synchroniser that all-reduces gradients in every step."""
    return DataParallel(averager, options.bucket_bytes)


class DataParallel(StepSynchroniser):
    """All-reduces gradients in buckets during the backward pass.

    The result is the exact weighted mean, sum of weight * gradient over sum of weight, so uneven batches count by their
    weight. A parameter that no replica used keeps its gradient None, as on a single replica. Buffers that the forward
    pass updates (the running means of BatchNorm) become their weighted mean.

    Args:
        averager: over the replicas; with a single replica nothing is sent or copied.
        bucket_bytes: size of a bucket; 0: by the size of the model.
    """

    def __init__(self, averager: Averager, bucket_bytes: int) -> None:
        super().__init__()
        self._averager = averager
        self._alone = len(averager.transport.members) == 1
        self._bucket_bytes = bucket_bytes
        self._buckets: list[_Bucket] = []
        self._weight = 0.0
        self._armed = False

    def attach(self, module: nn.Module) -> None:
        """Broadcast the first replica's parameters and buffers, and register gradient hooks."""
        if self._alone:
            return
        for tensor in state_tensors(module):
            self._await(self._averager.transport.broadcast(tensor.data))
        self._step_message = StepMessage(module, self._averager.transport.device)
        # The backward pass fills gradients from the last layer to the first.
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad][::-1]
        sixteenth = sum(_bytes(parameter) for parameter in trainable) // 16
        piece = self._bucket_bytes or min(max(sixteenth, 1 << 20), 25 << 20)
        self._buckets = [_Bucket(part) for part in make_buckets(trainable, piece)]
        for bucket in self._buckets:
            for index, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket, index))

    def set_weight(self, weight: float) -> float:
        """Return the weight: each replica's gradient is of its own mean loss."""
        self._weight = weight
        return weight

    def before_backward(self) -> None:
        """Send buckets during the next backward pass."""
        self._armed = not self._alone
        for bucket in self._buckets:
            bucket.clear()

    def before_step(self, loss: float, stop: bool) -> StepTotals:
        """Send the remaining buckets, wait for all, and set the mean gradients."""
        if self._alone:
            return StepTotals(self._weight, loss, stop)
        self._armed = False
        for bucket in self._buckets:
            bucket.fill_missing()
        self._launch_ready()
        used = [float(flag) for bucket in self._buckets for flag in bucket.used]
        message = self._step_message.pack([self._weight, loss, float(stop), *used])
        pending = self._averager.transport.all_reduce(message)
        for bucket in self._buckets:
            if bucket.pending:
                self._await(bucket.pending)
        self._await(pending)
        weight, loss, stops, *users = self._step_message.unpack(message)
        self._set_gradients(users)
        return StepTotals(weight, loss, bool(stops))

    def _on_gradient(self, bucket: "_Bucket", index: int, parameter: Tensor) -> None:
        if self._armed:
            if bucket.used[index]:
                raise TrainingError(
                    f"a parameter of shape {tuple(parameter.shape)} got its gradient in two parts, as re-entrant "
                    "activation checkpointing does to shared layers; checkpoint them with use_reentrant=False"
                )
            bucket.add(index, parameter)
            self._launch_ready()

    def _launch_ready(self) -> None:
        """Launch full buckets, in the same order on all replicas."""
        for bucket in self._buckets:
            if bucket.pending is None:
                if bucket.missing:
                    return
                bucket.pending = self._averager.average(bucket.flat, self._weight)

    def _set_gradients(self, users: Sequence[float]) -> None:
        """Set the mean gradient of each parameter, or None if no replica used it."""
        parameters = [parameter for bucket in self._buckets for parameter in bucket.parameters]
        views = [view for bucket in self._buckets for view in bucket.views]
        for parameter, view, count in zip(parameters, views, users, strict=True):
            parameter.grad = view.to(parameter.dtype) if count else None


def make_buckets(tensors: Iterable[Tensor], limit_bytes: int) -> list[list[Tensor]]:
    """Split a list of tensors into buckets of one type of at most `limit_bytes`, or of one tensor that is larger.

    The buckets in order are the list: no tensor is lost, whatever the sizes.
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
    """Gradients in one flat buffer, with room for the weight at the end; narrow types are summed in float32."""

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
        self.pending: PendingWork | None = None

    def add(self, index: int, parameter: Tensor) -> None:
        if not self.used[index] and parameter.grad is not None:
            self.views[index].copy_(parameter.grad)
            parameter.grad = None  # the copy is enough: never hold gradients twice
            self.used[index] = True
            self.missing -= 1

    def fill_missing(self) -> None:
        """Copy gradients that an earlier micro-batch left, and zeros where there is none."""
        for index, parameter in enumerate(self.parameters):
            self.add(index, parameter)
            if not self.used[index]:
                self.views[index].zero_()
        self.missing = 0
