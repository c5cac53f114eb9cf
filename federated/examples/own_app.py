"""A protocol of raytrain's in a Flower program of one's own: python own_app.py."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federated import FedKSeed, InProcessGrid

strategy = FedKSeed(
    {"name": "digits", "model": "mlp", "widths": [32]},
    rounds=4,
    clients={"count": 20, "per_round": 5},
    partition={"name": "dirichlet", "alpha": 0.5},
    optimizer={"lr": 1e-2},
)
client_app = strategy.client_app()
server_app = ServerApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:  # noqa: ARG001
    """Play the rounds, and save the model as seeds."""
    print("before:", strategy.evaluate())
    strategy.start(grid, record=lambda done: print(f"round {done.number}: {len(done.heard)} clients heard"))
    print("after:", strategy.evaluate())
    strategy.seed_model().save("model.safetensors")


if __name__ == "__main__":  # in this process; on actors of Ray: RayGrid("own_app:client_app", clients=20)
    main(InProcessGrid(client_app, clients=20), Context(1, 0, {}, None, {}))  # type: ignore[arg-type]
