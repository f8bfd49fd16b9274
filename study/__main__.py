"""The command `study`, and `python -m study`."""


def main() -> None:
    import atexit
    import gc

    from study.cli.app import main as run_command

    # The interpreter's last search for garbage would take 0.3 s, of the 1.0 s of `study status`.
    atexit.register(gc.freeze)
    run_command()


if __name__ == "__main__":
    main()
