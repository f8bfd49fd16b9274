"""The command `study`, and `python -m study`."""


def main() -> None:
    from study.cli import run

    run()


if __name__ == "__main__":
    main()
