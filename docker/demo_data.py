"""Draw the demonstration's data set where it isn't yet, as ``partial-fc demo`` does: ``demo_data.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from partial_fc.data.synthetic import make_dataset


def main() -> None:
    """Draw it into the folder that the command line names; one that holds it already stays as it is."""
    folder = Path(sys.argv[1])
    # The file appears last.
    if (folder / "train.idx").is_file():
        print(f"{folder} holds a data set already")
        return
    print(f"drawing a data set in {folder} (2,000 identities, 20 images each)", flush=True)
    make_dataset(folder)


if __name__ == "__main__":
    main()
