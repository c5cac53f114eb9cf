"""An app in the form that Flower's apps had before messages: `client_fn` and `server_fn`."""

from pathlib import Path

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


class Client(NumPyClient):
    """Goes towards the number of its partition."""

    def __init__(self, partition, steps):
        self.partition, self.steps = partition, steps

    def fit(self, parameters, config):
        for _ in range(self.steps):
            parameters = [array + 0.5 * (self.partition - array) for array in parameters]
        return parameters, 1, {}

    def evaluate(self, parameters, config):
        return float(np.square(parameters[0] - self.partition).mean()), 1, {}


def client_fn(context):
    return Client(context.node_config["partition-id"], context.run_config["steps.local"]).to_client()


def server_fn(context):
    def save(number, arrays, config):
        Path("final.txt").write_text(f"{number} {arrays[0].tolist()}")

    strategy = FedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(2)]), evaluate_fn=save)
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=context.run_config["rounds"]))


client, server = ClientApp(client_fn), ServerApp(server_fn=server_fn)
