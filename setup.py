"""Lists the packages, which live in three folders: launcher/, kernels/launcher_kernels/ and recipes/.

`recipes/` stays at the top of a checkout, where people look for it, and becomes `launcher/recipes/` in a wheel. No
table of pyproject.toml can find packages and add one that lies elsewhere, so this one line is code.
"""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["launcher", "launcher.*"]), *find_packages("kernels"), "launcher.recipes"])
