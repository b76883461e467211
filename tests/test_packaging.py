"""What is installed: the wheel against the tree, names that nobody else's package may lose to ours, lazy imports."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import diffusers_accel

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Folders of the repository and the packages as which they are imported.
HOMES = {
    "diffusers_accel": "diffusers_accel",
    "kernels": "diffusers_accel.kernels",
    "search": "diffusers_accel.search",
    "evals": "diffusers_accel.evals",
}
# Parts of the checkout that are not installed.
WEIGHTS, TRAINING = "diffusers_accel/evals/toy/weights/", "diffusers_accel/evals/toy/training/"


def tree() -> set[str]:
    """Every file of the four folders by the path that it has when installed."""
    files = set()
    for folder, package in HOMES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix != ".pyc" and not path.name.startswith("."):
                files.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
    return files


def python(code: str, *, cwd: Path = ROOT, **env: str) -> str:
    """Runs `code` in a fresh interpreter and returns what it printed."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that no earlier build/ of the checkout can leak into it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in HOMES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_every_folder_with_code_is_a_listed_package() -> None:
    found = {path.rpartition("/")[0].replace("/", ".") for path in tree() if path.endswith(".py")}
    listed = CONFIG["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == found


def test_the_wheel_holds_the_tree_without_the_small_models_weights_and_training(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {name for name in tree() if not name.startswith((WEIGHTS, TRAINING))}
    assert "diffusers_accel/py.typed" in names
    assert wheel.stat().st_size < 2**20, "users install code, not the small model of the tests"


def test_an_installed_wheel_says_where_the_weights_are(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
from diffusers_accel.evals.toy import verify_weights
try:
    verify_weights()
except FileNotFoundError as error:
    print(error)
"""
    found = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "come with a checkout of the project, not with the installed package" in found


def test_every_module_of_the_wheel_imports_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    files = sorted(
        name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py") and "__main__" not in name
    )
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files]
    code = f"""
import importlib, sys
for name in {modules!r}:
    found = importlib.import_module(name).__file__
    assert found.startswith({str(tmp_path)!r}), found
"""
    python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path))


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert f"Version: {diffusers_accel.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    for extra in ("triton", "eval", "metrics", "brisque", "cvvdp", "xformers", "dev"):
        assert f"Provides-Extra: {extra}\n" in metadata
    (scripts,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
    assert "diffusers-accel = diffusers_accel.cli:main" in scripts


def test_the_oldest_host_that_is_tested_is_the_oldest_that_is_supported() -> None:
    """`make hosts` runs the families on it."""
    (least,) = (each for each in CONFIG["project"]["dependencies"] if each.startswith("diffusers>="))
    (tested,) = re.findall(r"^OLDEST := diffusers==(\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert tested.startswith(least.removeprefix("diffusers>=") + "."), (tested, least)


def test_the_three_folders_are_namespaces_without_dangerous_names() -> None:
    for folder in ("kernels", "search", "evals"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/ would shadow a package of that name"
    risky = {"triton", "types", "enum"}
    assert not [path for folder in HOMES for path in (ROOT / folder).rglob("*") if path.stem in risky]


def test_hugging_faces_kernels_is_not_shadowed(tmp_path: Path) -> None:
    """Even with the checkout first and the real package last on the path, as under `python -m` from the root."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.real)"
    assert python(code) == "True"


def test_diffusers_sees_no_kernels_package_in_the_checkout() -> None:
    code = "import importlib.metadata as m, diffusers.utils as u; print(u.is_kernels_available())"
    try:
        import importlib.metadata

        expected = bool(importlib.metadata.version("kernels"))
    except importlib.metadata.PackageNotFoundError:
        expected = False
    assert python(code) == str(expected)


def test_imports_are_lazy() -> None:
    heavy = "heavy = {'torch', 'diffusers', 'transformers', 'triton', 'typer', 'rich', 'matplotlib', 'safetensors'}"
    code = f"{heavy}; import sys, diffusers_accel; print(sorted(heavy & set(sys.modules)))"
    assert python(code) == "[]"
    code = (
        f"{heavy}; import sys, diffusers_accel.kernels.attention; print(sorted(heavy & set(sys.modules) - {{'torch'}}))"
    )
    assert python(code) == "[]"


@pytest.mark.parametrize("name", diffusers_accel.__all__)
def test_the_public_names_are_there(name: str) -> None:
    assert getattr(diffusers_accel, name).__name__ == name
    assert name in dir(diffusers_accel)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        AttributeError, match=r"no attribute 'pach'; it has Budget, Family, Goal, Method, Plan, compare, .*patch"
    ):
        _ = diffusers_accel.pach


def test_messages_name_extras_that_exist_and_a_command_that_works_from_a_checkout() -> None:
    sources = [path for folder in HOMES for path in (ROOT / folder).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    named = {name for text in texts.values() for name in re.findall(r"\binstall\([\"'](\w+)[\"']", text)}
    extras = CONFIG["project"]["optional-dependencies"]
    assert {"eval", "triton", "fa4", "xformers"} <= named <= extras.keys()
    assert not [path for path, text in texts.items() if "diffusers-accel[" in text], (
        "nothing is published to install it from"
    )
