"""Train a network on the lake's labels: snapshot → loader → loop → run log. Entry points: `job.run`, `job.sweep`.

`loop` and what it imports is torch alone; `task` is what training processes run, without Spark and MLflow.
"""
