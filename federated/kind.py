"""The kind `federate`."""

from pathlib import Path

from raytrain.kinds import Kind

KIND = Kind(
    recipe="federated.recipe:FederateRecipe",
    run="federated.launch.run:run_federated",
    recipes=Path(__file__).parent / "recipes",
    load="federated.results:load_federated_model",
    panels="federated.report:panels",
    check="federated.preview:federated_preview",
    app="federated.launch.app:run_app_folder",
    tables={
        "protocols": "federated.tables:PROTOCOLS",
        "partitions": "federated.tables:PARTITIONS",
        "faults": "federated.tables:FAULTS",
        "strategies": "federated.tables:STRATEGIES",
    },
    shorthand="task",
    packages=("raytrain", "federated"),
    requires=("flwr",),
)
