"""`make bench`: the figures that the product promises, beside budgets and peers. `make bench ARGS=site` runs one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHES = ("embed", "train", "adapt", "site")


def main(names: list[str]) -> int:
    here = Path(__file__).parent
    failed = 0
    for name in names or BENCHES:
        print(f"\n== {name} (load {os.getloadavg()[0]:.1f} before it began)", flush=True)
        failed += (
            subprocess.run(
                [sys.executable, "-m", f"tests.bench.{(here / f'bench_{name}').stem}"], check=False
            ).returncode
            != 0
        )
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
