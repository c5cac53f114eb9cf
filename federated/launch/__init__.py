"""The simulation of clients on Ray actors."""

import federated.flower  # noqa: F401 - first, for its settings
