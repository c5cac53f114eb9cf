"""The kind `train`."""

from pathlib import Path

from raytrain.kinds import Kind

KIND = Kind(
    recipe="raytrain.training.recipe:TrainRecipe",
    run="raytrain.launch.dispatch:run_training",
    recipes=Path(__file__).parents[1] / "recipes",
    load="raytrain.training.results:load_best",
    panels="raytrain.training.report:training_panels",
    dry_run="raytrain.training.dry_run:dry_run",
    tables={
        "tasks": "raytrain.tasks.task:TASKS",
        "adapters": "raytrain.models.options:ADAPTERS",
        "sources": "raytrain.data.source:SOURCES",
        "optimizers": "raytrain.optim.options:ALL_OPTIMIZERS",
        "schedules": "raytrain.optim.schedules:SCHEDULES",
        "synchronisers": "raytrain.sync.options:ALL_SYNCHRONISERS",
        "compressions": "raytrain.sync.options:COMPRESSIONS",
        "penalties": "raytrain.sync.options:PENALTIES",
        "loggers": "raytrain.run.loggers:LOGGERS",
        "kernels": "raytrain.seeds.options:KERNELS",
    },
    remarks={"kernels": "raytrain.seeds.kernels.kernel:kernel_status"},
    shorthand="task",
    packages=("raytrain",),
    requires=("transformers", "datasets"),
)
