"""Makes `python -m opentau_train` run `cli.main`."""

from opentau_train.cli import main

if __name__ == "__main__":
    main()
