"""Draw the demonstration's data set where it isn't yet, as ``partial-fc demo`` does: ``demo_data.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from partial_fc.data.synthetic import make_dataset
from partial_fc.errors import DataError


def main() -> None:
    """Draw it into the folder that the command line names; one that holds it already stays as it is."""
    if len(sys.argv) != 2:
        sys.exit(f"error: got {len(sys.argv) - 1} arguments, expected one, the data set's folder: demo_data.py FOLDER")
    folder = Path(sys.argv[1])
    try:
        # The file appears last.
        if (folder / "train.idx").is_file():
            print(f"{folder} holds a data set already")
            return
        print(f"drawing a data set in {folder} (2,000 identities, 20 images each)", flush=True)
        make_dataset(folder)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
