"RecBole's BERT4Rec on the arguments of flare.benchmark; run it with the Python of .peers/recbole."
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from peer import Limit, Watch, arguments, say
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

asked = arguments(__doc__)
folder = TemporaryDirectory()
events = pd.read_csv(asked.csv, dtype={"user": str, "item": str})
events.columns = ["user_id:token", "item_id:token", "timestamp:float"]
(Path(folder.name) / "events").mkdir()
events.to_csv(Path(folder.name) / "events/events.inter", sep="\t", index=False)
sys.argv = sys.argv[:1]  # RecBole would read ours
config = Config(model="BERT4Rec", dataset="events", config_dict={
    "data_path": folder.name, "checkpoint_dir": folder.name, "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "train_neg_sample_args": None, "hidden_size": asked.hidden_size, "n_layers": asked.layers, "n_heads": asked.heads,
    "inner_size": asked.ffn, "hidden_dropout_prob": asked.dropout, "attn_dropout_prob": asked.dropout, "mask_ratio": asked.mask,
    "MAX_ITEM_LIST_LENGTH": asked.max_len, "loss_type": "CE", "train_batch_size": asked.batch_size, "eval_batch_size": 256,
    "learning_rate": asked.lr, "epochs": asked.epochs, "metrics": ["Recall", "NDCG"], "topk": [10], "valid_metric": "NDCG@10",
    "seed": asked.seed, "use_gpu": False, "show_progress": False, "state": "ERROR", "metrics_decimal_place": 5})
init_seed(config["seed"], config["reproducibility"])
torch.set_num_threads(asked.threads)
dataset = create_dataset(config)
train, valid, test = data_preparation(config, dataset)
model = get_model(config["model"])(config, train.dataset)
trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
watch, step = Watch(asked.max_steps), trainer.optimizer.step


def counted(*given, **named):
    "A step, counted."
    step(*given, **named)
    watch.lap(1)
    if watch.steps == watch.max_steps: raise Limit


trainer.optimizer.step = counted
try:
    for epoch in range(asked.epochs):
        before = watch.seconds
        watch.start()
        trainer._train_epoch(train, epoch)
        watch.lap()
        watch.epochs.append(watch.seconds - before)
        if asked.validate:
            watch.history.append({"seconds": round(watch.seconds, 3),
                                  "ndcg@10": float(trainer.evaluate(valid, load_best_model=False)["ndcg@10"])})
except Limit: pass
start = time.perf_counter()
found = trainer.evaluate(test, load_best_model=False)  # for all users, whatever --eval-users says
say("recbole", watch, len(train), items=dataset.item_num - 1, users=dataset.user_num - 1, eval_s=round(time.perf_counter() - start, 4),
    eval_users=len(test.dataset), **{"recall@10": float(found["recall@10"]), "ndcg@10": float(found["ndcg@10"])})
