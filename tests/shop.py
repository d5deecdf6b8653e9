"A small made-up shop and a project folder around it, for the tests of experiments and of the command line."
import shutil
from pathlib import Path

import pandas as pd

HOME = Path(__file__).parents[1]


def write_shop(folder: Path, customers: int = 24, items: int = 12) -> Path:
    "interactions.csv and items.csv: customers who go round the shelf."
    folder.mkdir(parents=True)
    rows = [(f"u{u}", f"i{(u + t) % items}", t) for u in range(customers) for t in range(6 + u % 3)]
    pd.DataFrame(rows, columns=["user", "item", "timestamp"]).to_csv(folder / "interactions.csv", index=False)
    titles = [f"thing {i} of kind {i % 3}" for i in range(items)]
    pd.DataFrame({"item": [f"i{i}" for i in range(items)], "title": titles}).to_csv(folder / "items.csv", index=False)
    return folder


def write_project(folder: Path) -> Path:
    "A project with the benchmark notebook and a shop."
    (folder / "nbs/experiments").mkdir(parents=True)
    (folder / "settings.ini").write_text("[DEFAULT]\n")
    shutil.copy(HOME / "nbs/experiments/benchmark.ipynb", folder / "nbs/experiments")
    write_shop(folder / "shop")
    return folder
