"""``python -m partial_fc`` is ``partial-fc``."""

from partial_fc.cli import main

if __name__ == "__main__":
    main()
