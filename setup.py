"""Package list: everything is declared in pyproject.toml but `conf`, which is installed as `rbm.conf`."""

from setuptools import find_packages, setup

configuration = ["rbm.conf", *(f"rbm.conf.{name}" for name in find_packages("conf"))]
setup(
    packages=[*find_packages(include=["rbm", "rbm.*", "dataset_builder", "dataset_builder.*", "policies", "policies.*"]), *configuration],
    package_dir={"rbm.conf": "conf"},
)
