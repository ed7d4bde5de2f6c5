"""`python -m qpc`, the command line."""

from qpc.cli.app import main

if __name__ == "__main__":
    main()
