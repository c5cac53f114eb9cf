"""Population based training in a Ray Tune program, where Ray's own scheduler stood: python under_tune.py."""

import json
from pathlib import Path

from ray import tune
from ray.tune.examples.pbt_function import pbt_function  # the trainable of Ray's own example

from search.launch.tune import PBTScheduler

SPACE = {
    "lr": {"type": "float", "low": 1e-4, "high": 0.02, "scale": "log"},
    "some_other_factor": {"type": "int", "low": 1, "high": 3},
    "word": {"type": "choice", "values": ["one", "two"]},
}
lineage = Path("lineage.jsonl")
tuner = tune.Tuner(
    pbt_function,
    run_config=tune.RunConfig(
        storage_path=str(Path("tune").absolute()), verbose=0, stop={"done": True, "training_iteration": 10}
    ),
    tune_config=tune.TuneConfig(
        scheduler=PBTScheduler(SPACE, interval=5, seed=1, lineage=lineage),
        metric="mean_accuracy",
        mode="max",
        num_samples=4,
        reuse_actors=True,
    ),
    param_space={"lr": 0.0001, "some_other_factor": 1, "checkpoint_interval": 5},  # what trials begin with
)
results = tuner.fit()
for line in lineage.read_text().splitlines():
    row = json.loads(line)
    if row["action"] == "exploit":
        print(f"step {row['step']}: trial {row['member']} goes on as {row['parent']}, with {row['new']}")
