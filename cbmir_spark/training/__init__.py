"""Train the network on the lake's labels: snapshot → loader → loop → run log. Entry points: `job.run`, `job.sweep`."""
