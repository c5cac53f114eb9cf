"""The kind `federate`."""

from pathlib import Path

from raytrain.kinds import Kind

KIND = Kind(
    recipe="federated.recipe:FederateRecipe",
    run="federated.launch.run:run_federated",
    recipes=Path(__file__).parent / "recipes",
    load="federated.results:load_federated_model",
    panels="federated.report:panels",
    check="federated.flower.preview:federated_preview",
    tables={
        "protocols": "federated.protocols.options:PROTOCOLS",
        "partitions": "federated.partition:PARTITIONS",
        "faults": "federated.faults:FAULTS",
        "strategies": "federated.recipe:STRATEGIES",
    },
    shorthand="task",
    packages=("raytrain", "federated"),
    requires=("flwr",),
)
