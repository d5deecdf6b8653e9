"Sweeps: as many trials as were asked for, none lost; and the winner is the best."
import json
import shutil
from dataclasses import replace

import optuna
import pytest
from filelock import FileLock
from optuna.distributions import CategoricalDistribution, FloatDistribution

from flare import cli, grid, sweeps
from flare.grid import Grid, asked_of, changes, read_yaml
from flare.records import TAUGHT, Record, code_digest
from flare.sweeps import Study, open_study, read_trials, run_study
from shop import HOME, write_project
from test_experiments import here


@pytest.fixture
def project(tmp_path):
    return write_project(tmp_path / "project")


@pytest.fixture
def study(project):
    return Study("small/lir", "benchmark", {"model": "lir", "dataset": str(project / "shop")}, {"b": FloatDistribution(0, 1)}, 4)


@pytest.fixture
def quick(monkeypatch):
    "Runs nothing: the value of a trial is 1 - |b - 0.3|; returns what was run."
    ran = []
    monkeypatch.setattr(grid, "execute", lambda point, project, threads, gpu: ran.append(point.values["b"]) or (0.0, ""))
    monkeypatch.setattr(sweeps, "record_of", record_of)
    return ran


def record_of(point, project):
    "As if a trial had been run."
    data = {"name": "shop", "split": "leave_one_out"}
    model = point.values["model"]
    return Record("small", model, 0, {}, {}, data, {"validation": {sweeps.METRIC: 1 - abs(point.values["b"] - 0.3)}}, {}, {},
                  code_digest(model))


def test_the_winner_is_the_best_of_the_trials(study, project, quick):
    journal = project / "paper/sweeps/small/lir.jsonl"
    assert read_trials(study, project).empty and not journal.exists()  # looking leaves nothing behind
    tried = run_study(study, project, executor=here([]), progress=False)
    before = journal.read_text()
    assert read_trials(study, project).equals(tried) and journal.read_text() == before
    assert tried["b"].tolist() == quick and tried["state"].tolist() == ["complete"] * 4
    winner = read_yaml((project / grid.WINNERS).read_text(), "")["small/lir"]
    best = min(range(4), key=lambda n: abs(quick[n] - 0.3))
    assert (winner["trial"], winner["trials"], winner["values"]["b"], winner["values"]["model"]) == (best, 4, quick[best], "lir")
    assert not run_study(study, project, executor=here([]), progress=False).empty and len(quick) == 4  # nothing is left
    run_study(replace(study, trials=6), project, executor=here([]), progress=False)
    assert len(quick) == len(set(quick)) == 6


def test_what_is_known_to_be_good_is_tried_first_and_counts(study, project, quick):
    begun = replace(study, first={"b": 0.31})
    assert len(run_study(begun, project, executor=here([]), progress=False)) == 4
    assert quick[0] == 0.31 and quick.count(0.31) == 1
    run_study(replace(begun, trials=6), project, executor=here([]), progress=False)
    assert len(quick) == 6 and quick.count(0.31) == 1


def test_what_was_running_is_run_again(study, project, quick, monkeypatch):
    def stopped(point, project, threads, gpu):
        quick.append(point.values["b"])
        if len(quick) == 2: raise KeyboardInterrupt
        return 0.0, ""
    monkeypatch.setattr(grid, "execute", stopped)
    with pytest.raises(KeyboardInterrupt): run_study(study, project, executor=here([]), progress=False)
    assert [trial.state.name for trial in open_study(study, project).trials] == ["COMPLETE", "RUNNING"]
    tried = run_study(study, project, executor=here([]), progress=False)
    assert tried["state"].tolist() == ["complete"] * 4 and quick[2] == quick[1] and len(quick) == 5


def test_a_trial_that_fails_counts_and_never_wins(study, project, quick, monkeypatch):
    monkeypatch.setattr(grid, "execute", lambda point, *_: quick.append(point.values["b"]) or (0.0, "it broke" if len(quick) < 4 else ""))
    tried = run_study(study, project, executor=here([]), progress=False)
    assert tried["state"].tolist() == ["fail"] * 3 + ["complete"] and tried["error"].tolist() == ["it broke"] * 3 + [""]
    assert read_yaml((project / grid.WINNERS).read_text(), "")["small/lir"]["trial"] == 3


def test_values_that_do_not_go_together_are_a_failed_trial(study, project, quick):
    holes = replace(study, name="small/bert4rec", fixed=study.fixed | {"model": "bert4rec", "hidden_size": 100},
                    space={"heads": CategoricalDistribution([3, 4])}, trials=8)
    tried = run_study(holes, project, executor=here([]), progress=False)
    assert set(tried["heads"]) == {3, 4} and len(quick) == (tried["heads"] == 4).sum()
    assert (tried.loc[tried["heads"] == 3, "state"] == "fail").all() and (tried.loc[tried["heads"] == 4, "state"] == "complete").all()
    assert tried.loc[tried["heads"] == 3, "error"].str.contains("heads").all()


def test_a_journal_belongs_to_its_values(study, project, quick):
    run_study(study, project, executor=here([]), progress=False)
    for other, what in ((replace(study, fixed=study.fixed | {"k1": 2.0}), "fixed"),
                        (replace(study, space={"b": FloatDistribution(0, 0.5)}), "space")):
        with pytest.raises(ValueError, match=f"begun with another {what}: give the study another name"):
            run_study(other, project, executor=here([]), progress=False)
    journal = open_study(study, project)
    journal.ask()  # and killed before anything was chosen
    tried = run_study(replace(study, trials=6), project, executor=here([]), progress=False)
    assert tried["state"].tolist() == ["complete"] * 4 + ["fail", "complete"]


@pytest.mark.parametrize("slip, message", [({"k11": 2.0}, "does not declare k11"), ({"model": "lirr"}, "there is no model 'lirr'"),
                                           ({"dataset": "nowhere"}, "nowhere"), ({"split": "random"}, "there is no split 'random'"),
                                           ({"seed": "one"}, "seed is 'one'")])
def test_a_slip_costs_no_trial(study, project, quick, slip, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_study(replace(study, fixed=study.fixed | slip), project, executor=here([]), progress=False)
    assert not (project / "paper/sweeps").exists() and not quick


@pytest.mark.parametrize("old, new, message", [
    ("trials: 2", "trials: true", "trials is True"), ("base: {seed: 1}", "base: [1]", "base must map"),
    ("space: {b: [0.1]}", "space: [b]", "studies must map"),
    ("studies:\n  lir: {fixed: {model: lir}, space: {b: [0.1]}}", "studies: {}", "studies must map"), ("model: lir", "b: 0.1", "b cannot be fixed and tried"),
    ("b: [0.1]", "b: []", "lir: b must be a list of values, or low and high")])
def test_a_sweep_that_makes_no_sense(tmp_path, old, new, message):
    text = "notebook: benchmark\ntrials: 2\nbase: {seed: 1}\nstudies:\n  lir: {fixed: {model: lir}, space: {b: [0.1]}}\n"
    assert old in text
    (tmp_path / "x.yml").write_text(text)
    assert Study.read(tmp_path / "x.yml")[0].fixed == {"experiment": "sweep_x", "seed": 1, "model": "lir"}
    (tmp_path / "x.yml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message): Study.read(tmp_path / "x.yml")


def test_a_trial_of_other_code_is_told(study, project, quick, monkeypatch):
    run_study(replace(study, trials=2), project, executor=here([]), progress=False)
    assert read_trials(study, project)["other_code"].tolist() == [""] * 2
    later = code_digest("lir") | {"flare.metrics": "another", "flare.new": "one"}
    monkeypatch.setattr(sweeps, "code_digest", lambda model: later)
    monkeypatch.setattr(sweeps, "record_of", lambda point, project: replace(record_of(point, project), code=later))
    monkeypatch.setattr(grid, "execute", lambda point, *_: (0.0, "it broke" if len(quick) > 2 else quick.append(point.values["b"]) or ""))
    tried = run_study(study, project, executor=here([]), progress=False)
    assert tried["state"].tolist() == ["complete"] * 3 + ["fail"] and tried["other_code"].tolist() == ["flare.metrics, flare.new"] * 2 + ["", ""]
    assert open_study(study, project).user_attrs["made 0"]["code"] == code_digest("lir") and open_study(study, project).user_attrs["trials"] == 4


def test_two_at_once_are_refused(study, project, quick):
    (project / "paper/runs").mkdir(parents=True)
    with FileLock(project / "paper/runs/small-lir.lock"), pytest.raises(ValueError, match="another process is running small/lir"):
        run_study(study, project, progress=False)


def test_winners_of_all_studies_stand_together_and_a_grid_takes_them(study, project, quick):
    for name in ("small/lir", "other/lir"): run_study(replace(study, name=name), project, executor=here([]), progress=False)
    assert set(read_yaml((project / grid.WINNERS).read_text(), "")) == {"small/lir", "other/lir"}
    file = project / "nbs/experiments/best.yml"
    file.write_text("notebook: benchmark\nbase: {experiment: best, b: 7.0}\ngrid:\n  - like: small/lir\n    k1: [1.0, 2.0]\n")
    points = Grid.read(file).expand()
    assert [(point["k1"], point["model"], point["experiment"]) for point in points] == [(1.0, "lir", "best"), (2.0, "lir", "best")]
    assert abs(points[0]["b"] - 0.3) == min(abs(b - 0.3) for b in quick[:4])
    file.write_text("notebook: benchmark\ngrid:\n  - like: big/lir\n")
    with pytest.raises(ValueError, match="no sweep has found big/lir; found are other/lir, small/lir"): Grid.read(file)


def test_a_list_that_won_is_one_value(study, project, quick):
    run_study(replace(study, fixed=study.fixed | {"model": "flare_listens", "listener_forms": ["leaf", "brand"]},
                      space={"dropout": FloatDistribution(0, 0.5)}), project, executor=here([]), progress=False)
    file = project / "nbs/experiments/best.yml"
    file.write_text("notebook: benchmark\ngrid:\n  - like: small/lir\n")
    assert [point["listener_forms"] for point in Grid.read(file).expand()] == [["leaf", "brand"]]


@pytest.mark.parametrize("won", [["flare"], ["bert4rec"], ["flare", "bert4rec"]])
def test_with_winners_the_grids_still_differ_from_table_2_where_they_say_so(tmp_path, monkeypatch, won):
    known = {}
    monkeypatch.setattr(grid, "asked_of", lambda point: known[text] if (text := json.dumps(point, sort_keys=True)) in known
                        else known.setdefault(text, asked_of(point)))
    shared = {"dataset": "recformer/Scientific", "epochs": 11, "patience": 7, "evaluate_every": 4, "hidden_size": 320, "layers": 5, "heads": 16, "dropout": 0.45,
              "mask_probability": 0.11, "last_mask_share": 0.33, "learning_rate": 1e-4}
    values = {"flare": shared | {"model": "flare", "perceiver_layers": 4, "latents": 3, "alpha": 0.3, "temperature": 0.7},
              "bert4rec": shared | {"model": "bert4rec", "layers": 6, "dropout": 0.35}}
    shelf = tmp_path / "nbs/experiments"
    shutil.copytree(HOME / "nbs/experiments", shelf)
    (tmp_path / "settings.ini").touch()

    def read(name):
        "The points of a grid, each as what is trained for it, and how it differs from table 2."
        points = [point | {"model": {"flare_hears": "flare", "flare_pushed": "flare"}.get(point["model"], TAUGHT.get(point["model"], point["model"]))} for point in Grid.read(shelf / f"{name}.yml").expand(only={"seed": 0})]
        return [point for point in points if point["model"] in ("flare", "bert4rec")]

    def differ(name):
        plain = {(point["model"], point["dataset"]): point for point in read("benchmark")}
        return [{change.split(" = ")[0] for change in changes(point, plain[point["model"], point["dataset"]]).split(", ")}
                for point in read(name)]

    names = ("ablations", "push", "fusion", "critiquing", "unseen")
    by_hand = {name: differ(name) for name in names}
    before = read("benchmark")
    (tmp_path / grid.WINNERS).parent.mkdir(parents=True)
    (tmp_path / grid.WINNERS).write_text(json.dumps({f"scientific/{model}": {"values": values[model]} for model in won}))
    for name in names:
        for hand, swept in zip(by_hand[name], differ(name), strict=True): assert swept == hand or name == "unseen" and swept <= hand
    for old, new in zip(before, read("benchmark"), strict=True):
        tuned = new["model"] in won and new["dataset"] in ("recformer/Scientific", "lcrec/Scientific", "lcrec/Office2014")
        assert (grid.asked_of(new)[0].get("layers") == values[new["model"]]["layers"]) == tuned and (tuned or grid.asked_of(old) == grid.asked_of(new)) and (new["dataset"], new["seed"]) == (old["dataset"], old["seed"])


@pytest.mark.parametrize("file", sorted((HOME / "nbs/experiments/sweeps").glob("*.yml")), ids=lambda p: p.name)
def test_every_sweep_can_be_run(file, monkeypatch, project):
    class Stand:
        def __init__(self, name): self.name, self.fingerprint = name, "0" * 12
    monkeypatch.setattr(grid, "load_dataset", Stand)
    studies = Study.read(file)
    assert len({study.trials for study in studies}) == 1
    for study in studies:
        trial = optuna.create_study().ask(study.space)
        point = sweeps.point_of(study, trial.params, HOME)
        assert {name: point.values[name] for name in trial.params} == trial.params


def test_from_the_command_line(study, project, quick, monkeypatch, capsys):
    monkeypatch.chdir(project)
    (project / "nbs/experiments/sweeps").mkdir()
    (project / "nbs/experiments/sweeps/small.yml").write_text(
        f"notebook: benchmark\ntrials: 2\nbase: {{dataset: {project / 'shop'}}}\nstudies:\n  lir: {{fixed: {{model: lir}}, space: {{b: {{low: 0.0, high: 1.0}}}}}}\n")
    assert cli.main(["sweep", "small.yml", "--dry-run"]) == 0 and not quick
    assert cli.main(["sweep", "small.yml"]) == 0 and len(quick) == 2
    assert "small/lir: 2 of 2 trials complete" in capsys.readouterr().out
    assert cli.main(["sweep", "small.yml", "--study", "bm25"]) == 2
    assert "the sweep has no study bm25; it has lir" in capsys.readouterr().err
    for wrong, message in ((["--trials", "4", "--study", "lir"], "--trials is for all studies of a sweep"),
                           (["--trials", "0"], "--trials is 0")):
        assert cli.main(["sweep", "small.yml", *wrong]) == 2 and message in capsys.readouterr().err
    assert len(quick) == 2 and cli.main(["sweep", "small.yml", "--trials", "3"]) == 0 and len(quick) == 3
    assert cli.main(["sweep", "small.yml", "--dry-run"]) == 0 and capsys.readouterr().out.count("small/lir: 3 of 3 trials complete") == 2
