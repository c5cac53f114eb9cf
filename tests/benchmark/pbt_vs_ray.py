"""Population based training: our slots beside Ray Tune's own scheduler, on the same trials.

    python tests/benchmark/pbt_vs_ray.py

(a) 16 digit classifiers on 2 cores, continuous dimensions; both train by the same `Trial`, so that what differs is what
surrounds it. Ours are slots of this machine. Ray's PBT reuses actors; it runs synchronously and asynchronously, and the
faster of the two counts. Each search is a process of its own. Wall time counts from its beginning to its end: of Ray's,
from when its cluster has started; ours has none to start. The overhead of a report is what is left of it when training
is taken away: wall time * 2 cores / reports - training, where training is what the same steps take in 2 processes side
by side with nothing around them. The marginal overhead counts the time from the last report of the first generation to
the last one alone, and so leaves out what a search takes to start; that is `start_seconds`.

(b) whole numbers and words: how many values of 8 trials are outside of what was declared, or end in an error, in Ray's
PBT and in our scheduler under Tune.
"""

import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench import finish, parse, parser_of
from measured import FIRST_STEP, measure
from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from raytrain.kinds import RunOptions
from raytrain.launch.session import cluster_session
from search.launch.dispatch import dispatch_search
from search.launch.trial import Trial
from search.launch.tune import PBTScheduler
from search.recipe import SearchRecipe
from search.scheduling.work import Snapshot, Work

CORES = 2
MEMBERS = 16
LOW, HIGH = 1e-3, 1.0
SEARCHES = ("ours", "ray-synchronous", "ray-asynchronous")
OVERHEADS = ("overhead_ms_per_report", "overhead_ms_per_report_marginal")


def recipe(interval: int, reports: int, seed: int) -> SearchRecipe:
    """Return the search whose members report every `interval` steps."""
    return SearchRecipe.parse(
        {
            "kind": "search",
            "seed": seed,
            "base": {
                "kind": "train",
                "steps": interval * reports,
                "batch": 64,
                "task": {"name": "digits", "model": "mlp", "widths": [64, 64]},
                "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
                "schedule": {"name": "constant"},
                "resources": {"cpus": 1},
            },
            "search": {
                "name": "pbt",
                "population": MEMBERS,
                "interval": interval,
                "space": {"optimizer": {"lr": {"type": "float", "low": LOW, "high": HIGH, "scale": "log"}}},
            },
        }
    )


class RayMember(tune.Trainable):
    """A member of Ray's population: one report is one segment of the same `Trial`."""

    def setup(self, config: dict[str, Any]) -> None:
        """Make ready to train."""
        torch.set_num_threads(1)
        search = SearchRecipe.parse(config["recipe"])
        self._interval = search.search.interval
        self._trial = Trial(search.base, torch.device("cpu"), lambda step: None)
        self._state: bytes | None = None
        self._step = 0

    def step(self) -> dict[str, float]:
        """Train a segment."""
        snapshot = Snapshot("state" if self._state else "", self._step)
        changes = {"optimizer.lr": min(max(self.config["lr"], LOW), HIGH)}
        began = time.perf_counter()
        end = self._trial.train(Work("", 0, 0, snapshot, self._step + self._interval, changes, 0), self._state)
        self._state, self._step = end.state, end.step
        return {**end.metrics, "train_seconds": time.perf_counter() - began, "ended_at": time.time()}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state."""
        # Always under one name: Ray writes checkpoints of a number into one folder, also of another attempt.
        (Path(checkpoint_dir) / "state").write_bytes(self._step.to_bytes(8, "big") + (self._state or b""))

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Take a state over."""
        data = (Path(checkpoint_dir) / "state").read_bytes()
        self._step, self._state = int.from_bytes(data[:8], "big"), data[8:]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Serve another member."""
        self.config = new_config
        self._state, self._step = None, 0
        return True


def spans(ends: Sequence[float]) -> dict[str, float]:
    """Return how many reports there were, and the seconds of a further one: of those after the first generation."""
    ends = sorted(ends)
    return {"reports": len(ends), "seconds_per_report": (ends[-1] - ends[MEMBERS - 1]) / (len(ends) - MEMBERS)}


def search_ours(search: SearchRecipe, folder: Path) -> dict[str, float]:
    """Search by our slots."""
    result = dispatch_search(search, RunOptions(folder / "run"))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"accuracy": result.best["value"], **spans([row["seconds"] for row in rows])}


def search_by_ray(search: SearchRecipe, folder: Path, *, synch: bool) -> dict[str, float]:
    """Search by Ray's scheduler."""
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=1,
        hyperparam_mutations={"lr": tune.loguniform(LOW, HIGH)},
        synch=synch,
    )
    reports = search.steps // search.search.interval
    tuner = tune.Tuner(
        tune.with_resources(RayMember, {"cpu": 1}),
        run_config=tune.RunConfig(
            name="run", storage_path=str(folder), verbose=0, stop={"training_iteration": reports}
        ),
        tune_config=tune.TuneConfig(
            scheduler=scheduler, metric="accuracy", mode="max", num_samples=MEMBERS, reuse_actors=True
        ),
        param_space={"lr": tune.loguniform(LOW, HIGH), "recipe": search.to_dict()},
    )
    results = tuner.fit()
    frames = [result.metrics_dataframe for result in results if result.metrics_dataframe is not None]
    return {
        "accuracy": max(float(frame["accuracy"].max()) for frame in frames),
        **spans([ended_at for frame in frames for ended_at in frame["ended_at"]]),
        "train_seconds": sum(float(frame["train_seconds"].sum()) for frame in frames),
    }


def search_once(options: Namespace) -> None:
    """Search in this process, and leave what came of it in a file."""
    FIRST_STEP.write_text(repr(time.time()))  # `measure` asks for it
    search = recipe(options.interval, options.reports, options.seed)
    cluster = contextlib.nullcontext() if options.one == "ours" else cluster_session(None, CORES)
    with tempfile.TemporaryDirectory() as folder, cluster:
        began = time.perf_counter()
        if options.one == "ours":
            found = search_ours(search, Path(folder))
        else:
            found = search_by_ray(search, Path(folder), synch=options.one == "ray-synchronous")
        found["wall_seconds"] = time.perf_counter() - began
        found["start_seconds"] = found["wall_seconds"] - found["reports"] * found["seconds_per_report"]
    options.found.write_text(json.dumps(found))


def measured(how: str, interval: int, reports: int, seed: int) -> dict[str, Any]:
    """Search in a process of its own, and return what came of it and what it took."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        words = ["--one", how, "--interval", interval, "--reports", reports, "--seed", seed, "--found", file]
        took = measure([sys.executable, __file__, *map(str, words)], also=0)
        if took["status"]:
            raise RuntimeError(f"{how} ended with {took['status']}")
        return {"search": how, "interval": interval, "seed": seed, **json.loads(file.read_text()), "cpu": took["cpu"]}


def seconds_per_step(steps: int) -> float:
    """Return how long a step takes in this process."""
    torch.set_num_threads(1)
    trial = Trial(recipe(steps, 2, 0).base, torch.device("cpu"), lambda step: None)
    began = time.perf_counter()
    trial.train(Work("", 0, 0, Snapshot(), steps, {}, 0), None)
    return (time.perf_counter() - began) / steps


def seconds_per_step_on_all_cores() -> float:
    """Return how long a step takes when each core trains, and nothing else runs: the median of three times."""
    with get_context("spawn").Pool(CORES) as pool:
        times = [statistics.mean(pool.map(seconds_per_step, [300] * CORES, chunksize=1)) for _ in range(4)]
    return statistics.median(times[1:])  # in the first one they import


def compare(seconds: float, reports: int, seeds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return a row for each search and their ratios, for one training time per report."""
    per_step = seconds_per_step_on_all_cores()
    interval = max(1, round(seconds / per_step))
    rows = [measured(how, interval, reports, seed) for seed in range(seeds) for how in SEARCHES]
    for row in rows:
        whole, further = row["wall_seconds"] / row["reports"], row["seconds_per_report"]
        row["overhead_ms_per_report"] = 1e3 * (whole * CORES - interval * per_step)
        row["overhead_ms_per_report_marginal"] = 1e3 * (further * CORES - interval * per_step)
    of = {how: [row for row in rows if row["search"] == how] for how in SEARCHES}
    walls = {how: statistics.median(row["wall_seconds"] for row in of[how]) for how in SEARCHES}
    ray = min(SEARCHES[1:], key=walls.__getitem__)
    gains = [ours["accuracy"] - theirs["accuracy"] for ours, theirs in zip(of["ours"], of[ray], strict=True)]
    spread = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
    name = f"{seconds:g}_s"
    median = {
        how: {key: statistics.median(row[key] for row in of[how]) for key in ("cpu", "start_seconds", *OVERHEADS)}
        for how in ("ours", ray)
    }
    overheads = {
        f"{key}_{who}_{name}": median[how][key]
        for key in (*OVERHEADS, "start_seconds")
        for who, how in (("ours", "ours"), ("ray", ray))
    }
    return rows, {
        f"wall_time_ray_over_ours_{name}": walls[ray] / walls["ours"],
        f"cpu_seconds_ray_over_ours_{name}": median[ray]["cpu"] / median["ours"]["cpu"],
        **overheads,
        f"accuracy_ours_minus_ray_{name}": statistics.mean(gains),
        f"half_width_95_{name}": 1.96 * spread,
    }


DEPTHS, WORDS = (1, 4), ("sgd", "adamw", "lion")


def report_values(config: dict[str, Any]) -> None:
    """Report the values that a trial has been given, and a score that prefers small ones."""
    step = 0
    if checkpoint := tune.get_checkpoint():
        with checkpoint.as_directory() as folder:
            step = int((Path(folder) / "step").read_text())
    while True:
        step += 1
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "step").write_text(str(step))
            score = random.Random(f"{config['depth']}{step}").random()
            tune.report(
                {"score": score, "seen_depth": config["depth"]}, checkpoint=tune.Checkpoint.from_directory(folder)
            )


def failures(scheduler: Any, reports: int) -> int:
    """Return how many values were outside of what was declared, and one for each trial that ended in an error."""
    with tempfile.TemporaryDirectory() as folder:
        tuner = tune.Tuner(
            report_values,
            run_config=tune.RunConfig(storage_path=folder, verbose=0, stop={"training_iteration": reports}),
            tune_config=tune.TuneConfig(
                scheduler=scheduler, metric="score", mode="max", num_samples=8, reuse_actors=True
            ),
            param_space={"depth": tune.randint(DEPTHS[0], DEPTHS[1] + 1), "optimizer": tune.choice(WORDS)},
        )
        try:
            results = tuner.fit()
        except Exception as error:  # of the scheduler, which ends the whole run
            print(f"{type(scheduler).__name__}: {type(error).__name__}: {error}")
            return 8
        frames = [result.metrics_dataframe for result in results if "seen_depth" in (result.metrics or {})]
        seen = [depth for frame in frames for depth in frame["seen_depth"]]
        return results.num_errors + sum(not DEPTHS[0] <= depth <= DEPTHS[1] for depth in seen)


def whole_numbers_and_words(reports: int) -> dict[str, float]:
    """Return the failures of Ray's scheduler and of ours."""
    theirs = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=1,
        resample_probability=0.0,
        hyperparam_mutations={"depth": tune.randint(DEPTHS[0], DEPTHS[1] + 1), "optimizer": tune.choice(WORDS)},
    )
    depth = {"type": "int", "low": DEPTHS[0], "high": DEPTHS[1]}
    ours = PBTScheduler({"depth": depth, "optimizer": {"type": "choice", "values": list(WORDS)}}, interval=1)
    with cluster_session(None, CORES):
        return {"ray_failures": failures(theirs, reports), "our_failures": failures(ours, reports)}


def main() -> None:
    """Measure and report, or search once."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--one", choices=SEARCHES, help="search once, as this benchmark does in a process of its own")
    parser.add_argument("--found", type=Path)
    for name in ("interval", "reports", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    options = parse(parser)
    if options.one:
        search_once(options)
        return
    rows, headline = [], {}
    for seconds, reports, seeds in ((0.1, 3, 1),) if options.quick else ((0.1, 8, 2), (2.0, 3, 1)):
        more, figures = compare(seconds, reports, seeds)
        rows, headline = rows + more, headline | figures
    headline |= whole_numbers_and_words(reports=5 if options.quick else 10)
    finish("pbt_vs_ray", rows, headline, options)


if __name__ == "__main__":
    main()
