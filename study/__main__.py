"""The command `study`, and `python -m study`."""


def main() -> None:
    import atexit
    import gc

    gc.set_threshold(250_000, 10, 10)  # modules are no garbage: 0.1 s of `study status`, which makes 150,000 objects

    from study.cli.app import main as run_command

    atexit.register(_skip_last_collection)
    run_command()


def _skip_last_collection() -> None:
    """The interpreter's last search for garbage would take 0.3 s, of the 1.0 s of `study status`.

    Triton, which torchvision loads, needs it: else its bindings print 30 lines of `nanobind: leaked` at the exit.
    """
    import gc
    import sys

    if "triton" not in sys.modules:
        gc.freeze()


if __name__ == "__main__":
    main()
