"""Where torch and all else is installed from; nothing is installed here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("platform", "environment", "by_uv", "gpu", "words"),
    [
        ("linux", {}, True, False, ["--torch-backend", "cpu"]),
        ("linux", {}, True, True, ["--torch-backend", "auto"]),
        ("linux", {"UV_TORCH_BACKEND": "cu130"}, True, True, ["--torch-backend", "cu130"]),
        ("linux", {}, False, False, ["--index-url", "https://download.pytorch.org/whl/cpu"]),
        ("linux", {}, False, True, []),
        ("darwin", {}, True, False, []),
        ("darwin", {}, False, False, []),
        ("linux", {"TORCH_INDEX": "mine"}, True, False, ["--default-index", "mine"]),
        ("darwin", {"TORCH_INDEX": "mine"}, False, False, ["--index-url", "mine"]),
    ],
)
def test_the_torch_that_fits_the_machine_is_asked_for(
    install: ModuleType, platform: str, environment: dict[str, str], by_uv: bool, gpu: bool, words: list[str]
) -> None:
    assert install.torch_index(platform, environment, by_uv=by_uv, gpu=gpu) == words


def test_what_pip_is_configured_with_holds_for_uv(install: ModuleType) -> None:
    listed = (
        ":env:.find-links='/more/wheels'\n"
        "global.cert='/etc/ssl/mine.pem'\n"
        "global.extra-index-url='https://one/simple\\nhttps://two/simple'\n"
        "global.find-links='/wheels'\n"
        "global.index-url='https://mirror/simple'\n"
        "global.timeout='60'\n"
        "install.find-links='/a/wheels /b/wheels'\n"
    )
    assert install.uv_settings(listed) == {
        "UV_DEFAULT_INDEX": "https://mirror/simple",
        "UV_INDEX": "https://one/simple https://two/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/more/wheels",
        "SSL_CERT_FILE": "/etc/ssl/mine.pem",
    }
    without = [line for line in listed.splitlines() if not line.startswith(":env:")]
    assert install.uv_settings("\n".join(without))["UV_FIND_LINKS"] == "/a/wheels,/b/wheels"
    assert install.uv_settings("") == {}


@pytest.mark.parametrize(("chosen", "falls_back"), [({}, sys.platform == "linux"), ({"TORCH_INDEX": "mine"}, False)])
def test_an_index_that_cannot_be_reached_is_done_without_unless_it_was_named(
    chosen: dict[str, str], falls_back: bool, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    ended = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", ROOT / "install.py"],
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "UV_OFFLINE": "1",
            "UV_CACHE_DIR": str(tmp_path / "cache"),
            **chosen,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert f"installing into {tmp_path / 'venv'} by uv" in ended.stderr
    assert ("torch comes from where all else does instead" in ended.stderr) == falls_back
