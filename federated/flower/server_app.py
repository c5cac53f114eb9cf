"""The `ServerApp` of a deployment: it plays the rounds of a recipe with the clients of SuperNodes."""

from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federated.build import task_of
from federated.flower.deployed import recipe_of
from federated.flower.guard import check_closed
from federated.flower.introductions import nodes_of
from federated.flower.runs import run_of
from federated.records import RunRecords
from federated.results import result_of
from raytrain.run.directory import RunDirectory
from raytrain.training.build import options_from_data

app = ServerApp()


@app.main()
def serve_federated(grid: Grid, context: Context) -> None:
    """Play the rounds of the recipe that the run's configuration names, from what its folder holds of them.

    Raises:
        RecipeError: the deployment is open to strangers, or the recipe is wrong.
    """
    config = context.run_config
    check_closed("flower-superlink", insecure=bool(config.get("insecure", False)))
    directory = RunDirectory(Path(str(config["out"])).absolute())
    recipe = recipe_of(config)
    recipe = recipe.with_overrides(options_from_data(task_of(recipe), directory))
    torch.set_num_threads(recipe.threads())
    run = run_of(recipe)
    with directory.session(resume=directory.recipe.is_file()):
        run.resume(directory.path)
        directory.prepare(recipe.to_toml())
        nodes = nodes_of(grid, run, float(str(config["wait-seconds"])))
        directory.record_attempt(recipe.to_toml(), run.version, [{"nodes": len(nodes)}])
        with RunRecords(directory, run, every=recipe.evaluation.every) as records:
            for played in run.play(grid, nodes, directory.path, records.add):
                heard = f"heard {len(played.heard)} of {len(played.clients)}"
                print(f"round {played.number + 1}/{recipe.rounds}: {heard}", flush=True)
        size, done = run.parameter_bytes(), run.is_done()
        directory.write_result(result_of(directory, run.task, size, done=done, error=""))
