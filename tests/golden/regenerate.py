"""Write the golden files anew: `make golden`. A change of one needs a reason in its commit.

python -m tests.golden.regenerate
"""

import json
import tempfile
from pathlib import Path

from tests.golden import losses, sample_ids

FOLDER = Path(__file__).parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {"sample_ids.json": sample_ids.make(), "losses.json": losses.make(Path(folder))}
    for name, content in files.items():
        (FOLDER / name).write_text(json.dumps(content, indent=1) + "\n")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
