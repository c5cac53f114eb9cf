"""How many slots a cluster has room for."""

import pytest

from raytrain.errors import RecipeError
from raytrain.launch.resources import Node
from search.launch.slots import SlotResources, slot_count

MACHINES = [Node(cpus, slots=100) for cpus in (5.0, 3.0, 1.0)]


@pytest.mark.parametrize(
    ("workers", "placement", "room"),
    [
        (1, "PACK", 9),
        (2, "PACK", 4),
        (2, "SPREAD", 4),
        (2, "STRICT_PACK", 3),
        (2, "STRICT_SPREAD", 4),
        (3, "STRICT_PACK", 2),
        (3, "STRICT_SPREAD", 1),
    ],
)
def test_slots_of_several_workers_fit_as_their_placement_says(workers: int, placement: str, room: int) -> None:
    each = SlotResources(1.0, {}, {}, workers, placement)
    assert slot_count(0, 100, each, MACHINES) == room
    with pytest.raises(RecipeError) as error:
        slot_count(room + 1, 100, each, MACHINES)
    what = "1 CPU each" if workers == 1 else f"{workers} workers with 1 CPU each"
    assert str(error.value) == (f"slots: {room + 1} of {what} do not fit on 3 machine(s) with 9 CPU; set slots={room}")
