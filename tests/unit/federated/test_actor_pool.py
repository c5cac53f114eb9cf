"""How many actors serve the clients."""

import pytest

from federated.launch.actor_pool import ActorOptions, actor_count
from raytrain.errors import RecipeError

FOUR, TWO_WITH_GPU = {"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("options", "nodes", "free", "expected"),
    [
        (ActorOptions(), [FOUR], {"CPU": 4.0}, 4),
        (ActorOptions(), [FOUR, TWO_WITH_GPU], {"CPU": 3.5, "GPU": 1.0}, 3),
        (ActorOptions(), [FOUR], {}, 1),
        (ActorOptions(cpus=0.1), [FOUR], {"CPU": 0.3}, 3),
        (ActorOptions(cpus=3), [FOUR, FOUR], {"CPU": 8.0}, 2),
        (ActorOptions(3), [FOUR], {"CPU": 1.0}, 3),
        (ActorOptions(gpus=0.5), [FOUR, TWO_WITH_GPU], {"CPU": 6.0, "GPU": 1.0}, 2),
        (ActorOptions(cpus=0.5, gpus=0.1), [TWO_WITH_GPU], {"CPU": 2.0, "GPU": 1.0}, 2),
        (ActorOptions(3, cpus=0.5, gpus=0.1), [TWO_WITH_GPU], {"CPU": 2.0, "GPU": 1.0}, 3),
    ],
    ids=["free", "fraction", "busy", "tenths", "places", "asked", "one GPU", "two a GPU", "asked with GPU"],
)
def test_the_free_cores_have_an_actor_each(
    options: ActorOptions, nodes: list[dict[str, float]], free: dict[str, float], expected: int
) -> None:
    assert actor_count(options, nodes, free) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ActorOptions(4, cpus=2),
            "clients.actors: 4 actor(s) of 2 CPU each do not fit on 2 machine(s) with 6 CPU; set clients.actors=3",
        ),
        (
            ActorOptions(cpus=1, gpus=2),
            "clients.actors: 1 actor(s) of 1 CPU and 2 GPU each do not fit on 2 machine(s) with 6 CPU and 1 GPU; "
            "set fewer for each",
        ),
    ],
)
def test_actors_that_never_fit_are_refused(options: ActorOptions, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        actor_count(options, [FOUR, TWO_WITH_GPU], {"CPU": 6.0, "GPU": 1.0})
    assert str(caught.value) == expected
