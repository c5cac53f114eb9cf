"""A deployment on the loopback address: SuperLink and SuperNodes with TLS and keys, as `federated/README.md` says."""

import datetime
import ipaddress
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from federated.build import Federation
from federated.recipe import FederateRecipe

APP = Path(__file__).parents[2] / "federated" / "flower" / "app"
BIN = Path(sys.executable).parent
RECIPE = """
kind = "federate"
task = "raytrain.testing:tiny"
rounds = 1
seed = 5

[clients]
count = 2
per_round = 2

[protocol]
pool = 64
local_steps = 12
batch = 4

[optimizer]
lr = 0.02
"""
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return not probe.connect_ex(("127.0.0.1", port))


def write_certificates(folder: Path) -> None:
    """Write a certificate authority and the certificate of a server on the loopback address."""
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    names = {file: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test {file}")]) for file in ("ca", "server")}
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    for file, key, extension in (
        ("ca", authority, x509.BasicConstraints(ca=True, path_length=None)),
        ("server", server, address),
    ):
        builder = x509.CertificateBuilder().subject_name(names[file]).issuer_name(names["ca"])
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
        certificate = builder.add_extension(extension, critical=file == "ca").sign(authority, hashes.SHA384())
        (folder / f"{file}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    write_key(folder / "server.key", server)


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    form = serialization.PrivateFormat.PKCS8 if path.suffix == ".key" else serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)


class Deployment:
    """Processes on the loopback address, which end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            **SETTINGS,
            "FLWR_HOME": str(folder / "home"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        (folder / "home").mkdir()
        link = {"address": f'"127.0.0.1:{self.port}"', "root-certificates": f'"{folder}/ca.pem"'}
        lines = [
            "[superlink]",
            'default = "dep"',
            "[superlink.dep]",
            *(f"{key} = {value}" for key, value in link.items()),
        ]
        (folder / "home" / "config.toml").write_text("\n".join(lines) + "\n")

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [str(BIN / words[0]), *words[1:]]
            process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def superlink(self) -> None:
        folder = self.folder
        certificates = ["--ssl-ca-certfile", f"{folder}/ca.pem", "--ssl-certfile", f"{folder}/server.pem"]
        certificates += ["--ssl-keyfile", f"{folder}/server.key"]
        self.listen(*certificates, "--enable-supernode-auth", "--port", str(self.port))

    def listen(self, *words: str) -> None:
        """Start a SuperLink with these words, and wait until it listens."""
        self.start("superlink", "flower-superlink", *words)
        give_up = time.monotonic() + 120
        while not _answers(self.port):
            assert time.monotonic() < give_up, self.logs()
            time.sleep(0.1)

    def run(self, connection: str, *words: str) -> None:
        """Run the app of a recipe to its end."""
        out = f'out="{self.folder}/run" recipe="{self.folder}/recipe.toml"'
        self.flwr("run", str(APP), connection, "--run-config", out, *words)
        give_up = time.monotonic() + 300
        while not (self.folder / "run" / "result.json").is_file():
            assert time.monotonic() < give_up, self.logs()
            time.sleep(0.5)

    def register(self, key: Path) -> None:
        self.flwr("supernode", "register", str(key.with_suffix(".pub")), "dep")

    def flwr(self, *words: str) -> str:
        ended = subprocess.run(
            [str(BIN / "flwr"), *words],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def supernode(self, client: int, key: Path) -> subprocess.Popen[bytes]:
        return self.start(
            f"supernode{client}", "flower-supernode", "--superlink", f"127.0.0.1:{self.port}",
            "--root-certificates", f"{self.folder}/ca.pem", "--auth-supernode-private-key", str(key),
            "--port", str(free_port()),
            "--node-config", f'partition-id={client} num-partitions=2 recipe="{self.folder}/recipe.toml"',
        )  # fmt: skip

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        for process in self.processes:
            try:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for member in family:
                member.kill()
            process.wait()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    write_certificates(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    made = Deployment(tmp_path)
    yield made
    made.close()


def test_a_deployment_ends_with_the_coefficients_of_the_simulation(deployment: Deployment) -> None:
    folder = deployment.folder
    deployment.superlink()
    for client in range(2):
        key = folder / f"client{client}"
        write_key(key, ec.generate_private_key(ec.SECP384R1()))
        deployment.register(key)
        deployment.supernode(client, key)
    deployment.run("dep")
    check_equal_to_one_process(folder)


def check_equal_to_one_process(folder: Path) -> None:
    """Check that the run in a folder had the reports, and the metrics, of the recipe in one process."""
    recipe = FederateRecipe.parse({"name": "recipe", **tomllib.loads(RECIPE)})
    federation = Federation.of(recipe)
    server = federation.server()
    for _ in federation.simulation(server).run(folder / "one"):
        pass
    assert (folder / "run" / "reports.bin").read_bytes() == (folder / "one" / "reports.bin").read_bytes()
    result = json.loads((folder / "run" / "result.json").read_text())
    assert (result["status"], result["metrics"]) == ("done", federation.evaluate(server))


def test_a_simulation_of_flowers_ends_with_the_same(deployment: Deployment) -> None:
    folder = deployment.folder
    deployment.environment["RAY_ADDRESS"] = "local"
    (folder / "home" / "config.toml").write_text(
        f'[superlink.simulation]\naddress = "127.0.0.1:{deployment.port}"\ninsecure = true\n'
    )
    deployment.listen("--insecure", "--simulation", "--port", str(deployment.port))
    deployment.run("simulation", "--federation-config", "num-supernodes=2")
    check_equal_to_one_process(folder)
