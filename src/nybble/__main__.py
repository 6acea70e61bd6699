"""`python -m nybble`: the command line, where no `nybble` script is on the path."""

from nybble.cli import main

if __name__ == "__main__":
    main()
