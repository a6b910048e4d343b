"""The command `etude`, which is `python -m etude`."""

import sys


def main() -> None:
    """Run a program; Ctrl-C while they are still being imported ends it without a traceback."""
    try:
        from etude import cli

        cli.main()
    except SystemExit:  # a program's own exit code
        raise
    except BaseException as error:
        from etude.errors import causes

        if any(isinstance(cause, KeyboardInterrupt) for cause in causes(error)):
            sys.exit(130)
        raise


if __name__ == "__main__":
    main()
