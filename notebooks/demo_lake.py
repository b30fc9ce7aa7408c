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

from cbmir_spark import config, demo, retrieval, session, storage
from cbmir_spark import tables as t

# %%
defaults = config.load()
settings = demo.inside(defaults, storage.canonical(str(config.conf_folder().parent / defaults.demo.folder)))
spark = session.build(settings, "notebook")
lake = t.Lake.of(settings)
pinned = t.require_published(spark, lake)
asdict(pinned)

# %% [markdown]
# ## What was ingested
#
# SOURCES has one row for each object of the archive, and each has one outcome.

# %%
sources = t.read(spark, lake.path(t.SOURCES), pinned.sources)
sources.groupBy(t.OUTCOME).agg(F.count("*").alias("objects")).orderBy(F.desc("objects")).toPandas()

# %% [markdown]
# Raw modalities and body parts become terms of a closed vocabulary, or UNKNOWN. Only images are trained on and
# searched: localizers and screens are kept, and kept out.

# %%
tags = t.read(spark, lake.path(t.TAGS), pinned.tags)
tags.groupBy(t.BODY_PART).pivot(t.MODALITY).count().orderBy(t.BODY_PART).toPandas().set_index(t.BODY_PART).fillna(
    0
).astype(int)

# %%
tags.groupBy(t.KIND, t.TRANSFER_SYNTAX).count().orderBy(t.KIND, F.desc("count")).toPandas()

# %% [markdown]
# ## What was not, and why
#
# A reason for each object that gave no image, with one example. The names of objects may tell identities: SOURCES lives
# in the vault, and so a notebook that shows it belongs there too.

# %%
example = F.min(F.expr(f"substring_index({t.URI}, '/archive/', -1)")).alias("for example")
sources.where(F.col(t.OUTCOME) != t.INGESTED).groupBy(t.OUTCOME, t.REASON).agg(
    F.count("*").alias("objects"), example
).orderBy(t.OUTCOME, F.desc("objects")).toPandas()

# %% [markdown]
# ## A query list
#
# Files of patients that training never saw, one image by its pseudonym, and one file that is not there.

# %%
queries = pd.read_csv(storage.local_path(settings.retrieval.queries))
queries.assign(uri=queries[t.URI].str.replace(r".*/archive/", "", regex=True))

# %%
report = retrieval.run(spark, settings)
asdict(report)

# %% [markdown]
# As many statuses come out as queries went in. `partitions` are what was searched: with a prefilter, a few of many.

# %%
pd.read_parquet(storage.local_path(storage.join(report.out, t.RESULTS_STATUSES.name))).sort_values(t.QUERY_ID)

# %%
hits = pd.read_parquet(storage.local_path(storage.join(report.out, t.RESULTS_HITS.name)))
hits.sort_values([t.QUERY_ID, t.RANK])[
    [t.QUERY_ID, t.RANK, t.DISTANCE, t.MODALITY, t.BODY_PART, t.SEX, t.AGE_YEARS, t.IMAGE_ID, t.FRAME]
].head(20)

# %% [markdown]
# The gallery that the job wrote: the query on the left, its hits by rank on the right. Pictures that may carry
# burned-in text are withheld.

# %%
page = storage.read_bytes(report.gallery, settings.storage).decode()
HTML(f'<div><iframe srcdoc="{html.escape(page)}" width="100%" height="900"></iframe></div>')

# %%
spark.stop()
