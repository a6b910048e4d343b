"""The command `etude`, which is `python -m etude`."""

from etude.cli import main

if __name__ == "__main__":
    main()
