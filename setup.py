"""Several source folders, one import name: kernels/, loaders/ and configs/ install as fastssl.kernels and so on."""

from setuptools import Extension, find_packages, setup

FOLDERS = {
    "fastssl": "fastssl",
    "fastssl.kernels": "kernels",
    "fastssl.loaders": "loaders",
    "fastssl.configs": "configs",
}

setup(
    package_dir=FOLDERS,
    packages=[
        package
        for name, folder in FOLDERS.items()
        for package in (name, *(f"{name}.{inner}" for inner in find_packages(folder)))
    ],
    package_data={"": ["*.yaml"]},
    # no module but a library for ctypes (loaders/turbojpeg.py, which does without it where it cannot be built)
    ext_modules=[Extension("fastssl.loaders._window", ["loaders/_window.c"], libraries=["jpeg"], optional=True)],
)
