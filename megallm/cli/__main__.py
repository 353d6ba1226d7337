"""`python -m megallm.cli`."""

from megallm.cli.main import main

if __name__ == "__main__":
    main()
