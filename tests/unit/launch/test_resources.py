import re
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytrain.errors import RecipeError
from raytrain.launch.resources import (
    MOST_ACTORS,
    CpuShare,
    Node,
    NodeResources,
    allocate_cpus,
    check_reachable,
    cpus_per_worker,
    eligible_nodes,
)


def nodes(*cpus: float) -> list[Node]:
    return [Node(each) for each in cpus]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=6), st.integers(1, 100))
def test_workers_get_the_most_whole_cpus_that_fit(machines: list[int], workers: int) -> None:
    def places(each: int) -> int:
        return sum(machine // each for machine in machines)

    if sum(machines) < workers:
        with pytest.raises(RecipeError, match=f"workers: {workers} workers of 1 CPU each do not fit"):
            cpus_per_worker(nodes(*machines), workers, 0)
    else:
        each = int(cpus_per_worker(nodes(*machines), workers, 0))
        assert places(each) >= workers > places(each + 1)


def test_the_message_says_what_would_fit() -> None:
    with pytest.raises(RecipeError) as caught:
        cpus_per_worker(nodes(2.0), 4, 0)
    assert str(caught.value) == (
        "workers: 4 workers of 1 CPU each do not fit on 1 machine(s) with 2 CPUs; set workers=2, or resources.cpus=0.5 "
        "to share CPUs"
    )


@pytest.mark.parametrize(
    ("machines", "workers", "cpus", "actors", "expected"),
    [
        ([1.0], 1, 0, 0, CpuShare(1, 1, 0)),  # nothing left: they share
        ([2.0], 1, 0, 0, CpuShare(1, 1, 1)),
        ([2.0], 2, 0, 0, CpuShare(1, 1, 0)),
        ([2.0], 1, 2, 0, CpuShare(2, 1, 0)),
        ([2.0], 1, 0, 3, CpuShare(2, 3, 0)),
        ([4.0], 1, 0, 0, CpuShare(3, 1, 1)),
        ([4.0], 1, 1, 0, CpuShare(1, 3, 1)),
        ([4.0], 1, 0, 2, CpuShare(2, 2, 1)),
        ([64.0], 1, 1, 0, CpuShare(1, MOST_ACTORS, 1)),
        ([8.0, 8.0], 1, 0, 0, CpuShare(8, 8, 1)),  # on the other machine
        ([8.0, 8.0], 2, 0, 0, CpuShare(7, 1, 1)),
        ([8.0, 8.0], 2, 4, 0, CpuShare(4, 4, 1)),
        ([4.0], 2, 0.5, 0, CpuShare(0.5, 1, 1)),
    ],
)
def test_actors_that_prepare_data_get_what_the_workers_leave(
    machines: list[float], workers: int, cpus: float, actors: int, expected: CpuShare
) -> None:
    assert allocate_cpus(nodes(*machines), workers, cpus, actors, 1.0) == expected


@given(
    st.lists(st.integers(1, 64).map(float), min_size=1, max_size=6),
    st.integers(1, 20),
    st.integers(0, 9),
    st.sampled_from([0.5, 1.0, 2.0]),
)
def test_workers_and_actors_fit_together(machines: list[float], workers: int, actors: int, actor_cpus: float) -> None:
    """Or Ray would wait for ever."""
    if sum(machines) < workers:
        with pytest.raises(RecipeError, match="do not fit"):
            allocate_cpus(nodes(*machines), workers, 0, actors, actor_cpus)
        return
    share = allocate_cpus(nodes(*machines), workers, 0, actors, actor_cpus)
    assert workers * share.total <= sum(machines)
    assert share.actors == actors or (not actors and share.actors >= 1)
    assert share.cpus >= 1


@given(st.integers(1, 16), st.integers(2, 40))
def test_the_advice_works(machine: int, workers: int) -> None:
    try:
        cpus_per_worker(nodes(machine), workers, 0)
    except RecipeError as error:
        advice = float(re.search(r"resources.cpus=([0-9.]+)", str(error)).group(1))
        assert cpus_per_worker(nodes(machine), workers, advice) == advice
        fewer = int(re.search(r"set workers=(\d+)", str(error)).group(1))
        assert cpus_per_worker(nodes(machine), fewer, 0) >= 1


@given(st.lists(st.integers(0, 8).map(float), min_size=1, max_size=5), st.integers(1, 6))
def test_strict_placements_get_no_more_than_ray_can_place(cpus: list[float], workers: int) -> None:
    """Or Ray would wait for ever."""
    cluster: list[NodeResources] = [({"CPU": each}, {}) for each in cpus]

    def given_cpus(placement: str) -> float:
        try:
            return cpus_per_worker(eligible_nodes(cluster, workers, {}, {}, placement), workers, 0)
        except RecipeError:
            return 0

    assert given_cpus("STRICT_SPREAD") == (sorted(cpus, reverse=True)[workers - 1] if workers <= len(cpus) else 0)
    assert given_cpus("STRICT_PACK") == max(cpus) // workers


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (
            "STRICT_SPREAD",
            "resources.placement: STRICT_SPREAD takes a machine for each of 3 workers, and there are 2 that have what "
            "a worker takes; set resources.placement=SPREAD, or workers to fewer",
        ),
        (
            "STRICT_PACK",
            "resources.placement: STRICT_PACK takes one machine for 3 workers, and the largest has room for 2; set "
            "resources.placement=PACK, or workers to fewer",
        ),
    ],
)
def test_strict_placements_that_cannot_be_are_refused(placement: str, message: str) -> None:
    cluster: list[NodeResources] = [({"CPU": 8.0, "GPU": 2.0}, {}), ({"CPU": 8.0, "GPU": 1.0}, {})]
    with pytest.raises(RecipeError) as caught:
        eligible_nodes(cluster, 3, {"GPU": 1.0}, {}, placement)
    assert str(caught.value) == message


def test_cpus_can_be_shared_by_asking_for_it() -> None:
    assert cpus_per_worker(nodes(2.0), 4, 0.5) == 0.5
    with pytest.raises(RecipeError, match="3 workers of 2 CPU each do not fit on 2 machine"):
        cpus_per_worker(nodes(3.0, 3.0), 3, 2.0)


MIXED: list[NodeResources] = [
    ({"CPU": 8.0, "GPU": 4.0, "node:10.0.0.1": 1.0}, {"ray.io/accelerator-type": "A100", "ray.io/node-id": "1"}),
    ({"CPU": 8.0, "GPU": 1.0, "fast": 2.0, "memory": 1e9}, {"ray.io/accelerator-type": "T4", "room": "west"}),
    ({"CPU": 2.0, "fast": 1.0}, {}),
]


@given(
    st.lists(st.tuples(st.integers(1, 16), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 12),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    st.sampled_from([0.0, 1.0, 2.0]),
)
def test_workers_are_given_no_more_cpus_than_ray_can_place(
    sizes: list[tuple[int, int, int]], workers: int, gpus: float, fast: float
) -> None:
    """Or Ray would wait for ever: every machine takes as many as all that they ask for lets it."""
    cluster: list[NodeResources] = [({"CPU": cpu, "GPU": gpu, "fast": quick}, {}) for cpu, gpu, quick in sizes]
    each = {name: amount for name, amount in (("GPU", gpus), ("fast", fast)) if amount}

    def places(cpus: float) -> int:
        return sum(
            min([int(have["CPU"] // cpus), *(int(have[name] // amount) for name, amount in each.items())])
            for have, _ in cluster
        )

    try:
        cpus = cpus_per_worker(eligible_nodes(cluster, workers, each, {}), workers, 0)
    except RecipeError:
        assert places(1) < workers
    else:
        assert places(cpus) >= workers > places(cpus + 1)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, [8, 8, 2]),
        ({"room": "west"}, [8]),
        ({"ray.io/accelerator-type": "in(A100, H100)"}, [8]),
        ({"ray.io/accelerator-type": "!A100"}, [8, 2]),
        ({"ray.io/accelerator-type": "!in(A100,T4)"}, [2]),
        ({"ray.io/accelerator-type": "T4", "room": "!east"}, [8]),
    ],
)
def test_labels_choose_machines(wanted: dict[str, str], expected: list[int]) -> None:
    assert [node.cpus for node in eligible_nodes(MIXED, 1, {}, wanted)] == expected


@pytest.mark.parametrize(
    ("workers", "each", "labels", "message"),
    [
        (
            6, {"GPU": 1.0}, {},
            "resources.gpus: 6 workers of 1 GPU each do not fit on 5 GPU(s); set resources.gpus=0 to train on CPUs, or "
            "workers to fewer",
        ),
        (
            2, {"fast": 2.0}, {},
            "resources.custom.fast: 2 workers of 2 each do not fit on machines that have 2 + 1; set workers to fewer",
        ),
        (
            1, {"slow": 1.0}, {},
            "resources.custom.slow: no machine has it; there are CPU, GPU, fast; a machine gets it by "
            """`ray start --resources='{"slow": 1}'`""",
        ),
        (2, {"GPU": 1.0, "fast": 1.0}, {}, "workers: 2 workers of 1 GPU, 1 fast each do not fit on 3 machine(s); set "
            "workers=1"),
        (
            1, {}, {"room": "east"},
            "resources.labels: no machine has room=east; there are ray.io/accelerator-type=A100, "
            "ray.io/accelerator-type=T4, room=west; a machine gets labels by `ray start --labels`",
        ),
    ],
)  # fmt: skip
def test_what_no_machine_has_is_told(
    workers: int, each: dict[str, float], labels: dict[str, str], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        eligible_nodes(MIXED, workers, each, labels)
    assert str(caught.value) == message


def test_an_address_must_answer() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=rf"^--address: no Ray cluster answers at 127.0.0.1:{port} "):
            check_reachable(f"127.0.0.1:{port}")  # bound, and not listening
        taken.listen()
        check_reachable(f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["auto", "local", "ray://somewhere:10001"])
def test_other_forms_are_left_to_ray(address: str) -> None:
    check_reachable(address)


def test_a_port_is_a_number() -> None:
    with pytest.raises(RecipeError, match=r"^--address: expected HOST:PORT, as in 10.0.0.1:6379; got 'host:head'$"):
        check_reachable("host:head")
