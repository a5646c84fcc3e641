"""Three source folders, one import name: kernels/ and loaders/ install as fastssl.kernels and fastssl.loaders."""

from setuptools import find_packages, setup

setup(
    package_dir={"fastssl": "fastssl", "fastssl.kernels": "kernels", "fastssl.loaders": "loaders"},
    packages=[
        "fastssl",
        *(f"fastssl.{name}" for name in find_packages("fastssl")),
        "fastssl.kernels",
        *(f"fastssl.kernels.{name}" for name in find_packages("kernels")),
        "fastssl.loaders",
        *(f"fastssl.loaders.{name}" for name in find_packages("loaders")),
    ],
)
