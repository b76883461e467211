"""What pyproject.toml cannot say: packages that a checkout has, also when it is installed with -e, and the wheel has not."""

from __future__ import annotations

from setuptools import setup
from setuptools.command.build_py import build_py

# How the small model of the tests is trained, which needs its checkout's weights and nobody's installation.
OF_THE_CHECKOUT = ("diffusers_accel.evals.toy.training",)


class BuildPy(build_py):
    def run(self) -> None:
        if not self.editable_mode:
            self.packages = [name for name in self.packages or [] if name not in OF_THE_CHECKOUT]
        super().run()


setup(cmdclass={"build_py": BuildPy})
