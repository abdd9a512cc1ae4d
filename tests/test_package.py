"""The distributed package: what a wheel and a source archive hold, and that they install and run."""

from __future__ import annotations

import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a build reads; a build in the checkout would leave its remains there.
SOURCES = ("minimind", "cli", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


def ran(*args: object) -> str:
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Source archive, and the wheel made from it, by the setuptools that is installed."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    ran(sys.executable, "-m", "build", "--no-isolation", folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    (archive,) = (folder / "dist").glob("*.tar.gz")
    return {"wheel": wheel, "sdist": archive}


def test_the_wheel_holds_every_file_of_both_packages_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
        described = wheel.read(metadata).decode()
    expected = {
        str(Path(package) / path.relative_to(ROOT / folder))
        for folder, package in (("minimind", "minimind"), ("cli", "minimind_cli"))
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert names == expected
    assert {"minimind/py.typed", "minimind_cli/app.py"} < names
    assert any(name.startswith("minimind/assets/") for name in names)
    assert "Requires-Python: >=3.11" in described


def test_the_source_archive_holds_what_a_build_needs(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "minimind/py.typed", "cli/app.py"} <= names
    assert any(name.startswith("minimind/assets/") for name in names)


def test_it_installs_in_an_empty_environment_and_runs(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A checkout on this path would come before what is installed.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    # The wheel was built from the source archive, so this speaks for both.
    ran(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    ran(*pip, "install", "-q", "--no-deps", "--no-index", built["wheel"])
    home = Path(ran(python, "-c", "import site; print(site.getsitepackages()[0])").strip())
    # What minimind depends on is lent by the environment of the tests, and comes after the new one's own.
    (home / "lent.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    assert "Usage: minimind-train" in ran(tmp_path / "venv/bin/minimind-train", "--help")
    where = "import minimind; print(minimind.__file__, minimind.load_tokenizer().vocab_size)"
    # Outside of the checkout, which would come first.
    shown = subprocess.run([python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [str(home / "minimind" / "__init__.py"), "6400"]
