"README.md is what `make readme` makes of nbs/index.ipynb, and it and the tables say what the records say."
import subprocess
import sys
from pathlib import Path

import pandas as pd

from flare.benchmark import read_lines, side_by_side
from flare.cli import text_table
from flare.experiments import benchmark_records, best_settings, over_seeds

ROOT = Path(__file__).resolve().parent.parent


def test_readme_is_made_of_the_index(tmp_path):
    subprocess.run([sys.executable, "-m", "jupyter", "nbconvert", "--to", "markdown", ROOT / "nbs/index.ipynb",
                    "--output-dir", tmp_path, "--output", "README", "--TagRemovePreprocessor.enabled=True",
                    "--TagRemovePreprocessor.remove_input_tags", "hide_input"], check=True, capture_output=True)
    made = (tmp_path / "README.md").read_text().replace("](../", "](")
    assert made == (ROOT / "README.md").read_text(), "run: make readme"


def test_table_2_and_the_readme_are_those_of_the_records():
    "A record that was added, changed or removed must not leave an older number behind."
    records = benchmark_records(ROOT / "paper", check_data=False)
    best = best_settings(over_seeds(records)).set_index(["dataset", "model"])
    table = pd.read_csv(ROOT / "paper/tables/table_2.csv", dtype=str)
    ours = table[table["source"] == "ours"]
    shown = {(row["dataset"], row["model"].removesuffix(" †")): row for _, row in ours.iterrows()}
    assert set(best.index) <= set(shown)
    for about, row in shown.items():
        if about not in best.index: assert row["seeds"] == "—", about
        else:
            for title, metric in {"Recall@10": "recall@10", "nDCG@10 pess.": "ndcg@10_pessimistic", "MRR": "mrr"}.items():
                assert row[title].split()[0] == f"{best.loc[about, f'test.{metric}']:.4f}", (*about, title, "run nbs/results/table_2.ipynb")
    readme = (ROOT / "README.md").read_text()
    for dataset in ("ml-100k", "recformer/Scientific"):
        for line in text_table(records[records["dataset"] == dataset]).splitlines():
            assert line.rstrip() in readme, f"run nbs/index.ipynb, then make readme: {line}"


def test_the_speed_in_the_readme_is_that_of_the_lines():
    readme = (ROOT / "README.md").read_text()
    for line in side_by_side(read_lines(ROOT / "paper")).iloc[:, :7].round(3).to_string(na_rep="—").splitlines():
        assert line.rstrip() in readme, f"run nbs/index.ipynb, then make readme: {line}"
