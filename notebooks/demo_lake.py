# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What a lake holds, and what a query list finds
#
# Over the demo's lake: run `make demo` first, then `make notebook`. Its images are phantoms drawn by a program, beside
# the test files of the pydicom package. Everything here goes through the Python API.

# %%
import os

import pandas as pd
from pyspark.sql import functions as F

import cbmir_spark as cbmir

# %%
folder = os.environ.get("CBMIR_DEMO__FOLDER", "../demo")
lake = cbmir.open(f"{folder}/lake", ingest={"archive": f"{folder}/archive"})
lake

# %% [markdown]
# ## What was ingested
#
# SOURCES has one row per object of the archive, and each has one outcome.

# %%
lake.sources.groupBy("outcome").agg(F.count("*").alias("objects")).orderBy(F.desc("objects")).toPandas()

# %% [markdown]
# Raw modalities and body parts become terms of a closed vocabulary, or UNKNOWN. Only images are trained on and
# searched; localizers and screens stay in TAGS.

# %%
lake.tags.groupBy("body_part").pivot("modality").count().orderBy("body_part").toPandas().set_index("body_part").fillna(
    0
).astype(int)

# %%
lake.tags.groupBy("kind", "transfer_syntax").count().orderBy("kind", F.desc("count")).toPandas()

# %% [markdown]
# ## What was not, and why
#
# A reason for each object that gave no image, with one example. Names of objects may identify people: SOURCES is in the
# vault, and a notebook that shows it belongs there too.

# %%
example = F.min(F.expr("substring_index(uri, '/archive/', -1)")).alias("for example")
lake.sources.where("outcome != 'ingested'").groupBy("outcome", "reason").agg(
    F.count("*").alias("objects"), example
).orderBy("outcome", F.desc("objects")).toPandas()

# %% [markdown]
# ## A query list
#
# Files of patients that training never saw, one image by its id, and one file that does not exist.

# %%
queries = pd.read_csv(f"{folder}/queries.csv")
queries.assign(uri=queries["uri"].str.replace(r".*/archive/", "", regex=True))

# %%
answer = lake.search(queries)
answer.report

# %% [markdown]
# There is one status per query. `partitions` are those searched: with a prefilter, a few of many.

# %%
answer.statuses.orderBy("query_id").toPandas()

# %%
answer.hits.orderBy("query_id", "rank").select(
    "query_id", "rank", "distance", "modality", "body_part", "sex", "age_years", "image_id", "frame"
).limit(20).toPandas()

# %% [markdown]
# An answer shows its gallery: each query on the left, its hits by rank on the right. Pictures that may carry burned-in
# text are withheld.

# %%
answer

# %% [markdown]
# The same images by their ids, with other settings for this one search.

# %%
ids = [row["image_id"] for row in answer.hits.select("image_id").distinct().limit(3).collect()]
lake.search(ids, k=3, prefilter="none", gallery=0).hits.toPandas()

# %%
lake.close()
