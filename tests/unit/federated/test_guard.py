"""A deployment that is open to strangers is refused, unless that is wanted."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import sys
from federated.flower.guard import check_closed
from raytrain.errors import RecipeError
for program, insecure in (("flower-superlink", False), ("flower-superlink", True)):
    try:
        check_closed(program, insecure=insecure)
        print("closed")
    except RecipeError as error:
        print(error)
"""
PROGRAM = f"""#!{sys.executable}
import subprocess, sys
sys.exit(subprocess.run([{sys.executable!r}, "-c", {CHECK!r}]).returncode)
"""
OPEN = (
    "flower-superlink: expected TLS and keys of SuperNodes, by --ssl-certfile, --enable-supernode-auth and without "
    "--insecure; got {}. Set insecure=true in --run-config, and in --node-config, to do without"
)
TLS, KEYS, PLAIN = (
    "--ssl-certfile: whoever is on the way could read and change all messages",
    "--enable-supernode-auth: any SuperNode that reaches it could take part",
    "--insecure: messages are not encrypted",
)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--ssl-certfile", "server.pem", "--enable-supernode-auth"], "closed"),
        (["--ssl-certfile=server.pem", "--enable-supernode-auth"], "closed"),
        (["--ssl-certfile", "server.pem"], OPEN.format(KEYS)),
        (["--insecure"], OPEN.format("; ".join([PLAIN, TLS, KEYS]))),
        (["--insecure", "--simulation"], "closed"),
    ],
    ids=["words", "equals", "no-keys", "plain", "simulation"],
)
def test_an_app_sees_how_its_superlink_was_started(tmp_path: Path, words: list[str], said: str) -> None:
    program = tmp_path / "flower-superlink"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    ended = subprocess.run([program, *words], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == [said, "closed"]


def test_what_cannot_be_seen_is_said(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["closed", "closed"]
    assert ended.stderr == "flower-superlink: cannot see how it was started; it needs TLS, and keys of SuperNodes\n"
