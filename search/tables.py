"""What a search recipe can name. It loads without NumPy, so that it is listed at once."""

SEARCHES: dict[str, str] = {
    "pbt": "search.pbt.engine:pbt",
    "grid": "search.sweep.searches:grid",
    "random": "search.sweep.searches:random",
    "asha": "search.sweep.searches:asha",
    "hyperband": "search.sweep.searches:hyperband",
    "median": "search.sweep.searches:median",
    "extrapolation": "search.sweep.searches:extrapolation",
    "sobol": "search.sweep.searches:sobol",
    "evolution": "search.sweep.searches:evolution",
    "mcts": "search.sweep.searches:mcts",
    "gp": "search.sweep.searches:gp",
    "nars": "search.sweep.searches:nars",
    "tpe": "search.sweep.searches:tpe",
}


SEARCHERS: dict[str, str] = {
    "random": "search.searchers.random:RandomSearcher",
    "grid": "search.searchers.grid:GridSearcher",
    "sobol": "search.searchers.sobol:SobolSearcher",
    "evolution": "search.searchers.evolution:EvolutionSearcher",
    "mcts": "search.searchers.mcts:MCTSSearcher",
    "gp": "search.searchers.gp:GaussianProcessSearcher",
    "nars": "search.searchers.nars:NARSSearcher",
    "tpe": "search.searchers.tpe:TPESearcher",
}


PREDICTORS: dict[str, str] = {
    "gp": "search.predictor.gaussian_process:GaussianProcessPredictor",
    "ridge": "search.predictor.ridge:Ridge",
    "trees": "search.predictor.trees:Trees",
}


PROXIES: dict[str, str] = {
    "parameters": "search.proxies.weights:parameter_count",
    "gradient-norm": "search.proxies.weights:gradient_norm",
    "snip": "search.proxies.weights:snip",
    "synflow": "search.proxies.weights:synflow",
    "synaptic-saliency": "search.proxies.weights:synaptic_saliency",
    "synaptic-diversity": "search.proxies.weights:synaptic_diversity",
    "head-confidence": "search.proxies.attention:head_confidence",
    "softmax-confidence": "search.proxies.attention:softmax_confidence",
    "hidden-covariance": "search.proxies.covariance:hidden_covariance",
    "jacobian-covariance": "search.proxies.covariance:jacobian_covariance",
}


EXPLOITS: dict[str, str] = {
    "truncation": "search.pbt.exploit:Truncation",
    "tournament": "search.pbt.exploit:Tournament",
    "welch": "search.pbt.exploit:Welch",
    "mf-pbt": "search.pbt.mf_pbt:MultipleFrequencies",
    "none": "search.pbt.exploit:NoExploit",
}


EXPLORES: dict[str, str] = {
    "perturb": "search.pbt.explore:Perturb",
    "resample": "search.pbt.explore:Resample",
    "pb2": "search.pbt.pb2:PB2",
    "none": "search.pbt.explore:NoExplore",
}
