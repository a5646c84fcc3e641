"""kernels/, loaders/ and configs/ are the package's own folders: links in fastssl/ lead to them (pyproject.toml)."""

from setuptools import Extension, find_packages, setup

setup(
    package_dir={"": "."},  # an editable install is then a plain path, which every tool understands
    packages=find_packages(include=["fastssl", "fastssl.*"]),
    package_data={"fastssl": ["py.typed", "configs/*.yaml", "configs/*/*.yaml"]},
    # no module but a library for ctypes (window_decoder.py and batch_pool.py do without it where it cannot be built)
    ext_modules=[
        Extension(
            "fastssl.loaders._window",
            ["fastssl/loaders/_window.c", "fastssl/loaders/_pool.c"],
            libraries=["jpeg"],
            extra_compile_args=["-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ],
)
