"""Federated fine-tuning in one process, with every message as bytes: python one_process.py."""

import tempfile
from pathlib import Path

from federated import FederateRecipe, Federation

recipe = FederateRecipe.parse(
    {
        "kind": "federate",
        "task": {"name": "digits", "model": "mlp", "widths": [32]},
        "rounds": 4,
        "clients": {"count": 20, "per_round": 5},
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "protocol": {"name": "fedkseed", "local_steps": 200, "batch": 8},
        "optimizer": {"name": "zo-sgd", "lr": 1e-2},
    }
)
federation = Federation.of(recipe)
server = federation.server()
print("before:", federation.evaluate(server))
with tempfile.TemporaryDirectory() as folder:
    for done in federation.simulation(server).run(Path(folder)):
        print(f"round {done.number}: {len(done.heard)} clients sent {done.bytes_up} bytes")
    print("after:", federation.evaluate(server))
    federation.seed_model(server).save(Path(folder) / "model.safetensors")
    print("the model takes", (Path(folder) / "model.safetensors").stat().st_size, "bytes")
