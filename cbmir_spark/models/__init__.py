"""Networks, their files, and the registry that names them. Without Spark.

`artifact` and `embed` load a model and apply it; `registry.Registry` finds and registers models.
"""
