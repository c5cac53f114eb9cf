"""A deployment that is open to strangers is refused, unless that is wanted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from federated.flower import guard
from federated.flower.guard import check_closed, look_by_ps, look_in_proc
from raytrain.errors import RecipeError

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


@pytest.mark.skipif(not shutil.which("ps") or not Path("/proc/self/stat").is_file(), reason="one of them is not there")
def test_ps_shows_the_same_processes_as_proc() -> None:
    words, parent = look_by_ps(os.getpid())
    assert parent == os.getppid()
    assert words == " ".join(look_in_proc(os.getpid())[0]).split()


def test_where_processes_cannot_be_looked_at_nobody_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(pid: int) -> tuple[list[str], int]:
        raise FileNotFoundError(2, "No such file or directory", "ps")

    monkeypatch.setattr(guard, "look_in_proc", look)
    with pytest.raises(
        RecipeError, match=r"^flower-supernode: expected to see how it was started, in /proc or by ps; "
    ):
        check_closed("flower-supernode", insecure=False)
    check_closed("flower-supernode", insecure=True)
