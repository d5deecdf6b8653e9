"The arguments of flare.benchmark and its JSON line, for libraries that live in an environment of their own."
import argparse
import json
import time
from pathlib import Path


def arguments(description):
    "The arguments that all systems share."
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--csv", required=True)
    for name, default in (("hidden-size", 64), ("layers", 2), ("heads", 2), ("ffn", 256), ("max-len", 50), ("batch-size", 256),
                          ("epochs", 1), ("threads", 2), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("mask", 0.2), ("dropout", 0.2), ("lr", 1e-3)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--eval-users", type=int)
    parser.add_argument("--validate", action="store_true")
    return parser.parse_args()


class Limit(Exception):
    "Raised when the steps that were asked for are done."


class Watch:
    "Seconds of the steps and of the whole epochs."

    def __init__(self, max_steps):
        self.max_steps, self.steps, self.seconds, self.epochs, self.history = max_steps, 0, 0.0, [], []
        self.warm, self.warmed = min(10, (max_steps or 0) // 4), 0.0  # steps that are in no rate, as in flare.benchmark, and their seconds

    def start(self):
        self.clock = time.perf_counter()

    def lap(self, steps=0):
        "Add the time since `start`, and start again."
        self.seconds += time.perf_counter() - self.clock
        self.steps += steps
        if steps and self.steps == self.warm: self.warmed = self.seconds
        self.start()

    def epoch_s(self, epoch_steps):
        "Median of the whole epochs; without one, the steps made stand for the others."
        if self.epochs: return sorted(self.epochs)[len(self.epochs) // 2]
        return (self.seconds - self.warmed) / (self.steps - self.warm) * epoch_steps


def peak_mb():
    "Most memory that this process has had at once, in MiB."
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10


def say(system, watch, epoch_steps, **line):
    "Print the JSON line."
    print(json.dumps({"system": system, "model": "bert4rec", "epoch_s": round(watch.epoch_s(epoch_steps), 4), "steps": watch.steps,
                      "epoch_steps": epoch_steps, "train_s": round(watch.seconds, 3),
                      "peak_mb": round(peak_mb(), 1), **line, **({"history": watch.history} if watch.history else {})}))
