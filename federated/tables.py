"""What a federated recipe can name. It loads without torch and NumPy, so that it is listed at once."""

PROTOCOLS: dict[str, str] = {
    "fedkseed": "federated.protocols.fedkseed:FedKSeed Local steps along a pool of K seeds (Qin et al. 2024).",
    "fedkseed-pro": "federated.protocols.fedkseed_pro:FedKSeedPro The same, important seeds first (Qin et al. 2024).",
    "common-seeds": "federated.protocols.common_seeds:CommonSeeds Equal seeds for all (Li et al. 2025, DeComFL).",
    "sign": "federated.protocols.sign:Sign Votes of one bit on equal seeds (Cai et al. 2025, FeedSign).",
    "flower": "federated.gradients:GradientTrainer Steps with gradients, averaged by a strategy of Flower's.",
}


PARTITIONS: dict[str, str] = {
    "iid": "federated.partition:iid Examples dealt at random.",
    "dirichlet": "federated.partition:dirichlet Labels shared out by a Dirichlet distribution (Yurochkin et al. 2019).",
    "shards": "federated.partition:shards A few labels each (McMahan et al. 2017, FedAvg).",
    "domain": "federated.partition:domain One client for each author, speaker or package.",
}


FAULTS: dict[str, str] = {
    "drop": "federated.faults:drop A client never answers.",
    "slow": "federated.faults:slow A client answers late.",
    "crash": "federated.faults:crash The process that serves a client dies.",
    "garble": "federated.faults:garble A report is damaged on its way.",
}


STRATEGIES: dict[str, str] = {
    "FedAvg": "flwr.serverapp.strategy:FedAvg Mean of parameters, by examples (McMahan et al. 2017).",
    "FedProx": "flwr.serverapp.strategy:FedProx FedAvg with clients held near the model (Li et al. 2020).",
    "FedAdam": "flwr.serverapp.strategy:FedAdam Adam on the server (Reddi et al. 2021).",
    "FedYogi": "flwr.serverapp.strategy:FedYogi Yogi on the server (Reddi et al. 2021).",
    "FedAdagrad": "flwr.serverapp.strategy:FedAdagrad Adagrad on the server (Reddi et al. 2021).",
    "FedAvgM": "flwr.serverapp.strategy:FedAvgM Momentum on the server (Hsu et al. 2019).",
    "FedMedian": "flwr.serverapp.strategy:FedMedian Median of each parameter (Yin et al. 2018).",
    "FedTrimmedAvg": "flwr.serverapp.strategy:FedTrimmedAvg Mean without the extremes (Yin et al. 2018).",
    "Krum": "flwr.serverapp.strategy:Krum The client nearest to its neighbours (Blanchard et al. 2017).",
    "MultiKrum": "flwr.serverapp.strategy:MultiKrum Mean of some such clients (Blanchard et al. 2017).",
    "Bulyan": "flwr.serverapp.strategy:Bulyan Krum, then a trimmed mean (El Mhamdi et al. 2018).",
    "QFedAvg": "flwr.serverapp.strategy:QFedAvg Clients with a high loss count more (Li et al. 2020).",
}
"""Flower's, which average arrays of parameters."""
