"""Protocols by name. The table loads without torch, so that it is listed at once."""

PROTOCOLS: dict[str, str] = {
    "fedkseed": "federated.protocols.fedkseed:FedKSeed Local steps along a pool of K seeds (Qin et al. 2024).",
    "fedkseed-pro": "federated.protocols.fedkseed_pro:FedKSeedPro The same, important seeds first (Qin et al. 2024).",
    "common-seeds": "federated.protocols.common_seeds:CommonSeeds Equal seeds for all (Li et al. 2025, DeComFL).",
    "sign": "federated.protocols.sign:Sign Votes of one bit on equal seeds (Cai et al. 2025, FeedSign).",
    "flower": "federated.gradients:GradientTrainer Steps with gradients, averaged by a strategy of Flower's.",
}
