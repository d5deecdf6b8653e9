"RecTools' BERT4Rec on the arguments of flare.benchmark; run it with the Python of .peers/rectools."
import time
import warnings

import numpy as np
import pandas as pd
import torch
from peer import Watch, arguments, say
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import BERT4RecModel

warnings.filterwarnings("ignore")
asked = arguments(__doc__)
torch.set_num_threads(asked.threads)
torch.manual_seed(asked.seed)
events = pd.read_csv(asked.csv).sort_values(["user", "timestamp"], kind="stable")
events = events.rename(columns={"user": Columns.User, "item": Columns.Item, "timestamp": Columns.Datetime})
events[Columns.Weight], events[Columns.Datetime] = 1.0, pd.to_datetime(events[Columns.Datetime], unit="s")
back = events.groupby(Columns.User).cumcount(ascending=False)  # 0 is the last event, the test item; 1 the validation item
train = Dataset.construct(events[back >= 2])
watch = Watch(asked.max_steps)


def ranked(known, target):
    "Recall@10 and nDCG@10 of one target a user, the catalogue ranked after what is known of them; users it cannot serve miss."
    found = model.recommend(users=target[Columns.User].to_numpy(), dataset=Dataset.construct(known), k=10, filter_viewed=False,
                            on_unsupported_targets="ignore")
    hit = found.merge(target[[Columns.User, Columns.Item]], on=[Columns.User, Columns.Item])
    return len(hit) / len(target), float((1 / np.log2(hit[Columns.Rank] + 1)).sum() / len(target))


class Clock(Callback):
    "Times steps and epochs."

    def on_train_epoch_start(self, trainer, module):
        self.before = watch.seconds
        watch.epoch_steps = trainer.num_training_batches
        watch.start()

    def on_train_batch_end(self, *given): watch.lap(1)

    def on_train_epoch_end(self, trainer, module):
        watch.lap()
        if watch.steps % watch.epoch_steps == 0: watch.epochs.append(watch.seconds - self.before)


def lightning(**_):
    "A trainer that writes nothing and times itself."
    return Trainer(max_epochs=1 if asked.validate else asked.epochs, max_steps=asked.max_steps or -1, accelerator="cpu", devices=1, logger=False,
                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Clock()])


model = BERT4RecModel(n_factors=asked.hidden_size, n_blocks=asked.layers, n_heads=asked.heads, session_max_len=asked.max_len,
                      batch_size=asked.batch_size, mask_prob=asked.mask, dropout_rate=asked.dropout, lr=asked.lr, loss="softmax",
                      epochs=asked.epochs, dataloader_num_workers=0, deterministic=False, recommend_batch_size=256,
                      recommend_torch_device="cpu", get_trainer_func=lightning)
if not asked.validate: model.fit(train)
for epoch in range(asked.epochs if asked.validate else 0):
    model.fit(train) if epoch == 0 else model.fit_partial(train, min_epochs=1, max_epochs=1)
    watch.history.append({"seconds": round(watch.seconds, 3), "ndcg@10": ranked(events[back >= 2], events[back == 1])[1]})
users = events[Columns.User].unique()[: asked.eval_users]
chosen = events[Columns.User].isin(users)
start = time.perf_counter()
recall, ndcg = ranked(events[chosen & (back >= 1)], events[chosen & (back == 0)])
say("rectools", watch, watch.epoch_steps, items=events[Columns.Item].nunique(), users=events[Columns.User].nunique(),
    eval_s=round(time.perf_counter() - start, 4), eval_users=len(users), **{"recall@10": round(recall, 5), "ndcg@10": round(ndcg, 5)})
