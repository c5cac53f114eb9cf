"""On-disk cache of tokenized examples.

They are Arrow tables in the cache of the `datasets` library, mapped into memory. Workers of one machine share them: the
first that needs a table writes it while the others wait for its lock.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain.errors import RecipeError

Example = dict[str, Any]


def token_count(example: Example) -> int:
    """Return the number of tokens of an example."""
    return len(example["tokens"])


class StoredExamples:
    """Examples in the on-disk cache.

    Args:
        make: yields the examples; called if they are not cached yet.
        columns: column -> type: "tokens" (a list of integers), "int64" or "string". One is "domain". "label" holds
            classes; without it, a class is the index of an example's domain in the sorted domains.
        key: everything that the examples depend on, as plain data.

    Raises:
        RecipeError: `make` raised it.
    """

    def __init__(self, make: Callable[[], Iterator[Example]], columns: Mapping[str, str], key: Any) -> None:
        from datasets import Dataset, Features, List, Value  # noqa: PLC0415 - slow to import
        from datasets.exceptions import DatasetGenerationError  # noqa: PLC0415

        types = {"tokens": List(Value("int32"))}
        features = Features({name: types.get(kind) or Value(kind) for name, kind in columns.items()})
        fingerprint = hashlib.sha256(json.dumps([key, dict(columns), _code()]).encode()).hexdigest()[:32]
        try:
            with _quiet():
                self._table = Dataset.from_generator(make, features=features, fingerprint=fingerprint)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, RecipeError):
                raise error.__cause__ from None
            raise

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._table)

    def __getitem__(self, index: int) -> Example:
        """Return example `index`, its tokens as lists."""
        example: Example = self._table[index]
        return example

    def domain(self, index: int) -> str:
        """Return the domain of an example, such as its file."""
        return self._domains[index]

    def label(self, index: int) -> int:
        """Return the class of an example."""
        return int(self.labels[index])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The classes of all examples, shape (n,)."""
        if "label" in self._table.column_names:
            return np.asarray(self._table.data.column("label").to_numpy())
        return np.unique(np.array(self._domains), return_inverse=True)[1]

    @cached_property
    def _domains(self) -> list[str]:
        domains: list[str] = self._table.data.column("domain").to_pylist()
        return domains


@contextmanager
def _quiet() -> Iterator[None]:
    """Disable progress bars, which workers would draw over each other."""
    from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled  # noqa: PLC0415

    shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


def _code() -> str:
    """Return the SHA-256 of the source that makes examples, so that another version makes them anew."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()
