"""Package list: everything is declared in pyproject.toml but `conf`, which is installed as `rbm.conf`."""

from setuptools import find_packages, setup

OURS = ("rbm", "dataset_builder", "policies")

configuration = ["rbm.conf", *(f"rbm.conf.{name}" for name in find_packages("conf"))]
setup(
    packages=[*find_packages(include=[f"{name}{below}" for name in OURS for below in ("", ".*")]), *configuration],
    package_dir={"rbm.conf": "conf"},
)
