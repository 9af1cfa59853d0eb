"""What not every installation has: packages that come with an extra of this one.

A device that trains needs none of them. They are imported where they are used first,
and what is missing is said in one line, with the extra to install.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .errors import ConfigurationError
from .texts import listed

# Each extra of pyproject.toml, and what is imported of it. Without Numba sums over
# clients are made another way (fedweight.core.rows), so that nothing requires it.
EXTRAS = {
    "mlflow": ("mlflow",),
    "server": ("numba",),
    "simulation": ("cloudpickle", "ray"),
    "studies": (
        "altair",
        "fairlearn",
        "jinja2",
        "pandas",
        "scipy",
        "sklearn",
        "vl_convert",
    ),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported, without importing it.

    Examples
    --------
    >>> is_installed("torch"), is_installed("no_such_package")
    (True, False)
    """
    return importlib.util.find_spec(package) is not None


def require(what: str, extra: str, *packages: str) -> None:
    """Raise unless an extra's packages are installed.

    Parameters
    ----------
    what : str
        What needs them, as a message begins with it.
    extra : str
        One of :data:`EXTRAS`.
    *packages : str
        Which of them are needed; all by default.

    Raises
    ------
    ConfigurationError
        Naming the packages that are missing, and the extra.

    Examples
    --------
    >>> require("a plot", "studies")
    """
    wanted = packages or EXTRAS[extra]
    missing = [package for package in wanted if not is_installed(package)]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise ConfigurationError(
            f"{what} needs {listed(missing)}, which {are} not installed. Install "
            f"fedweight[{extra}]."
        )


class Imported:
    """A package that is imported when something of it is asked for.

    Parameters
    ----------
    package : str
        Its name.
    extra : str, optional
        The extra that brings it; without one it is always installed.
    what : str, optional
        What needs it, for :func:`require`.

    Examples
    --------
    >>> pd = Imported("pandas", "studies", "a table")
    >>> len(pd.DataFrame())
    0
    """

    def __init__(self, package: str, extra: str = "", what: str = "") -> None:
        self._needed = (what, extra, package)

    def __getattr__(self, name: str) -> Any:
        """Return what the package has by this name, and keep it."""
        if name.startswith("__"):  # What looks at modules does not want it imported.
            raise AttributeError(name)
        what, extra, package = self._needed
        if extra:
            require(what, extra, package)
        value = getattr(importlib.import_module(package), name)
        setattr(self, name, value)
        return value
