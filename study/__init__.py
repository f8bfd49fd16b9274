"""What a study is and how it runs."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dynamic-training-study")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+source"
