"""`python -m opentau_train`: see `cli.py`."""

from opentau_train.cli import main

if __name__ == "__main__":
    main()
