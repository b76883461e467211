"""The venv in which VBench runs: made from pinned versions with hashes, of the Python that these are for, marked when whole."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusers_accel.evals.vbench.dimensions import DIMENSIONS, Set
from diffusers_accel.files import (
    FileError,
    Kind,
    Schema,
    load_document,
    only_writer,
    prepare_folder,
    printable,
    quoted,
    save_document,
)
from diffusers_accel.support.device import find_device

Build = Literal["cpu", "cuda"]

KIND = Kind("diffusers_accel.vbench_environment", version=1, remedy="run `diffusers-accel vbench setup` again")
MARK = "diffusers_accel.json"  # in the venv, written last
REQUIREMENTS = Path(__file__).with_name("requirements")
# What the pinned files are for: tokenizers 0.13.3, which VBench's transformers needs, has no wheel for a later Python.
PYTHON, SYSTEM, PROGRAM = "3.11", "Linux x86_64", "python3.11"
SETUP = "diffusers-accel vbench setup"
ASK = (
    "import platform as p; print(p.python_version()); print(p.system(), p.machine()); print(p.python_implementation())"
)
ASK_SECONDS = 60


class EnvironmentMark(Schema, frozen=True):
    """What the venv was made of.

    packages: the set. requirements: sha256 of the files that were installed.
    """

    packages: Set
    build: Build
    requirements: str


@dataclass(frozen=True)
class Environment:
    """A venv that is whole."""

    folder: Path
    made: EnvironmentMark

    @property
    def python(self) -> Path:
        return _python(self.folder)

    def lacks(self, dimension: str) -> str | None:
        """What of its packages a dimension misses, and what to do; or None."""
        needs = DIMENSIONS[dimension]
        if needs.packages == "full" and self.made.packages == "light":
            return f"the packages of the full environment ({SETUP} --full)"
        if needs.detectron2 and not has_detectron2(self):
            return (
                "detectron2 (in no registry of packages: build it from facebookresearch/detectron2 on GitHub with "
                f"{printable(self.python)} -m pip install --no-build-isolation)"
            )
        return None


def default_folder() -> Path:
    """Below XDG_CACHE_HOME, else ~/.cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "diffusers_accel" / "vbench"


def find(folder: Path | None = None) -> Environment:
    """The environment that `setup` has made.

    Raises:
        FileError: there is none, or it was made of other files, or is not whole.
    """
    folder = (folder or default_folder()).absolute()
    again = f"make it with: {SETUP}" + ("" if folder == default_folder() else f" --env {printable(folder)}")
    try:
        made = load_document(folder / MARK, KIND, EnvironmentMark)
    except FileNotFoundError:
        raise FileError(
            f"{printable(folder)}: expected VBench's environment, found none that is whole; {again}"
        ) from None
    if made.requirements != digest(made.packages, made.build):
        raise FileError(f"{printable(folder)}: was made of other versions than this release pins; {again}")
    if not _python(folder).is_file():
        raise FileError(f"{printable(folder)}: its Python is gone; {again}")
    return Environment(folder, made)


def setup(
    folder: Path | None = None, packages: Set = "light", build: Build = "cpu", python: str | None = None
) -> Environment:
    """Makes the environment, or brings one up to date that is there.

    Args:
        packages: "light" for the dimensions whose `packages` say so, "full" for all.
        build: of PyTorch.
        python: the interpreter to make it of, a path or a name; None looks for one that fits.

    Raises:
        ValueError: it does not fit.
        WriteError: the folder cannot be written, or holds other files.
        RuntimeError: pip failed, with what it said.
    """
    folder = (folder or default_folder()).absolute()
    interpreter = find_python(python)
    prepare_folder(folder)
    others = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if others and not (folder / "pyvenv.cfg").is_file():
        raise FileError(
            f"{printable(folder)}: expected an empty folder or a venv, found {printable(others[0])[:60]} in it; "
            "name a folder of its own with --env"
        )
    with only_writer(folder / MARK, "another setup works on this environment"):
        (folder / MARK).unlink(missing_ok=True)  # not whole from here on
        if not (folder / "bin" / "pip").is_file():
            _call([interpreter, "-m", "venv", str(folder)])
        if (found := _version(str(_python(folder)))) != (PYTHON, SYSTEM, "CPython"):
            raise FileError(
                f"{printable(folder)}: expected a venv of CPython {PYTHON} on {SYSTEM}, found one of "
                f"{_told(found)}; delete it, or name another with --env"
            )
        for names, options in steps(packages, build):
            _install(folder, names, options, build)
        save_document(
            folder / MARK, KIND, EnvironmentMark(packages=packages, build=build, requirements=digest(packages, build))
        )
    return find(folder)


def steps(packages: Set, build: Build) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The calls of pip: the files of each, and its options. Everything is pinned, so pip resolves nothing."""
    if packages == "light":
        return [((f"torch-{build}", "light"), ("--only-binary", ":all:"))]
    # Some packages are sources, and are built by the pinned setuptools.
    return [(("build",), ("--only-binary", ":all:")), ((f"torch-{build}", "light", "full"), ("--no-build-isolation",))]


def digest(packages: Set, build: Build) -> str:
    """sha256 of the files that such an environment is made of."""
    found = hashlib.sha256()
    for names, _ in steps(packages, build):
        for name in names:
            found.update((REQUIREMENTS / f"{name}.txt").read_bytes())
    return found.hexdigest()


def find_python(python: str | None = None) -> str:
    """The path of an interpreter that the pinned files are for.

    Raises:
        ValueError: there is none; the message says what was found.
    """
    tried: list[str] = []
    for name in [python] if python else [sys.executable, PROGRAM]:
        path = shutil.which(name)
        found = _version(path) if path else None
        if found == (PYTHON, SYSTEM, "CPython"):
            return str(path)
        tried.append(f"{quoted(name)}, which is {_told(found)}")
    raise ValueError(
        f"python: expected CPython {PYTHON} on {SYSTEM}, for which VBench's packages are pinned, found "
        f"{' and '.join(tried)}; install one and name it with --python"
    )


def device(environment: Environment, asked: str | None) -> str:
    """Where VBench computes: on the CPU where its PyTorch is built for that alone, else where it is asked to.

    Raises:
        ValueError: there is no such device.
    """
    found = find_device(asked)
    return str(found) if environment.made.build == "cuda" else "cpu"


def has_detectron2(environment: Environment) -> bool:
    """Whether somebody has built it into the venv."""
    return any((environment.folder / "lib" / PROGRAM / "site-packages").glob("detectron2*"))


def _version(python: str) -> tuple[str, str, str] | None:
    """Version, system and implementation of an interpreter."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", ASK], capture_output=True, text=True, timeout=ASK_SECONDS, check=True
        )
        version, system, implementation = done.stdout.splitlines()
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return ".".join(version.split(".")[:2]), system, implementation


def _told(found: tuple[str, str, str] | None) -> str:
    if found is None:
        return "no Python that runs"
    version, system, implementation = found
    return printable(f"{implementation} {version} on {system}")[:100]


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _install(folder: Path, names: Sequence[str], options: Sequence[str], build: Build) -> None:
    pip = [str(_python(folder)), "-m", "pip", "install", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    files = [part for name in names for part in ("--requirement", str(REQUIREMENTS / f"{name}.txt"))]
    advice = ""
    if build == "cpu":
        advice = (
            ". PyTorch's CPU build is on PyTorch's own index, which pip's settings have to name (extra-index-url); "
            "--build cuda takes the one of the usual registry, which runs on a CPU too and is 5 GB"
        )
    _call([*pip, *options, *files], advice)


def _call(command: Sequence[str], advice: str = "") -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise RuntimeError(f"{printable(command[0])} does not run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        said = printable(" ".join(lines))[:300] or "no message"
        raise RuntimeError(f"making VBench's environment failed with code {done.returncode}: {said}{advice}")
