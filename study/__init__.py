"""What a study is and how it runs; the Python API: `launch`, `open_study`, `Study`, `load_model`.

The API is loaded when it is first used: `import study` alone loads neither torch nor Optuna.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from study.api import Study, launch, open_study
    from study.model import load_model

__all__ = ["Study", "launch", "load_model", "open_study"]

try:
    __version__ = version("dynamic-training-study")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+source"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'study' has no attribute {name!r}")
    if name == "load_model":
        from study import model

        return model.load_model
    from study import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
