"Sequences, splits and loaders: tiny files with exact expectations, bad input, an oracle, facts of the real sets."
import gzip
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flare.data import (READERS, Catalogue, Dataset, Sequences, data_root, leave_one_out, load_dataset, norepeat,
                        read_large, read_lcrec, read_movielens, read_recformer, recbole_folder, statistics_table,
                        unseen_users)
from flare.files import clean

needs_data = pytest.mark.skipif(data_root() is None, reason="FLARE_DATA is not set: the research sets are not at hand")


def rows_of(sequences: Sequences) -> list[list[int]]: return [row.tolist() for row in sequences]


def random_lists(seed: int, users: int = 60, items: int = 5) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, items, rng.integers(0, 9)).tolist() for _ in range(users)]


def made(lists: list[list[int]], n_items: int = 5, times: bool = True) -> Dataset:
    sequences = Sequences.from_lists(lists)
    if times: sequences = replace(sequences, timestamps=np.arange(sequences.events))
    table = pd.DataFrame({"item": [f"i{i}" for i in range(n_items)], "title": [f"t{i}" for i in range(n_items)],
                          "category": [()] * n_items})
    return Dataset("made", Catalogue(table), sequences, np.array([f"u{u}" for u in range(len(lists))]))


# --- ragged operations and splits against plain lists ---------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_ragged_operations_equal_lists(seed):
    lists = random_lists(seed)
    data = made(lists)
    sequences, rng = data.sequences, np.random.default_rng(seed)
    order, drops = rng.permutation(len(lists))[:20], rng.integers(0, 5, len(lists))
    assert rows_of(sequences) == lists
    assert rows_of(sequences.take(order)) == [lists[i] for i in order]
    assert rows_of(sequences.tail(3)) == [row[-3:] for row in lists]
    assert rows_of(sequences.drop_last(drops)) == [row[:max(len(row) - n, 0)] for row, n in zip(lists, drops)]
    assert sequences.last.tolist() == [row[-1] if row else -1 for row in lists]
    assert sequences.take(order).timestamps.tolist() == [t for i in order for t in range(*sequences.offsets[i:i + 2])]
    once = [[item for place, item in enumerate(row) if place == 0 or row[place - 1] != item] for row in lists]
    assert rows_of(norepeat(data).sequences) == once
    assert norepeat(data).dropped == {"consecutive repeats": sum(map(len, lists)) - sum(map(len, once))}


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out_equals_lists(seed):
    lists = random_lists(seed)
    split, tested = leave_one_out(made(lists)), [u for u, row in enumerate(lists) if len(row) >= 3]
    assert rows_of(split.train) == [row[:-2] if len(row) >= 3 else row for row in lists]
    assert split.test.users.tolist() == split.validation.users.tolist() == tested
    assert rows_of(split.validation.history) == [lists[u][:-2] for u in tested]
    assert split.validation.targets.tolist() == [lists[u][-2] for u in tested]
    assert rows_of(split.test.history) == [lists[u][:-1] for u in tested]
    assert split.test.targets.tolist() == [lists[u][-1] for u in tested]
    assert split.test.targets.dtype == np.int64 and split.train.items.dtype == np.int32


def test_unseen_users_divides_all_long_users():
    lists = random_lists(0, 400)
    data, long = made(lists), [u for u, row in enumerate(lists) if len(row) >= 3]
    split = unseen_users(data, seed=3)
    held = [*split.validation.users, *split.test.users]
    assert len(set(held)) == len(held) and set(held) <= set(long)
    assert rows_of(split.train) == [lists[u][:-2] for u in long if u not in set(held)]
    sizes = [len(split.train), len(split.validation), len(split.test)]
    assert sizes == pytest.approx(np.array([.8, .1, .1]) * len(long), abs=1) and sum(sizes) == len(long)
    assert rows_of(split.test.history) == [lists[u][:-1] for u in split.test.users]
    assert split.test.targets.tolist() == [lists[u][-1] for u in split.test.users]
    assert unseen_users(data, seed=4).test.users.tolist() != split.test.users.tolist()
    with pytest.raises(ValueError, match="add up to 1"): unseen_users(data, shares=(.8, .1, .2))
    with pytest.raises(ValueError, match="too few to divide"): unseen_users(made([[0, 1, 2]]))


def test_users_with_too_few_events():
    split = leave_one_out(made([[0], [1, 2], [1, 2, 3]]))
    assert rows_of(split.train) == [[0], [1, 2], [1]] and split.test.users.tolist() == [2]
    with pytest.raises(ValueError, match="no user of made has three events"): leave_one_out(made([[0], [1, 2]]))


def test_items_outside_the_catalogue():
    with pytest.raises(ValueError, match="user 'u1' has item 7, but the catalogue has 0 to 4"): made([[0], [1, 7]])
    with pytest.raises(ValueError, match="item -1"): made([[0], [-1]])


def test_fingerprint_is_of_the_content():
    data = made([[0, 1], [2]])
    table, sequences = data.catalogue.table, data.sequences
    changed = [replace(data, users=np.array(["u0", "v"])), replace(data, sequences=replace(sequences, timestamps=None)),
               replace(data, sequences=replace(sequences, timestamps=np.array([0, 1, 3]))),
               replace(data, sequences=Sequences(sequences.items, np.array([0, 1, 3]), sequences.timestamps)),
               replace(data, catalogue=Catalogue(table.assign(category=[("a",), (), (), (), ()]))),
               replace(data, catalogue=Catalogue(table.assign(category=[(), ("a",), (), (), ()]))),
               replace(data, catalogue=Catalogue(table.assign(title=["t0t", "1", "t2", "t3", "t4"])))]
    assert len({data.fingerprint, *(other.fingerprint for other in changed)}) == len(changed) + 1
    assert made([[0, 1], [2]]).fingerprint == data.fingerprint


# --- your own tables --------------------------------------------------------------------------------------------------

EVENTS = "user,item,timestamp\nann,a,30\nbob,b,10\nann,b,20\nann,c,20\n"
ITEMS = "item,title,category\na,Saw,Tools > Saws\nb,Glue,\nc,007,\nd,NA,\n"


def shop(folder: Path, events: str | None = EVENTS, items: str | None = ITEMS) -> Path:
    for name, text in {"interactions": events, "items": items}.items():
        if text is not None: (folder / f"{name}.csv").write_text(text, encoding="utf-8")
    return folder


def test_csv(tmp_path):
    data = load_dataset(shop(tmp_path))
    assert data.name == tmp_path.name and data.users.tolist() == ["ann", "bob"] and data.dropped == {}
    assert rows_of(data.sequences) == [[1, 2, 0], [1]]
    assert data.sequences.timestamps.tolist() == [20, 20, 30, 10]
    assert data.catalogue.table["title"].tolist() == ["Saw", "Glue", "007", "NA"]
    assert data.catalogue.table["category"].tolist() == [("Tools", "Saws"), (), (), ()]


def test_parquet_equals_csv(tmp_path):
    (tmp_path / "csv").mkdir(), (tmp_path / "parquet").mkdir()
    csv = load_dataset(shop(tmp_path / "csv"))
    when = pd.to_datetime([30, 10, 20, 20], unit="s")
    pd.DataFrame({"user": ["ann", "bob", "ann", "ann"], "item": list("abbc"), "timestamp": when}).to_parquet(
        tmp_path / "parquet" / "interactions.parquet")
    pd.DataFrame({"item": list("abcd"), "title": ["Saw", "Glue", "007", "NA"],
                  "category": [["Tools", "Saws"], None, [], []]}).to_parquet(tmp_path / "parquet" / "items.parquet")
    assert load_dataset(str(tmp_path / "parquet")).fingerprint == csv.fingerprint


def test_ids_of_any_type(tmp_path):
    events = pd.DataFrame({"user": [7, 7], "item": [2, 1], "timestamp": [1.5, 1.25]})
    events.to_parquet(tmp_path / "interactions.parquet")
    (tmp_path / "items.csv").write_text("item,title\n1,One\n2,Two\n")
    data = load_dataset(tmp_path)
    assert data.users.tolist() == ["7"] and rows_of(data.sequences) == [[0, 1]]


def test_excel_csv(tmp_path):
    shop(tmp_path)
    (tmp_path / "items.csv").write_bytes(("\ufeff" + ITEMS.replace("\n", "\r\n")).encode())
    assert load_dataset(tmp_path).catalogue.table["item"].tolist() == list("abcd")


def test_copies_of_item_rows_are_counted(tmp_path):
    data = load_dataset(shop(tmp_path, items=ITEMS + "a,Saw,Tools > Saws\n"))
    assert data.dropped == {"copies of item rows": 1} and data.n_items == 4


BAD_EVENTS = {
    "": r"interactions.csv: the file is empty",
    "user,item,timestamp\n": r"interactions.csv has no rows",
    "user,item\nann,a\n": r"interactions.csv lacks the columns \['timestamp'\]",
    EVENTS + "bob,a\n": r"interactions.csv, row 6: .*Expected 3 columns, got 2",
    EVENTS + "bob,a,1,2\n": r"interactions.csv, row 6: .*Expected 3 columns, got 4",
    EVENTS + "bob,a,soon\n": r"interactions.csv, row 6: timestamp 'soon'",
    EVENTS + "bob,a,\n": r"interactions.csv, row 6: timestamp ''",
    EVENTS + "bob,a,NaN\n": r"interactions.csv, row 6: timestamp 'NaN'",
    EVENTS + "bob,a,inf\n": r"interactions.csv, row 6: timestamp 'inf'",
    EVENTS + "bob,a,1e300\n": r"interactions.csv, row 6: timestamp '1e300'",
    EVENTS + "bob,z,1\nbob,z,2\n": r"interactions.csv, row 6: item 'z' is not in the catalogue.*\(2 of these\)",
    EVENTS + ",a,1\n": r"interactions.csv, row 6: user '' is empty",
    EVENTS + "bob, ,1\n": r"interactions.csv, row 6: item ' ' is empty",
}


@pytest.mark.parametrize("text", BAD_EVENTS)
def test_bad_interactions(tmp_path, text):
    with pytest.raises(ValueError, match=BAD_EVENTS[text]): load_dataset(shop(tmp_path, events=text))


BAD_ITEMS = {
    "": r"items.csv: the file is empty",
    "item,title\n": r"items.csv has no rows",
    "item,name\na,Saw\n": r"items.csv lacks the columns \['title'\]",
    "item,title,title\na,Saw,Saw\n": r"items.csv: the header .* names a column twice",
    ITEMS + "e,Nail\n": r"items.csv, row 6: .*Expected 3 columns, got 2",
    ITEMS + "a,Hammer,\n": r"items.csv, row 6: item 'a' stands in an earlier row with other values",
    ITEMS + ",Hammer,\n": r"items.csv, row 6: item '' is empty",
    ITEMS + 'e,"Nail,\nf,Bolt,\n': r"items.csv: a quotation mark is opened and never closed",
    ITEMS + 'e,"Na': r"items.csv",
    ITEMS + 'e,a 7" roll,\nf,b,c,d\n': r"items.csv: Expected 3 fields in line 7, saw 4",
}


@pytest.mark.parametrize("text", BAD_ITEMS)
def test_bad_items(tmp_path, text):
    with pytest.raises(ValueError, match=BAD_ITEMS[text]): load_dataset(shop(tmp_path, items=text))


def test_other_bad_folders(tmp_path):
    shop(tmp_path, items=None)
    with pytest.raises(FileNotFoundError, match="neither items.csv nor"): load_dataset(tmp_path)
    (tmp_path / "items.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="items.parquet"): load_dataset(tmp_path)
    shop(tmp_path)
    with pytest.raises(ValueError, match="keep one"): load_dataset(tmp_path)
    (tmp_path / "items.parquet").unlink()
    (tmp_path / "items.csv").write_bytes(b"item,title\na,caf\xe9\n")
    with pytest.raises(ValueError, match="items.csv, row 2: .*UTF8"): load_dataset(tmp_path)
    (tmp_path / "items.csv").write_text(ITEMS)
    events = pd.DataFrame({"user": ["u", None], "item": ["a", "a"], "timestamp": [1, 2]})
    events.to_parquet(tmp_path / "interactions.parquet")
    (tmp_path / "interactions.csv").unlink()
    with pytest.raises(ValueError, match="interactions.parquet, row 2: user .* is empty"): load_dataset(tmp_path)


# --- the names --------------------------------------------------------------------------------------------------------

def test_unknown_names(tmp_path):
    for name in ("recformer/Arts", "large/", "ML-100K", "nowhere"):
        with pytest.raises(ValueError, match="unknown dataset .* ml-100k, recformer/Scientific, .*lcrec/Office2014"):
            load_dataset(name)
    with pytest.raises(FileNotFoundError, match="is not a folder"): load_dataset(tmp_path / "nowhere")


def test_missing_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("FLARE_DATA", raising=False)
    assert data_root() is None
    with pytest.raises(FileNotFoundError, match="FLARE_DATA is not set: export"): load_dataset("recformer/Scientific")
    monkeypatch.setenv("FLARE_DATA", str(tmp_path))
    for name in (*READERS, "large/food"):
        with pytest.raises(FileNotFoundError, match="is missing: FLARE_DATA must name"): load_dataset(name)
    for name in READERS: (tmp_path / name).mkdir(parents=True)
    for name in READERS:
        with pytest.raises(FileNotFoundError, match="copy"): load_dataset(name)


# --- Recformer --------------------------------------------------------------------------------------------------------

RECFORMER = {"smap": {"A": 1, "B": 0, "C": 2}, "umap": {"x": 1, "y": 0, "z": 2},
             "meta_data": {"A": {"title": "T &amp; A", "brand": "b", "category": ["r", "s"]},
                           "C": {"title": "", "brand": "", "category": [], "text": "flat"}, "Q": {"title": "not sold"}},
             "train": {"0": [0, 1], "1": [2]}, "val": {"0": [1]}, "test": {"0": [2]}}


def recformer(folder: Path, **changes: object) -> Path:
    for name, content in (RECFORMER | changes).items(): (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_recformer(tmp_path):
    data = read_recformer(recformer(tmp_path))
    assert rows_of(data.sequences) == [[0, 1, 1, 2], [2]] and data.users.tolist() == ["y", "x"]
    assert data.dropped == {"catalogue entries without a number": 1, "users without events": 1}
    assert data.catalogue.table["item"].tolist() == ["B", "A", "C"]
    assert data.catalogue.table["title"].tolist() == ["", "T & A", ""]
    assert data.catalogue.table["category"].tolist() == [(), ("r", "s"), ()]
    assert data.catalogue.has_text.tolist() == [False, True, True]
    assert data.sequences.timestamps is None


@pytest.mark.parametrize("changes, message", [
    (dict(train={"0": [0, 3]}), r"train.json, user 0: item 3 is not in the catalogue"),
    (dict(train={"9": [0]}), r"train.json, user 9: user '9' is not in umap.json"),
    (dict(test={"0": 2}), r"test.json, user 0: 2 is not a list of item numbers"),
    (dict(val={"0": ["1"]}), r"val.json, user 0: \['1'\] is not a list of item numbers"),
    (dict(train=[[0, 1]]), r"train.json must hold a JSON object"),
    (dict(train={}), r"train.json must hold a JSON object"),
    (dict(smap={"A": 1, "B": 1}), r"smap.json, entry B: number 1"),
    (dict(umap={"x": 1, "y": 2}), r"umap.json, entry y: number 2"),
    (dict(umap={"x": True, "y": 0}), r"umap.json, entry x: number True"),
    (dict(meta_data={"A": "title"}), r"meta_data.json, item A: 'title' is not an object"),
    (dict(meta_data={"A": {"title": ["T"]}}), r"meta_data.json, item A: title \['T'\] is not text"),
    (dict(meta_data={"A": {"title": "T", "category": "r"}}), r"meta_data.json, item A: category 'r' is not a list"),
])
def test_bad_recformer(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message): read_recformer(recformer(tmp_path, **changes))


def test_broken_json(tmp_path):
    recformer(tmp_path)
    (tmp_path / "train.json").write_text('{"0": [0, 1],\n "1": [2')
    with pytest.raises(ValueError, match=r"train.json, line 2, column \d+: .*cut short"): read_recformer(tmp_path)
    (tmp_path / "train.json").write_text("")
    with pytest.raises(ValueError, match=r"train.json is empty"): read_recformer(tmp_path)
    (tmp_path / "train.json").write_bytes(b'{"0": "\xff"}')
    with pytest.raises(ValueError, match=r"train.json: byte 7 is not UTF-8"): read_recformer(tmp_path)
    (tmp_path / "train.json").write_text('{"0": [0], "0": [1]}')
    with pytest.raises(ValueError, match=r"train.json: key '0' stands twice"): read_recformer(tmp_path)
    (tmp_path / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.json is missing"): read_recformer(tmp_path)


def test_odd_text_survives(tmp_path):
    meta = {"A": {"title": "half an emoji \ud83d and 日本語 🎁", "category": ["&quot;x&quot;"]},
            "B": {"title": None, "brand": 3}}
    data = read_recformer(recformer(tmp_path, meta_data=meta))
    assert data.catalogue.table["title"].tolist() == ["", "half an emoji ? and 日本語 🎁", ""]
    assert data.catalogue.table["brand"].tolist() == ["3", "", ""] and len(data.fingerprint) == 12
    assert clean("&amp;amp; &#x27;&#39; &nope; R&D&region=1\u00a0 \n x") == "&amp; '' &nope; R&D&region=1 x"


# --- LC-Rec -----------------------------------------------------------------------------------------------------------

def lcrec(folder: Path, items: dict | None = None, inter: dict | None = None) -> Path:
    items = items or {"1": {"title": "b", "description": "", "brand": "", "categories": ""},
                      "0": {"title": "a", "description": "d", "brand": "", "categories": "R,Tapes, Glues & Co,S"}}
    (folder / "X.item.json").write_text(json.dumps(items))
    (folder / "X.inter.json").write_text(json.dumps(inter or {"7": [1, 0], "3": [0], "4": []}))
    return folder


def test_lcrec(tmp_path):
    data = read_lcrec(lcrec(tmp_path))
    assert data.catalogue.table["category"].tolist() == [("R", "Tapes, Glues & Co", "S"), ()]
    assert rows_of(data.sequences) == [[1, 0], [0]] and data.users.tolist() == ["7", "3"]
    assert data.dropped == {"users without events": 1}
    assert "d" not in data.catalogue.text()[0].split() and data.catalogue.text(["description"]) == ["d", ""]
    other = read_lcrec(tmp_path, separator=", ", root=("Office Products",))
    assert other.catalogue.table["category"].tolist() == [("Office Products", "R,Tapes", "Glues & Co,S"), ()]


def test_bad_lcrec(tmp_path):
    with pytest.raises(ValueError, match="X.inter.json, user 7: item 2 is not in the catalogue"):
        read_lcrec(lcrec(tmp_path, inter={"7": [1, 2]}))
    with pytest.raises(ValueError, match="X.item.json, entry 5: number '5'"):
        read_lcrec(lcrec(tmp_path, items={"5": {"title": "a"}}))
    with pytest.raises(ValueError, match="X.item.json, item 0: 'a' is not an object"):
        read_lcrec(lcrec(tmp_path, items={"0": "a"}))
    with pytest.raises(ValueError, match="no events"): read_lcrec(lcrec(tmp_path, inter={"7": []}))
    (tmp_path / "X.item.json").unlink()
    with pytest.raises(FileNotFoundError, match="X.item.json is missing"): read_lcrec(tmp_path)


def test_lcrec_by_asin(tmp_path):
    (tmp_path / "G.inter.json").write_text('{"0": [1, 0], "1": [1]}')
    (tmp_path / "G.item2id").write_text("AA\t0\nBB\t1\n")
    (tmp_path / "G.user2id").write_text("ann\t1\nbob\t0\n")
    meta = {"BB": {"title": "b", "category": list("12345678")}, "CC": {"title": "c"}}
    (tmp_path / "G.meta_by_asin.json").write_text(json.dumps(meta))
    data = read_lcrec(tmp_path, depth=5)
    assert data.users.tolist() == ["bob", "ann"] and data.catalogue.table["title"].tolist() == ["", "b"]
    assert data.catalogue.table["category"].tolist() == [(), tuple("12345")]
    assert data.dropped == {"catalogue entries without a number": 1}
    (tmp_path / "G.item2id").write_text("AA\t0\nAA\t1\n")
    with pytest.raises(ValueError, match="G.item2id, row 2: 'AA' stands in an earlier row"): read_lcrec(tmp_path)
    (tmp_path / "G.item2id").write_text("AA\t0\nBB\n")
    with pytest.raises(ValueError, match="G.item2id, row 2"): read_lcrec(tmp_path)


# --- MovieLens and the large sets -------------------------------------------------------------------------------------

def test_movielens_does_not_import_recbole():
    code = ("import sys; from flare.data import load_dataset; "
            "print(load_dataset('ml-100k').n_events, 'recbole' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["100000", "False"]


def test_movielens_ties_keep_the_order_of_the_file():
    data = load_dataset("ml-100k")
    raw = pd.read_csv(recbole_folder() / "ml-100k.inter", sep="\t")
    raw.columns = ["user", "item", "rating", "time"]
    expected = {str(user): group.sort_values("time", kind="stable")["item"].astype(str).tolist()
                for user, group in raw.groupby("user")}
    ids = data.catalogue.table["item"].to_numpy()
    assert {user: ids[row].tolist() for user, row in zip(data.users, data.sequences)} == expected


def test_movielens_without_recbole(monkeypatch):
    monkeypatch.setattr("flare.data.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps recbole==1.2.1"): load_dataset("ml-100k")


def test_bad_movielens(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    (folder / "ml.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\t1\t5\n")
    (folder / "ml.item").write_text("item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
                                    "1\tA\tV\tunknown\n")
    assert read_movielens(folder).catalogue.table.values.tolist() == [["1", "A", "", ()]]
    (folder / "ml.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nu\t1\t5\nu\t2\t5\n")
    with pytest.raises(ValueError, match="ml.inter, row 3: item '2' is not in the catalogue"): read_movielens(folder)
    (folder / "ml.inter").write_text("user_id:token\titem_id:token\nu\t1\n")
    with pytest.raises(ValueError, match=r"ml.inter lacks the columns \['timestamp'\]"): read_movielens(folder)


def large(folder: Path, seq: str, titles: str = "5\tV\n6\tVI\n") -> Path:
    for name, text in {"seq": seq, "titles": titles}.items():
        (folder / f"s.{name}.tsv.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def test_large_keeps_the_order_of_the_file(tmp_path):
    data = read_large(large(tmp_path, "u\t6 5 6\t3 2 2\n"))
    assert rows_of(data.sequences) == [[1, 0, 1]] and data.sequences.timestamps.tolist() == [3, 2, 2]
    assert data.catalogue.table["item"].tolist() == ["s:5", "s:6"]


def test_large_sets_are_joined(tmp_path):
    large(tmp_path, "u\t6 5\t1 2\n")
    for kind, text in {"seq": "u\t9\t3\n", "titles": "9\tIX\n"}.items():
        (tmp_path / f"t.{kind}.tsv.gz").write_bytes(gzip.compress(text.encode()))
    data = read_large(tmp_path)
    assert rows_of(data.sequences) == [[1, 0], [2]] and data.users.tolist() == ["s:u", "t:u"]
    assert data.catalogue.table["item"].tolist() == ["s:5", "s:6", "t:9"]
    assert rows_of(read_large(tmp_path, ["t"]).sequences) == [[0]]


@pytest.mark.parametrize("seq, titles, message", [
    ("u\t5 6\t1 2\nv\t5 7\t1 2\n", "5\tV\n6\tVI\n", r"s.seq.tsv.gz, row 2: item 7 is not in s.titles.tsv.gz"),
    ("u\t5 6\t1 2\nv\t5 x\t1 2\n", "5\tV\n6\tVI\n", r"s.seq.tsv.gz, row 2: '5 x' is not a list of numbers"),
    ("u\t5 6\t1 2\nv\t5\t1234567890123456789\n", "5\tV\n6\tVI\n",
     r"s.seq.tsv.gz, row 2: '1234567890123456789' is not a list of numbers of at most 18 digits"),
    ("u\t5 6\t1 2\nv\t\t\n", "5\tV\n6\tVI\n", r"s.seq.tsv.gz, row 2: '' is not a list of numbers"),
    ("u\t5 6\t1 2\nv\t5\t1 2\n", "5\tV\n6\tVI\n", r"s.seq.tsv.gz, row 2: '1 2' are not as many times as items"),
    ("u\t5 6\t1 2\nu\t5\t1\n", "5\tV\n6\tVI\n", r"s.seq.tsv.gz, row 2: user 'u' stands in an earlier row"),
    ("u\t5\t1\nv\t5\n", "5\tV\n", r"s.seq.tsv.gz, row 2: .*Expected 3 columns"),
    ("u\t5\t1\n", "5\tV\n5\tV\n", r"s.titles.tsv.gz, row 2: item '5' stands in an earlier row"),
    ("", "5\tV\n", r"s.seq.tsv.gz: the file is empty"),
])
def test_bad_large(tmp_path, seq, titles, message):
    with pytest.raises(ValueError, match=message): read_large(large(tmp_path, seq, titles))


def test_damaged_gzip(tmp_path):
    large(tmp_path, "u\t5 6\t1 2\n")
    path = tmp_path / "s.seq.tsv.gz"
    whole = path.read_bytes()
    for damaged in (whole[:-9], b"not gzip at all", whole[:12] + b"\xff\xff\xff" + whole[15:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="s.seq.tsv.gz: .*fetch it again"): read_large(tmp_path)
    with pytest.raises(ValueError, match=r"no set \['t'\]: give one of \['s'\]"): read_large(tmp_path, ["t"])


# --- the real sets ----------------------------------------------------------------------------------------------------

@needs_data
def test_recformer_facts():
    data = load_dataset("recformer/Scientific")
    split, facts = leave_one_out(data), data.statistics()
    assert (facts.users, facts["items"], facts.events, facts.repeats) == (11_041, 5_327, 76_896, 4_250)
    assert data.catalogue.has_text.sum() == 4_385 and round(facts.text_coverage, 3) == .932
    assert len(split.test) == 11_039 and (split.test.targets == split.validation.targets).sum() == 405
    assert (~np.isin(split.test.targets, split.train.items)).sum() == 98
    folder = data_root() / "recformer" / "Scientific"
    parts = [json.loads((folder / f"{part}.json").read_text()) for part in ("train", "val", "test")]
    whole = [sum((part.get(str(user), []) for part in parts), []) for user in range(data.n_users)]
    assert rows_of(data.sequences) == whole
    assert rows_of(split.train) == [parts[0][str(user)] for user in range(data.n_users)]


@needs_data
@pytest.mark.parametrize("name, size, text, root", [
    ("lcrec/Scientific", (8_317, 4_344, 58_492), 1., "Industrial & Scientific"),
    ("lcrec/Office2014", (4_905, 2_420, 53_258), 1., "Office Products"),
    ("lcrec/Games", (50_546, 16_859, 452_989), .9992, "Video Games")])
def test_lcrec_facts(name, size, text, root):
    data = load_dataset(name)
    facts = data.statistics()
    assert (facts.users, facts["items"], facts.events) == size
    assert facts.repeats == 0 and data.sequences.lengths.min() == 5
    assert round(facts.text_coverage, 4) == text and not data.catalogue.table["title"].str.contains("&amp;").any()
    assert set(data.catalogue.category_path(1)) <= {root, ""}
    assert max(map(len, data.catalogue.table["category"])) <= (5 if name == "lcrec/Games" else 16)


@needs_data
def test_large_facts_and_speed():
    begin = time.perf_counter()
    data = load_dataset("large")
    assert time.perf_counter() - begin < 60
    assert (data.n_users, data.n_items, data.n_events) == (227_370, 157_529, 2_613_264)
    assert data.catalogue.has_text.all() and not data.catalogue.has_category.any()
    one = load_dataset("large/food")
    rows = np.flatnonzero(np.char.startswith(data.users, "food:"))
    first = np.flatnonzero(data.catalogue.table["item"].str.startswith("food:"))[0]
    assert (data.sequences.take(rows).items - first == one.sequences.items).all()
    with pytest.raises(ValueError, match="give one of"): load_dataset("large/nothing")


@needs_data
def test_all_statistics_in_one_table():
    table = statistics_table(map(load_dataset, [*READERS, "ml-100k"]))
    assert table.shape == (len(READERS) + 1, 10) and table["events"].dtype == np.int64
    assert table["text_coverage"].between(.9, 1).all()
