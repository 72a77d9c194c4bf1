"""Trackers: TensorBoard, Weights & Biases and MLflow are given what metrics.jsonl has, by a process of their own.

needed.py    whether each can work, asked before a run starts
lines.py     a line of metrics.jsonl as numbers and words
kept.py      trackers.json: whose run it is there, and how far it has been told
following.py the process, from the first rank's side: `python -m launcher.train.trackers.follow RUN`
follow.py    the process itself, a thread a tracker
tensorboard.py wandb.py mlflow.py  one each

metrics.jsonl is the truth. Whatever a tracker has missed, because its server was gone or a machine went down, it is
given when it answers again, at the latest with the run's next start.
"""
