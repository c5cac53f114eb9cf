"""What a round adds up, against the arithmetic of the papers."""

import numpy as np

from federated.protocols.protocol import ClientReport
from federated.testing import examples_of, make_protocol, random_scalars, report_of, server_of
from federated.wire import MODEL_BYTES


def test_the_sum_is_that_of_the_paper() -> None:
    """A_k = A_k - lr sum of c_i q_it, and towards w0 by weight decay, against a loop over everything."""
    variant = ("fedkseed", {"pool": 7, "up": "float32", "down": "float32", "weight_decay": 3.0})
    server, sums = server_of(variant), np.zeros(7)
    for number in range(5):
        lr = float(server.protocol.rates.lr[number])
        clients = server.sample().clients
        total = sum(map(examples_of, clients))
        sums *= 1 - lr * 3.0
        for client in clients:
            server.ask(client)
            server.hear(client, report_of(server, client))
            scalars = random_scalars(1000 * number + client)
            for index, value in zip(server.protocol.directions(number, client), scalars, strict=True):
                sums[index] -= lr * examples_of(client) / total * float(np.nan_to_num(value))
        server.aggregate()
        seeds, found = server.protocol.seeds_and_coefficients(server.model)
        pool = server.protocol.table.seeds(np.arange(7)).tolist()
        np.testing.assert_allclose(found, [sums[pool.index(seed)] for seed in seeds.tolist()], rtol=1e-6)


def test_a_vote_moves_by_its_sign_and_an_even_one_not_at_all() -> None:
    votes = np.array([[1, 1, 1, -1], [1, -1, -1, -1], [1, 1, -1, -1], [1, -1, -1, -1]], np.float32)
    for clients, expected in (([0, 1, 2, 3], [1, 0, -1, -1]), ([0, 1, 2], [1, 1, -1, -1])):
        server = server_of(("sign", {"pool": 0, "local": True}), clients=4, local_steps=4)
        server.sample()
        for client in clients:
            server.ask(client)
            server.hear(client, report_of(server, client, votes[client]))
        server.aggregate()
        lr = float(server.protocol.rates.lr[0])
        assert server.model.coefficients.tolist() == [-lr * value for value in expected]
        assert len(server.history.payload(0)) == MODEL_BYTES + 2 + server.protocol.summary_bytes(len(clients))


def test_important_seeds_are_drawn_more_often_but_not_by_more_than_e() -> None:
    protocol = make_protocol(("fedkseed-pro", {"pool": 4}), local_steps=2000)
    assert protocol.probabilities().tolist() == [0.25] * 4  # type: ignore[attr-defined]
    numbers = np.array([np.nan, 1e9, -3.0, 3.0], np.float32)
    protocol.observe([ClientReport(0, 1, numbers, np.arange(4)), ClientReport(1, 1, np.float32([1.0]), np.array([3]))])
    means = np.array([0.0, 500.0, 1.5, 4 / 3])  # over an initial 0 each; 1e9 counts as 1000
    likely = np.exp(means / 500) / np.exp(means / 500).sum()
    np.testing.assert_allclose(protocol.probabilities(), likely, rtol=1e-6)  # type: ignore[attr-defined]
    counts = np.bincount(protocol.directions(3, 5), minlength=4) / 2000
    np.testing.assert_allclose(counts, likely, atol=0.05)
    again = make_protocol(("fedkseed-pro", {"pool": 4}), local_steps=2000)
    again.load_state(protocol.state())
    assert np.array_equal(again.directions(3, 5), protocol.directions(3, 5))
    assert not np.array_equal(again.directions(3, 6), protocol.directions(3, 5))
