"""Curve extrapolation: trials whose loss curve leads nowhere near the best are stopped."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from search.scheduling.segments import Objective
from search.sweep.loss_curve import Annealing, Prediction, predict_end
from search.sweep.options import ExtrapolationOptions
from search.sweep.pruner import Pruner

INTERVAL = (0.05, 0.95)
"""Shares of the probability between which a predicted interval lies."""

Rates = Callable[[Mapping[str, Any]], Sequence[float]]
"""Changes of the base recipe -> learning-rate factor of each step."""


class CurveExtrapolation(Pruner):
    """Stops a trial whose chance to end better than the best score so far is below a bound.

    The chance is that of the law of loss curves, fitted to the trial's own scores; see `loss_curve`. A trial that is
    stopped is not promoted later.

    Source: Domhan et al. 2015, Speeding Up Automatic Hyperparameter Optimization of Deep Neural Networks by
    Extrapolation of Learning Curves, with another family of curves.

    Args:
        steps: of a whole training.
        options: when a trial is judged, and the bound.
        objective: what the scores are of.
        rates: the learning-rate schedule of a trial.
    """

    def __init__(self, steps: int, options: ExtrapolationOptions, objective: Objective, rates: Rates) -> None:
        super().__init__(steps)
        self._options, self._objective, self._rates = options, objective, rates
        self._curves: dict[int, list[tuple[int, float]]] = {}
        self._remark: dict[str, Any] = {}

    def first_step(self, trial: int) -> int:  # noqa: ARG002
        """Return the step of the first score."""
        return min(self._options.interval, self.steps)

    def judge(self, trial: int, step: int, fitness: float, changes: Mapping[str, Any]) -> int | None:
        """Return the next judgement, unless the trial is stopped or at its end."""
        own = self._curves.setdefault(trial, [])
        own.append((step, -fitness))
        self._remark = {}
        if step >= self.steps:
            return None
        telling = len(own) >= self._options.least and step >= self._options.grace * self.steps
        hopeless = telling and self._predict(trial, changes) < self._options.chance
        return None if hopeless else min(step + self._options.interval, self.steps)

    def remark(self) -> dict[str, Any]:
        """Return the predicted end of the trial that was judged last, and its chance; {} if nothing was predicted."""
        return self._remark

    def state_dict(self) -> dict[str, Any]:
        """Return the scores of all trials."""
        return {"curves": sorted(self._curves.items())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the scores of all trials."""
        self._curves = {trial: [tuple(point) for point in points] for trial, points in state["curves"]}

    def _predict(self, trial: int, changes: Mapping[str, Any]) -> float:
        """Predict the end of a trial, and return its chance to be better than every other one is so far."""
        steps, losses = zip(*self._curves[trial], strict=True)
        predicted = predict_end(Annealing.of(self._rates(changes)), steps, losses)
        others = [loss for other, curve in self._curves.items() if other != trial for _, loss in curve]
        chance = predicted.chance_below(min(others)) if others else 1.0
        self._remark = {"predicted": {**self._scores(predicted), "chance": chance}}
        return chance

    def _scores(self, predicted: Prediction) -> dict[str, float]:
        """Return the expected score, and the two between which it lies with a probability of 90 %."""
        ends = sorted(self._objective.fitness(-predicted.quantile(share)) for share in INTERVAL)
        return {"score": self._objective.fitness(-predicted.mean), "low": ends[0], "high": ends[1]}
