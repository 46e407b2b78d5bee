"""The packages: tools and experiments, beside vdit in a checkout, are installed inside of it."""

from setuptools import find_packages, setup

BESIDE = ("tools", "experiments")

setup(
    packages=[
        *find_packages(include=["vdit", "vdit.*"]),
        *(f"vdit.{name}" for name in find_packages(include=[f"{x}*" for x in BESIDE])),
    ],
    package_dir={f"vdit.{name}": name for name in BESIDE},
)
