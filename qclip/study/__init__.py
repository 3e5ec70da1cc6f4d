"""A grid of measurements, declared in a file: models x recipes x data, each cell computed once and kept in a store.

A *plan* (`plan.py`) is the file. Its *cells* (`cells.py`) are one variant of a model under one condition each, with a
hash of all that their values depend on; `measure.py` computes some of them with the functions of `qclip evaluate`, and
`store.py` keeps what was measured as a Parquet data set.
"""
