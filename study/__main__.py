"""The command `study`, and `python -m study`."""

SHOWING = {"status", "list", "logs"}
"""Verbs that soon end, hold little, and run no code of others."""


def main() -> None:
    import atexit
    import gc
    import sys

    _open_what_is_closed()
    if SHOWING & set(sys.argv[1:2]):
        # 0.1 s of `study status`, which makes 150,000 objects. Not where own networks train: of one that makes a cycle
        # a step, with 1 MB in it, the garbage came to 2.3 GB instead of 0.9 in 1,500 steps; a report of 100,000 trials
        # took 0.96 GB instead of 0.79.
        gc.set_threshold(250_000, 10, 10)

    from study.cli.app import main as run_command

    atexit.register(_skip_last_collection)
    run_command()


def _open_what_is_closed() -> None:
    """Standard streams that whoever started us has closed (`study … >&-`): else the next file that is opened, such as a
    database, would be where programs write their messages.
    """
    import os
    import sys

    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 — for as long as the process


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
