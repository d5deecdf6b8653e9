"README.md is what `make readme` makes of nbs/index.ipynb, and it and the tables say what the records say."
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

from flare.benchmark import read_lines, side_by_side
from flare.cli import text_table
from flare.results import benchmark_records, best_settings, over_seeds, read_heard

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


def test_table_4_and_the_readme_are_those_of_the_records():
    found, _ = read_heard("critiquing", ROOT / "paper")
    listens = found[(found["model"] != "flare_hears") & (found["who"] == "listens") & (found["strength"] == 1)]
    table = pd.read_csv(ROOT / "paper/tables/table_4.csv")
    shown = table[table["who answers"].str.removesuffix(" †") == "Flare listens"].set_index(["dataset", "asked"])
    for (dataset, said), part in listens[listens["said"].isin(["precise", "broad"])].groupby(["dataset", "said"]):
        row = shown.loc[(dataset, said)]
        assert row["seeds"] == part["key"].nunique(), (dataset, said)
        for title, metric in {"Recall@10": "recall@10", "nDCG@10": "ndcg@10", "MRR": "mrr"}.items():
            assert row[title].split()[0] == f"{part.loc[part['metric'] == metric, 'value'].mean():.4f}", (dataset, said, title, "run nbs/results/table_4.ipynb")
    readme = (ROOT / "README.md").read_text()
    for line in table[table["who answers"].str.match(r"Flare listens|\(") & (table["seeds"] > 0)].to_string(index=False).splitlines():
        assert line.rstrip() in readme, f"run nbs/index.ipynb, then make readme: {line}"


def test_what_is_compared_with_a_stale_record_says_so():
    "Table 2: a dagger stands where a record of either model is stale; every pair of models that both have records is there."
    records = benchmark_records(ROOT / "paper", check_data=False)
    best = best_settings(over_seeds(records[records["split"] == "leave_one_out"])).set_index(["dataset", "model"])
    table = pd.read_csv(ROOT / "paper/tables/table_2_differences.csv", dtype=str)
    shown = {(row["dataset"], row[side].removesuffix(" †")): row[side].endswith("†") for _, row in table.iterrows()
             for side in ("model", "against")}
    for about, old in shown.items(): assert old or not best.loc[about, "stale"], (*about, "run nbs/results/table_2.ipynb")
    pairs = [("flare", "bert4rec"), ("flare", "lir"), ("flare_fused", "flare"), ("flare_fused", "bert4rec"),
             ("flare_fused", "bert4rec_fused"), ("bert4rec_fused", "bert4rec")]
    there = {(data, *pair) for data in best.index.unique("dataset") for pair in pairs if all((data, model) in best.index for model in pair)}
    assert {(row["dataset"], row["model"].removesuffix(" †"), row["against"].removesuffix(" †")) for _, row in table.iterrows()} == there
    cells = table.set_index("seeds")[["Recall@10", "nDCG@10", "MRR"]].stack()
    found = cells.str.extract(r"^[+-]0\.\d{4} \[[+-]0\.\d{4}, [+-]0\.\d{4}\] [↑↓≈] (\d+) of (\d+)$").astype(int)
    trainings = cells.index.get_level_values("seeds").map(lambda seeds: math.prod(map(int, seeds.split(", "))))
    assert (found[1] == trainings).all() and (found[0] <= found[1]).all()


def test_an_addition_is_compared_with_records_of_its_time():
    "Push: what is stale has a dagger, stands against stale records, and whoever has records has a verdict."
    gains, rows = (pd.read_csv(ROOT / f"paper/tables/{name}.csv", dtype=str) for name in ("push_gains", "push"))
    of = {(row["dataset"], row["what"].removesuffix(" †")): row for _, row in rows.iterrows()
          if "Flare of table 2" not in row["what"] and "published" not in row["what"]}
    assert len(gains) == 3 * len(of)
    for _, row in gains.iterrows():
        with_it = of[row["dataset"], row["added"].removesuffix(" †")]
        assert (row["verdict"] == "—") <= (with_it["seeds"] == "0" or with_it["what"].endswith("†")), (row["added"], "run nbs/results/push.ipynb")
        if row["verdict"] != "—":
            assert row["added"].endswith("†") >= with_it["what"].endswith("†") and row["seeds"].startswith(with_it["seeds"] + ", ")


def test_the_paper_types_no_figure_of_a_result_and_every_name_is_given():
    text, given = (ROOT / "paper/main.tex").read_text(), (ROOT / "paper/tables/numbers.tex").read_text()
    body = text.split(r"\begin{document}")[1]
    assert not re.findall(r"0?\.\d{3,}", re.sub(r"\\includegraphics\[.*?\]", "", body))
    names = set(re.findall(r"\\newcommand\{\\(\w+)\}", given + text))
    assert set(re.findall(r"\\([A-Z]\w+)", body)) <= names, "run nbs/results/numbers.ipynb"
    for file in re.findall(r"\\input\{(.*?)\}", text): assert (ROOT / "paper" / f"{file}.tex").exists(), file
    for file in re.findall(r"\\includegraphics(?:\[.*?\])?\{(.*?)\}", text): assert (ROOT / "paper" / f"{file}.png").exists(), file
    of_paper = re.findall(r"tables/(table_\d+|push)\}", body)  # numbered in their order
    assert of_paper[:12] == [f"table_{n}" for n in range(1, 12)] + ["push"]
    records = benchmark_records(ROOT / "paper", check_data=False)
    best = best_settings(over_seeds(records)).set_index(["dataset", "split", "model"])
    for name, model in {"Flare": "flare", "Ids": "bert4rec", "Fused": "flare_fused"}.items():
        now = best.loc[("recformer/Scientific", "leave_one_out", model), "test.ndcg@10_pessimistic"]
        assert rf"\newcommand{{\{name}Ndcg}}{{{now:.4f}" in given, (name, "run nbs/results/numbers.ipynb")


def test_the_speed_in_the_readme_is_that_of_the_lines():
    readme = (ROOT / "README.md").read_text()
    for line in side_by_side(read_lines(ROOT / "paper")).iloc[:, :7].round(3).to_string(na_rep="—").splitlines():
        assert line.rstrip() in readme, f"run nbs/index.ipynb, then make readme: {line}"
