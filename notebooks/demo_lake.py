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
# the test files of the pydicom package. Everything here is the library's; nothing is defined.

# %%
import html
from dataclasses import asdict

import pandas as pd
from IPython.display import HTML
from pyspark.sql import functions as F

from cbmir_spark import config, storage
from cbmir_spark.cli import demo
from cbmir_spark.lake import columns as cols
from cbmir_spark.lake import delta, publication, schemas
from cbmir_spark.lake.paths import LakePaths
from cbmir_spark.retrieval import job as retrieval_job
from cbmir_spark.spark import session
from cbmir_spark.storage import ObjectStore

# %%
defaults = config.load()
settings = demo.inside(defaults, storage.canonical(str(config.conf_folder().parent / defaults.demo.folder)))
spark = session.build(settings, "notebook")
lake = LakePaths.of(settings.lake)
pinned = publication.require_published(spark, lake)
asdict(pinned)

# %% [markdown]
# ## What was ingested
#
# SOURCES has one row for each object of the archive, and each has one outcome.

# %%
sources = delta.read(spark, lake.path(schemas.SOURCES), pinned.sources)
sources.groupBy(cols.OUTCOME).agg(F.count("*").alias("objects")).orderBy(F.desc("objects")).toPandas()

# %% [markdown]
# Raw modalities and body parts become terms of a closed vocabulary, or UNKNOWN. Only images are trained on and
# searched: localizers and screens are kept, and kept out.

# %%
tags = delta.read(spark, lake.path(schemas.TAGS), pinned.tags)
tags.groupBy(cols.BODY_PART).pivot(cols.MODALITY).count().orderBy(cols.BODY_PART).toPandas().set_index(
    cols.BODY_PART
).fillna(0).astype(int)

# %%
tags.groupBy(cols.KIND, cols.TRANSFER_SYNTAX).count().orderBy(cols.KIND, F.desc("count")).toPandas()

# %% [markdown]
# ## What was not, and why
#
# A reason for each object that gave no image, with one example. The names of objects may tell identities: SOURCES lives
# in the vault, and so a notebook that shows it belongs there too.

# %%
example = F.min(F.expr(f"substring_index({cols.URI}, '/archive/', -1)")).alias("for example")
sources.where(F.col(cols.OUTCOME) != cols.INGESTED).groupBy(cols.OUTCOME, cols.REASON).agg(
    F.count("*").alias("objects"), example
).orderBy(cols.OUTCOME, F.desc("objects")).toPandas()

# %% [markdown]
# ## A query list
#
# Files of patients that training never saw, one image by its pseudonym, and one file that is not there.

# %%
queries = pd.read_csv(storage.local_path(settings.retrieval.queries))
queries.assign(uri=queries[cols.URI].str.replace(r".*/archive/", "", regex=True))

# %%
report = retrieval_job.run(spark, settings)
asdict(report)

# %% [markdown]
# As many statuses come out as queries went in. `partitions` are what was searched: with a prefilter, a few of many.

# %%
pd.read_parquet(storage.local_path(storage.join(report.out, schemas.RESULTS_STATUSES.name))).sort_values(cols.QUERY_ID)

# %%
hits = pd.read_parquet(storage.local_path(storage.join(report.out, schemas.RESULTS_HITS.name)))
hits.sort_values([cols.QUERY_ID, cols.RANK])[
    [
        cols.QUERY_ID,
        cols.RANK,
        cols.DISTANCE,
        cols.MODALITY,
        cols.BODY_PART,
        cols.SEX,
        cols.AGE_YEARS,
        cols.IMAGE_ID,
        cols.FRAME,
    ]
].head(20)

# %% [markdown]
# The gallery that the job wrote: the query on the left, its hits by rank on the right. Pictures that may carry
# burned-in text are withheld.

# %%
page = ObjectStore(settings.storage).read_bytes(report.gallery).decode()
HTML(f'<div><iframe srcdoc="{html.escape(page)}" width="100%" height="900"></iframe></div>')

# %%
spark.stop()
