"""kernels/, loaders/ and configs/ are the package's own folders: links in fastssl/ lead to them (pyproject.toml)."""

from setuptools import Extension, find_packages, setup

setup(
    package_dir={"": "."},  # an editable install is then a plain path, which every tool understands
    packages=find_packages(include=["fastssl", "fastssl.*"]),
    package_data={"fastssl": ["py.typed", "configs/*.yaml", "configs/*/*.yaml"]},
    # no module but a library for ctypes (loaders/window_decoder.py, which does without it where it cannot be built)
    ext_modules=[
        Extension("fastssl.loaders._window", ["fastssl/loaders/_window.c"], libraries=["jpeg"], optional=True)
    ],
)
