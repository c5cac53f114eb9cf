"""The sweeps that a recipe can name."""

from raytrain.errors import RecipeError
from raytrain.registry import resolve
from search.prior import read_priors
from search.scheduling.scheduler import Problem
from search.searcher import Searcher
from search.searchers.gp import GaussianProcessSearcher
from search.searchers.grid import GridSearcher
from search.searchers.nars import NARSSearcher
from search.searchers.random import RandomSearcher
from search.sweep.asha import SuccessiveHalving
from search.sweep.extrapolation import CurveExtrapolation
from search.sweep.hyperband import HyperbandBrackets
from search.sweep.median import MedianStopping
from search.sweep.options import (
    ASHAOptions,
    ExtrapolationOptions,
    GridOptions,
    MedianOptions,
    NARSOptions,
    PriorOptions,
    SweepOptions,
)
from search.sweep.pruner import NoPruner
from search.sweep.sweep import Sweep
from search.tables import SEARCHERS


def grid(problem: Problem, options: GridOptions) -> Sweep:
    """Every combination of some values of each dimension."""
    searcher = GridSearcher(problem.space, problem.seed, options.points)
    return Sweep(problem, options, searcher, NoPruner(problem.steps))


def random(problem: Problem, options: SweepOptions) -> Sweep:
    """Independent draws, each trained to the end."""
    return Sweep(problem, options, RandomSearcher(problem.space, problem.seed), NoPruner(problem.steps))


def sobol(problem: Problem, options: SweepOptions) -> Sweep:
    """Points of a Sobol sequence, each trained to the end."""
    return Sweep(problem, options, _searcher("sobol", problem), NoPruner(problem.steps))


def evolution(problem: Problem, options: SweepOptions) -> Sweep:
    """Regularised evolution (Real et al. 2019), each child trained to the end."""
    return Sweep(problem, options, _searcher("evolution", problem), NoPruner(problem.steps))


def mcts(problem: Problem, options: SweepOptions) -> Sweep:
    """Monte Carlo tree search over the decisions (after DeepArchitect), each proposal trained to the end."""
    return Sweep(problem, options, _searcher("mcts", problem), NoPruner(problem.steps))


def gp(problem: Problem, options: PriorOptions) -> Sweep:
    """Bayesian optimisation with a Gaussian process, each proposal trained to the end."""
    priors = read_priors(options.prior, problem.space)
    searcher = GaussianProcessSearcher(problem.space, problem.seed, priors)
    return Sweep(problem, options, searcher, NoPruner(problem.steps))


def nars(problem: Problem, options: NARSOptions) -> Sweep:
    """Evolution guided by the best predictor (after FBNetV3's NARS), each proposal trained to the end."""
    searcher = NARSSearcher(problem.space, problem.seed, options.predictor)
    return Sweep(problem, options, searcher, NoPruner(problem.steps))


def tpe(problem: Problem, options: SweepOptions) -> Sweep:
    """Tree-structured Parzen estimator (Optuna), each proposal trained to the end."""
    return Sweep(problem, options, _searcher("tpe", problem), NoPruner(problem.steps))


def asha(problem: Problem, options: ASHAOptions) -> Sweep:
    """Asynchronous successive halving: bad trials pause early, good ones are promoted."""
    pruner = SuccessiveHalving(problem.steps, options.interval, options.eta, options.trials)
    return Sweep(problem, options, _searcher(options.searcher, problem), pruner)


def hyperband(problem: Problem, options: ASHAOptions) -> Sweep:
    """Asynchronous Hyperband: brackets of successive halving that begin to prune at different steps."""
    pruner = HyperbandBrackets(problem.steps, options.interval, options.eta, options.trials)
    return Sweep(problem, options, _searcher(options.searcher, problem), pruner)


def median(problem: Problem, options: MedianOptions) -> Sweep:
    """Trials that are worse than the median of the others are stopped early."""
    pruner = MedianStopping(problem.steps, options.interval, options.least)
    return Sweep(problem, options, _searcher(options.searcher, problem), pruner)


def extrapolation(problem: Problem, options: ExtrapolationOptions) -> Sweep:
    """Trials whose extrapolated loss curve has little chance to end best are stopped early."""
    constant = [1.0] * problem.steps
    rates = problem.rates if options.law == "annealing" else lambda _: constant
    if rates is None:
        raise RecipeError("search.law: expected power, as only a training recipe has a schedule; got annealing")
    pruner = CurveExtrapolation(problem.steps, options, problem.objective, rates)
    return Sweep(problem, options, _searcher(options.searcher, problem), pruner)


def _searcher(name: str, problem: Problem) -> Searcher:
    searcher: Searcher = resolve(SEARCHERS, name, "search.searcher")(problem.space, problem.seed)
    return searcher
