"""The cluster file for `ray up`, as far as it can be read without machines."""

from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[3]
FILE = ROOT / "cluster" / "machines.yaml"


def test_ray_accepts_it() -> None:
    config = prepare_config(yaml.safe_load(FILE.read_text()))
    validate_config(config)
    (nodes,) = config["available_node_types"].values()
    machines = config["provider"]["worker_ips"]
    assert config["max_workers"] == nodes["min_workers"] == nodes["max_workers"] == len(machines)


def test_every_ray_that_it_starts_asks_for_a_token() -> None:
    config = yaml.safe_load(FILE.read_text())
    for place in ("head", "worker"):
        (start,) = [line for line in config[f"{place}_start_ray_commands"] if "ray start" in line]
        assert "RAY_AUTH_MODE=token" in start
    assert "~/.ray/auth_token" in config["file_mounts"]


def test_it_installs_what_is_here() -> None:
    config = yaml.safe_load(FILE.read_text())
    assert config["file_mounts"]["~/raytrain"] == "."
    (install,) = [line for line in config["setup_commands"] if "install.py" in line]
    assert (ROOT / install.rpartition("~/raytrain/")[2]).is_file()
