"""Data for training and evaluation: where examples come from and how they become batches.

- `sources`: digits, 2-D toys, `.npz` files, image folders, prepared data, tfds; functions that return a `Source`.
- `preparation`: raw files into prepared data (`prepared`, `manifest`), which are read from disk: `jaxdiff data`.
- `pipeline`: shuffled, resumable training batches (grain), padded evaluation batches, the fingerprint of a run's data.
- `text`: captions as bytes and back.
- `transforms`: pure JAX functions for the jitted step and for pictures.

Import the modules themselves; this package imports nothing, so that grain loads only where training needs it.
"""
