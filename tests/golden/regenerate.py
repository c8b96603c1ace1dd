"""Write the golden files anew: `make golden`. A change of one needs a reason in its commit.

python -m tests.golden.regenerate
"""

import json
from pathlib import Path

from tests.golden import sample_ids

FOLDER = Path(__file__).parent
FILES = {"sample_ids.json": sample_ids.make}


def main() -> None:
    for name, make in FILES.items():
        (FOLDER / name).write_text(json.dumps(make(), indent=1) + "\n")
        print(FOLDER / name)


if __name__ == "__main__":
    main()
