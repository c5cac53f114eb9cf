"""Input pipelines: the options `task.source` of every task.

"local" and "ray" prepare the same batches, equal to the bit and in the same order. Any other source is a user's
function, seed -> iterator of examples, such as a simulator, which runs in actors beside the training.
"""

import inspect
from typing import Annotated, Any

from pydantic import Field, SerializeAsAny

from raytrain.errors import RecipeError
from raytrain.recipe import Options, merge_options, options_by_name, options_parameter

SOURCES: dict[str, str] = {
    "local": "raytrain.data.source:LocalSource Examples are read and collated in each worker, between its steps.",
    "ray": "raytrain.data.source:RayDataSource Ray Data prepares the same batches beside the training.",
}


class SourceOptions(Options):
    """The options of a source."""


class LocalSource(SourceOptions):
    """Each worker reads and collates its examples itself, between its steps."""


class ActorSource(SourceOptions):
    """What every source takes that works in actors beside the training.

    Attributes:
        actors: of each worker; 0: one for each processor that the workers leave, at least one and at most 8.
        cpus: processors of each actor. Where there are none left, the actors share those of the workers.
    """

    actors: int = Field(0, ge=0)
    cpus: float = Field(1, gt=0)


class RayDataSource(ActorSource):
    """A Ray Data pipeline prepares the batches of "local" beside the training, in the same order.

    Its actors read the task's examples by index, as the workers would; data sets of Hugging Face are mapped into memory
    for this and not loaded.

    Attributes:
        prefetch_bytes: size of the batches prepared ahead for each worker; at least a step or two for each actor.
    """

    prefetch_bytes: int = Field(8 << 20, ge=1)


class GeneratorSource(ActorSource):
    """Actors run a user's function, seed -> iterator of examples, beside the training.

    Each batch is made by one actor, and batches are taken from the actors in turn. An iterator that ends is followed by
    one of another seed. It may as well read a stream of files that are too large to be indexed.

    Attributes:
        prefetch: batches that each actor prepares ahead of the training.
    """

    prefetch: int = Field(4, ge=1)


def source_options(found: Any) -> type[SourceOptions]:
    """Return the options of a source: a class of this module, or those of a function that makes examples.

    Such a function takes a seed, and may take options of its own: a parameter annotated with a subclass of `Options`.

    Raises:
        RecipeError: `found` is no such function.
    """
    if isinstance(found, type) and issubclass(found, SourceOptions):
        return found
    own = options_parameter(found)
    given = (0,) if own is Options else (0, own)
    try:
        inspect.signature(found).bind(*given)
    except (TypeError, ValueError):
        raise RecipeError(
            f"task.source.name: expected {', '.join(SOURCES)}, or a function seed -> iterator of examples, which may "
            f"also take options annotated with a subclass of raytrain.Options; got {found!r}"
        ) from None
    return merge_options(own, GeneratorSource, "task.source.name")


SourceField = Annotated[SerializeAsAny[SourceOptions], options_by_name(SOURCES, "task.source", source_options, "local")]
