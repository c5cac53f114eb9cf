"""The laws of local updates: replicas are threads, on a quadratic whose minimum differs from one to the next."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from raytrain.recipe import options_parameter
from raytrain.registry import resolve
from raytrain.sync.averaging import ExactAverager
from raytrain.sync.compression import CompressedAverager
from raytrain.sync.ddp import DataParallel
from raytrain.sync.global_momentum import GlobalMomentum
from raytrain.sync.interval import SyncInterval
from raytrain.sync.local_updates import LocalUpdates
from raytrain.sync.methods import delayed_averaging
from raytrain.sync.options import COMPRESSIONS, SYNCHRONISERS, DelayedAveragingOptions
from raytrain.sync.outer import GapAwarePenalty, OuterOptimizer, SecantPenalty, max_stable_lr
from raytrain.sync.transport import LocalTransport
from raytrain.testing import ThreadGroup, ThreadTransport

WIDTH = 3


class Quadratic(nn.Module):
    """A point, and the loss sum_i curvature_i (point_i - target_i)^2 / 2: each coordinate is a problem of its own."""

    def __init__(self, curvature: Tensor | None = None) -> None:
        super().__init__()
        self.curvature = torch.ones(WIDTH, dtype=torch.float64) if curvature is None else curvature
        self.point = nn.Parameter(torch.arange(1.0, len(self.curvature) + 1, dtype=torch.float64))

    def forward(self, target: Tensor) -> Tensor:
        return (self.curvature * (self.point - target).square()).sum() / 2


Make = Callable[[ExactAverager], Any]


def targets(seed: int, rank: int, step: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1000 + rank * 100 + step)
    return torch.randn(width, generator=generator, dtype=torch.float64)


def run(
    make: Make,
    members: int,
    steps: int,
    *,
    seed: int = 0,
    lr: float = 0.3,
    momentum: float = 0.0,
    curvature: Tensor | None = None,
    target: Tensor | None = None,
) -> list[Any]:
    """Train replicas; return for each (its points after every step, its point at the end, the synchroniser)."""

    def replica(transport: ThreadTransport) -> Any:
        module = Quadratic(curvature)
        optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
        sync = make(ExactAverager(transport))
        sync.attach(module)
        points = []
        for step in range(steps):
            sync.set_weight(1.0)
            sync.before_backward()
            drawn = targets(seed, transport.rank, step, len(module.point))
            loss = module(drawn if target is None else target)
            loss.backward()
            sync.before_step(loss.item(), stop=False)
            optimizer.step()
            optimizer.zero_grad()
            sync.after_step(1.0)
            points.append(module.point.detach().clone())
        sync.finish()
        return points, module.point.detach().clone(), sync

    return ThreadGroup(members).run(replica)


def local(
    every: int, delay: int = 0, *, keep: bool = True, pull: float = 1.0, share: float = 0.0, **outer: Any
) -> Make:
    def make(averager: ExactAverager) -> LocalUpdates:
        velocity = GlobalMomentum(share) if share else None
        pace = SyncInterval(every, delay)
        return LocalUpdates(
            averager, OuterOptimizer(**outer), pace, keep_local_progress=keep, alpha=pull, global_momentum=velocity
        )

    return make


SETTINGS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 13), st.integers(0, 99))


@settings(max_examples=30)
@given(SETTINGS, st.data())
def test_replicas_are_equal_to_the_bit_afterwards(setting: tuple[int, int, int, int], data: st.DataObject) -> None:
    members, every, steps, seed = setting
    make = local(
        every,
        data.draw(st.integers(0, every)),
        keep=data.draw(st.booleans()),
        pull=data.draw(st.sampled_from([1.0, 0.4])),
        share=data.draw(st.sampled_from([0.0, 0.7])),
        lr=data.draw(st.floats(0.1, 1.0)),
        momentum_factor=data.draw(st.sampled_from([0.0, 0.5, 0.9])),
        nesterov=data.draw(st.booleans()),
        clip=data.draw(st.sampled_from([0.0, 0.1])),
    )
    (_, first, _), *others = run(make, members, steps, seed=seed)
    for _, point, _ in others:
        assert torch.equal(point, first)


@settings(max_examples=20)
@given(SETTINGS)
def test_local_sgd_with_one_local_step_is_data_parallel_sgd(setting: tuple[int, int, int, int]) -> None:
    members, _, steps, seed = setting
    expected = run(lambda averager: DataParallel(averager, 0), members, steps, seed=seed)
    for (points, _, _), (others, _, _) in zip(expected, run(local(1), members, steps, seed=seed), strict=True):
        torch.testing.assert_close(points, others, rtol=1e-12, atol=1e-12)


@settings(max_examples=20)
@given(SETTINGS, st.sampled_from([0.0, 0.5]), st.booleans())
def test_the_outer_step_is_torchs_sgd(setting: tuple[int, int, int, int], beta: float, nesterov: bool) -> None:
    """On the mean of the differences, which are found here by local runs from the shared point."""
    members, every, rounds, seed = setting
    outer = {"lr": 0.7, "momentum_factor": beta, "nesterov": nesterov and beta > 0}
    (points, _, _), *_ = run(local(every, **outer), members, every * rounds, seed=seed)
    shared = nn.Parameter(Quadratic().point.detach().clone())
    optimizer = torch.optim.SGD([shared], lr=0.7, momentum=beta, nesterov=outer["nesterov"])
    for turn in range(rounds):
        ends = []
        for rank in range(members):
            point = shared.detach().clone()
            for step in range(turn * every, (turn + 1) * every):
                point -= 0.3 * (point - targets(seed, rank, step))
            ends.append(point)
        shared.grad = shared.detach() - torch.stack(ends).mean(0)
        optimizer.step()
        torch.testing.assert_close(points[(turn + 1) * every - 1], shared.detach(), rtol=1e-9, atol=1e-11)


@settings(max_examples=20)
@given(SETTINGS, st.sampled_from([0.0, 0.5]))
def test_co2_without_delay_is_slowmo(setting: tuple[int, int, int, int], beta: float) -> None:
    members, every, steps, seed = setting
    one = run(local(every, 0, keep=False, momentum_factor=beta), members, steps, seed=seed)
    other = run(local(every, 0, keep=True, momentum_factor=beta), members, steps, seed=seed)
    for (points, last, _), (others, final, _) in zip(one, other, strict=True):
        torch.testing.assert_close(points, others, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(last, final, rtol=1e-12, atol=1e-12)


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 99), st.data())
def test_late_without_momentum_is_plain_training_for_one_worker(
    every: int, steps: int, seed: int, data: st.DataObject
) -> None:
    options = DelayedAveragingOptions(every=every, delay=data.draw(st.integers(0, every)), global_momentum=0.0)
    [(points, point, _)] = run(lambda averager: delayed_averaging(averager, options), 1, steps, seed=seed)
    [(expected, _, _)] = run(lambda averager: DataParallel(averager, 0), 1, steps, seed=seed)
    torch.testing.assert_close(torch.stack([*points, point]), torch.stack([*expected, expected[-1]]))


class Erratic(SyncInterval):
    """A pace that changes at every mean, as one that is measured may: also to rounds that end before a mean is due."""

    def __init__(self, rounds: list[tuple[int, int]]) -> None:
        super().__init__(*rounds[0])
        self.rounds = rounds

    def learn(self, *_: float) -> None:
        self.rounds = [*self.rounds[1:], self.rounds[0]]
        self.every, self.delay = self.rounds[0]


Rounds = list[tuple[int, int]]
ROUNDS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 8)), min_size=1, max_size=3)
"""Steps in a round, and from sending to applying: also more."""


def drift(transport: ThreadTransport, rounds: Rounds, steps: int, keep: bool, before: list[Any]) -> Any:
    """Go a way of its own that no place changes; return the module and the state, or the last place if it goes on."""
    module = Quadratic()
    sync = LocalUpdates(ExactAverager(transport), OuterOptimizer(), Erratic(rounds), keep_local_progress=keep)
    if before:
        module.load_state_dict(before[0][0])
        sync.load_state_dict(before[transport.rank][1], before[0][1])
    sync.attach(module)
    for _ in range(steps):
        sync.set_weight(1.0)
        sync.before_step(0.0, stop=False)
        with torch.no_grad():
            module.point += 1.0 + transport.rank
        sync.after_step(1.0)
    if before:
        sync.finish()
        return module.point.detach()
    state = sync.state_dict()
    with sync.synced_parameters():
        return copy.deepcopy(module.state_dict()), state


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), ROUNDS, ROUNDS, st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_no_mean_is_lost_whatever_the_pace_before_and_after_a_resume(
    members: int, rounds: Rounds, others: Rounds, steps: int, more: int, keep: bool
) -> None:
    """Also where a mean was to come after the next one is sent."""
    group = ThreadGroup(members)
    before = group.run(lambda transport: drift(transport, rounds, steps, keep, []))
    expected = Quadratic().point.detach() + (steps + more) * (1 + (members - 1) / 2)
    for place in ThreadGroup(members).run(lambda transport: drift(transport, others, more, keep, before)):
        torch.testing.assert_close(place, expected)


@pytest.mark.parametrize("delay", [0, 4, 5, 9])
def test_a_round_of_measured_length_is_never_shorter_than_a_given_delay(delay: int) -> None:
    def make(averager: ExactAverager) -> LocalUpdates:
        return delayed_averaging(averager, DelayedAveragingOptions(every="auto", delay=delay))

    (_, first, _), (_, second, _) = run(make, 2, 100)
    assert torch.equal(first, second)


def late_as_described(members: int, every: int, delay: int, rounds: int, seed: int, share: float) -> list[Tensor]:
    """Return where each replica is after its rounds and `delay` steps more, written out for all replicas at once."""
    pull, stride, still = 1 - (delay / every) ** 2 / 2, max(1, every // 12), 0
    begun = Quadratic().point.detach().clone()
    points, shared, velocity = [begun.clone() for _ in range(members)], begun.clone(), torch.zeros_like(begun)
    moved, sent = [torch.zeros_like(begun) for _ in range(members)], None
    for step in range(every * rounds + delay):
        arrives, ends = step % every == (delay - 1) % every and sent is not None, step % every == every - 1
        still += 1
        adds = still if still == stride or arrives or ends else 0
        still -= adds
        for rank in range(members):
            by = -0.3 * (points[rank] - targets(seed, rank, step)) + share * velocity * adds
            points[rank], moved[rank] = points[rank] + by, moved[rank] + by
        if arrives:
            movement, places = sent
            shared = shared + movement
            velocity = velocity + min(1, every / 24) * (movement / every - velocity)
            points = [point + pull * (shared - place) for point, place in zip(points, places, strict=True)]
            sent = None
        if ends:
            sent = (torch.stack(moved).mean(0), list(points))
            moved = [torch.zeros_like(begun) for _ in range(members)]
    return points


@settings(max_examples=40)
@given(st.integers(1, 4), st.sampled_from([1, 2, 5, 11, 30]), st.integers(1, 6), st.integers(0, 99), st.data())
def test_a_late_mean_pulls_the_replicas_and_becomes_part_of_their_steps(
    members: int, every: int, rounds: int, seed: int, data: st.DataObject
) -> None:
    delay, share = data.draw(st.integers(1, every)), data.draw(st.sampled_from([0.0, 0.4, 0.7]))
    options = DelayedAveragingOptions(every=every, delay=delay, global_momentum=share)
    expected = late_as_described(members, every, delay, rounds, seed, share)
    found = run(lambda averager: delayed_averaging(averager, options), members, every * rounds + delay, seed=seed)
    for rank, (points, _, _) in enumerate(found):
        torch.testing.assert_close(points[-1], expected[rank], rtol=1e-9, atol=1e-11)


@settings(max_examples=20)
@given(SETTINGS, st.sampled_from([0.3, 0.7]), st.data())
def test_the_mean_of_the_replicas_moves_as_if_all_were_known_to_all(
    setting: tuple[int, int, int, int], share: float, data: st.DataObject
) -> None:
    """Being pulled changes where a replica is, not where their mean is: on a quadratic, how far makes no difference."""
    members, every, rounds, seed = setting
    delay = data.draw(st.integers(0, every))
    means = []
    for pull in (1.0, 0.3):
        found = run(local(every, delay, pull=pull, share=share), members, every * rounds, seed=seed)
        means.append(torch.stack([torch.stack(points) for points, _, _ in found]).mean(0))
    torch.testing.assert_close(*means)


@pytest.mark.parametrize("delay", [0, 1, 3])
def test_a_movement_that_lasts_is_amplified_up_to_one_over_what_is_no_momentum(delay: int) -> None:
    """Where every step is the same, whatever the point."""
    share, lr = 0.7, 0.01
    targets_far_away = 1e6

    def replica(transport: ThreadTransport) -> list[float]:
        module = Quadratic()
        optimizer = torch.optim.SGD(module.parameters(), lr=lr / targets_far_away)
        sync = local(3, delay, share=share)(ExactAverager(transport))
        sync.attach(module)
        places = []
        for _ in range(900):
            sync.set_weight(1.0)
            module(torch.full((WIDTH,), targets_far_away, dtype=torch.float64)).backward()
            sync.before_step(0.0, stop=False)
            optimizer.step()
            optimizer.zero_grad()
            sync.after_step(1.0)
            places.append(module.point[0].item())
        return places

    for places in ThreadGroup(2).run(replica):
        first, last = places[2] - places[1], (places[-1] - places[-101]) / 100
        assert first == pytest.approx(lr, rel=1e-4)
        assert last == pytest.approx(lr / (1 - share), rel=1e-3)


def shares_left(make: Make, steps: int, rates: list[float], momentum: float = 0.0) -> list[float]:
    """Return what share of its distance to the minimum one replica has left, by each of some learning rates."""
    curvature = torch.tensor(rates, dtype=torch.float64)  # a step of lr 1 on these is one of these rates on 1
    [(points, _, _)] = run(make, 1, steps, lr=1.0, momentum=momentum, curvature=curvature, target=0 * curvature)
    return (points[-1] / Quadratic(curvature).point).abs().tolist()


@pytest.mark.parametrize("every", [1, 4, 12, 48])
@pytest.mark.parametrize(("momentum", "share"), [(0.0, 0.9), (0.9, 0.7)])
def test_momentum_that_is_spread_over_local_steps_is_stable_however_late(
    every: int, momentum: float, share: float
) -> None:
    for delay in {every // 4, every}:
        assert max(shares_left(local(every, delay, share=share), 800, [0.03, 0.1, 0.3, 1.0], momentum)) < 0.05


def test_nesterovs_momentum_diverges_where_it_comes_late() -> None:
    assert shares_left(local(6, 6, pull=0.5, momentum_factor=0.97, nesterov=True), 1200, [0.1])[0] > 5
    assert shares_left(local(6, 6, pull=0.5, share=0.97), 1200, [0.1])[0] < 0.5


def test_what_does_not_train_does_not_move() -> None:
    """As half of a block, when it is frozen for a turn."""
    first, last = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    velocity = GlobalMomentum(0.5)
    velocity.reset(torch.zeros(5), [first, last], torch.ones(5))
    first.requires_grad_(False)
    velocity.apply(4)
    assert torch.equal(first, torch.zeros(2))
    assert torch.equal(last, torch.full((3,), 2.0))
    last.requires_grad_(False)
    velocity.apply(4)
    assert torch.equal(last, torch.full((3,), 2.0))


@pytest.mark.parametrize("pull", [1.0, 0.5])
def test_a_pull_keeps_replicas_together_where_steps_forget_the_distance(pull: float) -> None:
    """With lr 1 a step forgets where it began, so that a round late -pull times the distance is left after a round."""
    rounds = 5
    found = run(local(4, 4, pull=pull), 4, 4 * rounds, lr=1.0, curvature=torch.ones(300, dtype=torch.float64))
    points = torch.stack([points[-1] for points, _, _ in found])
    alone = 1 - 1 / 4  # the variance of four targets around their own mean
    strays = (points - points.mean(0)).square().mean().item()
    assert strays == pytest.approx(alone * sum(pull ** (2 * age) for age in range(rounds)), rel=0.15)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 0.9])
def test_a_delayed_round_is_stable_below_one_minus_beta(beta: float) -> None:
    """On a quadratic that local steps shrink by 1 - c: rate * c < 1 - beta with delay, < 2 (1 + beta) without."""

    for delay, nesterov, expected in (
        (1, False, 1 - beta),
        (0, False, 2 * (1 + beta)),
        (0, True, 2 * (1 + beta) / (1 + 2 * beta)),
    ):
        limit = max_stable_lr(OuterOptimizer(momentum_factor=beta, nesterov=nesterov), late=bool(delay))
        assert limit == pytest.approx(expected)
        make = local(1, delay, keep=False, lr=2 * limit, momentum_factor=beta, nesterov=nesterov)
        stable, unstable = shares_left(make, 400, [0.8 / 2, 1.25 / 2])
        assert stable < 0.1
        assert unstable > 10


@pytest.mark.parametrize(
    ("sync", "warned"),
    [
        ({"name": "co2", "penalty": "none"}, "stable below 0.8 / c"),
        ({"name": "co2", "penalty": "gap-aware", "outer_momentum": 0.5}, "stable below 0.5 / c"),
        ({"name": "co2", "penalty": "constant"}, ""),
        ({"name": "co2"}, ""),
        ({"name": "slowmo", "outer_lr": 3.5}, "sync.outer_lr = 3.5 can diverge"),
        ({"name": "diloco", "outer_lr": 1.4}, "stable below 1.36 / c"),
        ({"name": "diloco"}, ""),
    ],
)
def test_an_outer_step_that_may_diverge_is_told(
    sync: dict[str, Any], warned: str, caplog: pytest.LogCaptureFixture
) -> None:
    factory = resolve(SYNCHRONISERS, sync["name"], "sync.name")
    caplog.set_level("WARNING")
    factory(ExactAverager(LocalTransport()), options_parameter(factory)(**sync))
    assert [warned in message for message in caplog.messages] == ([True] if warned else [])


@settings(max_examples=20)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_the_mean_of_a_round_is_over_the_samples_of_those_who_did_any(weights: list[list[int]], seed: int) -> None:
    """Each list is of what a replica's four steps count: any of them, or all, may be 0."""

    def replica(transport: ThreadTransport) -> tuple[Tensor, Tensor]:
        module = Quadratic()
        sync = local(4)(ExactAverager(transport))
        sync.attach(module)
        for step, weight in enumerate(weights[transport.rank]):
            sync.set_weight(float(weight))
            sync.before_step(0.0, stop=False)
            with torch.no_grad():
                if weight:
                    module.point += targets(seed, transport.rank, step)
                own = module.point.detach().clone()
            sync.after_step(1.0)
        return own, module.point.detach().clone()

    found = ThreadGroup(len(weights)).run(replica)
    samples = torch.tensor([float(sum(own)) for own in weights], dtype=torch.float64)
    ends = torch.stack([own for own, _ in found])
    expected = samples @ ends / samples.sum() if samples.sum() else Quadratic().point.detach()
    for _, point in found:
        torch.testing.assert_close(point, expected)


@pytest.mark.parametrize("codec", COMPRESSIONS)
@pytest.mark.parametrize("delay", [0, 3])
def test_coded_differences_train_as_exact_ones_and_are_equal_on_all(codec: str, delay: int) -> None:
    def make(averager: ExactAverager) -> LocalUpdates:
        return local(4, delay)(
            CompressedAverager(averager.transport, resolve(COMPRESSIONS, codec, "sync.compression")())
        )

    expected = run(local(4, delay), 3, 80)
    found = run(make, 3, 80)
    for (_, one, _), (_, other, sync) in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)
        assert torch.equal(other, found[0][1])
        assert not torch.equal(one, other)
        assert sync.bytes_sent > 0


@pytest.mark.parametrize(
    ("sync", "buffers"),
    [
        ({"name": "local-sgd"}, 3),
        ({"name": "cocod"}, 3),
        ({"name": "slowmo"}, 4),
        ({"name": "diloco"}, 4),
        ({"name": "delayed-averaging", "delay": 2}, 4),
        ({"name": "co2", "penalty": "constant"}, 4),
        ({"name": "co2", "penalty": "secant"}, 5),
        ({"name": "delayed-averaging", "delay": 2, "compression": "int8"}, 4 + 1 + 1 / 2),
    ],
)
def test_a_replica_keeps_as_many_buffers_as_the_readme_says(sync: dict[str, Any], buffers: float) -> None:
    size = 64 * 1024
    factory = resolve(SYNCHRONISERS, sync["name"], "sync.name")
    options = options_parameter(factory)(every=3, **sync)

    def replica(transport: ThreadTransport) -> float:
        module = nn.Linear(1024, 64, bias=False)
        one = factory(ExactAverager(transport), options)
        one.attach(module)
        for _ in range(10):
            one.set_weight(1.0)
            one.before_step(0.0, stop=False)
            one.after_step(1.0)
        one.finish()
        return sum(tensor.numel() for tensor in kept(one, {module.weight.untyped_storage()._cdata})) / size

    for found in ThreadGroup(2).run(replica):
        assert found == pytest.approx(buffers, abs=0.001)


def kept(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Yield each tensor that an object of ours holds, one for each piece of memory."""
    for value in vars(thing).values():
        if isinstance(value, Tensor):
            if value.untyped_storage()._cdata not in seen:
                seen.add(value.untyped_storage()._cdata)
                yield value
        elif type(value).__module__.startswith("raytrain.sync") and id(value) not in seen:
            seen.add(id(value))
            yield from kept(value, seen)


class Counting(Quadratic):
    """Counts in a buffer what it saw, as a BatchNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("shared", [True, False])
def test_buffers_are_averaged_or_stay_local_until_the_end(shared: bool) -> None:
    def replica(transport: ThreadTransport) -> list[float]:
        module = Counting()
        sync = LocalUpdates(
            ExactAverager(transport),
            OuterOptimizer(),
            SyncInterval(2, 0),
            keep_local_progress=True,
            share_buffers=shared,
        )
        sync.attach(module)
        seen = []
        for _ in range(5):
            sync.set_weight(1.0)
            module.seen += 1.0 + 2.0 * transport.rank
            sync.before_step(0.0, stop=False)
            sync.after_step(1.0)
            seen.append(module.seen.item())
        state = sync.state_dict()
        assert [value.item() for value in state["buffers"]] == [seen[-1]]
        sync.finish()
        return [*seen, module.seen.item()]

    averaged = [[1, 4, 5, 8, 9, 10], [3, 4, 7, 8, 11, 10]]
    apart = [[1, 2, 3, 4, 5, 10], [3, 6, 9, 12, 15, 10]]
    assert ThreadGroup(2).run(replica) == (averaged if shared else apart)


@pytest.mark.parametrize(("keep", "delay"), [(False, 2), (False, 0), (True, 0), (True, 1)])
def test_a_shared_buffer_is_the_mean_of_where_the_replicas_ended_a_round(keep: bool, delay: int) -> None:
    """However late it comes; without `keep` a replica begins a round at the newest that there is."""

    def replica(transport: ThreadTransport) -> tuple[list[float], list[float], list[float]]:
        module = Counting()
        sync = LocalUpdates(
            ExactAverager(transport), OuterOptimizer(), SyncInterval(2, delay), keep_local_progress=keep
        )
        sync.attach(module)
        ends, shared, begun = [], [], []
        for step in range(12):
            sync.set_weight(1.0 + transport.rank)
            module.seen.mul_(0.5).add_(targets(0, transport.rank, step)[0].abs())
            sync.before_step(0.0, stop=False)
            ends.append(module.seen.item())
            sync.after_step(1.0)
            begun.append(module.seen.item())
            with sync.synced_parameters():
                shared.append(module.seen.item())
        return ends[1::2], shared, begun[1::2]

    (ends, shared, begun), (others, _, _) = ThreadGroup(2).run(replica)
    means = [(one + 2 * other) / 3 for one, other in zip(ends, others, strict=True)]
    assert shared[1 + delay :: 2][: len(means)] == pytest.approx(means[: len(shared[1 + delay :: 2])])
    if not keep:
        assert begun == pytest.approx(shared[1::2])


@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("name", [name for name in SYNCHRONISERS if name not in ("ddp", "fsdp")])
def test_what_was_loaded_is_where_the_model_is(name: str, codec: str | None) -> None:
    """A checkpoint is read on the CPU; "meta" stands for a GPU, which has the same rule: one device in an operation."""
    factory = resolve(SYNCHRONISERS, name, "sync.name")
    options = options_parameter(factory)(name=name, every=3, compression=codec)

    def made(device: torch.device) -> tuple[Any, nn.Module]:
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(device)
        return factory(ExactAverager(LocalTransport(device)), options), module

    sync, module = made(torch.device("cpu"))
    sync.attach(module)
    for _ in range(10):
        sync.set_weight(1.0)
        sync.before_step(0.0, stop=False)
        with torch.no_grad():
            module[0].weight += 0.1
        sync.after_step(1.0)
    state = sync.state_dict()
    there, module = made(torch.device("meta"))
    there.load_state_dict(state, state)
    there.attach(module)
    assert [value.device.type for value in kept(there, set())] == ["meta"] * len([*kept(sync, set())])


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("shrink", [0.05, 0.3, 0.9])
def test_the_secant_finds_how_fast_local_rounds_shrink_and_keeps_the_delay_stable(beta: float, shrink: float) -> None:
    """On a quadratic they shrink the error by 1 - c, whatever the momentum does."""
    outer = OuterOptimizer(momentum_factor=beta, penalty=(penalty := SecantPenalty()))
    outer.reset(point := torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), None)
    differences = [shrink * point]
    for _ in range(400):
        differences.append(shrink * point)  # made from here, and applied a round later
        outer(differences.pop(0).clone(), 1.0)
    assert penalty.curvature == pytest.approx(shrink, rel=1e-3)
    assert point.abs().max() < 1e-2


def test_the_secant_averages_what_it_finds_from_round_to_round() -> None:
    """Along one coordinate, differences that shrink by other shares in each round: c <- 0.7 c + 0.3 found."""
    outer = OuterOptimizer(penalty=(penalty := SecantPenalty()))
    outer.reset(point := torch.tensor([1.0], dtype=torch.float64), None)
    places, expected, before = [point.item()], None, 0.0
    for turn, share in enumerate([0.1, 0.5, 0.9, 0.3, 0.7, 0.2]):
        difference = share * places[max(0, turn - 1)]  # made a round ago
        if turn >= 2:
            found = (difference - before) / (places[turn - 1] - places[turn - 2])
            expected = min(max(found, 0), 1) if expected is None else 0.7 * expected + 0.3 * min(max(found, 0), 1)
        before = difference
        outer(torch.tensor([difference], dtype=torch.float64), 1.0)
        places.append(point.item())
        assert penalty.curvature == (None if expected is None else pytest.approx(expected))


def test_the_gap_is_the_last_outer_step() -> None:
    outer = OuterOptimizer(lr=0.5, penalty=GapAwarePenalty())
    outer.reset(torch.zeros(2), None)
    outer(torch.tensor([3.0, 4.0]), 1.0)
    assert outer.anchor.tolist() == [-1.5, -2.0]  # there was no step before: 1
    outer(torch.tensor([0.0, 5.0]), 1.0)
    assert outer.anchor.tolist() == pytest.approx([-1.5, -2.0 - 0.5 * 5.0 / 1.5])  # the step was 0.5 * 5


@settings(max_examples=20)
@given(SETTINGS, st.floats(0.01, 0.5))
def test_the_momentum_is_never_longer_than_the_clip(setting: tuple[int, int, int, int], clip: float) -> None:
    members, every, steps, seed = setting
    for _, _, sync in run(local(every, momentum_factor=0.9, clip=clip), members, steps, seed=seed):
        assert sync._outer.momentum_buffer.abs().max() <= clip
