"""Several source folders, one import name: kernels/, loaders/ and configs/ install as fastssl.kernels and so on."""

from setuptools import find_packages, setup

setup(
    package_dir={
        "fastssl": "fastssl",
        "fastssl.kernels": "kernels",
        "fastssl.loaders": "loaders",
        "fastssl.configs": "configs",
    },
    packages=[
        "fastssl",
        *(f"fastssl.{name}" for name in find_packages("fastssl")),
        "fastssl.kernels",
        *(f"fastssl.kernels.{name}" for name in find_packages("kernels")),
        "fastssl.loaders",
        "fastssl.configs",
        *(f"fastssl.loaders.{name}" for name in find_packages("loaders")),
    ],
    package_data={"fastssl.configs": ["*.yaml", "*/*.yaml"]},
)
