"""What a study is and how it runs; the Python API: `launch`, `open_study`, `Study`, `load_model`.

The API is loaded when it is first used: `import study` alone loads neither torch nor Optuna.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from study.api import Study, launch, open_study
    from study.model import load_model

__all__ = ["Study", "launch", "load_model", "open_study"]

if TYPE_CHECKING:
    __version__: str


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in __all__:
        raise AttributeError(f"module 'study' has no attribute {name!r}")
    if name == "load_model":
        from study import model

        return model.load_model
    from study import api

    return getattr(api, name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # 20 ms, of the 100 of `study --help`

    try:
        return version("dynamic-training-study")
    except PackageNotFoundError:  # imported from a source tree that was never installed
        return "0+source"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
